"""What the figures of a comparison's page show, as plain data: which runs, which points, which axes.

The page's script draws them; it knows nothing of metrics. A series is `{"label": number of its group, "name": run,
"points": [[x, y, half-width of the 95 % interval or None], ...]}`.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

from lightning_ntk.comparison.columns import differing_settings, episode_scores, mean_of_runs
from lightning_ntk.comparison.figures import read_training
from lightning_ntk.comparison.table import Entry, Group
from lightning_ntk.running.results import mean_and_ci95, paired_difference
from lightning_ntk.tracking.metric_names import (
    CLEAN,
    CONDITION_NUMBER,
    EFFECTIVE_RANK,
    MASKING,
    SOURCE,
    eps_text,
    is_l2,
    known,
    names_without_eps,
    robust_names,
    severity_names,
    shifted_names,
)

Figure = dict[str, Any]

# Of a line over training: a figure is some 400 pixels wide, and a page of many long runs is not to be megabytes.
MOST_POINTS = 300


def page_figures(groups: Sequence[Group], metric: str) -> list[Figure]:
    """Every figure for which some run has data."""
    score = {"label": "accuracy, %"} if metric == "accuracy" else {"label": "mean squared error", "log": True}
    figures = [
        *training_figures(groups, metric, score),
        time_figure(groups, metric, score),
        *robust_figures(groups),
        bars(groups, "Accuracy under attack, whatever the size of the change", {"no attack": CLEAN}, names_without_eps),
        bars(groups, "Out of distribution", {"source": SOURCE}, all_shifted),
        severity_figure(groups),
    ]
    for figure in figures:
        if figure["y"].get("log"):  # Such an axis has no place for other numbers.
            for series in figure["series"]:
                series["points"] = [point for point in series["points"] if point[1] > 0]
    return [figure for figure in figures if any(series["points"] for series in figure["series"])]


def training_figures(groups: Sequence[Group], metric: str, score: dict[str, Any]) -> list[Figure]:
    """Validation scores over steps and over seconds, and the kernel's conditioning over steps; a line for each run."""
    lines = [(k, entry, read_training(entry.folder)) for k, group in enumerate(groups) for entry in group.members]
    factor = 100 if metric == "accuracy" else 1

    def figure(title: str, x: str, column: str, y_axis: dict[str, Any], scale: float = 1) -> Figure:
        x_axis = {"label": "meta-steps" if x == "step" else "seconds of training"}
        series = []
        for k, entry, rows in lines:
            rows = [row for row in rows if x in row and column in row]
            points = [[row[x], _times(scale, row[column]), _times(scale, row.get(f"{column}_ci95"))] for row in rows]
            series.append({"label": k, "name": entry.name, "points": thinned(_drawable(points))})
        return {"kind": "lines", "title": title, "x": x_axis, "y": y_axis, "series": series}

    def with_references(figure: Figure) -> Figure:
        """Runs without training, as level lines at their test score."""
        places = [point[0] for series in figure["series"] for point in series["points"]]
        for series, (_, entry, _) in zip(figure["series"], lines, strict=True):
            if places and not series["points"] and not entry.result.is_trained:
                level = factor * entry.result.metrics.get(f"test/{metric}", math.nan)
                points = [[min(places), level, None], [max(places), level, None]]
                series |= {"name": f"{entry.name} (test)", "points": _drawable(points)}
        return figure

    return [
        with_references(figure("Validation over meta-steps", "step", f"val/{metric}", score, factor)),
        with_references(figure("Validation over seconds of training", "time/fit", f"val/{metric}", score, factor)),
        figure("Condition number of the NTK", "step", CONDITION_NUMBER, {"label": "condition number", "log": True}),
        figure("Effective rank of the NTK", "step", EFFECTIVE_RANK, {"label": "effective rank"}),
    ]


def thinned(points: Sequence[list[Any]]) -> list[list[Any]]:
    """At most MOST_POINTS, evenly chosen, with the first and the last; in seven digits (the page shows four)."""
    kept = min(len(points), MOST_POINTS)
    chosen = [points[round(k * (len(points) - 1) / max(1, kept - 1))] for k in range(kept)]
    return [[None if value is None else float(f"{value:.7g}") for value in point] for point in chosen]


def time_figure(groups: Sequence[Group], metric: str, score: dict[str, Any]) -> Figure:
    """Test score against the seconds of training, a point for each run."""
    factor = 100 if metric == "accuracy" else 1
    series = []
    for k, group in enumerate(groups):
        for entry in group.members:
            mean, half_width = mean_and_ci95(entry.result.episodes[f"test/{metric}"])
            seconds = known(entry.result.timings, "fit_s")
            points = _drawable([[seconds, factor * mean, _times(factor, half_width)]]) if seconds else []
            series.append({"label": k, "name": entry.name, "points": points})
    axis = {"label": "seconds of training", "zero": True}
    return {"kind": "points", "title": "Test against training time", "x": axis, "y": score, "series": series}


def robust_figures(groups: Sequence[Group]) -> list[Figure]:
    """For each attack, accuracy over eps: a line for each group, the mean over its runs."""
    figures = []
    for attack, strengths in robust_names(_metrics(groups)).items():
        places = {0.0: CLEAN, **strengths}
        series = []
        for k, group in enumerate(groups):
            points = [[eps, *group_mean(group.members, n), eps_text(attack, eps)] for eps, n in places.items()]
            has_attack = any(eps > 0 and mean is not None for eps, mean, *_ in points)
            series.append({"label": k, "name": group.label, "points": _drawable(points) if has_attack else []})
        label = "eps, the l2 norm of the change" if is_l2(attack) else "eps, the largest change of a pixel"
        figures.append(
            {
                "kind": "lines",
                "title": f"Accuracy under attack: {attack}",
                "x": {"label": label, "ticks": [[eps, eps_text(attack, eps)] for eps in places], "zero": True},
                "y": {"label": "accuracy, %", "zero": True},
                "series": series,
            }
        )
    return figures


def severity_figure(groups: Sequence[Group]) -> Figure:
    """Accuracy over the severity of corruptions, the mean over their kinds; severity 0 is the source."""
    places = severity_names(_metrics(groups))
    series = []
    for k, group in enumerate(groups):
        points = [[0, *group_mean(group.members, SOURCE)]] if places else []
        for severity, names in places.items():
            means = [group_mean(group.members, name)[0] for name in names]
            points.append([severity, None if None in means else sum(means) / len(means), None])
        has_corrupted = any(point[0] > 0 and point[1] is not None for point in points)
        series.append({"label": k, "name": group.label, "points": _drawable(points) if has_corrupted else []})
    return {
        "kind": "lines",
        "title": "Corrupted images, mean over kinds",
        "x": {"label": "severity", "ticks": [[place, str(place)] for place in (0, *places)]},
        "y": {"label": "accuracy, %", "zero": True},
        "series": series,
    }


def all_shifted(names: Sequence[str]) -> dict[str, str]:
    """Accuracies on other data sets, then on corrupted images."""
    corrupted = {f"corrupted: {kind}": name for kind, name in shifted_names(names, corrupted=True).items()}
    return {**shifted_names(names), **corrupted}


def bars(
    groups: Sequence[Group], title: str, first: dict[str, str], find: Callable[[Sequence[str]], dict[str, str]]
) -> Figure:
    """Accuracies as bars, for each of several metrics: those that `find` finds, beside a first one for comparison."""
    targets = {**first, **find(_metrics(groups))}
    series = []
    for k, group in enumerate(groups):
        points = [[place, *group_mean(group.members, name)] for place, name in enumerate(targets.values())]
        has_target = any(place >= len(first) and mean is not None for place, mean, _ in points)
        series.append({"label": k, "name": group.label, "points": _drawable(points) if has_target else []})
    return {
        "kind": "bars",
        "title": title,
        "x": {"label": "", "names": list(targets)},
        "y": {"label": "accuracy, %", "zero": True},
        "series": series,
    }


def robust_differences(groups: Sequence[Group], reference: Sequence[Entry]) -> tuple[list[str], list[list[str]]]:
    """Header and body of a table: accuracy under attack less the baseline's, paired over the probe episodes.

    Empty where no other group shares an attack, an eps and its probe episodes with the baseline. Groups that were
    attacked with other settings are left out.
    """
    others = [
        group
        for group in groups
        if list(group.members) != list(reference)
        and not differing_settings([entry.result for entry in (*reference, *group.members)], ["adversarial"])
    ]
    header, body = ["attack", "eps", *(group.label for group in others)], []
    for attack, strengths in robust_names(_metrics(groups)).items():
        for eps, name in strengths.items():
            baseline = episode_scores([entry.result for entry in reference], name)
            line = []
            for group in others:
                scores = episode_scores([entry.result for entry in group.members], name)
                if baseline is None or scores is None or len(scores) != len(baseline):
                    line.append("")
                    continue
                difference, half_width = paired_difference(scores, baseline)
                line.append(f"{100 * difference:+.2f} ± {100 * half_width:.2f}")
            if any(line):
                body.append([attack, eps_text(attack, eps), *line])
    return header, body


def masking_notes(groups: Sequence[Group]) -> list[str]:
    """For each run that shows signs of masked gradients, which: its accuracy under FGSM and PGD may be too high."""
    notes = []
    for entry in (entry for group in groups for entry in group.members):
        found = {match["sign"]: v for name, v in entry.result.metrics.items() if (match := MASKING.fullmatch(name))}
        if found:
            from lightning_ntk.attacks.masking import TOLERANCE  # Needs torch, which a comparison else does not.

            signs = [f"{sign} {value:.2g}" for sign, value in found.items() if value > TOLERANCE]
            notes += [f"{entry.name}: {', '.join(signs)}"] if signs else []
    return notes


def group_mean(members: Sequence[Entry], name: str) -> tuple[float | None, float | None]:
    """(Mean over runs, half-width of its 95 % interval over episodes) of an accuracy, in percent; None: not known."""
    return tuple(_times(100, value) for value in mean_of_runs([entry.result for entry in members], name))


def _metrics(groups: Sequence[Group]) -> list[str]:
    """The names of all metrics of all runs."""
    return list(dict.fromkeys(name for group in groups for entry in group.members for name in entry.result.metrics))


def _times(factor: float, value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else factor * value


def _drawable(points: Sequence[list[Any]]) -> list[list[Any]]:
    """The points whose coordinates are finite numbers."""
    return [p for p in points if all(value is not None and math.isfinite(value) for value in p[:2])]
