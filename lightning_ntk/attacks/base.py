"""What all attacks share: the predictor that they see, what they return, and what they refuse.

Images are `[*batch, channels, height, width]` with values in [0, 1], labels int64 `[*batch]`. One task has a batch of m
queries; T tasks have a batch of `[T, m]`, and a predictor made by `side_by_side`.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_ntk.episode import Episode
from lightning_ntk.errors import ConfigError, DataError
from lightning_ntk.ntk.params import in_chunks

# Maps images [*batch, channels, height, width] in [0, 1] to logits [*batch, C].
Predictor = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Attacked:
    """What an attack found.

    Attributes:
        images: `[*batch, channels, height, width]`, in [0, 1].
        outputs: the predictor's logits for them, `[*batch, C]`.
        queries: int64 `[*batch]`, how often the predictor was asked about a version of each image.
    """

    images: Tensor
    outputs: Tensor
    queries: Tensor


def side_by_side(predictors: Sequence[Predictor]) -> Predictor:
    """T tasks' predictors as one, of images `[T, m, ...]`: each task keeps to its own."""

    def predict(x: Tensor) -> Tensor:
        return torch.stack([of_task(images) for of_task, images in zip(predictors, x, strict=True)])

    return predict


def in_parts(predict: Predictor, at_once: int | None = None) -> Predictor:
    """A predictor of images `[m, channels, height, width]` that gives at most `at_once` in one go, where they do not
    depend on each other: for the memory, and on a CPU for the time (`ntk.memory`). None keeps them together."""

    def predict_parts(x: Tensor) -> Tensor:
        return torch.cat([predict(part) for part in in_chunks(x, at_once)])

    return predict_parts


def check_images(x: Tensor, y: Tensor) -> None:
    """Raise `DataError` unless x holds images in [0, 1] and y a label for each."""
    if not x.is_floating_point() or x.dim() < 4 or x.shape[:-3] != y.shape:
        raise DataError(
            f"An attack needs float images [*batch, channels, height, width] and labels [*batch], but got {x.dtype} "
            f"{list(x.shape)} and {list(y.shape)}."
        )
    if y.dtype != torch.int64 or not y.numel() or y.min() < 0:
        what = "none" if not y.numel() else f"labels of {y.dtype} from {y.min()}"
        raise DataError(f"An attack needs images, and an int64 label from 0 on for each, but got {what}.")
    low, high = x.aminmax()
    if not (low >= 0 and high <= 1):
        raise DataError(
            f"An attack needs images in [0, 1], but these lie in [{low:.3g}, {high:.3g}]. Give the predictor unit "
            "images and let the network normalise them (TaskSpec.mean, TaskSpec.std)."
        )


def check_episode(episode: Episode) -> None:
    """Raise `DataError` unless a task, as a data module draws it, has queries that become images in [0, 1]."""
    if episode.query_x.is_floating_point():  # uint8 becomes [0, 1] on the device.
        check_images(episode.query_x, episode.query_y)


def check_eps(eps: float | Tensor, key: str = "eps", most: float = 1.0) -> None:
    """Raise `ConfigError` naming the key unless the size of a perturbation lies in [0, most]; a tensor has one each."""
    sizes = eps.flatten().tolist() if isinstance(eps, Tensor) else [eps]
    for size in sizes:
        is_number = isinstance(size, int | float) and not isinstance(size, bool)
        if not (is_number and 0 <= size <= most and math.isfinite(size)):
            bound = f"from 0 to {most:g}" if math.isfinite(most) else "finite and at least 0"
            raise ConfigError(f"{key} must be {bound} in units of images in [0, 1], but got {size!r}.")


def per_image(sizes: float | Tensor, x: Tensor) -> float | Tensor:
    """Sizes that multiply images x: a number, or `[*batch]` with axes for channels, height and width."""
    return sizes[..., None, None, None] if isinstance(sizes, Tensor) else sizes


def is_wrong(outputs: Tensor, y: Tensor) -> Tensor:
    """Which logits `[*batch, C]` are a mistake, bool `[*batch]`: what is no number is no right answer."""
    return (outputs.argmax(-1) != y) | ~outputs.isfinite().all(-1)


@torch.no_grad()
def evaluate(predict: Predictor, x: Tensor) -> Tensor:
    """Logits `[*batch, C]`, without a graph."""
    return predict(x)
