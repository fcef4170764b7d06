"""`EpisodeNetwork`: features and a linear head, with the input normalisation as its first step."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class EpisodeNetwork(nn.Module):
    """Base of the networks: `head(features(normalised x))`.

    Args:
        features: maps normalised inputs `[n, *input_shape]` to features `[n, width]`.
        width: number of features.
        outputs: C, number of outputs of the linear head.
        mean, std: per-channel input statistics, or None to leave inputs as they are.

    Attributes:
        couples_examples: True where an example's output depends on the rest of its batch (batch statistics). The
            Jacobian of such a network is that of the whole batch, and its predictions are transductive.
    """

    couples_examples: bool = False

    def __init__(
        self,
        features: nn.Module,
        width: int,
        outputs: int,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        self.features = features
        self.head = nn.Linear(width, outputs)
        # Not part of the checkpoint: the data set gives them again.
        self.register_buffer("mean", _per_channel(mean), persistent=False)
        self.register_buffer("std", _per_channel(std), persistent=False)

    def embed(self, x: Tensor) -> Tensor:
        """Features `[n, width]` of inputs `[n, *input_shape]`: what the head sees."""
        if self.mean is not None:
            x = (x - self.mean) / self.std
        return self.features(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.embed(x))


def _per_channel(values: Sequence[float] | None) -> Tensor | None:
    return None if values is None else torch.tensor(list(values)).view(-1, 1, 1)
