"""`lightning-ntk compare RUN RUN ...`: runs that saw the same test episodes, in one table and one figure."""

import csv
import dataclasses
import os
import sys
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

from rich.console import Console
from rich.table import Table

from lightning_ntk.errors import ConfigError, nearest_name
from lightning_ntk.figures import learning_curves
from lightning_ntk.results import FILE_NAME, RunResult, mean_and_ci95, paired_difference, read_results
from lightning_ntk.run_folder_names import CONFIG_FILE, EVALUATIONS_FOLDER

HELP = """usage: lightning-ntk compare RUN [RUN ...] [baseline=NAME] [out=FOLDER]

Compare runs that were tested on the same episodes: one table (also as Markdown and CSV) and the learning curves.
A RUN is a run folder, or a folder in which run folders are found.

  baseline=NAME   a method, or a run's name in the table: adds the paired difference to it, episode by episode
  out=FOLDER      where comparison.md, comparison.csv and figures/ go (default: the folder that holds the runs)

Examples:
  lightning-ntk compare runs/demo baseline=maml
  lightning-ntk compare runs/A runs/B out=comparison
"""


@dataclasses.dataclass(frozen=True)
class Entry:
    """One run in the comparison: its name in the table, its folder and its results."""

    name: str
    folder: Path
    result: RunResult


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


def main(argv: list[str] | None = None) -> None:
    """Compare as the command line asks; see `lightning-ntk compare --help`."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or "--help" in words or "-h" in words:
        sys.stdout.write(HELP)
        return
    options, paths = {}, []
    for word in words:
        key, is_option, value = word.partition("=")
        if is_option and not Path(word).exists():
            if key not in ("baseline", "out"):
                raise ConfigError(f"compare has no setting {key!r}.{nearest_name(key, ('baseline', 'out'))}")
            options[key] = value
        else:
            paths.append(Path(word).expanduser())
    compare(paths, options.get("baseline"), Path(options["out"]) if "out" in options else None)


def compare(paths: Sequence[Path], baseline: str | None = None, out: Path | None = None) -> list[Row]:
    """Compare runs; prints the table, writes comparison.md, comparison.csv and the figure, and returns the rows."""
    entries = find_runs(paths)
    check_same_episodes(entries)
    metric = next(iter(entries[0].result.episodes)).removeprefix("test/")
    rows = table_rows(entries, metric, baseline)
    folder = out or common_folder([entry.folder for entry in entries])
    folder.mkdir(parents=True, exist_ok=True)
    write_csv(rows, metric, folder / "comparison.csv")
    (folder / "comparison.md").write_text(markdown(rows, metric, entries[0].result), encoding="utf-8")
    figure = learning_curves(
        [(entry.name, entry.folder) for entry in entries],
        metric,
        [(e.name, e.result.metrics[f"test/{metric}"]) for e in entries if not e.result.timings.get("fit_s")],
        folder / "figures" / "learning_curves.png",
    )
    show(rows, metric, entries[0].result)
    for file in (folder / "comparison.md", folder / "comparison.csv", figure):
        if file is not None:
            sys.stdout.write(f"{file}\n")
    return rows


def find_runs(paths: Sequence[Path]) -> list[Entry]:
    """All finished runs at or below the given folders; unfinished ones are named on stderr."""
    folders: list[Path] = []
    for path in paths:
        if not path.is_dir():
            raise ConfigError(f"{path} is not a folder. Give run folders, or a folder of runs.")
        candidates = [path] if (path / FILE_NAME).exists() else sorted(file.parent for file in path.rglob(FILE_NAME))
        folders += [f for f in candidates if f == path or EVALUATIONS_FOLDER not in f.relative_to(path).parts]
        for config in path.rglob(CONFIG_FILE):
            if not (config.parent / FILE_NAME).exists() and "wandb" not in config.relative_to(path).parts:
                sys.stderr.write(f"left out: {config.parent} (not finished; go on with ckpt={config.parent})\n")
    folders = list(dict.fromkeys(folder.resolve() for folder in folders))
    if not folders:
        raise ConfigError(f"No finished run in {', '.join(map(str, paths))}: there is no {FILE_NAME} in it or below.")
    results = [read_results(folder) for folder in folders]
    return [Entry(n, f, r) for n, f, r in zip(unique_names(folders, results), folders, results, strict=True)]


def unique_names(folders: Sequence[Path], results: Sequence[RunResult]) -> list[str]:
    """Method names where they tell the runs apart, else with the seed, else with the folder."""
    for name in (
        lambda folder, result: result.method,
        lambda folder, result: f"{result.method} seed {result.seed}",
        lambda folder, result: f"{result.method} {folder.name}",
        lambda folder, result: f"{result.method} {folder}",
    ):
        names = [name(folder, result) for folder, result in zip(folders, results, strict=True)]
        if len(set(names)) == len(names):
            break
    return names


def check_same_episodes(entries: Sequence[Entry]) -> None:
    """Raise `ConfigError`, saying what differs, unless all runs were tested on the same episodes."""
    first = entries[0]
    for entry in entries[1:]:
        if entry.result.episode_ids == first.result.episode_ids:
            continue
        ours, theirs = first.result.task, entry.result.task
        keys = sorted(key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key))
        reason = "; ".join(f"{key}: {ours.get(key)} and {theirs.get(key)}" for key in keys)
        raise ConfigError(
            f"{first.name} ({first.folder}) and {entry.name} ({entry.folder}) were tested on different episodes: "
            f"{reason or 'the same settings, but the images of the data differ'}. Compare runs of the same task, or "
            "test one of them again with `lightning-ntk evaluate`."
        )


def table_rows(entries: Sequence[Entry], metric: str, baseline: str | None) -> list[Row]:
    """One row a run, best first, then one row for each method with several runs: the mean of its runs."""
    reference = find_baseline(entries, baseline)
    rows = [make_row([entry], metric, reference) for entry in entries]
    by_method = sorted(entries, key=lambda entry: entry.result.method)
    for _, group in groupby(by_method, key=lambda entry: entry.result.method):
        members = list(group)
        if len(members) > 1:
            rows.append(make_row(members, metric, reference))
    return sorted(rows, key=lambda row: (row.runs > 1, -row.score if metric == "accuracy" else row.score))


def find_baseline(entries: Sequence[Entry], baseline: str | None) -> list[Entry]:
    """The runs that a name stands for: one by its name in the table, or all runs of a method."""
    if baseline is None:
        return []
    named = [e for e in entries if e.name == baseline] or [e for e in entries if e.result.method == baseline]
    named = named or [e for e in entries if Path(baseline).resolve() == e.folder]
    if not named:
        names = sorted({e.name for e in entries} | {e.result.method for e in entries})
        raise ConfigError(f"baseline={baseline} is none of the runs.{nearest_name(baseline, names)} Runs: {names}.")
    return named


def make_row(members: Sequence[Entry], metric: str, reference: Sequence[Entry]) -> Row:
    """A row for one run, or for the mean over several: scores are averaged episode by episode first."""
    scores = mean_scores(members, metric)
    score, ci95 = mean_and_ci95(scores)
    is_baseline = bool(reference) and list(members) == list(reference)
    difference = difference_ci95 = None
    if reference and not is_baseline:
        difference, difference_ci95 = paired_difference(scores, mean_scores(reference, metric))
    method = members[0].result.method
    return Row(
        name=members[0].name if len(members) == 1 else f"{method}, mean of {len(members)} runs",
        runs=len(members),
        score=score,
        ci95=ci95,
        difference=difference,
        difference_ci95=difference_ci95,
        meta_step_s=_mean([entry.result.timings.get("meta_step_s") for entry in members]),
        fit_s=_mean([entry.result.timings.get("fit_s") for entry in members]),
        peak_mib=_mean([entry.result.metrics.get("memory/peak_mib") for entry in members]),
        is_baseline=is_baseline,
    )


def mean_scores(members: Sequence[Entry], metric: str) -> list[float]:
    """Per-episode scores, averaged over runs."""
    per_run = [entry.result.episodes[f"test/{metric}"] for entry in members]
    return [sum(values) / len(values) for values in zip(*per_run, strict=True)]


def cells(rows: Sequence[Row], metric: str) -> tuple[list[str], list[list[str]]]:
    """Header and body of the table, as text."""
    percent = metric == "accuracy"

    def score(value: float, half_width: float, sign: str = "") -> str:
        if percent:
            return f"{100 * value:{sign}.2f} ± {100 * half_width:.2f}"
        return f"{value:{sign}.4f} ± {half_width:.4f}"

    def number(value: float | None, form: str) -> str:
        return "" if not value or value != value else format(value, form)

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
    Console(width=None if sys.stdout.isatty() else 120).print(table)


def write_csv(rows: Sequence[Row], metric: str, file: Path) -> None:
    """The table's numbers, unrounded."""
    names = [field.name for field in dataclasses.fields(Row)]
    with file.open("w", newline="", encoding="utf-8") as target:
        writer = csv.writer(target)
        writer.writerow(["metric", *names])
        for row in rows:
            writer.writerow([metric, *dataclasses.astuple(row)])


def common_folder(folders: Sequence[Path]) -> Path:
    """The deepest folder that holds all runs."""
    return Path(os.path.commonpath([folder.parent for folder in folders]))


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


if __name__ == "__main__":
    from lightning_ntk.cli import guarded

    sys.exit(guarded(main))
