"""The loop, with real processes that do nothing: failures, kills, resuming, stopping, and what the folders keep."""

import dataclasses
import os
import signal
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from sweeping import PROGRAM, Notes, run_locally, starts, trivial

from lightning_ntk.errors import ConfigError
from lightning_ntk.running.lock import LOCK_FILE, is_locked
from lightning_ntk.running.results import SCHEMA_VERSION, read_results
from lightning_ntk.settings.config import conf_folder
from lightning_ntk.sweep import job as job_module
from lightning_ntk.sweep.command import JobList
from lightning_ntk.sweep.job import read_state, write_state
from lightning_ntk.sweep.launchers.local import LocalLauncher, visible_gpus
from lightning_ntk.sweep.plan import begins_anew, start_anew, to_run
from lightning_ntk.sweep.process import JobProcess, job_environment
from lightning_ntk.sweep.runner import Clock, Runner


@pytest.fixture(autouse=True)
def _path(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(conf_folder().parent))


def wait_for(condition, seconds=280):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.02)


def test_a_failing_job_is_recorded_with_its_error_and_the_others_go_on(tmp_path):
    jobs = [
        trivial("good", tmp_path, "steps=2"),
        trivial("diverges", tmp_path, "steps=3", "fail_at=1"),
        trivial("also good", tmp_path),
    ]
    states = run_locally(jobs)
    assert [states[job.name].status for job in jobs] == ["done", "failed", "done"]
    failed = read_state(jobs[1].folder)
    assert failed == states["diverges"]
    assert (failed.exit_code, failed.attempts) == (1, 1), "its own error is final"
    assert failed.error == "ArithmeticError: diverged at step 1"
    assert "Traceback" in Path(failed.log).read_text()
    assert read_results(jobs[2].folder).metrics["test/accuracy"] == 0.25


def test_the_same_command_does_what_is_missing_and_no_more(tmp_path):
    jobs = [trivial(name, tmp_path, *words) for name, words in {"a": [], "b": ["fail_at=0"], "c": []}.items()]
    run_locally(jobs[:2])
    todo, finished, failed = to_run(jobs, "missing")
    assert ([j.name for j in todo], [j.name for j in finished], [j.name for j in failed]) == (["c"], ["a"], ["b"])
    todo, finished, failed = to_run(jobs, "failed")
    assert ([j.name for j in todo], [j.name for j in finished], failed) == (["b", "c"], ["a"], [])
    todo, finished, failed = to_run(jobs, "all")
    assert ([j.name for j in todo], finished, failed) == (["a", "b", "c"], [], [])
    assert (jobs[0].folder / "results.json").exists(), "what is to go goes when it is sure that jobs can start"
    assert [begins_anew(job, "all") for job in jobs] == [True, True, True]
    assert [begins_anew(job, "failed") for job in jobs] == [False, False, False]


def test_a_killed_job_goes_on_from_its_checkpoint(tmp_path):
    job = trivial("a", tmp_path, "steps=6", "stall_at=3")

    def kill():
        wait_for((job.folder / "checkpoints" / "last.ckpt").exists)
        os.kill(int(starts(job)[0][1]), signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    state = run_locally([job])["a"]
    killer.join()
    assert (state.status, state.attempts) == ("done", 2)
    first, second = (int(line[0]) for line in starts(job))
    assert first == 0
    assert second >= 1, "it began anew"


def test_a_job_that_is_killed_each_time_fails_after_its_retries(tmp_path):
    script = tmp_path / "dies.py"
    script.write_text("import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    job = job_module.Job("a", (), tmp_path / "a", program=(str(script),))
    board = Notes()
    state = run_locally([job], retries=1, board=board)["a"]
    assert (state.status, state.attempts, state.exit_code) == ("failed", 2, -9)
    assert "memory" in state.error
    assert [status for _, status in board.changes] == ["running", "pending", "running", "failed"]


def test_a_hundred_jobs_leave_a_hundred_results_after_three_kills(tmp_path):
    to_kill = {"seed=0": "stall_at=1", "seed=41": "stall_at=1", "seed=99": "stall_at=2"}
    words = {f"seed={seed}": [f"seed={seed}", "steps=3"] for seed in range(100)}
    jobs = [trivial(name, tmp_path, *given, to_kill.get(name, "seconds=0.03")) for name, given in words.items()]

    def kill():
        for job in jobs:
            if job.name in to_kill:
                wait_for((job.folder / "checkpoints" / "last.ckpt").exists, 120)
                os.kill(int(starts(job)[0][1]), signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    states = run_locally(jobs, at_once=4)
    killer.join()
    assert {name for name, state in states.items() if state.attempts > 1} == to_kill.keys()
    assert {state.status for state in states.values()} == {"done"}
    assert [read_results(job.folder).seed for job in jobs] == list(range(100))


def test_the_sweep_adds_less_than_three_seconds_to_a_job(tmp_path):
    """In processor time, which other work on the machine changes little, and in the longest sleep between two looks."""
    jobs = [trivial(f"seed={seed}", tmp_path, f"seed={seed}") for seed in range(5)]
    launcher, sleeps = LocalLauncher([job.needs for job in jobs], 1), []

    def sleep(seconds):
        sleeps.append(seconds)
        time.sleep(seconds)

    began = time.process_time()
    Runner(JobList(jobs), launcher, Notes(), clock=Clock(sleep=sleep)).run()
    ours = (time.process_time() - began) / len(jobs)
    # start.py and the interpreter of the training are one process, one after the other.
    to_first_line = statistics.median(float(starts(job)[0][3]) for job in jobs)
    assert ours + to_first_line + max(sleeps) < 3


def test_an_exit_without_results_is_a_failure(tmp_path):
    script = tmp_path / "does_nothing.py"
    script.write_text("")
    state = run_locally([job_module.Job("a", (), tmp_path / "a", program=(str(script),))])["a"]
    assert (state.status, state.exit_code, state.error) == ("failed", 0, "it left no results.json")


def test_what_was_begun_without_a_checkpoint_is_cleared_away(tmp_path):
    job = trivial("a", tmp_path)
    write_state(job.folder, job_module.State("pending", attempts=1))
    (job.folder / "config.yaml").write_text("A training would not begin in such a folder.")
    (job.folder / "figures").mkdir()
    (job.folder / "log_1.txt").write_text("what the first attempt said")
    assert run_locally([job])["a"].status == "done"
    names = {path.name for path in job.folder.iterdir()}
    assert not names & {"config.yaml", "figures"}
    assert (job.folder / "log_1.txt").read_text() == "what the first attempt said"


def test_two_processes_never_write_one_folder(tmp_path, monkeypatch):
    job = trivial("a", tmp_path, "stall_at=0")
    write_state(job.folder, read_state(job.folder))
    first = JobProcess(job, 1, {})
    wait_for(lambda: starts(job))
    assert is_locked(job.folder / LOCK_FILE)
    second = subprocess.run(
        [sys.executable, "-c", LOCKED_AT_ONCE, str(job.folder), "0", str(os.getpid()), *job.arguments()],
        capture_output=True,
        text=True,
        check=False,
    )
    assert second.returncode == 75
    assert f"being written by another process (process {starts(job)[0][1]} on" in second.stderr
    with pytest.raises(ConfigError, match="being written"):
        to_run([job], "all")
    first.kill()
    wait_for(lambda: first.poll() is not None)
    assert not is_locked(job.folder / LOCK_FILE)
    assert len(starts(job)) == 1


LOCKED_AT_ONCE = "import sys; from lightning_ntk.sweep import start; start.LOCK_WAIT_S = 0.2; start.main(sys.argv[1:])"


def test_a_job_dies_with_the_process_that_started_it(tmp_path):
    job = trivial("a", tmp_path, "stall_at=0")
    job.folder.mkdir()
    code = (
        "import sys, time; from pathlib import Path; from lightning_ntk.sweep.job import Job;"
        "from lightning_ntk.sweep.process import run_to_end;"
        f"run_to_end(Job('a', ('stall_at=0',), Path({str(job.folder)!r}), program={PROGRAM!r}), 1, {{}})"
    )
    parent = subprocess.Popen([sys.executable, "-c", code])
    wait_for(lambda: starts(job))
    parent.kill()
    parent.wait()
    wait_for(lambda: not is_locked(job.folder / LOCK_FILE))


def test_the_ranks_of_another_program_are_not_handed_on(tmp_path, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "3")
    job = trivial("a", tmp_path)
    assert run_locally([job])["a"].status == "done"
    assert starts(job)[0][2] == "-"
    given = {
        "WORLD_SIZE": "2",
        "SLURM_NTASKS": "2",
        "SLURM_STEP_ID": "0",
        "TORCHELASTIC_RUN_ID": "x",
        "SLURM_JOB_ID": "7",
    }
    assert job_environment(given, {"A": "b"}) == {"SLURM_JOB_ID": "7", "PYTHONUNBUFFERED": "1", "A": "b"}


def test_a_stopped_sweep_stops_its_jobs_and_goes_on_later(tmp_path):
    jobs = [trivial(name, tmp_path, "steps=4", "stall_at=2") for name in "ab"]

    class Interrupting(Notes):
        def look(self, running):
            if all((job.folder / "checkpoints" / "last.ckpt").exists() for job in jobs):
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_locally(jobs, board=Interrupting())
    assert [read_state(job.folder).status for job in jobs] == ["pending", "pending"]
    assert not any(is_locked(job.folder / LOCK_FILE) for job in jobs)
    todo, _, _ = to_run(jobs, "missing")
    assert {state.status for state in run_locally(todo).values()} == {"done"}
    assert all(int(starts(job)[1][0]) > 0 for job in jobs), "it began anew"


def test_a_job_that_does_not_heed_the_signal_is_killed_with_its_children(tmp_path):
    script = tmp_path / "deaf.py"
    script.write_text(
        "import signal, subprocess, sys, time; signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        f"open({str(tmp_path / 'child')!r}, 'w').write(str(child.pid)); time.sleep(60)\n"
    )
    job = job_module.Job("a", (), tmp_path / "a", program=(str(script),))
    job.folder.mkdir()
    process = JobProcess(job, 1, {})
    wait_for(lambda: (tmp_path / "child").exists() and (tmp_path / "child").read_text())
    process.stop(grace_s=0.3)
    wait_for(lambda: process.poll() is not None)
    assert process.poll() == -9
    child = int((tmp_path / "child").read_text())
    wait_for(lambda: is_gone(child))


def is_gone(process):
    try:
        return Path(f"/proc/{process}/stat").read_text().split()[2] == "Z"
    except FileNotFoundError:
        return True


def test_a_full_disk_stops_the_sweep_with_the_reason(tmp_path, monkeypatch):
    jobs = [trivial(name, tmp_path, "steps=2") for name in "abc"]
    written = []

    def replace(source, target):
        written.append(target)
        if len(written) > 2:
            raise OSError(28, "No space left on device")
        os.rename(source, target)

    monkeypatch.setattr(job_module.os, "replace", replace)
    with pytest.raises(ConfigError, match=r"No space left on device.*same command again"):
        run_locally(jobs, at_once=1)
    monkeypatch.undo()
    assert not any(is_locked(job.folder / LOCK_FILE) for job in jobs)
    assert not list(tmp_path.rglob("*.tmp"))
    assert read_results(jobs[0].folder).seed == 0


def test_a_folder_of_other_settings_or_of_another_version_is_named_and_left_alone(tmp_path):
    job = trivial("a", tmp_path, "steps=2")
    run_locally([job])
    with pytest.raises(ConfigError, match=r"other settings \(steps=2, steps=3 differ\).*--rerun all"):
        to_run([trivial("a", tmp_path, "steps=3")], "missing")
    elsewhere = dataclasses.replace(job, config_folder="/tuned")
    with pytest.raises(ConfigError, match=r"other settings \(--config-dir none and /tuned differ\)"):
        to_run([elsewhere], "missing")
    results = job.folder / "results.json"
    foreign = results.read_text().replace(f'"schema_version": {SCHEMA_VERSION}', '"schema_version": 99')
    results.write_text(foreign)
    assert to_run([job], "missing") == ([], [], [job])
    assert results.read_text() == foreign
    assert "schema_version 99" in job_module.result_error(job)
    todo, _, _ = to_run([job], "failed")
    assert results.read_text() == foreign
    assert begins_anew(job, "failed")
    start_anew(job)
    assert run_locally(todo)["a"].status == "done"
    assert job_module.result_error(job) is None
    assert starts(job)[-1][0] == "0", "it went on from a checkpoint of another version"


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("step 1\nTraceback\ntorch.OutOfMemoryError: CUDA\nleaked semaphore objects\n", "torch.OutOfMemoryError: CUDA"),
        ("lightning-ntk: data.ways=9 is too many.\nbye", "lightning-ntk: data.ways=9 is too many."),
        ("lightning-ntk: x\nlightning-ntk: another (Connection closed by peer)", "lightning-ntk: x"),
        ("step 1\nRuntimeError: Connection closed by peer", "RuntimeError: Connection closed by peer"),
        ("10 %\r20 %\rSegmentation fault\n\n", "Segmentation fault"),
        ("\xff" * 30_000 + "\nValueError: é", "ValueError: é"),
        ("", "it said nothing"),
        (None, "it left no log"),
    ],
)
def test_the_error_is_the_last_line_that_names_one(text, line, tmp_path):
    log = tmp_path / "log_1.txt"
    if text is not None:
        log.write_text(text)
    assert job_module.error_line(log) == line


def test_files_that_no_sweep_has_made_are_not_touched(tmp_path):
    job = trivial("a", tmp_path)
    job.folder.mkdir()
    (job.folder / "thesis.tex").write_text("mine")
    for rerun in ("missing", "failed", "all"):
        with pytest.raises(ConfigError, match="not of a sweep"):
            to_run([job], rerun)
    assert (job.folder / "thesis.tex").read_text() == "mine"


@pytest.mark.parametrize(
    ("ends", "devices", "attempts"),
    [
        ("sys.exit(130)", 1, 2),
        ("sys.exit(137)", 1, 2),
        ("sys.exit(143)", 1, 2),
        ("raise RuntimeError('Read error [127.0.0.1]:3974: Connection reset by peer.')", 2, 2),
        ("raise RuntimeError('Read error [127.0.0.1]:3974: Connection reset by peer.')", 1, 1),
        ("raise RuntimeError('its own')", 2, 1),
    ],
)
def test_a_job_that_was_ended_from_outside_is_taken_up_again(ends, devices, attempts, tmp_path):
    script = tmp_path / "ends_once.py"
    script.write_text(
        f"import os, runpy, sys\nif not os.path.exists({str(tmp_path / 'once')!r}):\n"
        f"    open({str(tmp_path / 'once')!r}, 'w').close(); {ends}\n"
        f"sys.argv[0] = {PROGRAM[0]!r}; runpy.run_path({PROGRAM[0]!r})\n"
    )
    job = job_module.Job("a", (), tmp_path / "a", job_module.Needs(devices=devices), program=(str(script),))
    state = run_locally([job])["a"]
    assert (state.status, state.attempts) == ("done" if attempts == 2 else "failed", attempts)


def test_a_job_without_a_test_is_done_when_it_ended_well(tmp_path):
    good = trivial("a", tmp_path, tests=False)
    bad = trivial("b", tmp_path, "steps=3", "fail_at=2", tests=False)
    run_locally([good, bad])
    for job in (good, bad):
        (job.folder / "results.json").unlink(missing_ok=True)
    assert to_run([good, bad], "missing") == ([], [good], [bad])


def test_states_survive_what_is_written_over_them(tmp_path):
    state = read_state(tmp_path)
    assert (state.status, state.attempts) == ("pending", 0)
    state.status = "failed"
    write_state(tmp_path, state)
    assert read_state(tmp_path) == state
    (tmp_path / "job.json").write_text('{"status": "done", "of_a_later_version": 1}')
    assert read_state(tmp_path).status == "done"
    (tmp_path / "job.json").write_text('{"status": "do')
    assert read_state(tmp_path).status == "pending"


def test_slots_have_their_gpus_and_their_cores(monkeypatch, tmp_path):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3,5,7")
    needs = [job_module.Needs(devices=2), job_module.Needs(devices=1)]
    launcher = LocalLauncher(needs, None)
    assert launcher.slots == 2
    assert [launcher.variables(slot)["CUDA_VISIBLE_DEVICES"] for slot in range(2)] == ["2,3", "5,7"]
    assert LocalLauncher(needs[1:], 8).variables(5)["CUDA_VISIBLE_DEVICES"] == "3", "eight jobs share four GPUs"
    with pytest.raises(ConfigError, match=r"trainer\.devices=5 are asked for, but this machine has 4 GPUs"):
        LocalLauncher([job_module.Needs(devices=5)], None)
    assert LocalLauncher([job_module.Needs(devices=0)], None).devices == 4, "auto is all of them"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr("lightning_ntk.sweep.launchers.local.available_cores", lambda: 8)
    alone = LocalLauncher([job_module.Needs()], None)
    assert (alone.slots, alone.variables(0)) == (1, {"OMP_NUM_THREADS": "8"})
    assert LocalLauncher([job_module.Needs(devices=2)], 2).variables(0) == {"OMP_NUM_THREADS": "2"}
    with pytest.raises(ConfigError, match=r"trainer\.devices=9 are asked for, but this machine has 8 cores"):
        LocalLauncher([job_module.Needs(devices=9)], None)
    with pytest.raises(ConfigError, match=r"num_nodes=2.*launcher=slurm"):
        LocalLauncher([job_module.Needs(nodes=2)], None)


LISTING = """GPU 0: NVIDIA H100 (UUID: GPU-a)
  MIG 1g.10gb Device 0: (UUID: MIG-b)
  MIG 1g.10gb Device 1: (UUID: MIG-c)
GPU 1: NVIDIA H100 (UUID: GPU-d)
"""


def test_gpus_are_known_by_the_numbers_that_the_driver_gives_them(monkeypatch, tmp_path):
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\necho '{LISTING}'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert visible_gpus() == ["0", "1"]


def test_a_launcher_is_never_given_more_than_it_has_room_for(tmp_path):
    jobs = [trivial(str(number), tmp_path, "seconds=0.1") for number in range(5)]
    most = []

    class Counting(LocalLauncher):
        def submit(self, attempts):
            handles = super().submit(attempts)
            most.append(self.slots - len(self._free))
            return handles

    Runner(JobList(jobs), Counting([job_module.Needs()], 2), Notes()).run()
    assert max(most) == 2
