"""What a measurement leaves: rows of tables, and the goals that they answer."""

import dataclasses
from collections.abc import Mapping, Sequence

from lightning_ntk.benchmark.counting import Operations
from lightning_ntk.benchmark.measure import Timing, Work, ratio


@dataclasses.dataclass
class Row:
    """One work. Numbers that were not measured are None, and `note` says why.

    Attributes:
        seconds: median, of one task. rounds: of each repetition.
        ratio, low, high: of the medians, over the table's reference; and the quartiles over the rounds.
        gflop, gbytes: operations and traffic of one task (`counting`).
        mib: peak memory of one task.
        tasks: done at once.
    """

    work: str
    seconds: float | None = None
    rounds: Sequence[float] = ()
    ratio: float | None = None
    low: float | None = None
    high: float | None = None
    gflop: float | None = None
    gbytes: float | None = None
    mib: float | None = None
    tasks: int = 1
    note: str = ""


@dataclasses.dataclass
class Table:
    """Rows under a title; ratios are over the row named `reference`."""

    name: str
    title: str
    reference: str
    rows: list[Row]
    note: str = ""

    def row(self, work: str) -> Row:
        return next(row for row in self.rows if row.work == work)


@dataclasses.dataclass(frozen=True)
class Figure:
    """A figure to reach: `value <= goal`, or `>=` where more is better. A None says that there is none."""

    what: str
    value: float | None
    goal: float | None = None
    more_is_better: bool = False
    note: str = ""

    @property
    def reached(self) -> bool | None:
        if self.value is None or self.goal is None:
            return None
        return self.value >= self.goal if self.more_is_better else self.value <= self.goal


def timed_rows(
    works: Sequence[Work],
    timings: Mapping[str, Timing],
    reference: str,
    counts: Mapping[str, Operations | None] | None = None,
) -> list[Row]:
    """Rows of works that took turns."""
    rows = []
    for work in works:
        timing = timings[work.name]
        row = Row(work.name, timing.median, timing.seconds, tasks=work.tasks, note=timing.note or work.note)
        if (numbers := ratio(timing, timings[reference])) is not None:
            row.ratio, row.low, row.high = numbers
        if (operations := (counts or {}).get(work.name)) is not None:
            row.gflop = operations.flop / work.tasks / 1e9
            row.gbytes = None if operations.bytes is None else operations.bytes / work.tasks / 1e9
        rows.append(row)
    return rows


def quotient(above: float | None, below: float | None) -> float | None:
    """above / below, or None where one is missing."""
    return None if above is None or not below else above / below


def best(rows: Sequence[Row], prefix: str) -> Row | None:
    """The fastest of the rows whose work's name starts with a prefix."""
    measured = [row for row in rows if row.work.startswith(prefix) and row.seconds is not None]
    return min(measured, key=lambda row: row.seconds, default=None)
