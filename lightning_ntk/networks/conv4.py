"""Conv4, the four-block convolutional network of the few-shot literature (Vinyals et al. 2016; Finn et al. 2017)."""

from collections.abc import Sequence

from torch import nn

from lightning_ntk.errors import ConfigError
from lightning_ntk.networks.base import EpisodeNetwork, check_image_shape
from lightning_ntk.networks.normalisation import GROUPS, check_norm, normalisation_layers

BLOCKS = 4


class Conv4(EpisodeNetwork):
    """Four blocks of 3x3 convolution, normalisation, ReLU and a halving of height and width; then a linear head.

    Args:
        input_shape: `(channels, height, width)`.
        outputs: C, the number of ways.
        filters: channels of every block (32 in the paper; Finn et al. use 64 on Omniglot).
        norm: "batch" normalises with the statistics of the batch at hand, in training and at test (no running
            averages): support and query batches are each coupled and predictions transductive. "group" normalises each
            example over groups of channels (Wu and He 2018). "none" leaves it out. Results of different modes are not
            comparable.
        downsample: "stride" halves by strided convolutions (Finn et al. on Omniglot), "pool" by 2x2 max pooling
            (84x84 images).
        mean, std: per-channel input statistics.
    """

    channels_last = True

    def __init__(
        self,
        input_shape: Sequence[int],
        outputs: int,
        *,
        filters: int = 32,
        norm: str = "batch",
        downsample: str = "stride",
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        check_image_shape(input_shape, "conv4")
        check_norm(norm)
        if filters < 1:
            raise ConfigError(f"network.filters must be at least 1, but got {filters}.")
        if norm == "group" and filters % GROUPS:
            raise ConfigError(f"network.norm=group needs network.filters to be a multiple of {GROUPS}, got {filters}.")
        if downsample not in ("stride", "pool"):
            raise ConfigError(f"network.downsample must be 'stride' or 'pool', but got {downsample!r}.")
        channels, height, width = input_shape
        if downsample == "pool" and min(height, width) < 2**BLOCKS:
            raise ConfigError(
                f"network.downsample=pool halves {BLOCKS} times and needs images of at least {2**BLOCKS} pixels a "
                f"side, but got {height}x{width}. Use network.downsample=stride."
            )
        layers: list[nn.Module] = []
        for block in range(BLOCKS):
            stride = 2 if downsample == "stride" else 1
            layers.append(nn.Conv2d(channels if block == 0 else filters, filters, 3, stride=stride, padding=1))
            layers.extend(normalisation_layers(norm, filters))
            if downsample == "pool":
                layers.append(nn.MaxPool2d(2))
                height, width = height // 2, width // 2
            else:
                height, width = -(-height // 2), -(-width // 2)
                if norm == "group" and filters == GROUPS and height * width == 1:
                    raise ConfigError(
                        f"network.norm=group with network.filters={filters} makes a constant of block {block + 1}: "
                        f"{GROUPS} groups have one number each on images this small. Make network.filters at least "
                        f"{2 * GROUPS}, or use network.downsample=pool."
                    )
            # The ReLU of the largest entry is the largest of the ReLUs, at a quarter of the work.
            layers.append(nn.ReLU())
        features = nn.Sequential(*layers, nn.Flatten())
        super().__init__(features, filters * height * width, outputs, mean, std)
        self.couples_examples = norm == "batch"
