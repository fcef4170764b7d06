"""Which images make an episode: pure functions of keys and of the classes' sizes; no image is touched here."""

import dataclasses
import functools
import itertools
import math

import numpy as np
import torch
from torch import Tensor

from datamodules.episodes.counter import below, random_words, steps

# Counters of different rows of one episode (its classes; the images of each) never meet.
_ROW = 2**32


@dataclasses.dataclass(frozen=True)
class TaskShape:
    """Ways, the shots of each class by label, and queries a class."""

    shots: tuple[int, ...]
    queries: int

    @property
    def ways(self) -> int:
        return len(self.shots)

    @property
    def images_per_class(self) -> int:
        return max(self.shots) + self.queries

    @property
    def labels(self) -> tuple[Tensor, Tensor]:
        """Support and query labels, in order: `[n]` and `[m]`. Equal shapes share them: copy before writing."""
        return _labels(self)

    def divide(self, numbers: np.ndarray) -> tuple[Tensor, Tensor]:
        """Image numbers `[T, ways, images_per_class]` as support `[T, n]` and query `[T, m]`, ordered by label."""
        most = max(self.shots)
        shots = np.arange(most) < np.array(self.shots)[:, None]
        support, query = numbers[:, :, :most][:, shots], numbers[:, :, most:].reshape(len(numbers), -1)
        return torch.from_numpy(support), torch.from_numpy(query)


@functools.lru_cache(maxsize=64)
def _labels(shape: TaskShape) -> tuple[Tensor, Tensor]:
    classes = torch.arange(shape.ways)
    return classes.repeat_interleave(torch.tensor(shape.shots)), classes.repeat_interleave(shape.queries)


def draw_images(keys: np.ndarray, starts: np.ndarray, sizes: np.ndarray, ways: int, each: int) -> np.ndarray:
    """Image numbers `[T, ways, each]` of T episodes: distinct classes in random order, of each distinct images.

    Args:
        keys: one for each episode, uint64 `[T]`.
        starts, sizes: number of a class's first image, and how many it has: int64 `[classes]`.

    Every ordered choice of classes, and of images in a class, is equally likely: the first k distinct of independent
    uniform numbers are a uniform choice of k.
    """
    widths = likely_enough(len(sizes), ways), likely_enough(int(sizes.min()), each)
    words = random_words(keys, _steps(ways, *widths))
    drawn = below(words[:, : widths[0]], np.uint64(len(sizes)))
    classes = _first_distinct(drawn, ways, lambda row: (keys[row], 0, len(sizes)))
    limits = sizes[classes].reshape(-1)
    drawn = below(words[:, widths[0] :].reshape(len(limits), -1), limits[:, None].astype(np.uint64))
    picked = _first_distinct(drawn, each, lambda row: (keys[row // ways], 1 + row % ways, limits[row]))
    return starts[classes][..., None] + picked.reshape(len(keys), ways, each)


def likely_enough(size: int, count: int) -> int:
    """How many uniform numbers below `size` mostly hold `count` distinct ones: their expectation and a third more."""
    return int(4 / 3 * size * math.log(size / (size - count + 0.5))) + 8


@functools.lru_cache(maxsize=64)
def _steps(ways: int, for_classes: int, for_images: int) -> np.ndarray:
    rows = [np.arange(for_classes), *(row * _ROW + np.arange(for_images) for row in range(1, ways + 1))]
    return steps(np.concatenate(rows))


def _first_distinct(drawn: np.ndarray, count: int, source) -> np.ndarray:
    """The first `count` distinct numbers of each row, int64; `source(row)` says where a row's numbers came from."""
    found = [list(dict.fromkeys(row))[:count] for row in drawn.tolist()]
    for row, numbers in enumerate(found):
        width = drawn.shape[1]
        while len(numbers) < count:  # Seldom: go on along the same sequence.
            width *= 2
            key, of_row, size = source(row)
            words = random_words(np.array([key]), steps(of_row * _ROW + np.arange(width)))
            numbers = found[row] = list(dict.fromkeys(below(words, np.uint64(size))[0].tolist()))[:count]
    flat = itertools.chain.from_iterable(found)
    return np.fromiter(flat, dtype=np.int64, count=len(found) * count).reshape(len(found), count)
