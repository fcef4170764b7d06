"""Pictures of accuracy out of distribution."""

from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure

from lightning_ntk.comparison.figures import COLOURS, LINES, MARKERS


def over_severities(
    severities: Sequence[int], curves: Mapping[str, Sequence[float]], others: Mapping[str, float]
) -> Figure:
    """Accuracies over the severity of each corruption, and those on other data sets as horizontal lines."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for number, (name, accuracies) in enumerate(curves.items()):
        style = {"color": COLOURS[number % len(COLOURS)], "marker": MARKERS[number % len(MARKERS)]}
        label = name.removeprefix("corrupted_").replace("_", " ")
        axes.plot(severities, [100 * accuracy for accuracy in accuracies], label=label, **style)
    for number, (name, accuracy) in enumerate(others.items()):
        axes.axhline(100 * accuracy, color="0.4", linestyle=LINES[(number + 1) % len(LINES)], label=name)
    axes.set_xlabel("severity of the corruption (0: clean source)")
    axes.set_ylabel("accuracy, %")
    axes.set_xticks(list(severities))
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right center", frameon=False)
    return figure
