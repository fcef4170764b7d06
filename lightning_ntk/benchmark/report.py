"""The tables on the terminal, as Markdown and as JSON."""

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table as RichTable

from lightning_ntk.benchmark.machine import in_words
from lightning_ntk.benchmark.rows import Figure, Row, Table
from lightning_ntk.benchmark.settings import Settings

SCHEMA_VERSION = 1
FILES = ("benchmark.md", "benchmark.json")
EXPLANATION = (
    "Ratios are of medians over rounds in which the works take turns; in brackets the quartiles over the rounds. "
    "Operations are those of matrix products and convolutions, traffic is what all operations read and write; both are "
    "counted while the work runs. The share of peak is the operations over the time, over the rate of a large float32 "
    "matrix product on this machine."
)


@dataclasses.dataclass(frozen=True)
class Result:
    """What a benchmark found, and on what."""

    machine: dict[str, Any]
    settings: Settings
    tables: Sequence[Table]
    figures: Sequence[Figure]


def figure_cells(figures: Sequence[Figure]) -> tuple[list[str], list[list[str]]]:
    """Header and body of the table of figures to reach."""
    body = []
    for figure in figures:
        sign = ">=" if figure.more_is_better else "<="
        value = "not measured" if figure.value is None else f"{figure.value:.2f}"
        goal = "" if figure.goal is None else f"{sign} {figure.goal:g}"
        reached = {None: "", True: "yes", False: "no"}[figure.reached]
        body.append([figure.what, value, goal, reached, figure.note])
    return ["figure", "value", "goal", "reached", "note"], body


def table_cells(table: Table, product_gflops: float | None) -> tuple[list[str], list[list[str]]]:
    """Header and body of a table; columns without a number are left out."""
    reference = next((row for row in table.rows if row.work == table.reference), Row(table.reference))
    columns = {
        # Of works that take turns the ratios count; a training's seconds are what it is read for.
        "s": lambda row: _number(row.seconds, 1, ".1f") if table.name == "runs" else "",
        f"over {table.reference}": lambda row: _ratio(row),
        "operations over it": lambda row: _number(row.gflop, reference.gflop, ".2f"),
        "GFLOP": lambda row: _number(row.gflop, 1, ".2f"),
        "traffic, GB": lambda row: _number(row.gbytes, 1, ".2f"),
        "share of peak": lambda row: _share(row, product_gflops),
        "peak, MiB": lambda row: _number(row.mib, 1, ".0f"),
        "note": lambda row: row.note,
    }
    filled = {name: [cell(row) for row in table.rows] for name, cell in columns.items()}
    filled = {name: cells for name, cells in filled.items() if any(cells)}
    body = [[row.work, *(cells[i] for cells in filled.values())] for i, row in enumerate(table.rows)]
    return ["work", *filled], body


def _ratio(row: Row) -> str:
    if row.ratio is None:
        return ""
    spread = f" ({row.low:.2f}-{row.high:.2f})" if row.low is not None and len(row.rounds) > 2 else ""
    return f"{row.ratio:.2f}{spread}"


def _number(value: float | None, divisor: float | None, form: str) -> str:
    return "" if value is None or not divisor else format(value / divisor, form)


def _share(row: Row, product_gflops: float | None) -> str:
    if row.gflop is None or not row.seconds or not product_gflops:
        return ""
    return f"{row.gflop / row.seconds / product_gflops:.0%}"


def markdown(result: Result) -> str:
    """Everything, as Markdown."""
    parts = ["# Benchmark", in_words(result.machine), settings_in_words(result.settings)]
    parts += ["## Figures", _grid(*figure_cells(result.figures))] if result.figures else []
    for table in result.tables:
        parts += [f"## {table.title}", _grid(*table_cells(table, result.machine["product_gflops"]))]
    parts += [] if result.settings.runs is not None else [EXPLANATION]
    return "\n\n".join(parts) + "\n"


def _grid(header: list[str], body: list[list[str]]) -> str:
    lines = [header, ["---" if _is_text(header, number) else "---:" for number in range(len(header))], *body]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines)


def _is_text(header: list[str], number: int) -> bool:
    """Whether a column holds words, not numbers."""
    return number == 0 or header[number] == "note"


def settings_in_words(settings: Settings) -> str:
    """The problem and how it was measured, in a line."""
    if settings.runs is not None:
        return f"Finished runs of {settings.runs}."
    rounds = f"at most {settings.repeats} rounds, {settings.limit_s:g} s a work."
    if set(settings.tables) == {"scaling"}:  # Its tables name their own problem.
        return f"{settings.device}; {rounds}"
    network, pooling = f"Conv4 with {settings.filters} filters, ", ", 2x2 pooling"
    if set(settings.tables) == {"resnet12"}:
        network, pooling = "", ""
    tasks = f"{settings.tasks} tasks a step, " if settings.tasks > 1 else ""
    words = f"{tasks}{settings.ways}-way {settings.shots}-shot, {settings.queries} queries a class, {network}"
    channels, height, width = settings.image_shape
    words += f"{height}x{width}x{channels}{pooling}, float32 without TF32, {settings.device}"
    return f"{words}; {rounds}"


def show(result: Result) -> None:
    """Print everything."""
    console = Console(width=None if sys.stdout.isatty() else 150, markup=False, highlight=False)
    console.print(in_words(result.machine))
    console.print(settings_in_words(result.settings))
    grids = [(table.title, *table_cells(table, result.machine["product_gflops"])) for table in result.tables]
    grids += [("Figures", *figure_cells(result.figures))] if result.figures else []
    for title, header, body in grids:
        grid = RichTable(title=title, title_justify="left")
        for number, name in enumerate(header):
            grid.add_column(name, justify="left" if _is_text(header, number) else "right")
        for line in body:
            grid.add_row(*line)
        console.print(grid)


def as_json(result: Result) -> dict[str, Any]:
    """Everything with its seconds, as plain JSON."""
    settings = dataclasses.asdict(result.settings)
    return {
        "schema_version": SCHEMA_VERSION,
        "machine": result.machine,
        "settings": {name: str(value) if isinstance(value, Path) else value for name, value in settings.items()},
        "figures": [{**dataclasses.asdict(figure), "reached": figure.reached} for figure in result.figures],
        "tables": [dataclasses.asdict(table) for table in result.tables],
    }


def write(folder: Path, result: Result) -> dict[str, Any]:
    """Write benchmark.md and benchmark.json into a folder; returns what the second holds."""
    content = as_json(result)
    (folder / FILES[0]).write_text(markdown(result), encoding="utf-8")
    (folder / FILES[1]).write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    return content
