"""Timing works that take turns: medians of repetitions, after a warm-up, and ratios round by round."""

import contextlib
import dataclasses
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence

import torch

from lightning_ntk.errors import LightningNTKError
from lightning_ntk.ntk.precision import without_tf32

# What a work may fail of without ending the benchmark: memory, a missing peer, an operation that a device lacks, a
# process that does not end.
FAILURES = (RuntimeError, MemoryError, LightningNTKError, subprocess.TimeoutExpired)
WARM_UPS = {"cpu": 1, "cuda": 3}
# Called with the name of what is measured now.
Report = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Work:
    """Something to be timed.

    Attributes:
        name: its row in the table.
        run: does it once, on `tasks` tasks. Its own return value is ignored.
        reset: brings the state back before each repetition; not timed.
        clock: for a work in another process, which times itself: does it once and returns the seconds. Replaces `run`.
        tasks: seconds are reported for one of them.
        absent: why there is nothing to run.
        note: what the row says besides.
    """

    name: str
    run: Callable[[], object] | None = None
    reset: Callable[[], None] | None = None
    clock: Callable[[], float] | None = None
    tasks: int = 1
    absent: str = ""
    note: str = ""


@dataclasses.dataclass
class Timing:
    """Seconds a task of each repetition, in the order of the rounds; `note` says why there are none, or no more."""

    seconds: list[float] = dataclasses.field(default_factory=list)
    note: str = ""

    @property
    def median(self) -> float | None:
        return statistics.median(self.seconds) if self.seconds else None


def interleave(works: Sequence[Work], repeats: int, limit_s: float, device: str, report: Report) -> dict[str, Timing]:
    """Warm every work up, then take rounds in which each runs once, starting one further in each round.

    Args:
        repeats: rounds. A work whose repetitions would together take more than `limit_s` seconds, judged by its last
            warm-up, sits out the later rounds; each runs at least once. One that fails sits out what follows.
    """
    timings = {work.name: Timing(note=work.absent and f"not measured: {work.absent}") for work in works}
    rounds = {}
    for work in works:
        if work.absent:
            continue
        report(f"{work.name}: warm-up")
        try:
            for _ in range(WARM_UPS[device]):
                started = time.perf_counter()
                reported = once(work, device) * work.tasks
                # A work in another process may report the seconds of no more than a part of what it does.
                last = max(reported, time.perf_counter() - started)
            rounds[work.name] = max(1, int(min(repeats, limit_s / max(last, 1e-9))))
        except FAILURES as error:
            timings[work.name].note = f"not measured: {type(error).__name__}: {first_line(error)}"
    ready = [work for work in works if work.name in rounds]
    for number in range(max(rounds.values(), default=0)):
        first = number % len(ready)
        for work in ready[first:] + ready[:first]:
            if number >= rounds[work.name]:
                continue
            report(f"{work.name}: {number + 1} of {rounds[work.name]}")
            try:
                timings[work.name].seconds.append(once(work, device))
            except FAILURES as error:
                rounds[work.name] = number
                timings[work.name].note = f"failed in round {number + 1}: {type(error).__name__}: {first_line(error)}"
    return timings


def once(work: Work, device: str) -> float:
    """Seconds a task of one repetition."""
    if work.reset is not None:
        work.reset()
    if work.clock is not None:
        return work.clock() / work.tasks
    synchronise(device)
    start = time.perf_counter()
    work.run()
    synchronise(device)
    return (time.perf_counter() - start) / work.tasks


def ratio(timing: Timing, reference: Timing) -> tuple[float, float, float] | None:
    """Ratio of the medians, and the quartiles of the ratios round by round; None where one was not measured."""
    if not timing.seconds or not reference.seconds:
        return None
    rounds = [a / b for a, b in zip(timing.seconds, reference.seconds, strict=False)]
    low, _, high = statistics.quantiles(rounds, n=4, method="inclusive") if len(rounds) > 1 else rounds * 3
    return timing.median / reference.median, low, high


def synchronise(device: str) -> None:
    """Wait until the device has done what it was given."""
    if device == "cuda":
        torch.cuda.synchronize()


def first_line(error: Exception) -> str:
    """An error's message, cut to a table's cell."""
    return (str(error).strip().split("\n")[0])[:160]


@contextlib.contextmanager
def float32_and_threads(threads: int | None) -> Iterator[None]:
    """Full float32 products (no TF32) and a number of CPU threads, for the while."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        with without_tf32():
            yield
    finally:
        torch.set_num_threads(before)
