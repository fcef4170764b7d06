"""The table of a comparison: its rows, and the same numbers on the terminal, as Markdown and as CSV."""

import csv
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from lightning_ntk.results import RunResult


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table. Scores are fractions or mean squared errors, times in seconds, memory in MiB."""

    name: str
    runs: int
    score: float
    ci95: float
    difference: float | None
    difference_ci95: float | None
    meta_step_s: float | None
    fit_s: float | None
    peak_mib: float | None
    is_baseline: bool


def cells(rows: Sequence[Row], metric: str) -> tuple[list[str], list[list[str]]]:
    """Header and body of the table, as text."""
    percent = metric == "accuracy"

    def score(value: float, half_width: float, sign: str = "") -> str:
        if percent:
            return f"{100 * value:{sign}.2f} ± {100 * half_width:.2f}"
        return f"{value:{sign}.4f} ± {half_width:.4f}"

    def number(value: float | None, form: str) -> str:
        return format(value, form) if value else ""

    with_baseline = any(row.is_baseline for row in rows)
    header = ["method", "accuracy, %" if percent else "mean squared error"]
    header += ["difference to baseline"] if with_baseline else []
    header += ["s a meta-step", "s of training", "peak memory, MiB"]
    body = []
    for row in rows:
        line = [row.name, score(row.score, row.ci95)]
        if row.is_baseline:
            line.append("baseline")
        elif with_baseline:
            line.append(score(row.difference, row.difference_ci95, "+"))
        line += [number(row.meta_step_s, ".3f"), number(row.fit_s, ".0f"), number(row.peak_mib, ".0f")]
        body.append(line)
    return header, body


def caption(result: RunResult) -> str:
    """What was tested, in words."""
    settings = ", ".join(f"{key} {value}" for key, value in result.task.items() if key != "data")
    return f"{result.task.get('data', result.data)}: {settings}. Intervals are 95 %, over episodes."


def markdown(rows: Sequence[Row], metric: str, result: RunResult) -> str:
    """The table in Markdown."""
    header, body = cells(rows, metric)
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + f"\n\n{caption(result)}\n"


def show(rows: Sequence[Row], metric: str, result: RunResult) -> None:
    """Print the table."""
    header, body = cells(rows, metric)
    table = Table(caption=caption(result), caption_justify="left")
    for number, name in enumerate(header):
        table.add_column(name, justify="left" if number == 0 else "right", no_wrap=number == 0)
    for line in body:
        table.add_row(*line)
    # A folder's name may hold square brackets, which are rich's markup.
    Console(width=None if sys.stdout.isatty() else 120, markup=False).print(table)


def write_csv(rows: Sequence[Row], metric: str, file: Path) -> None:
    """The table's numbers, unrounded."""
    names = [field.name for field in dataclasses.fields(Row)]
    with file.open("w", newline="", encoding="utf-8") as target:
        writer = csv.writer(target)
        writer.writerow(["metric", *names])
        for row in rows:
            writer.writerow([metric, *dataclasses.astuple(row)])
