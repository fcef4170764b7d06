"""A plain multilayer perceptron, the network of the sine-wave experiments (Finn et al. 2017)."""

import itertools
import math
from collections.abc import Sequence

from torch import nn

from lightning_ntk.errors import ConfigError
from lightning_ntk.networks.base import EpisodeNetwork


class MLP(EpisodeNetwork):
    """Flattened input, hidden layers with ReLU, linear head. No normalisation.

    Args:
        input_shape: shape of one example; it is flattened.
        outputs: C, the number of outputs.
        hidden: widths of the hidden layers (40 and 40 in Finn et al. 2017).
        mean, std: per-channel input statistics (images only).
    """

    def __init__(
        self,
        input_shape: Sequence[int],
        outputs: int,
        *,
        hidden: Sequence[int] = (40, 40),
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        if not all(width >= 1 for width in hidden):
            raise ConfigError(f"network.hidden must be widths of at least 1, but got {list(hidden)}.")
        widths = [math.prod(input_shape), *hidden]
        layers: list[nn.Module] = [nn.Flatten()]
        for before, after in itertools.pairwise(widths):
            layers += [nn.Linear(before, after), nn.ReLU()]
        super().__init__(nn.Sequential(*layers), widths[-1], outputs, mean, std)
