"""The figures of `callbacks.pictures`: an episode of images in classes, and fits of curves."""

from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from lightning_ntk.comparison.figures import COLOURS
from lightning_ntk.comparison.fit_figure import draw_curves
from lightning_ntk.episode import Episode

RIGHT, WRONG, TRUE, OTHER = COLOURS[2], COLOURS[1], COLOURS[0], "0.75"
# Shots of a class that are shown.
SHOTS = 5
# Below an image, the height of its bars and of its line of text, in widths of an image.
BARS, TEXT = 0.3, 0.2


@dataclass(frozen=True)
class Changed:
    """Queries after an attack.

    Attributes:
        chosen: indices `[k]` into the queries.
        images: `[k, channels, height, width]` in [0, 1].
        probabilities: `[k, C]` of the classes.
        eps: largest change of a pixel.
    """

    chosen: Tensor
    images: Tensor
    probabilities: Tensor
    eps: float


def episode(shown: Episode, probabilities: Tensor, queries: int, changed: Changed | None) -> Figure:
    """A row for each class: its support, then queries with their predictions; and the attacked queries to the right.

    Args:
        shown: one task of images in [0, 1].
        probabilities: `[m, C]` of the queries' classes.
        queries: shown of each class.
    """
    classes = [int(c) for c in shown.support_y.unique()]
    shots = min(SHOTS, max(int((shown.support_y == c).sum()) for c in classes))
    queries = min(queries, max(int((shown.query_y == c).sum()) for c in classes))
    rows = max(len(classes), 0 if changed is None else len(changed.chosen))
    columns = shots + 0.5 + queries + (0 if changed is None else 3.5)
    width, height = 0.85 * (columns + 0.9), 0.85 * (_top(rows) + 0.35)
    figure = Figure(figsize=(width + 0.2, height + 0.6))  # In inches; the title has the rest.
    axes = figure.add_axes((0.1 / (width + 0.2), 0.05 / (height + 0.6), width / (width + 0.2), height / (height + 0.6)))
    for row, c in enumerate(classes):
        axes.text(-0.15, _top(row) + 0.5, f"class {c}", ha="right", va="center", fontsize=8)
        for column, k in enumerate((shown.support_y == c).nonzero()[:shots, 0]):
            show_image(axes, shown.support_x[k], column, row)
        for column, k in enumerate((shown.query_y == c).nonzero()[:queries, 0]):
            place = shots + 0.5 + column
            show_image(axes, shown.query_x[k], place, row)
            show_prediction(axes, probabilities[k], c, place, row)
    headings = [(0, "support"), (shots + 0.5, "queries")]
    if changed is not None:
        start = shots + 0.5 + queries + 0.5
        headings += [(start, "clean"), (start + 1, "attacked"), (start + 2, "change")]
        for row, k in enumerate(changed.chosen):
            show_attack(axes, shown, probabilities, changed, row, int(k), start)
    for place, text in headings:
        axes.text(place + 0.05, -0.12, text, fontsize=9, weight="bold")
    accuracy = (probabilities.argmax(-1) == shown.query_y).double().mean()
    title = f"Episode {int(shown.index)}: accuracy {100 * accuracy:.0f} % of {len(probabilities)} queries"
    if changed is not None:
        title += f"; PGD at eps {255 * changed.eps:g}/255, change enlarged {0.5 / changed.eps:.3g} times around grey"
    axes.set_title(title + "\nbars: probability of each class, the true one dark", fontsize=9, loc="left")
    axes.set_xlim(-0.9, columns)
    axes.set_ylim(_top(rows), -0.35)
    axes.set_aspect("equal")
    axes.axis("off")
    return figure


def show_attack(
    axes: Axes, shown: Episode, probabilities: Tensor, changed: Changed, row: int, k: int, start: float
) -> None:
    """One query before and after the attack, and the change: mid-grey where there is none."""
    truth = int(shown.query_y[k])
    show_image(axes, shown.query_x[k], start, row)
    show_prediction(axes, probabilities[k], truth, start, row)
    show_image(axes, changed.images[row], start + 1, row)
    show_prediction(axes, changed.probabilities[row], truth, start + 1, row)
    change = (changed.images[row] - shown.query_x[k]) / (2 * changed.eps) + 0.5
    show_image(axes, change.clamp(0, 1), start + 2, row)


def show_image(axes: Axes, image: Tensor, column: float, row: int) -> None:
    """An image `[channels, height, width]` in its cell."""
    top = _top(row)
    values = image.movedim(0, -1).cpu()
    # One channel is grey; two or more than three have no colours of their own: their mean.
    values = values if values.shape[-1] == 3 else values.mean(-1)
    extent = (column + 0.04, column + 0.96, top + 0.96, top + 0.04)
    axes.imshow(values, cmap="gray", vmin=0, vmax=1, extent=extent, interpolation="nearest")


def show_prediction(axes: Axes, probabilities: Tensor, truth: int, column: float, row: int) -> None:
    """Frame an image by whether its prediction is right, and draw the classes' probabilities below it."""
    predicted, top = int(probabilities.argmax()), _top(row)
    is_right = predicted == truth
    colour = RIGHT if is_right else WRONG
    axes.add_patch(Rectangle((column + 0.04, top + 0.04), 0.92, 0.92, fill=False, edgecolor=colour, linewidth=2))
    base, width = top + 1 + BARS, 0.92 / len(probabilities)
    for c, probability in enumerate(probabilities.tolist()):
        height = (BARS - 0.04) * probability
        bar = (column + 0.04 + c * width, base - height)
        axes.add_patch(Rectangle(bar, 0.85 * width, height, color=TRUE if c == truth else OTHER, linewidth=0))
    axes.plot([column + 0.04, column + 0.96], [base, base], color="0.6", linewidth=0.5)
    text = f"{'✓' if is_right else '✗'} {predicted}: {100 * float(probabilities[predicted]):.0f} %"
    axes.text(column + 0.5, base + 0.03, text, ha="center", va="top", fontsize=7, color=colour)


def fits(episodes: Sequence[Episode], before: Sequence[Tensor], after: Sequence[Tensor]) -> Figure:
    """Curves side by side: the truth, the support, and the predictions `[m, 1]` before and after adaptation."""
    figure = Figure(figsize=(1 + 3.4 * len(episodes), 3.2), layout="constrained")
    all_axes = figure.subplots(1, len(episodes), squeeze=False)[0]
    for axes, task, first, last in zip(all_axes, episodes, before, after, strict=True):
        draw_curves(axes, task, first, last)
        errors = [float((values - task.query_y).square().mean()) for values in (first, last)]
        axes.set_title(f"Episode {int(task.index)}: mse {errors[0]:.3g} before, {errors[1]:.3g} after", fontsize=9)
        axes.set_xlabel("x")
    handles, labels = all_axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    return figure


def _top(row: int) -> float:
    """Where a row begins."""
    return row * (1 + BARS + TEXT)
