"""Figures of runs, drawn without pyplot's global state."""

import csv
import math
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lightning_ntk.comparison.table import Row, has_baseline

# Okabe and Ito's palette, distinct with any colour vision; its yellow is left out, being faint on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^vPX"
# For more labels than colours.
LINES = ("-", "--", ":", "-.")

# (label, run folder), one for each curve; curves of one label, such as the seeds of a method, look the same.
Run = tuple[str, Path]


def read_training(folder: Path) -> list[dict[str, float]]:
    """The rows of metrics.csv that were logged in training, as the numbers that each has; those of a test left out.

    `step` counts finished steps here: the file counts from 0.
    """
    file = folder / "metrics.csv"
    if not file.exists():
        return []
    # A machine that went down in the middle of a row can leave zeros, or anything, at the end.
    with file.open(newline="", encoding="utf-8", errors="replace") as lines:
        whole = csv.DictReader(line.replace("\0", "") for line in lines)
        rows = [{name: _number(text) for name, text in row.items() if name} for row in whole]
    rows = [{name: value for name, value in row.items() if value is not None} for row in rows]
    return [
        {**row, "step": row["step"] + 1}
        for row in rows
        if "step" in row and not any(name.startswith("test/") for name in row)
    ]


def _number(text: str | list[str] | None) -> float | None:
    try:
        return float(text)
    except (TypeError, ValueError):  # An empty cell, or a row that was cut.
        return None


def read_curve(folder: Path, column: str) -> tuple[list[float], list[float], list[float]]:
    """Meta-steps, seconds of training, and a metric's values, from the rows of metrics.csv that have the metric.

    Seconds are NaN where the run did not measure them (`callbacks=timing`).
    """
    rows = [row for row in read_training(folder) if column in row]
    seconds = [row.get("time/fit", math.nan) for row in rows]
    return [row["step"] for row in rows], seconds, [row[column] for row in rows]


def line_style(number: int) -> dict[str, object]:
    """How the line of that number looks, unlike the others."""
    return {
        "color": COLOURS[number % len(COLOURS)],
        "marker": MARKERS[number % len(MARKERS)],
        "linestyle": LINES[number // len(COLOURS) % len(LINES)],
        "markersize": 5,
    }


def room_for(names: Sequence[str]) -> float:
    """Inches that a figure needs beside its usual width, where names are so long that axes would have no place."""
    return 0.09 * max(0, max(map(len, names), default=0) - 40)


def height_for(names: Sequence[str]) -> float:
    """Inches of a figure that stands beside a legend of these names."""
    return max(4, 0.6 + 0.22 * len(names))


def set_log_scale(axes: Axes, which: str, values: Sequence[float]) -> None:
    """Make the "x" or "y" axis logarithmic, unless no value has a place on it, as where all runs diverged."""
    if any(math.isfinite(value) and value > 0 for value in values):
        axes.set(**{f"{which}scale": "log"})


def learning_curves(
    runs: Sequence[Run], metric: str, references: Sequence[tuple[str, float]], file: Path
) -> Path | None:
    """Validation scores of runs over meta-steps and over seconds of training, side by side, as a PNG.

    Args:
        metric: "accuracy" (drawn in percent) or "mse".
        references: (label, test score) of runs without training, drawn as horizontal lines.

    Returns:
        The file, or None when no run has a curve.
    """
    factor = 100 if metric == "accuracy" else 1
    curves = [(label, *read_curve(folder, f"val/{metric}")) for label, folder in runs]
    curves = [curve for curve in curves if curve[1]]
    if not curves:
        return None
    labels = [*dict.fromkeys(label for label, *_ in curves), *(f"{label} (test)" for label, _ in references)]
    figure = Figure(figsize=(11 + room_for(labels), height_for(labels)), layout="constrained")
    over_steps, over_seconds = figure.subplots(1, 2, sharey=True)
    drawn: list[str] = []
    for label, steps, seconds, values in curves:
        is_new = label not in drawn
        drawn += [label] if is_new else []
        # The legend leaves out what starts with "_".
        style = {**line_style(drawn.index(label)), "label": label if is_new else "_again"}
        scores = [factor * value for value in values]
        over_steps.plot(steps, scores, **style)
        over_seconds.plot(seconds, scores, **style)
    for number, (label, value) in enumerate(references):
        style = {"color": "0.5", "linestyle": LINES[(number + 1) % len(LINES)], "linewidth": 1}
        for axes in (over_steps, over_seconds):
            axes.axhline(factor * value, **style, label=f"{label} (test)")
    over_steps.set_xlabel("meta-steps")
    over_seconds.set_xlabel("seconds of training")
    over_steps.set_ylabel("validation accuracy, %" if metric == "accuracy" else "validation mean squared error")
    for axes in (over_steps, over_seconds):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        if metric != "accuracy":
            set_log_scale(axes, "y", [*(v for *_, values in curves for v in values), *(v for _, v in references)])
    handles, labels = over_steps.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=150)
    return file


def scores_of_methods(rows: Sequence[Row], metric: str, file: Path) -> Path:
    """Test scores with their intervals and, beside them, their differences to the baseline, a line each, as a PNG.

    Differences of mean squared errors, which have no scale in common, are left to the table.

    Args:
        rows: of the table, in its order from top to bottom.
        metric: "accuracy" (drawn in percent) or "mse".
    """
    is_accuracy = metric == "accuracy"
    factor = 100 if is_accuracy else 1
    panels = [("test accuracy, %" if is_accuracy else "test mean squared error", [(r.score, r.ci95) for r in rows])]
    if is_accuracy and has_baseline(rows):
        differences = [(0.0, 0.0) if r.is_baseline else (r.difference, r.difference_ci95) for r in rows]
        panels.append(("difference to the baseline, percentage points", differences))
    width = 3 + 4 * len(panels) + room_for([row.name for row in rows])
    figure = Figure(figsize=(width, 1.2 + 0.3 * len(rows)), layout="constrained")
    (grid,) = figure.subplots(1, len(panels), sharey=True, squeeze=False)
    for axes, (label, values) in zip(grid, panels, strict=True):
        for place, (value, half_width) in enumerate(values):
            axes.errorbar(
                factor * value, place, xerr=factor * half_width, capsize=3, marker="o", markersize=4, color=COLOURS[0]
            )
        axes.set_xlabel(label)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    first, last = figure.axes[0], figure.axes[-1]
    first.set_yticks(range(len(rows)), [row.name for row in rows])
    first.set_ylim(len(rows) - 0.5, -0.5)
    if not is_accuracy:
        set_log_scale(first, "x", [row.score for row in rows])
    if last is not first:
        last.axvline(0, color="0.5", linestyle="--", linewidth=1)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=150)
    return file


def scores_over_tasks(
    scores: dict[str, Sequence[tuple[float, float] | None]], tasks: Sequence[str], metric: str, file: Path
) -> Path:
    """Test scores with their intervals over tasks, a line for each method, as a PNG; those of a task side by side.

    Args:
        scores: by method, (score, half-width of its interval) for each task; None where there is none.
        metric: "accuracy" (drawn in percent) or "mse".
    """
    factor = 100 if metric == "accuracy" else 1
    figure = Figure(
        figsize=(4 + 1.2 * len(tasks) + room_for(list(scores)), height_for(list(scores))), layout="constrained"
    )
    axes = figure.subplots()
    for number, (method, values) in enumerate(scores.items()):
        known = [(place, *value) for place, value in enumerate(values) if value is not None]
        places, heights, half_widths = zip(*known, strict=True)
        # Intervals upon each other could not be told apart.
        aside = 0.4 * (number - (len(scores) - 1) / 2) / max(len(scores), 8)
        axes.errorbar(
            [place + aside for place in places],
            [factor * height for height in heights],
            [factor * half_width for half_width in half_widths],
            capsize=3,
            label=method,
            **line_style(number),
        )
    axes.set_xticks(range(len(tasks)), tasks)
    axes.set_ylabel("test accuracy, %" if metric == "accuracy" else "test mean squared error")
    if metric != "accuracy":
        set_log_scale(axes, "y", [value[0] for values in scores.values() for value in values if value is not None])
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right center", frameon=False)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=150)
    return file
