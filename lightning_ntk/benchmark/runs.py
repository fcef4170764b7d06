"""Seconds of training to a validation accuracy, from the metrics.csv of finished runs."""

import itertools
import math
import statistics
from collections.abc import Sequence
from pathlib import Path

from lightning_ntk.benchmark.rows import Figure, Row, Table, quotient
from lightning_ntk.errors import ConfigError

OURS, THEIRS = "meta_rkhs_ii", "maml"


def seconds_to_level(seconds: Sequence[float], scores: Sequence[float], level: float) -> float | None:
    """When a curve of (seconds of training, score) first reaches a level; None when it never does.

    Linear between two validations. A curve that starts at the level or above has reached it by its first validation.
    """
    points = [(s, a) for s, a in zip(seconds, scores, strict=True) if math.isfinite(a)]
    if points and points[0][1] >= level:
        return points[0][0]
    for (before, low), (after, high) in itertools.pairwise(points):
        if high >= level:
            return before + (after - before) * (level - low) / (high - low)
    return None


def runs_table(folder: Path, level: float) -> Table:
    """One row a finished run at or below a folder; a method's runs of several seeds are averaged in the figure.

    A run without validation accuracies, of regression for example, gets a row that says so.

    Raises:
        ConfigError: no finished run, or runs of different tasks.
    """
    from lightning_ntk.compare import find_runs
    from lightning_ntk.comparison.figures import read_curve

    entries = find_runs([folder], timed=True)
    tasks = {str(sorted((k, v) for k, v in entry.result.task.items() if k != "eval_seed")) for entry in entries}
    if len(tasks) > 1:
        raise ConfigError(f"runs={folder} holds runs of different tasks: name a folder with the runs of one.")
    rows = []
    for entry in entries:
        _, seconds, scores = read_curve(entry.folder, "val/accuracy")
        if not scores or math.isnan(seconds[-1]):
            lacking = "time/fit" if scores else "val/accuracy"
            rows.append(Row(entry.result.method, note=f"{entry.name}: no {lacking} in its metrics.csv"))
            continue
        reached = seconds_to_level(seconds, scores, level)
        note = f"{entry.name}; best {max(scores):.3f} in {seconds[-1]:.0f} s"
        if reached is not None and scores[0] >= level:
            note += "; its first validation, so at most this"
        rows.append(Row(entry.result.method, reached, note=note if reached else f"{note}; level not reached"))
    reference = mean_seconds(rows, THEIRS)
    for row in rows:
        row.ratio = quotient(row.seconds, reference)
    return Table("runs", f"Seconds of training to {level:.0%} validation accuracy", THEIRS, rows)


def mean_seconds(rows: Sequence[Row], method: str) -> float | None:
    """Mean over a method's runs; None when one of them never reached the level, or there is none."""
    seconds = [row.seconds for row in rows if row.work == method]
    return statistics.mean(seconds) if seconds and None not in seconds else None


def runs_figure(table: Table, goal: float) -> Figure:
    """The ratio of Meta-RKHS-II to MAML."""
    ours, theirs = mean_seconds(table.rows, OURS), mean_seconds(table.rows, THEIRS)
    missing = [name for name, value in ((OURS, ours), (THEIRS, theirs)) if value is None]
    note = "" if not missing else f"no run of {' and '.join(missing)} that reaches it"
    return Figure(f"{table.title}: {OURS} over {THEIRS}", quotient(ours, theirs), goal, note=note)
