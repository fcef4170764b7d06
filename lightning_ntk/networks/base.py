"""`EpisodeNetwork`: features and a linear head, with the input normalisation as its first step; and what any network
says of its examples."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_ntk.errors import ConfigError
from lightning_ntk.networks.normalisation import BatchStatistics


class EpisodeNetwork(nn.Module):
    """Base of the networks: `head(features(normalised x))`.

    Args:
        features: maps normalised inputs `[n, *input_shape]` to features `[n, width]`.
        width: number of features.
        outputs: C, number of outputs of the linear head.
        mean, std: per-channel input statistics, or None to leave inputs as they are.

    Attributes:
        couples_examples: True where an example's output depends on the rest of its batch (batch statistics). The
            Jacobian of such a network is that of the whole batch, and its predictions are transductive. A network
            without this attribute is taken to couple them.
        channels_last: whether images go on with their channels last in memory on a CPU, where oneDNN's convolutions
            (and all that keeps the layout after them) take less time so; Inductor's compiled ones take more. For
            networks that begin with a convolution.
    """

    couples_examples: bool = False
    channels_last: bool = False

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
        """Features `[n, width]` of inputs `[n, *input_shape]`: what the head sees.

        Raises:
            ConfigError: the inputs are bytes or other whole numbers, not floats.
        """
        if not x.is_floating_point():
            raise ConfigError(
                f"{type(self).__name__} takes floats, images in [0, 1], but got {x.dtype}. Divide bytes by 255, or "
                "take episodes from a datamodule's batch(split, indices)."
            )
        if self.mean is not None:
            x = (x - self.mean) / self.std
        if self.channels_last and x.device.type == "cpu" and not torch.compiler.is_compiling():
            # What contiguous(memory_format=torch.channels_last) does, which vmap does not take.
            x = x.movedim(1, -1).contiguous().movedim(-1, 1)
        return self.features(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.embed(x))


def check_image_shape(input_shape: Sequence[int], network: str) -> None:
    """Raise `ConfigError`, naming the choice of network, unless inputs are images."""
    if len(input_shape) != 3:
        raise ConfigError(
            f"network={network} needs images of shape (channels, height, width), but the data's inputs have shape "
            f"{tuple(input_shape)}. Use network=mlp for vectors."
        )


def couples_examples(network: nn.Module) -> bool:
    """Whether an example's output may depend on the rest of its batch: what the network says, or True if it does not.

    Raises:
        ConfigError: it says no, and has a layer that normalises by the statistics of the batch.
    """
    coupled = getattr(network, "couples_examples", True)
    for name, layer in network.named_modules():
        by_batch = isinstance(layer, BatchStatistics) or (isinstance(layer, _BatchNorm) and layer.running_mean is None)
        if by_batch and not coupled:
            raise ConfigError(
                f"network: {type(network).__name__} has couples_examples = False, but its layer {name} "
                f"({type(layer).__name__}) normalises by the statistics of the batch. Set couples_examples = True, or "
                "use nn.GroupNorm there."
            )
    return coupled


def remedy_of_coupling(network: nn.Module) -> str:
    """What to do about a network that couples its examples: a clause to go on after."""
    if hasattr(network, "couples_examples"):
        return "Use network.norm=group or none"
    return f"If those of {type(network).__name__} do not, set its attribute couples_examples = False"


def _per_channel(values: Sequence[float] | None) -> Tensor | None:
    return None if values is None else torch.tensor(list(values)).view(-1, 1, 1)
