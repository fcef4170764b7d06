"""launcher=slurm, through submitit's executor for this machine; and what a real SLURM would be asked for."""

import os
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from sweeping import Notes, starts, trivial

from lightning_ntk.errors import ConfigError
from lightning_ntk.running.results import read_results
from lightning_ntk.settings.config import conf_folder
from lightning_ntk.sweep.command import JobList
from lightning_ntk.sweep.job import Needs
from lightning_ntk.sweep.launchers.slurm import SlurmLauncher, rank_variables
from lightning_ntk.sweep.runner import Runner
from lightning_ntk.sweep.settings import SlurmSettings

LOCAL = SlurmSettings(cluster="local", cpus=1)


@pytest.fixture(autouse=True)
def _path(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(conf_folder().parent))


def test_jobs_run_through_submitit_with_one_task_for_each_device(tmp_path):
    jobs = [
        trivial("good", tmp_path, "seed=3", cpu=True),
        trivial("bad", tmp_path, "fail_at=0", cpu=True),
        trivial("two", tmp_path, "seed=4", devices=2, cpu=True),
    ]
    launcher = SlurmLauncher([job.needs for job in jobs], None, LOCAL, tmp_path)
    states = Runner(JobList(jobs), launcher, Notes()).run()
    assert [states[job.name].status for job in jobs] == ["done", "failed", "done"]
    assert states["bad"].error == "ArithmeticError: diverged at step 0"
    assert states["bad"].attempts == 1
    assert read_results(jobs[0].folder).seed == 3
    assert [line[2] for line in starts(jobs[0])] == ["-"], "a job of one process needs no rank"
    assert sorted(line[2] for line in starts(jobs[2])) == ["0", "1"]


def test_a_preempted_job_goes_back_into_the_queue_and_on_from_its_checkpoint(tmp_path):
    job = trivial("a", tmp_path, "steps=4", "stall_at=2", cpu=True)

    class Preempting(Notes):
        done = False

        def look(self, running):
            if (job.folder / "checkpoints" / "last.ckpt").exists() and not self.done:
                self.done = True
                training = starts(job)[0][1]
                task = Path(f"/proc/{training}/stat").read_text().rpartition(")")[2].split()[1]
                os.kill(int(task), signal.SIGUSR2)  # As SLURM does before it takes the machine.

    board = Preempting()
    launcher = SlurmLauncher([job.needs], None, LOCAL, tmp_path)
    states = Runner(JobList([job]), launcher, board).run()
    assert board.done
    assert (states["a"].status, states["a"].attempts) == ("done", 1), "SLURM's queue took it up, not the sweep"
    first, second = starts(job)
    assert first[0] == "0"
    assert int(second[0]) > 0


def test_stopping_a_sweep_cancels_its_jobs(tmp_path):
    job = trivial("a", tmp_path, "stall_at=0", cpu=True)

    class Interrupting(Notes):
        def look(self, running):
            if starts(job):
                raise KeyboardInterrupt

    launcher = SlurmLauncher([job.needs], None, LOCAL, tmp_path)
    with pytest.raises(KeyboardInterrupt):
        Runner(JobList([job]), launcher, Interrupting()).run()
    deadline = time.monotonic() + 280
    while time.monotonic() < deadline:
        try:
            os.kill(int(starts(job)[0][1]), 0)
        except ProcessLookupError:
            return
        time.sleep(0.05)
    raise AssertionError("the job is still at work")


def test_the_ranks_of_several_nodes_meet_on_the_first_at_a_port_of_the_job(tmp_path):
    environment = SimpleNamespace(
        num_tasks=4, num_nodes=2, node=1, local_rank=0, job_id="12345_7", hostnames=["first", "second"]
    )
    job = trivial("a", tmp_path, devices=2)
    expected = {
        "LOCAL_RANK": "0",
        "NODE_RANK": "1",
        "MASTER_ADDR": "first",
        "MASTER_PORT": str(20_000 + 123457 % 20_000),
        "LIGHTNING_NTK_RUN_FOLDER": str(job.folder),
    }
    assert rank_variables(environment, job) == expected
    environment.num_nodes, environment.node = 1, 0
    assert rank_variables(environment, job) == expected | {"NODE_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    environment.num_tasks = 1
    assert rank_variables(environment, job) == {}


def test_what_slurm_is_asked_for(tmp_path):
    settings = SlurmSettings("slurm", "gpu", "mine", minutes=60, cpus=8, mem_gb=32, extra={"qos": "high"})
    launcher = SlurmLauncher.__new__(SlurmLauncher)
    launcher.settings, launcher.slots = settings, 16
    assert launcher.parameters(Needs(devices=4, nodes=2)) == {
        "name": "lightning_ntk",
        "nodes": 2,
        "tasks_per_node": 4,
        "gpus_per_node": 4,
        "cpus_per_task": 8,
        "timeout_min": 60,
        "mem_gb": 32,
        "slurm_partition": "gpu",
        "slurm_account": "mine",
        "slurm_additional_parameters": {"qos": "high"},
        "slurm_array_parallelism": 16,
    }
    assert launcher.parameters(Needs(cpu=True))["gpus_per_node"] == 0


def test_a_machine_without_slurm_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"launcher=slurm: .*SLURM cluster"):
        SlurmLauncher([Needs()], None, SlurmSettings(), tmp_path)
    with pytest.raises(ConfigError, match=r"slurm\.cluster must be slurm or local"):
        SlurmLauncher([Needs()], None, SlurmSettings(cluster="x"), tmp_path)
    with pytest.raises(ConfigError, match="must be a number under launcher=slurm"):
        SlurmLauncher([Needs(devices=0)], None, LOCAL, tmp_path)


def test_a_job_may_meet_its_time_limit_again_and_again(tmp_path, monkeypatch):
    tool = tmp_path / "srun"  # By which submitit knows a cluster.
    tool.write_text("#!/bin/sh\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    launcher = SlurmLauncher([Needs()], None, SlurmSettings(), tmp_path)
    assert launcher.executor._executor.max_num_timeout >= 1000
