"""`Episode`, the data of one few-shot task or of a stacked batch of tasks, and `TaskSpec`, what all tasks share.

Every datamodule makes episodes, every method and callback reads them; nothing passes tuples with remembered positions.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class TaskSpec:
    """What a network and a method must know of a data set's tasks before they see one.

    Attributes:
        kind: "classification" (targets are class numbers 0..outputs-1) or "regression" (targets are real vectors).
        input_shape: shape of one example without batch axis: `(channels, height, width)` or `(features,)`.
        outputs: C, the number of network outputs: the ways of a training episode, or the target's dimension.
        mean, std: per-channel statistics of the training inputs, or None. The *network* applies them (its first layer),
            so that every predictor maps images in [0, 1] to outputs and an attack's epsilon keeps its meaning.
    """

    kind: Literal["classification", "regression"]
    input_shape: tuple[int, ...]
    outputs: int
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None


@dataclass(eq=False)
class Episode:
    """Support and query set of one task, or of T tasks stacked along a first axis. Treat it as immutable.

    (It is not a frozen dataclass because Lightning's precision plugins rebuild a batch field by field.)

    Attributes:
        support_x: `[n, *input_shape]`, stacked `[T, n, *input_shape]`. Images are uint8 when drawn and float in [0, 1]
            once on the device; see `datamodules.base`.
        support_y: int64 class numbers `[n]` (classification) or floats `[n, C]` (regression); stacked `[T, n, ...]`.
        query_x: `[m, *input_shape]`, stacked `[T, m, *input_shape]`.
        query_y: `[m]` or `[m, C]`, stacked `[T, m, ...]`.
        index: int64 number of the episode within its split, shape `[]`, stacked `[T]`: scores are gathered by it.
    """

    support_x: Tensor
    support_y: Tensor
    query_x: Tensor
    query_y: Tensor
    index: Tensor

    @staticmethod
    def stack(episodes: Sequence["Episode"]) -> "Episode":
        """Stack T single tasks of equal shapes into one batch of tasks."""
        return Episode(**{f.name: torch.stack([getattr(e, f.name) for e in episodes]) for f in fields(Episode)})

    @property
    def tasks(self) -> int:
        """T, the number of stacked tasks. Only meaningful on a stacked episode."""
        return self.index.shape[0]

    def __iter__(self) -> Iterator["Episode"]:
        """Iterate over the tasks of a stacked episode."""
        for task in range(self.tasks):
            yield Episode(**{f.name: getattr(self, f.name)[task] for f in fields(Episode)})

    def to(self, *args, **kwargs) -> "Episode":
        """Move every tensor, like `Tensor.to` with a device; Lightning calls this to bring a batch to its device."""
        return self._with_each(lambda tensor: tensor.to(*args, **kwargs))

    def pin_memory(self) -> "Episode":
        """Pin every tensor; called by the DataLoader's pinning thread."""
        return self._with_each(Tensor.pin_memory)

    def _with_each(self, change: Callable[[Tensor], Tensor]) -> Any:
        # A loader's own kind of episode may hold other things than tensors.
        tensors = {f.name: getattr(self, f.name) for f in fields(self) if isinstance(getattr(self, f.name), Tensor)}
        return replace(self, **{name: change(tensor) for name, tensor in tensors.items()})
