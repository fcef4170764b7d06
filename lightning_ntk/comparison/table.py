"""The table of a comparison: its rows, and the same numbers on the terminal, as Markdown and as CSV."""

import csv
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table

from lightning_ntk.comparison.columns import Column, settings_note
from lightning_ntk.running.results import RunResult

SCORE_TITLES = {"accuracy": "accuracy, %", "mse": "mean squared error"}

# None stands for what was not measured.
Number = float | None


@dataclasses.dataclass(frozen=True)
class Entry:
    """One run in the comparison: its name in the table, its folder and its results."""

    name: str
    folder: Path
    result: RunResult


@dataclasses.dataclass(frozen=True)
class Group:
    """The runs of one method and the same settings, which share a colour; `row` names the row of their mean."""

    label: str
    row: str
    members: tuple[Entry, ...]


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table. Scores are fractions or mean squared errors, times in seconds, memory in MiB.

    `method` is that of its runs; the name may say more. `further` holds (value, half-width of its interval) for each of
    the comparison's further columns. `in_mean`: another row is the mean over this run and others.
    """

    name: str
    method: str
    runs: int
    score: float
    ci95: float
    difference: float | None
    difference_ci95: float | None
    meta_step_s: float | None
    fit_s: float | None
    peak_mib: float | None
    is_baseline: bool
    further: tuple[tuple[Number, Number], ...] = ()
    in_mean: bool = False


def cells(rows: Sequence[Row], metric: str, columns: Sequence[Column] = ()) -> tuple[list[str], list[list[str]]]:
    """Header and body of the table, as text."""

    def number(value: float | None, form: str) -> str:
        return format(value, form) if value else ""

    with_baseline = has_baseline(rows)
    header = ["method", SCORE_TITLES[metric]]
    header += ["difference to baseline"] if with_baseline else []
    header += [column.title for column in columns]
    header += ["s a meta-step", "s of training", "peak memory, MiB"]
    body = []
    for row in rows:
        line = [row.name, score_cell(metric, row.score, row.ci95)]
        if with_baseline:
            line.append(difference_cell(metric, row))
        line += [column.show(*values) for column, values in zip(columns, row.further, strict=True)]
        line += [number(row.meta_step_s, ".3f"), number(row.fit_s, ".0f"), number(row.peak_mib, ".0f")]
        body.append(line)
    return header, body


def score_cell(metric: str, value: float, half_width: float, sign: str = "") -> str:
    """A score, or with sign "+" a difference of scores, with its interval."""
    # Rounded first, and 0.0 added: what rounds to 0 has no sign of its own.
    if metric == "accuracy":
        return f"{round(100 * value, 2) + 0.0:{sign}.2f} ± {100 * half_width:.2f}"
    return f"{round(value, 4) + 0.0:{sign}.4f} ± {half_width:.4f}"


def difference_cell(metric: str, row: Row) -> str:
    """How far a row lies from the baseline."""
    return "baseline" if row.is_baseline else score_cell(metric, row.difference, row.difference_ci95, "+")


def has_baseline(rows: Sequence[Row]) -> bool:
    """Whether the table has a column of differences."""
    return any(row.is_baseline for row in rows)


def caption(results: Sequence[RunResult], columns: Sequence[Column] = ()) -> str:
    """What was tested, in words, and what the runs did not measure alike."""
    first = results[0]
    settings = ", ".join(f"{key} {value}" for key, value in first.task.items() if key != "data")
    text = f"{data_name(first)}: {settings}. Intervals are 95 %, over episodes."
    notes = [*(column.note for column in columns), settings_note(results)]
    return printable(" ".join([text, *filter(None, notes)]))


def data_name(result: RunResult) -> str:
    """The class of a run's data, and the name that it was chosen by where that says more: `ImageFolder (leaves)`."""
    kind = str(result.task.get("data", result.data))
    says_no_more = result.data.replace("_", "").lower() == kind.lower()
    return kind if says_no_more else f"{kind} ({result.data})"


def printable(text: str | Path) -> str:
    """The text with escapes for what UTF-8 cannot write: a folder's name may be of any bytes."""
    return str(text).encode("utf-8", "backslashreplace").decode("utf-8")


def summary(rows: Sequence[Row]) -> list[Row]:
    """Means in the place of their runs, but for one that is the baseline; then the other runs; each as it is sorted."""
    singles = [row for row in rows if row.runs == 1 and (row.is_baseline or not row.in_mean)]
    means = [row for row in rows if row.runs > 1]
    return means + singles


def markdown(rows: Sequence[Row], metric: str, results: Sequence[RunResult], columns: Sequence[Column] = ()) -> str:
    """The table in Markdown, with means in the place of single seeds."""
    rows = summary(rows)
    return f"{markdown_table(*cells(rows, metric, columns))}\n{caption(results, columns)}\n"


def markdown_table(header: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """A table in Markdown whose columns after the first are numbers."""
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *([c.replace("|", "\\|") for c in b] for b in body)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def show(rows: Sequence[Row], metric: str, results: Sequence[RunResult], columns: Sequence[Column] = ()) -> None:
    """Print the table, with means in the place of single seeds."""
    rows = summary(rows)
    header, body = cells(rows, metric, columns)
    # A folder's name may hold square brackets, which are rich's markup.
    console = Console(width=None if sys.stdout.isatty() else 120 + 16 * len(columns), markup=False)
    table = Table(caption=caption(results, columns), caption_justify="left")
    # Where there is no room, headings take several lines, and then names; a number stands in one.
    widths = [max(map(cell_len, [name, *(line[k] for line in body)])) for k, name in enumerate(header)]
    edges = 3 * len(header) + 1
    if sum(widths) + edges > console.width:
        longest = [max(map(cell_len, [*name.split(), *(line[k] for line in body)])) for k, name in enumerate(header)]
        widths = [min(widths[0], max(20, console.width - edges - sum(longest[1:]))), *longest[1:]]
    for k, (name, width) in enumerate(zip(header, widths, strict=True)):
        table.add_column(name, justify="right" if k else "left", overflow="fold", width=width)
    for line in body:
        table.add_row(*line)
    console.print(table)


def numbers(row: Row, with_baseline: bool) -> list[Number]:
    """What the cells after the name are sorted by, in the order of `cells`; the baseline differs by 0."""
    difference = [0.0 if row.is_baseline else row.difference] if with_baseline else []
    further = [value for value, _ in row.further]
    return [row.score, *difference, *further, row.meta_step_s, row.fit_s, row.peak_mib]


def write_csv(rows: Sequence[Row], metric: str, file: Path, columns: Sequence[Column] = ()) -> None:
    """The table's numbers, unrounded."""
    names = [field.name for field in dataclasses.fields(Row) if field.name not in ("method", "further", "in_mean")]
    with file.open("w", newline="", encoding="utf-8") as target:
        writer = csv.writer(target)
        writer.writerow(["metric", *names, *(name for c in columns for name in (c.key, f"{c.key}_ci95"))])
        for row in rows:
            further = [number for pair in row.further for number in pair]
            writer.writerow([metric, *(getattr(row, name) for name in names), *further])
