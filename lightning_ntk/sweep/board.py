"""What a person sees of a sweep: a live table on a terminal, a line for each change elsewhere."""

import datetime
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from lightning_ntk.sweep.job import Job, State
from lightning_ntk.sweep.progress import Progress

STYLES = {"done": "green", "failed": "red", "running": "cyan", "pending": "yellow", "pruned": "dim"}
# So many finished jobs are kept in sight.
LAST_SHOWN = 8


def shown_score(progress: Progress) -> str:
    """The best validation score so far, as a person writes it."""
    if progress.best is None or progress.metric is None:
        return ""
    return f"{100 * progress.best:.2f} %" if progress.metric.endswith("accuracy") else f"mse {progress.best:.4f}"


def shown_time(seconds: float | None) -> str:
    """Hours, minutes and seconds."""
    return "" if seconds is None else str(datetime.timedelta(seconds=round(seconds)))


def time_left(job: Job, state: State, progress: Progress, now: float) -> float | None:
    """Seconds until a running job has made its steps, at the speed of this attempt."""
    made = progress.step - state.first_step
    if made <= 0 or state.started is None or not job.needs.steps:
        return None
    return max(0.0, (now - state.started) / made * (job.needs.steps - progress.step))


class Board:
    """Counts and shows the jobs of a sweep.

    Args:
        total: the number of jobs to run; None where a search decides.
        finished: how many of the sweep had a result already.
    """

    def __init__(self, total: int | None, finished: int = 0) -> None:
        self.total, self.finished = total, finished
        self.console = Console(stderr=True, markup=False)
        self.counts = {"done": 0, "failed": 0, "pruned": 0}
        self.last: list[tuple[Job, State, Progress]] = []
        self.running: list[tuple[Job, State, Progress]] = []
        self.worked_s = 0.0
        self.began = time.time()
        self.live = Live(console=self.console, auto_refresh=False) if self.console.is_terminal else None

    def __enter__(self) -> "Board":
        if self.live is not None:
            self.live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.live is not None:
            self.live.update(self.table(), refresh=True)
            self.live.stop()

    def changed(self, job: Job, state: State, progress: Progress) -> None:
        """A job has another state."""
        if state.status in self.counts:
            self.counts[state.status] += 1
            self.last = [*self.last, (job, state, progress)][-LAST_SHOWN:]
        if state.ended is not None and state.started is not None:
            self.worked_s += state.ended - state.started
        if self.live is None:
            sys.stdout.write(self.line(job, state, progress) + "\n")
            sys.stdout.flush()

    def look(self, running: Sequence[tuple[Job, State, Progress]]) -> None:
        """The running jobs, from time to time."""
        self.running = list(running)
        if self.live is not None:
            self.live.update(self.table(), refresh=True)

    def line(self, job: Job, state: State, progress: Progress) -> str:
        """One change, in a line."""
        number = sum(self.counts.values())
        counted = f"[{number}/{self.total}] " if self.total is not None else f"[{number}] "
        took = "" if state.ended is None else f" in {state.ended - (state.started or 0):.0f} s"
        score = f", validation {shown_score(progress)}" if progress.best is not None else ""
        attempt = f" (attempt {state.attempts})" if state.attempts > 1 else ""
        error = f": {state.error}" if state.error else ""
        word = "again" if state.status == "pending" else state.status
        return f"{counted}{word} {job.name}{took}{attempt}{score}{error}"

    def table(self) -> Group:
        """The counts, the last finished jobs, and the running ones."""
        table = Table(expand=False)
        for name in ("job", "state", "step", "best validation", "left", ""):
            table.add_column(name, overflow="fold", justify="left" if name in ("job", "state", "") else "right")
        now = time.time()
        shown = {job.name for job, _, _ in self.running}
        for job, state, progress in [*(row for row in self.last if row[0].name not in shown), *self.running]:
            running = state.status == "running"
            left = time_left(job, state, progress, now) if running else (state.ended or now) - (state.started or now)
            took = shown_time(left) if running else f"took {shown_time(left)}"
            step = f"{progress.step}/{job.needs.steps}" if progress.step else ""
            waits = running and state.log is not None and not Path(state.log).exists()  # In the queue of a cluster.
            status = Text("queued" if waits else state.status, STYLES.get(state.status, ""))
            table.add_row(job.name, status, step, shown_score(progress), took, (state.error or "")[:100])
        return Group(Text(self.summary()), table)  # A low terminal cuts the end off.

    def summary(self) -> str:
        """The counts, and how long the rest may take."""
        number = sum(self.counts.values())
        text = ", ".join(f"{count} {name}" for name, count in self.counts.items() if count) or "none finished yet"
        if self.finished:
            text += f" (and {self.finished} before)"
        if self.total is not None and 0 < number < self.total:
            rest = (time.time() - self.began) / number * (self.total - number)
            text += f"; {self.total - number} to go, about {shown_time(rest)}"
        return text

    def spent(self) -> str:
        """The time since the beginning, beside that spent in the jobs' processes: with jobs=1 the rest is ours."""
        return f"{time.time() - self.began:.1f} s ({self.worked_s:.1f} s in the jobs' own processes)"
