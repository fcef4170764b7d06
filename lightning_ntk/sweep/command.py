"""`lightning-ntk sweep`: from a command line to jobs, results and a comparison."""

import contextlib
import dataclasses
import os
import shlex
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType

from lightning_ntk.comparison.overview import compare_tasks
from lightning_ntk.errors import ConfigError, JobsFailedError, LightningNTKError, nearest_name
from lightning_ntk.running.lock import LOCK_FILE, holder, lock
from lightning_ntk.running.results import FILE_NAME
from lightning_ntk.settings.arguments import parse_command
from lightning_ntk.settings.config import UnknownSettingError, conf_folder, groups, own_folder
from lightning_ntk.settings.paths import as_path
from lightning_ntk.sweep.board import Board
from lightning_ntk.sweep.grid import digest, expand, read_overrides
from lightning_ntk.sweep.job import Job, State, read_state, result_error
from lightning_ntk.sweep.launchers.base import Launcher
from lightning_ntk.sweep.plan import begins_anew, make_jobs, start_anew, to_run
from lightning_ntk.sweep.progress import Progress
from lightning_ntk.sweep.runner import Runner
from lightning_ntk.sweep.settings import Settings, read_settings


def main(argv: list[str] | None = None) -> None:
    """Sweep as the command line asks; see `lightning-ntk sweep --help`."""
    words = list(sys.argv[1:] if argv is None else argv)
    command = parse_command("sweep", plain_words(words) or ["--help"])
    if command is None:
        return
    settings, overrides = read_settings(command.overrides, command.config_folder)
    folders = [conf_folder(), *([own_folder(command.config_folder)] if command.config_folder else [])]
    known = groups(folders)
    config_folder = None if command.config_folder is None else str(folders[-1])
    out = sweep_folder(settings, overrides, config_folder)
    again = f"Go on with: lightning-ntk sweep {shlex.join(without_rerun(words))}"
    if settings.search is None:
        grid = expand(read_overrides(overrides, known), settings.max_jobs)
        try:
            jobs = make_jobs(grid, out, known, config_folder)
        except UnknownSettingError as error:
            names = [field.name for field in dataclasses.fields(Settings)]
            raise ConfigError(
                f"{error} Settings of the sweep itself: {', '.join(names)}.{nearest_name(error.key, names)}"
            ) from error
        check_baseline(settings.baseline, jobs, known)
        if command.show_config:
            show_jobs(jobs)
            return
        with held(out), stoppable(again):
            run_grid(jobs, out, settings)
    else:
        from lightning_ntk.sweep.search_command import run_search

        run_search(overrides, known, out, settings, dataclasses.replace(command, config_folder=config_folder), again)


def plain_words(words: Sequence[str]) -> list[str]:
    """The options of this command as settings: --rerun failed, --many."""
    plain = []
    for word in words:
        if plain and plain[-1] == "--rerun":
            plain[-1] = f"rerun={word}"
        elif word.startswith("--rerun="):
            plain.append(word.removeprefix("--"))
        else:
            plain.append("max_jobs=1000000000" if word == "--many" else word)
    if plain and plain[-1] == "--rerun":
        raise ConfigError("--rerun needs to know what: --rerun failed, or --rerun all.")
    return plain


def without_rerun(words: Sequence[str]) -> list[str]:
    """A command line that does not begin anew what the interrupted one has begun anew."""
    kept = list(words)
    if "--rerun" in kept:
        at = kept.index("--rerun")
        del kept[at : at + 2]
    return [word for word in kept if not word.startswith(("--rerun=", "rerun="))]


def sweep_folder(settings: Settings, overrides: Sequence[str], config_folder: str | None) -> Path:
    """Where a sweep's jobs go: the same place for the same command."""
    if settings.out is not None:
        return as_path(settings.out, "out").resolve()
    name = settings.sweep
    if name is None:
        name = digest(" ".join([*overrides, *([config_folder] if config_folder else [])]))
    return Path.cwd() / "runs" / f"{settings.search or 'sweep'}_{name}"


def check_baseline(baseline: str | None, jobs: Sequence[Job], known: dict[str, dict[str, str]]) -> None:
    """Raise `ConfigError` for a baseline that is no method of these jobs, now rather than at the end."""
    methods = list(dict.fromkeys(job.method for job in jobs))
    if baseline is None or baseline in methods:
        return
    if baseline not in known["method"]:
        raise ConfigError(f"baseline={baseline} is no method.{nearest_name(baseline, known['method'])}")
    raise ConfigError(f"baseline={baseline}: no job trains it. Methods of this sweep: {', '.join(methods)}.")


def show_jobs(jobs: Sequence[Job]) -> None:
    """Print what would run."""
    for job in jobs:
        own = [] if job.config_folder is None else ["--config-dir", job.config_folder]
        sys.stdout.write(f"{job.name}: lightning-ntk train {shlex.join([*own, *job.overrides])}\n")
    sys.stdout.write(f"{len(jobs)} jobs in {jobs[0].folder.parent}\n")


@contextlib.contextmanager
def held(out: Path) -> Iterator[None]:
    """Hold the folder of a sweep, so that no second command works on it."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        taken = lock(out / LOCK_FILE)
    except OSError as error:
        raise ConfigError(f"out={out} cannot be written: {error.strerror}. Name another folder by out=.") from error
    if taken is None:
        who = holder(out / LOCK_FILE)
        raise ConfigError(f"out={out}: another sweep works on this folder ({who}). Wait for it, or name another.")
    try:
        yield
    finally:
        os.close(taken)


@contextlib.contextmanager
def stoppable(again: str) -> Iterator[None]:
    """Ctrl+C, and SIGTERM and SIGHUP like it, end with the command to go on with."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = {}
    for number in (signal.SIGTERM, signal.SIGHUP):
        # Started by nohup, it stays; outside the main thread, signals go elsewhere.
        if signal.getsignal(number) != signal.SIG_IGN and threading.current_thread() is threading.main_thread():
            before[number] = signal.signal(number, interrupt)
    try:
        yield
    except KeyboardInterrupt:
        raise KeyboardInterrupt(again) from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class JobList:
    """A list of jobs, as the source of the runner.

    Args:
        give_up: when the first so many have all failed with one error, there are no more; None: there always are.
    """

    def __init__(self, jobs: Sequence[Job], give_up: int | None = None) -> None:
        self.left, self.give_up = list(jobs), give_up
        self.errors: list[str | None] = []

    def take(self, number: int) -> list[Job]:
        if self.failed_alike():
            return []
        taken, self.left = self.left[:number], self.left[number:]
        return taken

    def failed_alike(self) -> bool:
        """Whether the first jobs that came to an end make it likely that all would fail."""
        first = self.errors[: self.give_up]
        return len(first) == self.give_up and None not in first and len(set(first)) == 1

    def is_hopeless(self, job: Job, progress: Progress) -> bool:
        return False

    def finished(self, job: Job, state: State, progress: Progress) -> None:
        self.errors.append(state.error)


def build_launcher(settings: Settings, jobs: Sequence[Job], out: Path) -> Launcher:
    """The launcher that the settings name; bad input is found now."""
    needs = list(dict.fromkeys(job.needs for job in jobs))
    if settings.launcher == "ray":
        from lightning_ntk.sweep.launchers.ray import RayLauncher

        return RayLauncher(needs, settings.jobs, settings.ray)
    if settings.launcher == "slurm":
        from lightning_ntk.sweep.launchers.slurm import SlurmLauncher

        return SlurmLauncher(needs, settings.jobs, settings.slurm, out)
    from lightning_ntk.sweep.launchers.local import LocalLauncher

    return LocalLauncher(needs, settings.jobs)


def run_grid(jobs: Sequence[Job], out: Path, settings: Settings) -> None:
    """Run what is missing of a grid, then compare what there is.

    Raises:
        JobsFailedError: a job, or the comparison, has failed.
    """
    todo, finished, _ = to_run(jobs, settings.rerun)
    if todo:
        launcher = build_launcher(settings, todo, out)
        try:
            for job in todo:  # Only now, when all that can be refused has been accepted.
                if begins_anew(job, settings.rerun):
                    start_anew(job)
            with Board(len(todo), len(finished)) as board:
                source = JobList(todo, settings.give_up)
                Runner(source, launcher, board, settings.retries).run()
        finally:
            launcher.close()
        sys.stdout.write(f"{board.summary()}, in {board.spent()}\n")
        if source.left:
            jobs = [job for job in jobs if job not in source.left]
            sys.stderr.write(
                f"The first {settings.give_up} jobs failed with one error, and {len(source.left)} were not started. "
                "The same command with give_up=null starts them all the same.\n"
            )
    else:
        sys.stdout.write(f"Nothing to run: {len(finished)} of {len(jobs)} jobs have their results.\n")
    try:
        compare_finished(jobs, out, settings.baseline)
    except LightningNTKError as error:
        sys.stderr.write(f"There is no comparison: {error}\n")
        check_all_done(jobs)  # What failed must still be said.
        raise JobsFailedError(f"All {len(jobs)} jobs are done, but they were not compared.") from error
    check_all_done(jobs)


def compare_finished(jobs: Sequence[Job], out: Path, baseline: str | None) -> None:
    """Compare the finished jobs: one table for each set of test episodes, and one over all."""
    folders = [job.folder for job in jobs if (job.folder / FILE_NAME).exists() and result_error(job) is None]
    if not folders:
        return
    try:
        compare_tasks(folders, baseline, out)
    except ConfigError as error:
        if baseline is None:
            raise
        # None of the baseline's runs has ended well, or they differ in more than their seeds.
        again = f"lightning-ntk compare {shlex.quote(str(out))} baseline=NAME"
        sys.stderr.write(f"Compared without differences: {error} ({again})\n")
        compare_tasks(folders, None, out)


def check_all_done(jobs: Sequence[Job]) -> None:
    """Raise `JobsFailedError` for the jobs that have failed, each with its error and its log."""
    failed = []
    for job in jobs:
        state = read_state(job.folder)
        error = result_error(job) if state.status != "failed" else state.error
        if error is not None:
            failed.append(f"  {job.name}: {error}" + (f" (log: {state.log})" if state.log else ""))
    if failed:
        lines = "\n".join(failed[:20] + ([f"  ... and {len(failed) - 20} more"] if len(failed) > 20 else []))
        raise JobsFailedError(f"{len(failed)} of {len(jobs)} jobs failed; --rerun failed takes them up again:\n{lines}")
