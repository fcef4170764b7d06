"""Helpers of the tests of sweeps: trivial jobs, a quiet board, and a look at what ran."""

from collections.abc import Sequence
from pathlib import Path

from lightning_ntk.sweep.command import JobList
from lightning_ntk.sweep.job import Job, Needs, State
from lightning_ntk.sweep.launchers.local import LocalLauncher
from lightning_ntk.sweep.progress import Progress
from lightning_ntk.sweep.runner import Runner

PROGRAM = (str(Path(__file__).with_name("trivial_job.py")),)


class Notes:
    """A board that notes the changes."""

    def __init__(self) -> None:
        self.changes: list[tuple[str, str]] = []
        self.running: list[str] = []

    def changed(self, job: Job, state: State, progress: Progress) -> None:
        self.changes.append((job.name, state.status))

    def look(self, running: Sequence[tuple[Job, State, Progress]]) -> None:
        self.running = [job.name for job, _, _ in running]


def trivial(name: str, out: Path, *overrides: str, **needs) -> Job:
    return Job(name, overrides, out / name, Needs(**needs), program=PROGRAM)


def run_locally(jobs: Sequence[Job], at_once: int = 2, retries: int = 2, board=None) -> dict[str, State]:
    launcher = LocalLauncher([job.needs for job in jobs], at_once)
    return Runner(JobList(jobs), launcher, board or Notes(), retries).run()


def starts(job: Job) -> list[list[str]]:
    """The step, the process, the rank variable and the processor time so far of each start of a trivial job."""
    file = job.folder.parent / f"starts_{job.folder.name}.txt"
    return [line.split() for line in file.read_text().splitlines()] if file.exists() else []
