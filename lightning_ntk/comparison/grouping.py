"""Which runs belong together, as the seeds of a method do, and what runs and their means are called."""

import json
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from lightning_ntk.comparison.table import Entry, printable
from lightning_ntk.running.results import RunResult
from lightning_ntk.running.run_folder_names import EVALUATIONS_FOLDER

# Settings that may differ between the runs of one mean: where a run lies, what it reports to, what it runs on. Of ckpt
# see `start_of`, of callbacks `groups_of_probes`.
OF_ONE_RUN = ("seed", "run_dir", "ckpt", "logger", "callbacks")
OF_ONE_RUN_IN = {
    "data": ("seed", "num_workers", "cache_dir", "download", "resident", "eval_tasks_per_batch"),
    "trainer": ("accelerator", "devices", "num_nodes", "strategy", "enable_progress_bar", "log_every_n_steps"),
}
# Callbacks whose settings decide no number of a test.
NO_PROBES = ("timing", "throughput", "pictures")


def unique_names(folders: Sequence[Path], results: Sequence[RunResult]) -> list[str]:
    """Method names where they tell the runs apart, else with the seed, or the folder where a method has several.

    No two are alike, and all can be written, whatever bytes a folder's name is of.
    """
    methods = [result.method for result in results]
    for name in (
        lambda folder, result: result.method,
        lambda folder, result: f"{result.method} seed {result.seed}",
        lambda folder, result: f"{result.method} {folder.name}" if methods.count(result.method) > 1 else result.method,
        lambda folder, result: f"{result.method} {folder}",
    ):
        names = [printable(name(folder, result)) for folder, result in zip(folders, results, strict=True)]
        if len(set(names)) == len(names):
            break
    return all_unlike(names)


def groups_of_seeds(entries: Sequence[Entry]) -> list[list[Entry]]:
    """The runs, those of one method and the same settings together: what differs between them is the seed."""
    groups: dict[str, list[Entry]] = {}
    for entry in entries:
        groups.setdefault(settings_of(entry.folder, entry.result), []).append(entry)
    return [tests for group in groups.values() for alike in groups_of_probes(group) for tests in groups_of_tests(alike)]


def settings_of(folder: Path, result: RunResult) -> str:
    """What the runs of one mean have in common, as text: the method and all settings but those of one run."""
    config = {key: value for key, value in result.config.items() if key not in OF_ONE_RUN}
    for group, keys in OF_ONE_RUN_IN.items():
        config[group] = {key: value for key, value in (config.get(group) or {}).items() if key not in keys}
    return json.dumps([result.method, start_of(folder, result), config], sort_keys=True)


def differing_keys(*settings: str) -> list[str]:
    """The keys that differ between several `settings_of`: `data.root`, `method.lr`."""
    configs = [json.loads(text) for text in settings]
    flat = [dict(_flat({"method": {"name": method}, "ckpt": start, **config})) for method, start, config in configs]
    keys = dict.fromkeys(key for one in flat for key in one)
    return [key for key in keys if len({json.dumps(one.get(key)) for one in flat}) > 1]


def _flat(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of everything in nested dicts."""
    if not isinstance(value, dict):
        yield key, value
        return
    for name, inner in value.items():
        yield from _flat(inner, f"{key}.{name}" if key else name)


def start_of(folder: Path, result: RunResult) -> str | None:
    """The checkpoint that a new run began with; None where it began without, or went on in its own folder.

    A run that goes on cannot be given a `run_dir`. Its folder may have been moved or copied to another machine since,
    and the path may be relative to where it was started from, so the folder's name decides.
    """
    ckpt = result.config.get("ckpt")
    if ckpt is None:
        return None
    path = Path(str(ckpt))
    start = path.parent.parent if path.parent.name == "checkpoints" else path
    is_own = start.name in ("", folder.name) or start.resolve() == folder
    return None if is_own and result.config.get("run_dir") is None else str(path)


def groups_of_tests(entries: Sequence[Entry]) -> list[list[Entry]]:
    """Tests by the name of their evaluation where some are of one training, which counts once in a mean.

    A run's own test stands with those of other runs. A training is a run folder and a seed: evaluations of checkpoints
    that were moved out of their folders can share a folder.
    """
    groups: dict[str, list[Entry]] = {}
    trainings = set()
    for entry in entries:
        is_evaluation = entry.folder.parent.name == EVALUATIONS_FOLDER
        trainings.add((entry.folder.parent.parent if is_evaluation else entry.folder, entry.result.seed))
        groups.setdefault(entry.folder.name if is_evaluation else "", []).append(entry)
    return list(groups.values()) if len(trainings) < len(entries) else [list(entries)]


def groups_of_probes(entries: Sequence[Entry]) -> list[list[Entry]]:
    """Runs apart where their probes (attacks, ...) were set differently at the test.

    A run without a probe that others have stays with them: it has nothing that could be mixed up.
    """
    groups: dict[str, list[Entry]] = {}
    seen: dict[str, set[str]] = {}
    for entry in entries:
        probes = {
            name: json.dumps(
                {key: value for key, value in settings.items() if not key.startswith("fit_")}, sort_keys=True
            )
            for name, settings in (entry.result.config.get("callbacks") or {}).items()
            if settings and name not in NO_PROBES
        }
        for name, settings in probes.items():
            seen.setdefault(name, set()).add(settings)
        groups.setdefault(json.dumps(probes, sort_keys=True), []).append(entry)
    return list(groups.values()) if any(len(settings) > 1 for settings in seen.values()) else [list(entries)]


def named_groups(entries: Sequence[Entry]) -> list[tuple[str, list[Entry]]]:
    """The groups of runs with their names, no two alike: of folders as much of the path as tells the groups apart."""
    groups = groups_of_seeds(entries)
    names = [group_name(group, entries) for group in groups]
    for parts in range(2, max(len(entry.folder.parts) for entry in entries) + 1):
        names = [
            group_name(group, entries, parts) if names.count(name) > 1 else name
            for name, group in zip(names, groups, strict=True)
        ]
    taken = [entry.name for entry in entries]
    means = iter(all_unlike([name for name, group in zip(names, groups, strict=True) if len(group) > 1], taken))
    return [(next(means) if len(group) > 1 else group[0].name, group) for group in groups]


def group_name(group: Sequence[Entry], entries: Sequence[Entry], parts: int = 1) -> str:
    """The name of one run, or of the mean over several: with their folders where the method has other runs too.

    Args:
        parts: of each folder's path, counted from its end.
    """
    if len(group) == 1:
        return group[0].name
    method, seeds = group[0].result.method, {entry.result.seed for entry in group}
    what = f"{len(seeds)} seeds" if len(seeds) == len(group) else f"{len(group)} runs"
    has_others = sum(entry.result.method == method for entry in entries) > len(group)
    folders = [Path(*entry.folder.parts[-parts:]) for entry in group]
    # A sweep names folders after what varies: those of one mean are alike but for the seed.
    shared = {without_seed(folder) for folder in folders}
    which = shared if len(shared) == 1 and shared != {"."} else map(str, folders)
    return printable(f"{method}, mean over {what}" + (f" ({', '.join(which)})" if has_others else ""))


def without_seed(folder: Path) -> str:
    """`method=maml,method.lr=0.1` for a folder `method=maml,seed=0,method.lr=0.1`; other names stay as they are."""
    parts = [[word for word in part.split(",") if not word.startswith("seed=")] for part in folder.parts]
    return str(Path(*map(",".join, parts)))


def all_unlike(names: Sequence[str], taken: Collection[str] = ()) -> list[str]:
    """The names, with a number behind those that are taken or came before."""
    found: list[str] = []
    for name in names:
        number, unlike = 1, name
        while unlike in found or unlike in taken:
            number += 1
            unlike = f"{name}_{number}"
        found.append(unlike)
    return found
