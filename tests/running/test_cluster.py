"""Jobs of a cluster: ranks that start by themselves, requeueing by SLURM's signal, and ranks that are killed."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from ports import free_port
from test_resume import check_equal, parameters
from test_train import TINY_SINE, run

from lightning_ntk import evaluate, train
from lightning_ntk.errors import ConfigError
from lightning_ntk.methods.base import MetaLearner
from lightning_ntk.running import cluster
from lightning_ntk.running.results import read_results
from lightning_ntk.settings.config import conf_folder

SLURM = {
    "SLURM_JOB_ID": "4711",
    "SLURM_JOB_NAME": "study",
    "SLURM_NTASKS": "1",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
    "SLURM_NODELIST": "127.0.0.1",
}
LONG = [*TINY_SINE, "steps=4000", "val_every=4", "data.tasks_per_step=4"]


STARTED = []


@pytest.fixture(autouse=True)
def _nothing_stays():
    """A test that fails leaves no process to the others."""
    yield
    while STARTED:
        process = STARTED.pop()
        process.kill()
        process.wait()
        process.stderr.close()


def start(*words, **variables):
    """`lightning-ntk train` in a process of its own."""
    paths = os.pathsep.join([str(conf_folder().parent), str(Path(__file__).parents[1])])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **variables}
    command = [sys.executable, "-W", "ignore", "-m", "lightning_ntk.cli", "train", *words]
    STARTED.append(
        subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    )
    return STARTED[-1]


def end(process, seconds=280):
    """The exit status of a process, and what it wrote to stderr."""
    _, error = process.communicate(timeout=seconds)
    return process.returncode, error


def wait_for(condition, process, seconds=280):
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.02)


def children(pid):
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def is_alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.fixture
def requeues(tmp_path, monkeypatch):
    """A stand-in for SLURM's `scontrol`, which leaves what it was asked."""
    (tmp_path / "bin").mkdir()
    tool = tmp_path / "bin" / "scontrol"
    tool.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/requeued\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    return tmp_path / "requeued"


def test_a_preempted_slurm_job_is_requeued_and_ends_as_one_that_was_not(requeues):
    settings = [*TINY_SINE, "steps=12", "val_every=4", "+callbacks.halt={_target_:halting.Halt}"]
    run(*settings, folder="whole")
    job = start(*settings, **SLURM, HALT="yes")
    folder = Path("runs/sinusoid_meta_rkhs_ii_seed0_slurm4711")
    wait_for((folder / "checkpoints/last.ckpt").exists, job)
    job.send_signal(signal.SIGUSR1)
    wait_for(lambda: requeues.exists() and requeues.read_text(), job)  # The shell makes the file before it writes.
    assert requeues.read_text() == "requeue 4711\n"
    job.kill()  # As SLURM does.
    end(job)
    assert torch.load(folder / "checkpoints/last.ckpt", weights_only=True)["global_step"] in (4, 8)
    again = start(*settings, **SLURM, SLURM_RESTART_COUNT="1")
    status, error = end(again)
    assert status == 0, error
    check_equal("whole", folder)
    assert len(list(Path("runs").iterdir())) == 1


@pytest.mark.parametrize("command", ["train", "evaluate"])
def test_a_signal_during_a_test_requeues_the_job_and_saves_nothing_of_lightnings(command, requeues, monkeypatch):
    run(*TINY_SINE)
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    collect, signals = MetaLearner._collect, []

    def once(self, episodes):
        if not signals:
            signals.append(signal.SIGUSR1)
            assert signal.getsignal(signal.SIGUSR1) is not signal.SIG_DFL, "the signal would end this process"
            assert not self.trainer._accelerator_connector.cluster_environment.auto_requeue
            signal.raise_signal(signal.SIGUSR1)
        collect(self, episodes)

    monkeypatch.setattr(MetaLearner, "_collect", once)
    train.main(["ckpt=run"]) if command == "train" else evaluate.main(["run=run", "name=it"])
    assert signals
    assert requeues.read_text() == "requeue 4711\n"
    assert not list(Path.cwd().rglob("hpc_ckpt*"))


def test_a_checkpoint_of_lightnings_requeueing_that_lies_around_is_not_loaded(monkeypatch):
    whole = run(*TINY_SINE, folder="whole")
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    Path("hpc_ckpt_1.ckpt").write_bytes(b"of another program")
    assert run(*TINY_SINE).episodes == whole.episodes
    evaluate.main(["run=run", "name=it"])
    assert read_results(Path("run/evaluations/it")).episodes == whole.episodes


def test_a_job_that_began_from_a_checkpoint_goes_on_with_its_own(monkeypatch, capsys):
    run(*TINY_SINE, folder="first")
    Path("first/checkpoints/last.ckpt").rename("taken.ckpt")
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    words = ["ckpt=taken.ckpt", "steps=4", "seed=0"]
    for count, finished in (("0", False), ("1", True)):
        monkeypatch.setenv("SLURM_RESTART_COUNT", count)
        train.main(words)
        assert ("has finished its 4 steps" in capsys.readouterr().out) == finished
    assert [path.name for path in Path("runs").iterdir()] == ["sinusoid_meta_rkhs_ii_seed0_slurm4711"]
    Path("runs/sinusoid_meta_rkhs_ii_seed0_slurm4711/checkpoints/last.ckpt").unlink()
    train.main(words)  # Stopped before a checkpoint of its own: from the given one again.
    assert "has finished" not in capsys.readouterr().out


def test_without_scontrol_a_signal_does_not_end_the_training(tmp_path, monkeypatch, capfd):
    for name, value in {**SLURM, "PATH": str(tmp_path)}.items():
        monkeypatch.setenv(name, value)
    before = signal.getsignal(signal.SIGUSR1)
    with cluster.requeued_on_signal(Path("run")):
        os.kill(os.getpid(), signal.SIGUSR1)
    assert "scontrol cannot be run (No such file or directory): submit the job again" in capfd.readouterr().err
    assert signal.getsignal(signal.SIGUSR1) == before


def test_ranks_that_slurm_starts_share_a_folder_and_the_work():
    settings = [*TINY_SINE, "data.tasks_per_step=4", "trainer.precision=64-true", "method.rank_tolerance=1e-13"]
    run(*settings, folder="one")
    two = {**SLURM, "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2", "MASTER_PORT": free_port()}
    ranks = [
        start(*settings, "trainer.devices=2", **(two | {"SLURM_PROCID": r, "SLURM_LOCALID": r})) for r in ("0", "1")
    ]
    ended = [end(rank) for rank in ranks]
    assert [status for status, _ in ended] == [0, 0], ended
    (folder,) = Path("runs").iterdir()
    assert all(
        torch.allclose(value, parameters(folder)[key], rtol=1e-6, atol=1e-9) for key, value in parameters("one").items()
    )
    assert read_results(folder).episode_ids == read_results(Path("one")).episode_ids


def test_a_restarted_job_without_a_checkpoint_begins_anew(monkeypatch):
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    train.main([*TINY_SINE, "test=false", "run_dir=job"])
    with pytest.raises(ConfigError, match=r"run_dir=job already holds a run"):
        train.main([*TINY_SINE, "run_dir=job"])
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    Path("job/checkpoints/last.ckpt").unlink()
    train.main([*TINY_SINE, "run_dir=job"])
    assert read_results(Path("job")).metrics["test/mse"] > 0


def test_torchrun_needs_a_name_for_the_folder(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    with pytest.raises(ConfigError, match=r"set run_dir=FOLDER, or give torchrun an --rdzv-id"):
        cluster.job_name()
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "study")
    assert cluster.job_name() == "torchrun-study"


@pytest.mark.parametrize("name", ["SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT"])
def test_a_restart_is_told_by_the_count_of_slurm_or_torchrun(name, monkeypatch):
    assert not cluster.is_restarted()
    for count, restarted in (("", False), ("0", False), ("1", True), ("12", True)):
        monkeypatch.setenv(name, count)
        assert cluster.is_restarted() == restarted


def test_the_first_of_the_ranks_owns_the_folder(monkeypatch):
    assert cluster.is_first()
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("LIGHTNING_NTK_RUN_FOLDER", "run")  # As Lightning's first process sets it for the others.
    assert cluster.is_child()
    assert not cluster.is_first()
    for cluster_variables, rank in ((SLURM, "SLURM_PROCID"), ({"TORCHELASTIC_RUN_ID": "study"}, "RANK")):
        with monkeypatch.context() as patch:
            for name, value in cluster_variables.items():
                patch.setenv(name, value)
            assert not cluster.is_child()
            for number in ("0", "1"):
                patch.setenv(rank, number)
                assert cluster.is_first() == (number == "0")


def test_a_task_of_a_job_array_is_requeued_by_both_numbers(monkeypatch):
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    assert cluster.slurm_job() == "4711"
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "4700")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    assert cluster.job_name() == "slurm4700_3"
    monkeypatch.setenv("SLURM_JOB_NAME", "interactive")
    assert cluster.job_name() is None


@pytest.mark.parametrize("victim", ["first", "second"])
def test_when_a_rank_is_killed_none_stays_and_the_run_can_go_on(victim):
    settings = [*LONG, "trainer.devices=2"]
    job = start(*settings, "run_dir=run")
    wait_for(Path("run/checkpoints/last.ckpt").exists, job)
    (second,) = (pid for pid in children(job.pid) if b"lightning_ntk" in Path(f"/proc/{pid}/cmdline").read_bytes())
    os.kill(job.pid if victim == "first" else second, signal.SIGKILL)
    assert end(job)[0] != 0
    deadline = time.monotonic() + 280
    while is_alive(second) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_alive(second), "a rank outlived the run"
    assert not Path("run/results.json").exists()
    reached = torch.load("run/checkpoints/last.ckpt", weights_only=True)["global_step"]
    assert reached < 4000
    if victim == "second":  # What is left is the same, whoever was killed; once is enough.
        runs = [start("ckpt=run", f"steps={reached + 4}"), start(*settings, f"steps={reached + 4}", "run_dir=whole")]
        ended = [end(process) for process in runs]
        assert [status for status, _ in ended] == [0, 0], ended
        check_equal("whole", "run")


def test_a_job_of_more_tasks_than_a_node_is_told_of_is_refused(monkeypatch):
    for name, value in {**SLURM, "SLURM_NTASKS": "2"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=r"`--ntasks=2`.*Use `--ntasks-per-node=2` instead"):
        train.main([*TINY_SINE, "trainer.devices=2"])
    assert not Path("runs").exists()


PARENT = """
import subprocess, sys
child = (
    "import time; from lightning_ntk.running.cluster import die_with_parent\\n"
    "die_with_parent(); print(1, flush=True); time.sleep(90)"
)
process = subprocess.Popen([sys.executable, "-c", child], stdout=subprocess.PIPE)
process.stdout.readline()
print(process.pid, flush=True)
process.wait()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a process with its parent")
def test_a_rank_ends_with_its_parent_whatever_it_is_at():
    parent = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True)
    child = int(parent.stdout.readline())
    assert is_alive(child)
    parent.kill()
    parent.communicate()
    deadline = time.monotonic() + 280
    while is_alive(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_alive(child)
