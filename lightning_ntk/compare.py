"""`lightning-ntk compare RUN RUN ...`: runs that saw the same test episodes, in one table, figure and page."""

import dataclasses
import json
import math
import os
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from lightning_ntk.comparison.columns import Column, further_columns
from lightning_ntk.comparison.figures import learning_curves, scores_of_methods
from lightning_ntk.comparison.grouping import differing_keys, groups_of_seeds, named_groups, settings_of, unique_names
from lightning_ntk.comparison.page import write_page
from lightning_ntk.comparison.table import Entry, Group, Row, markdown, printable, show, summary, write_csv
from lightning_ntk.errors import ConfigError, nearest_name
from lightning_ntk.running.results import FILE_NAME, RunResult, mean_and_ci95, paired_difference, read_results
from lightning_ntk.running.run_folder_names import CONFIG_FILE, EVALUATIONS_FOLDER
from lightning_ntk.settings.paths import as_path

SETTINGS = ("baseline", "by_task", "out")

HELP = """usage: lightning-ntk compare RUN [RUN ...] [baseline=NAME] [by_task=true] [out=FOLDER]

Compare runs that were tested on the same episodes: one table (also as Markdown and CSV), the learning curves, and a
page with both and all figures, comparison.html, which needs no network.
A RUN is a run folder, or a folder in which run folders are found.

  baseline=NAME   a method, or a run's name in the table: adds the paired difference to it, episode by episode
  by_task=true    runs on several tasks: a comparison of each, in comparison_TASK/, and all in one table, overview.md
  out=FOLDER      where comparison.html, comparison.md, comparison.csv and figures/ go
                  (default: the folder of runs, where one is given, else ./runs/comparison)

Examples:
  lightning-ntk compare runs/demo baseline=maml
  lightning-ntk compare runs/A runs/B out=comparison
"""


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
            if not key.isidentifier():
                raise ConfigError(f"{word} is not a folder. Give run folders, or a folder of runs.")
            if key not in SETTINGS:
                near = nearest_name(key, SETTINGS)
                raise ConfigError(f"compare has no setting {key!r}.{near} Nor is there a folder {word}.")
            options[key] = value
        else:
            paths.append(as_path(word, "RUN"))
    if options.get("baseline") == "":
        raise ConfigError("baseline= names a method, or a run's name in the table; it is empty.")
    if options.get("by_task", "false") not in ("true", "false"):
        raise ConfigError(f"by_task must be true or false, but got {options['by_task']!r}.")
    out = as_path(options["out"], "out") if "out" in options else None
    if options.get("by_task") == "true":
        from lightning_ntk.comparison.overview import compare_tasks

        compare_tasks(paths, options.get("baseline"), out)
    else:
        compare(paths, options.get("baseline"), out)


def compare(paths: Sequence[Path], baseline: str | None = None, out: Path | None = None) -> list[Row]:
    """Compare runs of one task; prints the table, writes the files of a comparison, and returns the rows."""
    return compare_entries(find_runs(paths), baseline, out or default_folder(paths))


def compare_entries(entries: Sequence[Entry], baseline: str | None, folder: Path) -> list[Row]:
    """Print the table of runs, write it with its figure and its page into the folder, and return the rows."""
    metric = next(iter(entries[0].result.episodes)).removeprefix("test/")
    check_same_episodes(entries, metric)
    columns = further_columns([entry.result for entry in entries])
    rows = table_rows(entries, metric, baseline, columns)
    try:
        files = write_files(entries, rows, metric, columns, folder)
    except OSError as error:
        raise ConfigError(f"out={folder} cannot be written: {error}. Name another folder by out=.") from error
    show(rows, metric, [entry.result for entry in entries], columns)
    for file in files:
        sys.stdout.write(f"{printable(file)}\n")
    return rows


def write_files(
    entries: Sequence[Entry], rows: Sequence[Row], metric: str, columns: Sequence[Column], folder: Path
) -> list[Path]:
    """Write the table as Markdown and CSV, figures of scores and of curves, and the page; returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    table, numbers, page = (folder / f"comparison.{ending}" for ending in ("md", "csv", "html"))
    write_csv(rows, metric, numbers, columns)
    results = [entry.result for entry in entries]
    table.write_text(markdown(rows, metric, results, columns), encoding="utf-8")
    # The runs of one mean share a label, and so a colour; each is drawn for itself.
    groups = [
        Group(name.replace(", mean over ", ", "), name, tuple(members)) for name, members in named_groups(entries)
    ]
    scores = scores_of_methods(summary(rows), metric, folder / "figures" / "scores.png")
    curves = learning_curves(
        [(group.label, entry.folder) for group in groups for entry in group.members],
        metric,
        [
            (group.row, mean_and_ci95(mean_scores(group.members, metric))[0])
            for group in groups
            if not any(entry.result.is_trained for entry in group.members)
        ],
        folder / "figures" / "learning_curves.png",
    )
    write_page(rows, metric, columns, groups, page)
    return [page, table, numbers, scores, *([curves] if curves else [])]


def find_runs(paths: Sequence[Path], *, timed: bool = False) -> list[Entry]:
    """All finished runs at or below the given folders; unfinished ones are named on stderr.

    Args:
        timed: whether a training that was made again, in another time, is a run of its own.
    """
    folders: list[Path] = []
    if not paths:
        raise ConfigError("There is nothing to compare: give run folders, or a folder of runs.")
    for path in paths:
        if not path.is_dir():
            raise ConfigError(f"{path} is not a folder. Give run folders, or a folder of runs.")
        candidates = [path] if (path / FILE_NAME).exists() else sorted(_folders_with(FILE_NAME, path))
        folders += [f for f in candidates if f == path or EVALUATIONS_FOLDER not in f.relative_to(path).parts]
        for folder in _folders_with(CONFIG_FILE, path):
            if not (folder / FILE_NAME).exists() and "wandb" not in folder.relative_to(path).parts:
                can_go_on = (folder / "checkpoints" / "last.ckpt").exists()
                ckpt = f"ckpt={shlex.quote(str(folder))} test=true"  # It may have been told not to test.
                advice = f"lightning-ntk train {ckpt}" if can_go_on else "stopped before its first checkpoint"
                sys.stderr.write(f"left out: {folder} (without results; {advice})\n")
    folders = list(dict.fromkeys(folder.resolve() for folder in folders))
    if not folders:
        raise ConfigError(f"No finished run in {', '.join(map(str, paths))}: there is no {FILE_NAME} in it or below.")
    read = {folder: read_results(folder) for folder in folders}
    folders = list(_without_copies(read, timed))
    results = [read[folder] for folder in folders]
    return [Entry(n, f, r) for n, f, r in zip(unique_names(folders, results), folders, results, strict=True)]


def _without_copies(read: Mapping[Path, RunResult], timed: bool) -> Iterator[Path]:
    """The folders less those of trainings before, which are named on stderr: a training counts once.

    A folder may have been copied, or two sweeps had the same job: equal settings, seed and callbacks then come to equal
    scores of all episodes, if not to equal timings.
    """
    seen: dict[str, Path] = {}
    for folder, result in read.items():
        # Two evaluations of a run under names of their own may well come to the same.
        evaluation = folder.name if folder.parent.name == EVALUATIONS_FOLDER else None
        training = [result.seed, result.config.get("callbacks"), result.episode_ids, result.episodes, evaluation]
        training += [result.timings] if timed else []
        first = seen.setdefault(settings_of(folder, result) + json.dumps(training, sort_keys=True), folder)
        if first is folder:
            yield folder
        else:
            sys.stderr.write(f"left out: {printable(str(folder))} (the same training as {printable(str(first))})\n")


def _folders_with(name: str, top: Path) -> Iterator[Path]:
    """The folders at or below `top` that hold a file of this name; links are followed, each folder is visited once."""
    visited = set()
    for folder, below, files in os.walk(top, followlinks=True):
        real = os.path.realpath(folder)
        if real in visited:
            below.clear()
        elif name in files:
            yield Path(folder)
        visited.add(real)


def check_same_episodes(entries: Sequence[Entry], metric: str) -> None:
    """Raise `ConfigError`, saying what differs, unless all runs were tested on the same episodes."""
    first = entries[0]
    for entry in entries[1:]:
        if entry.result.episode_ids == first.result.episode_ids:
            here, there = (len(e.result.episodes[f"test/{metric}"]) for e in (first, entry))
            if here != there:
                raise ConfigError(
                    f"{first.name} ({first.folder}) was tested on {here} episodes, {entry.name} ({entry.folder}) on "
                    f"{there} of the same. Test one of them again with `lightning-ntk evaluate`."
                )
            continue
        ours, theirs = first.result.task, entry.result.task
        keys = sorted(key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key))
        reason = "; ".join(f"{key}: {ours.get(key)} and {theirs.get(key)}" for key in keys)
        reason = reason or "the same settings, but the data differ (images, or settings that they do not name)"
        raise ConfigError(
            f"{first.name} ({first.folder}) and {entry.name} ({entry.folder}) were tested on different episodes: "
            f"{reason}. Compare runs of the same task, test one of them again with `lightning-ntk evaluate`, or have "
            "each task for itself by `lightning-ntk compare ... by_task=true`."
        )


def table_rows(
    entries: Sequence[Entry], metric: str, baseline: str | None, columns: Sequence[Column] = ()
) -> list[Row]:
    """One row a run, best first, then one row for each set of runs that differ in their seed alone: their mean."""
    reference = find_baseline(entries, baseline)
    means = [(name, group) for name, group in named_groups(entries) if len(group) > 1]
    averaged = {entry.name for _, group in means for entry in group}
    rows = [
        dataclasses.replace(
            make_row(name, group, metric, reference, columns),
            in_mean=len(group) == 1 and group[0].name in averaged,
        )
        for name, group in [(entry.name, [entry]) for entry in entries] + means
    ]
    sign = -1 if metric == "accuracy" else 1
    # NaN, the score of a run that diverged, has no order: it goes last.
    return sorted(rows, key=lambda row: (row.runs > 1, math.isnan(row.score), sign * row.score))


def find_baseline(entries: Sequence[Entry], baseline: str | None) -> list[Entry]:
    """The runs that a name stands for: one by its name in the table, or all runs of a method."""
    if baseline is None:
        return []
    named = [e for e in entries if e.name == baseline] or [e for e in entries if e.result.method == baseline]
    named = named or [e for e in entries if as_path(baseline, "baseline").resolve() == e.folder]
    if not named:
        names = sorted({e.name for e in entries} | {e.result.method for e in entries})
        raise ConfigError(
            f"baseline={baseline} is none of the runs.{nearest_name(baseline, names)} Runs: {', '.join(names)}."
        )
    if len(groups_of_seeds(named)) > 1:
        names = ", ".join(repr(e.name) for e in named)
        differing = differing_keys(*(settings_of(e.folder, e.result) for e in named))
        reason = f"runs of different settings ({', '.join(differing)})" if differing else "several tests of one run"
        raise ConfigError(f"baseline={baseline} stands for {reason}. Name one of them: {names}.")
    return named


def make_row(
    name: str, members: Sequence[Entry], metric: str, reference: Sequence[Entry], columns: Sequence[Column] = ()
) -> Row:
    """A row for one run, or for the mean over several: scores are averaged episode by episode first."""
    scores = mean_scores(members, metric)
    score, ci95 = mean_and_ci95(scores)
    is_baseline = bool(reference) and list(members) == list(reference)
    difference = difference_ci95 = None
    if reference and not is_baseline:
        difference, difference_ci95 = paired_difference(scores, mean_scores(reference, metric))
    return Row(
        name=name,
        method=members[0].result.method,
        runs=len(members),
        score=score,
        ci95=ci95,
        difference=difference,
        difference_ci95=difference_ci95,
        meta_step_s=_mean([entry.result.timings.get("meta_step_s") for entry in members]),
        # 0 is the clock and the memory of a run that did not train.
        fit_s=_mean([entry.result.timings.get("fit_s") for entry in members]) or None,
        peak_mib=_mean([entry.result.metrics.get("memory/peak_mib") for entry in members]) or None,
        is_baseline=is_baseline,
        further=tuple(column.of_runs([entry.result for entry in members]) for column in columns),
    )


def mean_scores(members: Sequence[Entry], metric: str) -> list[float]:
    """Per-episode scores, averaged over runs."""
    per_run = [entry.result.episodes[f"test/{metric}"] for entry in members]
    return [sum(values) / len(values) for values in zip(*per_run, strict=True)]


def default_folder(paths: Sequence[Path]) -> Path:
    """Where a comparison goes: into the folder of runs, where one is given, else into ./runs/comparison."""
    is_folder_of_runs = len(paths) == 1 and not (paths[0] / FILE_NAME).exists()
    return paths[0].resolve() if is_folder_of_runs else Path.cwd() / "runs" / "comparison"


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None and math.isfinite(value)]
    return sum(known) / len(known) if known else None


if __name__ == "__main__":
    from lightning_ntk.cli import guarded

    sys.exit(guarded(main))
