"""ResNet-12, the residual network of the few-shot literature (Mishra et al. 2018; Lee et al. 2019)."""

import math
from collections.abc import Sequence

from torch import Tensor, nn

from lightning_ntk.errors import ConfigError
from lightning_ntk.networks.base import EpisodeNetwork, check_image_shape
from lightning_ntk.networks.normalisation import GROUPS, check_norm, normalisation_layers

# Channels of the four blocks over `width`: 64, 160, 320, 640.
WIDENING = (1, 2.5, 5, 10)
SLOPE = 0.1


class ResNet12(EpisodeNetwork):
    """Four residual blocks, the average over the remaining pixels, and a linear head.

    A block is LeakyReLU(branch(x) + shortcut(x)) and a 2x2 max pooling. The branch is three 3x3 convolutions, each
    normalised, with LeakyReLU (slope 0.1) between them; the shortcut is a 1x1 convolution, normalised. At 84x84 it is
    the ResNet-12 of MetaOptNet (Lee et al. 2019) and of learn2learn: 12.4 million parameters with 5 outputs. Images of
    another size are averaged over whatever is left of them.

    DropBlock and dropout, which those use in training, are left out: adapting to a support set must give the same
    function each time.

    Args:
        input_shape: `(channels, height, width)`, at least 16x16 pixels.
        outputs: C, the number of ways.
        width: channels of the first block; the others have 2.5, 5 and 10 times as many.
        norm: "batch" normalises with the statistics of the batch at hand, in training and at test (no running
            averages): support and query batches are each coupled and predictions transductive. "group" normalises each
            example over groups of channels (Wu and He 2018). "none" leaves it out: the convolutions then have biases,
            and the initial weights of what a block adds up are divided by the square root of 2, so that the sum is as
            large as either part. Results of different modes are not comparable.
        mean, std: per-channel input statistics.
    """

    channels_last = True

    def __init__(
        self,
        input_shape: Sequence[int],
        outputs: int,
        *,
        width: int = 64,
        norm: str = "batch",
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        check_image_shape(input_shape, "resnet12")
        check_norm(norm)
        multiple = 2 * GROUPS if norm == "group" else 2
        if width < 1 or width % multiple:
            raise ConfigError(
                f"network.width must be a positive multiple of {multiple} with network.norm={norm} (the second block "
                f"has 2.5 times as many channels), but got {width}."
            )
        before, height, breadth = input_shape
        smallest = 2 ** len(WIDENING)
        if min(height, breadth) < smallest:
            raise ConfigError(
                f"network=resnet12 halves {len(WIDENING)} times and needs images of at least {smallest} pixels a side, "
                f"but got {height}x{breadth}. Use network=conv4, or larger images."
            )
        blocks: list[nn.Module] = []
        for factor in WIDENING:
            channels = int(factor * width)
            blocks.append(_Block(before, channels, norm))
            before = channels
        super().__init__(nn.Sequential(*blocks, _Average()), before, outputs, mean, std)
        self.couples_examples = norm == "batch"


class _Block(nn.Module):
    """`[n, before, h, w]` to `[n, channels, h // 2, w // 2]`."""

    def __init__(self, before: int, channels: int, norm: str) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            *_convolution(before, channels, 3, norm),
            nn.LeakyReLU(SLOPE),
            *_convolution(channels, channels, 3, norm),
            nn.LeakyReLU(SLOPE),
            *_convolution(channels, channels, 3, norm, summand=True),
        )
        self.shortcut = nn.Sequential(*_convolution(before, channels, 1, norm, summand=True))
        self.end = nn.Sequential(nn.LeakyReLU(SLOPE), nn.MaxPool2d(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.end(self.branch(x) + self.shortcut(x))


class _Average(nn.Module):
    """`[n, channels, h, w]` to `[n, channels]`. vmap has no rule for nn.AdaptiveAvgPool2d with channels last."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean((-2, -1))


def _convolution(before: int, channels: int, size: int, norm: str, *, summand: bool = False) -> list[nn.Module]:
    """A convolution that keeps height and width, He-initialised (He et al. 2015), and its normalisation."""
    convolution = nn.Conv2d(before, channels, size, padding=size // 2, bias=norm == "none")
    if norm == "none":
        # Nothing rescales the activations afterwards, so the weights must keep their size, sums included.
        nn.init.kaiming_normal_(convolution.weight, SLOPE, mode="fan_in")
        nn.init.zeros_(convolution.bias)
        if summand:
            convolution.weight.data /= math.sqrt(2)
    else:
        nn.init.kaiming_normal_(convolution.weight, mode="fan_out")
    return [convolution, *normalisation_layers(norm, channels)]
