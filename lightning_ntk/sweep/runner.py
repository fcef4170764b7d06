"""The loop of a sweep: hand jobs to a launcher, look after them, keep their states."""

import contextlib
import dataclasses
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Protocol

from lightning_ntk.errors import ConfigError
from lightning_ntk.sweep.job import (
    Job,
    State,
    describe_exit,
    has_result,
    log_file,
    lost_a_rank,
    read_state,
    result_error,
    write_state,
)
from lightning_ntk.sweep.launchers.base import Exit, Handle, Launcher
from lightning_ntk.sweep.process import GRACE_S
from lightning_ntk.sweep.progress import Progress, read_progress

# How often the progress of running jobs is read from their files, in seconds.
LOOK_EVERY_S = 1.0


class Source(Protocol):
    """Where jobs come from: a list, or a search that decides as it goes."""

    def take(self, number: int) -> list[Job]:
        """Up to `number` jobs to start now; none, with none running: there are no more."""

    def is_hopeless(self, job: Job, progress: Progress) -> bool:
        """Whether a running job is to be stopped for its validation scores."""

    def finished(self, job: Job, state: State, progress: Progress) -> None:
        """A job has come to its end."""


class Board(Protocol):
    """Where a person sees what goes on."""

    def changed(self, job: Job, state: State, progress: Progress) -> None:
        """A job has another state."""

    def look(self, running: Sequence[tuple[Job, State, Progress]]) -> None:
        """The running jobs, from time to time."""


@dataclasses.dataclass
class Clock:
    """Time, which a simulation replaces."""

    now: Callable[[], float] = time.time
    sleep: Callable[[float], None] = time.sleep


@dataclasses.dataclass
class _Running:
    job: Job
    state: State
    handle: Handle
    progress: Progress = dataclasses.field(default_factory=Progress)
    pruned: bool = False


class Runner:
    """Runs the jobs of a source on a launcher.

    Args:
        retries: how often a job whose attempt was ended from outside is taken up again.
    """

    def __init__(
        self, source: Source, launcher: Launcher, board: Board, retries: int = 2, clock: Clock | None = None
    ) -> None:
        self.source, self.launcher, self.board, self.retries = source, launcher, board, retries
        self.clock = clock or Clock()
        self.states: dict[str, State] = {}
        self._running: list[_Running] = []
        self._again: list[Job] = []
        self._losses: Counter[str] = Counter()

    def run(self) -> dict[str, State]:
        """Run all jobs to their ends; returns their states by name.

        An exception (Ctrl+C, a full disk) stops what runs first; its jobs can be taken up again.
        """
        looked = -LOOK_EVERY_S
        try:
            while self._start() or self._running:
                for running in list(self._running):
                    ended = running.handle.poll()
                    if ended is not None:
                        self._running.remove(running)
                        self._end(running, ended)
                if self.clock.now() - looked >= LOOK_EVERY_S:
                    looked = self.clock.now()
                    self._look()
                if self._running:
                    self.clock.sleep(self.launcher.interval_s)
        except BaseException:
            self._stop_all()
            raise
        return self.states

    def _start(self) -> bool:
        """Hand over as many jobs as there is room for; whether there were any."""
        room = self.launcher.slots - len(self._running)
        again, self._again = self._again[:room], self._again[room:]
        jobs = again + (self.source.take(room - len(again)) if room > len(again) else [])
        attempts = []
        for job in jobs:
            state = self.states.setdefault(job.name, read_state(job.folder))
            state.attempts += 1
            state.status, state.exit_code, state.error, state.ended = "running", None, None, None
            state.started = self.clock.now()
            state.overrides, state.config_folder = list(job.overrides), job.config_folder
            state.first_step = read_progress(job.folder).step
            state.log = str(log_file(job, state.attempts))
            write_state(job.folder, state)
            attempts.append((job, state.attempts))
        try:
            handles = self.launcher.submit(attempts) if attempts else []
        except OSError as error:
            raise ConfigError(f"A job could not be started: {error}. Give the same command again.") from error
        for job, handle in zip(jobs, handles, strict=True):
            self._running.append(_Running(job, self.states[job.name], handle))
            self.board.changed(job, self.states[job.name], Progress())
        return bool(jobs)

    def _end(self, running: _Running, ended: Exit) -> None:
        """Write down how an attempt ended, and whether the job is tried again."""
        job, state = running.job, running.state
        state.exit_code, state.ended = ended.code, self.clock.now()
        running.progress = read_progress(job.folder)
        finished = result_error(job) is None and (job.needs.tests or ended.code == 0)
        if finished:
            state.status = "done"
        elif running.pruned:
            state.status = "pruned"
        else:
            state.status = "failed"
            state.error = ended.lost or describe_exit(ended.code, log_file(job, state.attempts))
            if ended.code == 0:
                state.error = result_error(job)
        lost = state.status == "failed" and (ended.was_lost or lost_a_rank(job, state.error or ""))
        self._losses[job.name] += lost
        again = lost and self._losses[job.name] <= self.retries  # Losses of earlier commands do not count.
        if again:
            state.status = "pending"
            self._again.append(job)
        write_state(job.folder, state)
        self.board.changed(job, state, running.progress)
        if not again:
            self.source.finished(job, state, running.progress)

    def _look(self) -> None:
        for running in self._running:
            running.progress = read_progress(running.job.folder)
            if not running.pruned and self.source.is_hopeless(running.job, running.progress):
                running.pruned = True
                running.handle.stop()
        self.board.look([(r.job, r.state, r.progress) for r in self._running])

    def _stop_all(self) -> None:
        """Stop what runs, and write down that it is to be taken up again."""
        try:
            for running in self._running:
                running.handle.stop()
            deadline = time.monotonic() + GRACE_S + 5
            while any(r.handle.poll() is None for r in self._running) and time.monotonic() < deadline:
                time.sleep(0.1)
        finally:  # A second Ctrl+C does not wait.
            for running in self._running:
                if running.handle.poll() is None:
                    running.handle.kill()
                state = running.state
                state.status = "done" if has_result(running.job, state) else "pending"
                state.ended = self.clock.now()
                # The disk may be what stopped us; job.json then says "running", and is taken up too.
                with contextlib.suppress(ConfigError):
                    write_state(running.job.folder, state)
