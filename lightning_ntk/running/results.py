"""results.json: what a finished run leaves for others to read, and the statistics of per-episode scores."""

import dataclasses
import importlib.metadata
import json
import math
import os
import platform
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning_ntk.errors import DataError
from lightning_ntk.running.run_folder_names import EVALUATIONS_FOLDER

SCHEMA_VERSION = 2
# Version 1 had no probes.
READABLE_VERSIONS = (1, 2)
FILE_NAME = "results.json"
REPORTED_PACKAGES = ("torch", "pytorch-lightning", "learn2learn", "torchvision", "numpy", "wandb", "hydra-core")


@dataclasses.dataclass(frozen=True)
class RunResult:
    """One run's results. Accuracies are fractions in [0, 1], times are in seconds, memory in MiB.

    Attributes:
        method, data: names of the config choices.
        seed: of initial parameters and training episodes.
        metrics: `{"test/accuracy": ..., "test/accuracy_ci95": ..., "memory/peak_mib": ...}`, and what callbacks
            measured at the test, under their own names ("ntk/condition_number").
        episodes: per-episode test scores by metric, ordered by episode.
        episode_ids: SHA-256 that identifies the test episodes.
        task: the settings that decide the test episodes.
        timings: `meta_step_s` (median), `fit_s`, `test_s`; for each probe callback `<name>_fit_s` and `<name>_test_s`.
        versions: of Python and the packages that matter.
        config: the resolved config.
        probes: what callbacks measured at the test, by callback: `{"ntk": {"episodes": {metric: per-episode numbers},
            "series": {...}}}`; series hold curves, spectra and the like, in a form of the callback's own.
        tested: the weights that were tested, `{"checkpoint": "best.ckpt", "step": 250}`, the step being the one it was
            saved after; empty for a method without training, and in files from before it was recorded.
    """

    method: str
    data: str
    seed: int
    metrics: dict[str, float]
    episodes: dict[str, list[float]]
    episode_ids: str
    task: dict[str, Any]
    timings: dict[str, float]
    versions: dict[str, str]
    config: dict[str, Any]
    probes: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    tested: dict[str, Any] = dataclasses.field(default_factory=dict)
    schema_version: int = SCHEMA_VERSION

    @property
    def is_trained(self) -> bool:
        """Whether what was tested had been trained; files from before `tested` was recorded tell by its time."""
        return bool(self.tested or self.timings.get("fit_s"))


def write_results(folder: Path, result: RunResult) -> Path:
    """Write results.json into a folder, whole or not at all.

    It is strict JSON, which has no NaN: a number that is not finite becomes null (a run without training has no
    `meta_step_s`), in the config a string ("inf").
    """
    file = folder / FILE_NAME
    content = dataclasses.asdict(result)
    config = _replace_non_finite(content.pop("config"), str)
    text = json.dumps({**_replace_non_finite(content, lambda _: None), "config": config}, indent=1, allow_nan=False)
    temporary = file.with_suffix(".tmp")
    temporary.write_text(text + "\n", encoding="utf-8")
    os.replace(temporary, file)
    return file


def read_results(folder: Path) -> RunResult:
    """Read a run folder's results.json; a number that was not finite comes back as NaN.

    Raises:
        DataError: it is not there, is not JSON, has another schema version, lacks fields or has other types in them.
    """
    file = folder / FILE_NAME
    run = shlex.quote(str(folder.parent.parent if folder.parent.name == EVALUATIONS_FOLDER else folder))
    advice = (
        f"Test the run again with `lightning-ntk evaluate run={run}` (`lightning-ntk train ckpt={run}` where it did "
        "not end), or leave it out."
    )
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{folder} holds no {FILE_NAME}: it is no run folder, or its run has not finished.") from None
    except (OSError, ValueError) as error:
        raise DataError(f"{file} cannot be read as JSON: {error}. {advice}") from error
    version = content.get("schema_version") if isinstance(content, dict) else None
    if version not in READABLE_VERSIONS:
        raise DataError(
            f"{file} has schema_version {version}, but this version of lightning_ntk reads "
            f"{' and '.join(map(str, READABLE_VERSIONS))}. "
            "Test the run again with `lightning-ntk evaluate`, or read it with the version that wrote it."
        )
    if version == 1:
        content.setdefault("probes", {})
    content.setdefault("tested", {})
    names = {field.name for field in dataclasses.fields(RunResult)}
    missing = sorted(names - content.keys())
    if missing:
        raise DataError(f"{file} lacks the fields {', '.join(missing)}: it was not written by lightning_ntk.")
    wrong = _wrong_fields(content)
    if wrong:
        raise DataError(
            f"{file} has a field of another type than it should, {', '.join(wrong)}: it was not written by "
            f"lightning_ntk. {advice}"
        )
    if not content["episodes"] or not all(content["episodes"].values()):
        raise DataError(f"{file} holds no scores of episodes. Test the run again with `lightning-ntk evaluate`.")
    for numbers in (content["metrics"], content["timings"]):
        numbers.update({name: math.nan for name, value in numbers.items() if value is None})
    for scores in (content["episodes"], *(probe.get("episodes", {}) for probe in content["probes"].values())):
        scores.update({name: [math.nan if v is None else v for v in values] for name, values in scores.items()})
    return RunResult(**{name: content[name] for name in names})


def _wrong_fields(content: dict[str, Any]) -> list[str]:
    """The fields whose values, or those inside, are not of the types that `RunResult` states."""

    def is_dict_of(value: Any, is_right: Callable[[Any], bool]) -> bool:
        return isinstance(value, dict) and all(map(is_right, value.values()))

    def is_number(value: Any) -> bool:
        return value is None or isinstance(value, int | float)

    def is_scores(value: Any) -> bool:
        return is_dict_of(value, lambda scores: isinstance(scores, list) and all(map(is_number, scores)))

    def is_probe(value: Any) -> bool:
        return isinstance(value, dict) and is_scores(value.get("episodes", {}))

    def is_group(value: Any) -> bool:
        return value is None or isinstance(value, dict)

    config = content["config"] if isinstance(content["config"], dict) else {}
    right = {name: isinstance(content[name], str) for name in ("method", "data", "episode_ids")}
    right |= {"seed": isinstance(content["seed"], int)}
    right |= {name: isinstance(content[name], dict) for name in ("task", "versions", "config", "tested")}
    right |= {name: is_dict_of(content[name], is_number) for name in ("metrics", "timings")}
    right |= {"episodes": is_scores(content["episodes"])}
    right |= {"probes": is_dict_of(content["probes"], is_probe)}
    right |= {f"config.{name}": is_group(config.get(name)) for name in ("data", "trainer", "callbacks")}
    if right["config.callbacks"]:
        right |= {f"config.callbacks.{key}": is_group(v) for key, v in (config.get("callbacks") or {}).items()}
    return [name for name, is_right in right.items() if not is_right]


def package_versions() -> dict[str, str]:
    """Versions of Python, of this package and of those that results depend on."""
    from lightning_ntk.version import __version__

    versions = {"python": platform.python_version(), "lightning_ntk": __version__}
    for name in REPORTED_PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def mean_and_ci95(values: list[float]) -> tuple[float, float]:
    """Mean of per-episode scores and the half-width of its 95 % interval, 1.96 standard errors (0 for one value)."""
    mean = math.fsum(values) / len(values)
    if len(values) == 1:
        return mean, 0.0
    variance = math.fsum((value - mean) * (value - mean) for value in values) / (len(values) - 1)
    return mean, 1.96 * math.sqrt(variance / len(values))


def paired_difference(scores: list[float], baseline: list[float]) -> tuple[float, float]:
    """Mean of `scores - baseline` over the same episodes, and the half-width of its 95 % interval."""
    return mean_and_ci95([a - b for a, b in zip(scores, baseline, strict=True)])


def _replace_non_finite(value: Any, stand_in: Callable[[float], str | None]) -> Any:
    """A copy of nested dicts and lists, with something in the place of each NaN and infinity."""
    if isinstance(value, dict):
        return {key: _replace_non_finite(item, stand_in) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_replace_non_finite(item, stand_in) for item in value]
    return stand_in(value) if isinstance(value, float) and not math.isfinite(value) else value
