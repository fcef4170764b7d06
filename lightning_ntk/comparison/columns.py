"""The columns of a comparison where runs were measured further: under attack, out of distribution, conditioning."""

import dataclasses
import json
import math
import statistics
from collections.abc import Sequence
from typing import Any

from lightning_ntk.running.results import RunResult, mean_and_ci95
from lightning_ntk.tracking.metric_names import CONDITION_NUMBER, eps_text, known, robust_names, shifted_names

# Callbacks whose numbers at the test a comparison shows.
PROBES = ("adversarial", "ood", "ntk")
# Their settings that keep no two numbers of one name from being compared: most say which numbers there are, and so do
# the names; the ridge is of a number that is not shown.
HARMLESS = ("attacks", "linf_eps", "l2_eps", "support", "through_adaptation", "corruptions", "by_layer", "ridge")
# Their settings by the names that are in the names of metrics.
BY_NAME = ("targets", "art")
NOT_SET = "not set"


@dataclasses.dataclass(frozen=True)
class Column:
    """A further column of the table: the mean of some metrics of a run.

    Attributes:
        title: on the terminal, in Markdown and on the page.
        key: in comparison.csv.
        metrics: names in `RunResult.metrics`, all of which a run must have for the column to say something of it.
        percent: whether the value is a fraction that is shown in percent.
        note: what the table's caption says of it.
        geometric: whether runs are averaged by their logarithms, as a condition number over episodes is.
    """

    title: str
    key: str
    metrics: tuple[str, ...]
    percent: bool
    note: str = ""
    geometric: bool = False

    def of_runs(self, results: Sequence[RunResult]) -> tuple[float | None, float | None]:
        """(Value, half-width of its 95 % interval) of one run, or of the mean over several.

        None stands for what a run has not measured. A mean of several metrics has no interval: they may be of the same
        episodes.
        """
        values = [mean_of_runs(results, name) for name in self.metrics]
        if any(value is None for value, _ in values):
            return None, None
        if self.geometric and len(results) > 1:
            return statistics.geometric_mean(result.metrics[self.metrics[0]] for result in results), None
        return sum(value for value, _ in values) / len(values), values[0][1] if len(values) == 1 else None

    def show(self, value: float | None, half_width: float | None) -> str:
        """A cell's text."""
        if value is None:
            return ""
        if not self.percent:
            return f"{value:.4g}"
        return f"{100 * value:.2f}" + ("" if half_width is None else f" ± {100 * half_width:.2f}")


def mean_of_runs(results: Sequence[RunResult], name: str) -> tuple[float | None, float | None]:
    """(Mean over runs of a metric, half-width of its 95 % interval over episodes); None: not known."""
    values = [known(result.metrics, name) for result in results]
    if None in values:
        return None, None
    scores = episode_scores(results, name)
    half_width = None if scores is None else mean_and_ci95(scores)[1]
    if half_width is None and len(results) == 1:
        half_width = known(results[0].metrics, f"{name}_ci95")
    return sum(values) / len(values), half_width


def episode_scores(results: Sequence[RunResult], name: str) -> list[float] | None:
    """Per-episode values of a metric on the test's or a probe's episodes, averaged over runs.

    None unless the metric is their mean, and all runs have a finite number for each of the same count of episodes.
    """
    per_run = []
    for result in results:
        probes = [probe.get("episodes", {}) for probe in result.probes.values()]
        found = [episodes[name] for episodes in (*probes, result.episodes) if name in episodes]
        if not name.endswith("/accuracy") or not found or not all(map(math.isfinite, found[0])) or not found[0]:
            return None
        per_run.append(found[0])
    if len({len(values) for values in per_run}) != 1:
        return None
    return [sum(values) / len(values) for values in zip(*per_run, strict=True)]


def further_columns(results: Sequence[RunResult]) -> list[Column]:
    """The columns for what the runs share; runs that lack a measurement altogether have an empty cell."""
    columns = [column for column in (robust_column(results), shifted_column(results)) if column is not None]
    if any(known(result.metrics, CONDITION_NUMBER) is not None for result in results):
        columns.append(Column("condition number", "condition_number", (CONDITION_NUMBER,), False, geometric=True))
    return columns


def robust_column(results: Sequence[RunResult]) -> Column | None:
    """Accuracy under one attack that the runs share, at the middle eps that they share."""
    per_run = [robust_names(_known_names(result)) for result in results]
    for attack in _shared(per_run):
        strengths = {eps: name for eps, name in _shared([run.get(attack, {}) for run in per_run]).items() if eps > 0}
        if strengths:
            eps = list(strengths)[len(strengths) // 2]
            title = f"robust accuracy, % ({attack} {eps_text(attack, eps)})"
            key = strengths[eps].removesuffix("/accuracy").replace("/", "_")
            return Column(title, f"{key}_accuracy", (strengths[eps],), True)
    return None


def shifted_column(results: Sequence[RunResult]) -> Column | None:
    """Mean accuracy over the other data sets that the runs share, or else over the kinds of corruption."""
    for corrupted in (False, True):
        shared = _shared([shifted_names(_known_names(result), corrupted=corrupted) for result in results])
        if shared:
            targets = ", ".join(shared) + (" (corrupted images)" if corrupted else "")
            note = f"Out of distribution: {'mean over ' if len(shared) > 1 else ''}{targets}."
            return Column("out of distribution, %", "ood_accuracy", tuple(shared.values()), True, note)
    return None


def settings_note(results: Sequence[RunResult]) -> str:
    """What the caption says where a column, or a figure, has numbers of probes that were set differently."""
    differing = differing_settings(results)
    if not differing:
        return ""
    what = "; ".join(f"{key}: {' and '.join(values)}" for key, values in differing.items())
    return f"Measured with different settings: {what}."


def differing_settings(results: Sequence[RunResult], probes: Sequence[str] = PROBES) -> dict[str, list[str]]:
    """`{"adversarial.steps": ["20", "5"]}`: what was not the same in all tests that have numbers of a probe."""
    found = {}
    for probe in probes:
        places = (f"{probe}/", f"{probe}_support/")
        measured = [result for result in results if any(name.startswith(places) for name in _known_names(result))]
        per_run = [settings for settings in (_settings(result, probe) for result in measured) if settings]
        for key in dict.fromkeys(key for settings in per_run for key in settings):
            values = [_text(settings.get(key, NOT_SET)) for settings in per_run]
            if key.startswith(tuple(f"{name}." for name in BY_NAME)):  # A run without has no number of that name.
                values = [value for value in values if value != NOT_SET]
            if len(set(values)) > 1:
                found[f"{probe}.{key}"] = list(dict.fromkeys(values))
    return found


def _settings(result: RunResult, probe: str) -> dict[str, Any]:
    """The settings of a probe that its numbers at the test depend on."""
    settings = (result.config.get("callbacks") or {}).get(probe) or {}
    found = {}
    for key, value in settings.items():
        if key in BY_NAME:
            found |= {f"{key}.{name}": each for name, each in value.items()} if isinstance(value, dict) else {}
        elif key not in HARMLESS and key != "_recursive_" and not key.startswith("fit_"):
            found[key] = value
    return found


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True)


def _known_names(result: RunResult) -> list[str]:
    return [name for name in result.metrics if known(result.metrics, name) is not None]


def _shared(found: Sequence[dict]) -> dict:
    """The items whose keys are in all dicts that are not empty."""
    filled = [each for each in found if each]
    return {key: value for key, value in filled[0].items() if all(key in each for each in filled)} if filled else {}
