"""Corruptions of images at five severities, in the manner of ImageNet-C (Hendrycks and Dietterich 2019).

Each is a function of images `[n, channels, height, width]` in [0, 1] that gives images of the same shape in [0, 1].
Every image is corrupted for itself. Noise, brightness, contrast and pixelation have ImageNet-C's own parameters. Its
blurs are as wide as suits 224 pixels; scaled down to 28, the weakest would be an eighth of a pixel. Ours are given in
sides of the image, and are about twice as wide as theirs.
"""

import itertools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from lightning_ntk.errors import ConfigError, nearest_name

SEVERITIES = (1, 2, 3, 4, 5)

# The parameter of each severity.
GAUSSIAN_NOISE = (0.08, 0.12, 0.18, 0.26, 0.38)  # Standard deviation.
SHOT_NOISE = (60, 25, 12, 5, 3)  # Photons of a white pixel.
IMPULSE_NOISE = (0.03, 0.06, 0.09, 0.17, 0.27)  # Part of the values that become 0 or 1.
GAUSSIAN_BLUR = (0.01, 0.02, 0.03, 0.045, 0.06)  # Standard deviation, in sides of the image.
DEFOCUS_BLUR = (0.025, 0.035, 0.05, 0.07, 0.09)  # Radius of the disk, in sides of the image.
BRIGHTNESS = (0.1, 0.2, 0.3, 0.4, 0.5)  # Added to the value of HSV.
CONTRAST = (0.4, 0.3, 0.2, 0.1, 0.05)  # Part that is left of each deviation from the image's mean.
PIXELATE = (0.6, 0.5, 0.4, 0.3, 0.25)  # Part that is left of the resolution.


def gaussian_noise(x: Tensor, severity: int, generator: Generator) -> Tensor:
    """x + s N(0, 1), cut to [0, 1]."""
    noise = torch.randn(x.shape, generator=generator, device=generator.device).to(x)
    return (x + GAUSSIAN_NOISE[severity - 1] * noise).clamp(0, 1)


def shot_noise(x: Tensor, severity: int, generator: Generator) -> Tensor:
    """Poisson(c x) / c, cut to [0, 1]: the noise of counting photons."""
    photons = SHOT_NOISE[severity - 1]
    return (torch.poisson((photons * x).to(generator.device), generator=generator).to(x) / photons).clamp(0, 1)


def impulse_noise(x: Tensor, severity: int, generator: Generator) -> Tensor:
    """Each value becomes 0 or 1 with a probability of p / 2 each: salt and pepper."""
    draw = torch.rand(x.shape, generator=generator, device=generator.device).to(x)
    part = IMPULSE_NOISE[severity - 1]
    return torch.where(draw < part / 2, 0.0, torch.where(draw > 1 - part / 2, 1.0, x))


def gaussian_blur(x: Tensor, severity: int, generator: Generator) -> Tensor:
    """Convolved with a Gaussian, the edge repeated outwards."""
    deviation = GAUSSIAN_BLUR[severity - 1] * max(x.shape[-2:])
    radius = int(4 * deviation + 0.5)
    offsets = torch.arange(-radius, radius + 1, device=x.device, dtype=x.dtype)
    weights = torch.exp(-offsets.square() / (2 * deviation**2))
    weights = weights / weights.sum()
    return _convolve(_convolve(x, weights[None, :]), weights[:, None])


def defocus_blur(x: Tensor, severity: int, generator: Generator) -> Tensor:
    """Convolved with a disk, a lens out of focus, the edge repeated outwards. The disk's rim is a pixel soft."""
    radius = DEFOCUS_BLUR[severity - 1] * max(x.shape[-2:])
    reach = int(radius + 0.5)
    offsets = torch.arange(-reach, reach + 1, device=x.device, dtype=x.dtype)
    distances = (offsets[:, None].square() + offsets.square()).sqrt()
    weights = (radius + 0.5 - distances).clamp(0, 1)
    return _convolve(x, weights / weights.sum())


def brightness(x: Tensor, severity: int, generator: Generator) -> Tensor:
    """The value of HSV (the largest channel) raised, and cut to 1; hue and saturation stay."""
    value = x.amax(-3, keepdim=True)
    raised = (value + BRIGHTNESS[severity - 1]).clamp(max=1)
    # Black has no hue: it becomes grey.
    return torch.where(value > 0, x * (raised / value.clamp(min=torch.finfo(x.dtype).tiny)), raised)


def contrast(x: Tensor, severity: int, generator: Generator) -> Tensor:
    """Deviations from each channel's mean over the image, made smaller."""
    mean = x.mean((-2, -1), keepdim=True)
    return (mean + CONTRAST[severity - 1] * (x - mean)).clamp(0, 1)


def pixelate(x: Tensor, severity: int, generator: Generator) -> Tensor:
    """Averaged down to a coarser grid, and shown in squares of its pixels; both as Pillow's box filter does (but for
    edges at half a pixel, which it may round otherwise)."""
    height, width = x.shape[-2:]
    rows, columns = (_box(side, max(1, int(PIXELATE[severity - 1] * side))).to(x) for side in (height, width))
    return F.interpolate(rows @ x @ columns.T, (height, width), mode="nearest-exact")


CORRUPTIONS: dict[str, Callable[[Tensor, int, Generator], Tensor]] = {
    function.__name__: function
    for function in (
        gaussian_noise,
        shot_noise,
        impulse_noise,
        gaussian_blur,
        defocus_blur,
        brightness,
        contrast,
        pixelate,
    )
}


def corruption(kind: str, severity: int) -> Callable[[Tensor, Generator], Tensor]:
    """The corruption of a name at a severity, as a function of images and a generator, on any device.

    Raises:
        ConfigError: there is none of this name, or of this severity.
    """
    if kind not in CORRUPTIONS:
        near = nearest_name(str(kind), CORRUPTIONS)
        raise ConfigError(f"There is no corruption {kind!r}.{near} Corruptions: {', '.join(CORRUPTIONS)}.")
    if severity not in SEVERITIES or not isinstance(severity, int):
        raise ConfigError(f"The severity of a corruption is a whole number from 1 to 5, but got {severity!r}.")
    function = CORRUPTIONS[kind]
    return lambda x, generator: function(x, severity, generator)


def _box(side: int, size: int) -> Tensor:
    """Averages `[size, side]` of the pixels whose centres lie in each of `size` equal parts of a line of `side`."""
    part = side / size
    edges = [int(i * part + 0.5) for i in range(size + 1)]
    weights = torch.zeros(size, side)
    for i, (start, stop) in enumerate(itertools.pairwise(edges)):
        weights[i, start:stop] = 1 / (stop - start)
    return weights


def _convolve(x: Tensor, weights: Tensor) -> Tensor:
    """Each channel of x `[n, c, h, w]` with one kernel `[kh, kw]` of odd sides."""
    height, width = weights.shape
    padded = F.pad(x, (width // 2, width // 2, height // 2, height // 2), mode="replicate")
    kernel = weights.expand(x.shape[1], 1, height, width)
    return F.conv2d(padded, kernel, groups=x.shape[1]).clamp(0, 1)
