"""The figure of a probe under attack: accuracy over eps and over queries."""

import bisect
import re
from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure

from lightning_ntk.comparison.figures import COLOURS, MARKERS
from lightning_ntk.running.results import mean_and_ci95

# In `broken_after`: the images that an attack never broke.
NEVER = -1.0


def draw(episodes: dict[str, list[float]], series: dict[str, Any], clean: str, l2_families: set[str]) -> Figure:
    """Accuracy over eps (l-infinity, l2) and over SimBA's queries, as far as there is something to show.

    Args:
        episodes, series: see `callbacks.base.ProbeCallback`.
        clean: the name of the accuracy without attack, where the curves begin.
        l2_families: attacks whose eps is an l2 norm.
    """
    curves: dict[bool, dict[str, dict[float, list[float]]]] = {False: {}, True: {}}
    for name, values in episodes.items():
        if match := re.fullmatch(r"adversarial(_support)?/([^/]+)/eps_([^/]+)/accuracy", name):
            label = match[2] + (" on the support" if match[1] else "")
            curves[match[2] in l2_families].setdefault(label, {0.0: episodes[clean]})[float(match[3])] = values
    queries = {name.split("/")[1]: after for name, after in series.items() if name.endswith("/broken_after")}
    labels = {False: "eps in units of 1/255 (largest change of a pixel)", True: "eps (l2 norm of the change)"}
    panels = [kind for kind in (False, True) if curves[kind]] + (["queries"] if queries else [])
    figure = Figure(figsize=(1 + 4.5 * max(1, len(panels)), 4.5), layout="constrained")
    all_axes = figure.subplots(1, max(1, len(panels)), sharey=True, squeeze=False)[0]
    for axes, panel in zip(all_axes, panels, strict=False):
        if panel == "queries":
            for number, (name, after) in enumerate(sorted(queries.items())):
                axes.step(*accuracy_over_queries(after), where="post", color=COLOURS[number], label=name)
            axes.set_xlabel("queries an image")
        else:
            for number, (label, curve) in enumerate(curves[panel].items()):
                _draw_curve(axes, curve, label, number)
            axes.set_xlabel(labels[panel])
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=9, ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    all_axes[0].set_ylabel("accuracy, %")
    all_axes[0].set_ylim(0, 100)
    return figure


def _draw_curve(axes, curve: dict[float, list[float]], label: str, number: int) -> None:
    """Means over episodes with their 95 % intervals."""
    eps = sorted(curve)
    means, half_widths = zip(*(mean_and_ci95(curve[e]) for e in eps), strict=True)
    colour = COLOURS[number % len(COLOURS)]
    heights, spread = [100 * m for m in means], [100 * h for h in half_widths]
    axes.errorbar(
        eps, heights, spread, color=colour, marker=MARKERS[number % len(MARKERS)], markersize=5, capsize=2, label=label
    )


def accuracy_over_queries(broken_after: Sequence[Sequence[float]]) -> tuple[list[float], list[float]]:
    """Numbers of queries, and the percentage of images that are right after so many: a falling staircase."""
    each = [after for episode in broken_after for after in episode]
    broken = sorted(after for after in each if after != NEVER)
    steps = sorted({0.0, *broken})
    return steps, [100 * (1 - bisect.bisect_right(broken, q) / len(each)) for q in steps]
