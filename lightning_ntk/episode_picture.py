"""A picture of episodes: each class's images in a row, or points: of a function, or coloured by class."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from lightning_ntk.episode import Episode

# Images of a class that are shown; the rest would be too small to see.
MOST_SUPPORT, MOST_QUERY = 5, 10
GAP = 2  # pixels between images
COLOURS = 10  # of classes, in points
# Inches: of the figure, its part that images fill, an image at most, a panel of points, a panel's title and ticks.
WIDTH, FILLED, IMAGE, POINTS, AROUND = 9.0, 8.5, 0.7, 3.0, 0.6


def draw_episodes(file: Path, episodes: Sequence[tuple[str, Episode]]) -> None:
    """Write a PNG with a panel for each single-task episode `(title, episode)`; images are uint8, or floats up to 1."""
    heights = [_height(episode) for _, episode in episodes]
    figure = Figure(figsize=(WIDTH, sum(heights) + AROUND * len(heights)), layout="constrained")
    axes = figure.subplots(len(episodes), 1, height_ratios=heights, squeeze=False)[:, 0]
    for axis, (title, episode) in zip(axes, episodes, strict=True):
        sizes = f"{len(episode.support_x)} support, {len(episode.query_x)} query"
        axis.set_title(f"{title}: {sizes}{_left_out(episode)}", loc="left", fontsize=10)
        if _has_images(episode):
            _draw_images(axis, episode)
        else:
            (_draw_function if episode.support_y.is_floating_point() else _draw_classes)(axis, episode)
    figure.savefig(file, dpi=110)


def _has_images(episode: Episode) -> bool:
    """Whether it is of images in classes."""
    x = episode.support_x
    return x.dim() == 4 and x.shape[1] in (1, 3) and not episode.support_y.is_floating_point()


def _height(episode: Episode) -> float:
    """Of an episode's panel, in inches."""
    if not _has_images(episode):
        return POINTS
    height, width, _ = _canvas(episode)[0].shape
    return min(FILLED * height / width, IMAGE * (int(episode.support_y.max()) + 1))


def _left_out(episode: Episode) -> str:
    """What the title says where not all images of a class are shown."""
    if not _has_images(episode):
        return ""
    shots, queries = (int(y.bincount().max()) for y in (episode.support_y, episode.query_y))
    if shots <= MOST_SUPPORT and queries <= MOST_QUERY:
        return ""
    return f", up to {MOST_SUPPORT} and {MOST_QUERY} of a class shown"


def _canvas(episode: Episode) -> tuple[np.ndarray, list[int]]:
    """The images of an episode, a row a class, uint8 `[height, width, 3]`; and where support and query begin."""
    classes = sorted(set(episode.support_y.tolist()))
    support, query = (
        [_as_bytes(x[y == label][:most]).numpy() for label in classes]
        for x, y, most in (
            (episode.support_x, episode.support_y, MOST_SUPPORT),
            (episode.query_x, episode.query_y, MOST_QUERY),
        )
    )
    height, width = episode.support_x.shape[-2:]
    down, right = height + GAP, width + GAP
    second = right * max(map(len, support)) + width // 2
    shape = (down * len(classes) - GAP, second + right * max(map(len, query)) - GAP, 3)
    canvas = np.full(shape, 255, dtype=np.uint8)
    for row, images in enumerate(zip(support, query, strict=True)):
        for start, own in zip((0, second), images, strict=True):
            for column, image in enumerate(own):
                place = start + right * column
                # One channel becomes three alike.
                canvas[down * row : down * row + height, place : place + width] = image.transpose(1, 2, 0)
    return canvas, [0, second]


def _as_bytes(x: Tensor) -> Tensor:
    return x if x.dtype == torch.uint8 else (x.clamp(0, 1) * 255).byte()


def _draw_images(axis: Axes, episode: Episode) -> None:
    canvas, starts = _canvas(episode)
    axis.imshow(canvas, interpolation="nearest")
    axis.set_anchor("W")
    down = episode.support_x.shape[-2] + GAP
    rows = range(0, len(canvas), down)
    axis.set_yticks([row + down / 2 for row in rows], [str(label) for label in range(len(rows))])
    axis.set_ylabel("label")
    axis.set_xticks(starts, ["support", "query"], ha="left")
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)


def _draw_classes(axis: Axes, episode: Episode) -> None:
    for name, x, y in (("query", episode.query_x, episode.query_y), ("support", episode.support_x, episode.support_y)):
        x = x.flatten(1)
        look = {"marker": ".", "s": 30} if name == "query" else {"marker": "o", "s": 60, "edgecolors": "black"}
        up = y if x.shape[1] == 1 else x[:, 1]
        axis.scatter(x[:, 0], up, c=y % COLOURS, cmap="tab10", vmin=0, vmax=COLOURS - 1, label=name, **look)
    axis.set_xlabel("x" if x.shape[1] == 1 else "first coordinate of x")
    axis.set_ylabel("label" if x.shape[1] == 1 else "second coordinate of x")
    axis.legend(loc="upper right", fontsize=8, title="coloured by label", title_fontsize=8)


def _draw_function(axis: Axes, episode: Episode) -> None:
    support_x, query_x = episode.support_x.flatten(1), episode.query_x.flatten(1)
    order = query_x[:, 0].argsort()
    line = "-" if query_x.shape[1] == 1 else ""
    axis.plot(query_x[order, 0], episode.query_y[order, 0], f".{line}", color="tab:blue", label="query")
    axis.plot(support_x[:, 0], episode.support_y[:, 0], "o", color="tab:orange", label="support")
    axis.set_xlabel("x" if query_x.shape[1] == 1 else "first coordinate of x")
    axis.set_ylabel("y" if episode.query_y.shape[1] == 1 else "first coordinate of y")
    axis.legend(loc="upper right", fontsize=8)
