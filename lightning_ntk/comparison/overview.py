"""Runs on several tasks: a comparison of each task, and one table and one figure over all of them."""

import dataclasses
import itertools
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_ntk.compare import compare_entries, default_folder, find_runs
from lightning_ntk.comparison.figures import scores_over_tasks
from lightning_ntk.comparison.grouping import all_unlike, unique_names
from lightning_ntk.comparison.table import (
    SCORE_TITLES,
    Entry,
    Row,
    data_name,
    difference_cell,
    has_baseline,
    markdown_table,
    printable,
    score_cell,
    summary,
)
from lightning_ntk.errors import ConfigError, nearest_name

# Settings that read well behind their number, "5 shots", and one of them.
COUNTED = {"ways": "way", "shots": "shot", "queries": "query"}


def compare_tasks(paths: Sequence[Path], baseline: str | None = None, out: Path | None = None) -> None:
    """Compare the runs of each task by themselves, then all: writes comparison_TASK/, overview.md and overview.png.

    Runs of a single task get the comparison alone. A task without a run of the baseline has no differences.
    """
    folder = out or default_folder(paths)
    tasks = _by_task(find_runs(paths))
    if len(tasks) == 1:
        compare_entries(tasks[0], baseline, folder)
        return
    known = _names(*tasks)
    if baseline is not None and baseline not in known:
        raise ConfigError(
            f"baseline={baseline} is none of the runs.{nearest_name(baseline, known)} Runs: {', '.join(sorted(known))}."
        )
    names = task_names([{**run.task, "data": data_name(run)} for run in (entries[0].result for entries in tasks)])
    metrics, rows = [], []
    # Names that differ in other characters alone would share a folder.
    folders = all_unlike([f"comparison_{re.sub(r'[^A-Za-z0-9.-]+', '_', name)}" for name in names])
    for where, entries in zip(folders, tasks, strict=True):
        metrics.append(next(iter(entries[0].result.episodes)).removeprefix("test/"))
        rows.append(compare_entries(entries, baseline if baseline in _names(entries) else None, folder / where))
    table = folder / "overview.md"
    try:
        table.write_text(overview(names, metrics, rows), encoding="utf-8")
        files = [table]
        if len(set(metrics)) == 1:
            files.append(scores_over_tasks(_scores(rows), names, metrics[0], folder / "overview.png"))
    except OSError as error:
        raise ConfigError(f"out={folder} cannot be written: {error}. Name another folder by out=.") from error
    sys.stdout.write("".join(f"{printable(file)}\n" for file in files))


def task_names(tasks: Sequence[dict[str, Any]]) -> list[str]:
    """A name for each task from the settings in which they differ; numbered where those are the same."""
    keys = dict.fromkeys(key for task in tasks for key in task)
    differing: list[str] = []
    for key in keys:
        named = [json.dumps([task.get(other) for other in differing]) for task in tasks]
        values = [json.dumps(task.get(key)) for task in tasks]
        # What follows from the settings before it, as a split does from its data set, says nothing more.
        follows = bool(differing) and len(set(zip(named, values, strict=True))) == len(set(named))
        if len(set(values)) > 1 and (key in COUNTED or not follows):
            differing.append(key)
    names = []
    for task in tasks:
        parts = [(key, task[key]) for key in differing if task.get(key) is not None]
        names.append(printable(", ".join(_words(key, value) for key, value in parts) or "task"))
    return [f"{name} ({names[: i + 1].count(name)})" if names.count(name) > 1 else name for i, name in enumerate(names)]


def _words(key: str, value: Any) -> str:
    if key == "data":
        return str(value)
    return f"{value} {COUNTED[key] if value == 1 else key}" if key in COUNTED else f"{key} {value}"


def overview(tasks: Sequence[str], metrics: Sequence[str], rows: Sequence[Sequence[Row]]) -> str:
    """The scores on all tasks as one table in Markdown: a row for each row of their comparisons, means before runs."""
    shown = rows_by_name(rows)
    header = ["method"]
    body = {name: [name] for of_task in shown for name in of_task}
    for task, metric, of_task in zip(tasks, metrics, shown, strict=True):
        with_differences = has_baseline(list(of_task.values()))
        header += [f"{task}: {SCORE_TITLES[metric]}"] + (["difference to baseline"] if with_differences else [])
        for name, line in body.items():
            row = of_task.get(name)
            line.append("" if row is None else score_cell(metric, row.score, row.ci95))
            if with_differences:
                line.append("" if row is None else difference_cell(metric, row))
    return f"{markdown_table(header, list(body.values()))}\nIntervals are 95 %, over episodes.\n"


def _by_task(entries: Sequence[Entry]) -> list[list[Entry]]:
    """The runs of each task, named as they are without those of the others; 5 shots come before 10."""
    tasks: dict[str, list[Entry]] = {}
    for entry in entries:
        tasks.setdefault(entry.result.episode_ids, []).append(entry)
    named = []
    for runs in tasks.values():
        names = unique_names([run.folder for run in runs], [run.result for run in runs])
        named.append([dataclasses.replace(run, name=name) for run, name in zip(runs, names, strict=True)])
    data = [run.result.task.get("data") for run in entries]

    def place(runs: list[Entry]) -> list[float]:
        task = runs[0].result.task
        counts = [task.get(key) for key in COUNTED]
        return [data.index(task.get("data")), *(n if isinstance(n, int | float) else 0 for n in counts)]

    return sorted(named, key=place)


def _names(*groups: Sequence[Entry]) -> set[str]:
    """What a baseline can be called."""
    return {name for entries in groups for entry in entries for name in (entry.result.method, entry.name)}


def rows_by_name(rows: Sequence[Sequence[Row]]) -> list[dict[str, Row]]:
    """What is shown of each task, by names that are the same on all tasks.

    A method that has one row on each of its tasks is one line; where these rows are called otherwise, as when a seed is
    missing on one task, it says how many runs each stands for: `maml, runs: 3, 2`.
    """
    shown = [summary(of_task) for of_task in rows]
    of_method: dict[str, list[Row]] = {}
    for row in itertools.chain(*shown):
        of_method.setdefault(row.method, []).append(row)
    several = {row.method for of_task in shown for row in of_task if sum(o.method == row.method for o in of_task) > 1}

    def name(row: Row) -> str:
        alike = of_method[row.method]
        if row.method in several or len({other.name for other in alike}) == 1:
            return row.name
        return f"{row.method}, runs: {', '.join(str(other.runs) for other in alike)}"

    return [{name(row): row for row in of_task} for of_task in shown]


def _scores(rows: Sequence[Sequence[Row]]) -> dict[str, list[tuple[float, float] | None]]:
    shown = rows_by_name(rows)
    names = dict.fromkeys(name for of_task in shown for name in of_task)
    scores = [{name: (row.score, row.ci95) for name, row in of_task.items()} for of_task in shown]
    return {name: [of_task.get(name) for of_task in scores] for name in names}
