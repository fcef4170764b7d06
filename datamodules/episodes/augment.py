"""Augmentation of training images: flips, crops, colours; drawn by key on the CPU, applied in batches on the device."""

import numpy as np
import torch
from torch import Tensor

from datamodules.episodes.counter import below, key_of, keys_of, random_words, steps
from datamodules.episodes.image_store import rearrange
from lightning_ntk.errors import ConfigError, nearest_name

CHOICES = ("none", "flip", "crop_flip")
# Numbers of their streams of random numbers: 0 to 2 are the splits' episodes, 3 is the training steps' shapes.
MOVES, COLOURS = 7, 6
# Images are padded by this part of their side before a crop of the old size is taken: 8 pixels of 84, 3 of 32.
PADDING = 0.1
# Shares of red, green and blue in a pixel's grey (ITU-R BT.601), rounded as in torchvision.
LUMA = (0.2989, 0.587, 0.114)


def check_augment(augment: str) -> None:
    """Raise `ConfigError` unless it is one of the choices."""
    if augment not in CHOICES:
        near = nearest_name(str(augment), CHOICES)
        raise ConfigError(f"data.augment must be one of {', '.join(CHOICES)}, but got {augment!r}.{near}")


def check_jitter(jitter: float) -> None:
    """Raise `ConfigError` unless it is a number from 0 to 1."""
    if isinstance(jitter, bool) or not isinstance(jitter, int | float) or not 0 <= jitter <= 1:
        raise ConfigError(f"data.jitter must be a number from 0 (none) to 1, but got {jitter!r}.")


def draw_moves(augment: str, seed: int, epoch: int, indices: np.ndarray, images: int, size: tuple[int, int]) -> Tensor:
    """Moves of the images of T episodes, int64 `[T, images, 3]`: flip (0 or 1), shift down and shift right in pixels.

    A pure function of its arguments; the key differs from those that draw the episodes.
    """
    keys = keys_of(key_of(seed, MOVES, epoch), indices)
    words = random_words(keys, steps(np.arange(3 * images))).reshape(len(keys), images, 3)
    height, width = (int(PADDING * side) if augment == "crop_flip" else 0 for side in size)
    limits = np.array([2, 2 * height + 1, 2 * width + 1], dtype=np.uint64)
    return torch.from_numpy(below(words, limits).astype(np.int64) - np.array([0, height, width]))


def apply_moves(images: Tensor, moves: Tensor) -> Tensor:
    """Images `[..., channels, height, width]` moved by `moves` `[..., 3]`; at the edges they are reflected."""
    height, width = images.shape[-2:]
    flip, down, right = moves.reshape(-1, 3).unbind(-1)
    rows = _reflected(torch.arange(height, device=images.device) + down[:, None], height)
    columns = torch.arange(width, device=images.device)
    columns = torch.where(flip[:, None] == 1, columns.flip(0), columns)  # A crop, then a flip.
    columns = _reflected(columns + right[:, None], width)
    pixels = (rows[:, :, None] * width + columns[:, None, :]).flatten(1)
    return rearrange(images.reshape(-1, *images.shape[-3:]), pixels).view(images.shape)


def draw_colours(jitter: float, seed: int, epoch: int, indices: np.ndarray, images: int) -> Tensor:
    """Factors of the images of T episodes, float32 `[T, images, 3]`: of brightness, of contrast and of saturation.

    Each is uniform from 1 - jitter to 1 + jitter, a pure function of the arguments, with keys of its own.
    """
    keys = keys_of(key_of(seed, COLOURS, epoch), indices)
    words = random_words(keys, steps(np.arange(3 * images))).reshape(len(keys), images, 3)
    return torch.from_numpy((1 + jitter * (2 * (words / 2**32) - 1)).astype(np.float32))


def apply_colours(images: Tensor, factors: Tensor) -> Tensor:
    """Images `[..., channels, height, width]` in [0, 1], 1 or 3 channels, changed by `factors` `[..., 3]`.

    Brightness, then contrast, then saturation, as Chen et al. (2019) and their successors have them, by the formulas of
    torchvision's `adjust_brightness`, `adjust_contrast` and `adjust_saturation`: blended with black, with the mean of
    the grey image and with the grey image itself, each cut to [0, 1]. Grey images have no saturation to change.
    """
    brightness, contrast, saturation = factors.to(images.dtype)[..., None, None, None].unbind(-4)
    images = (brightness * images).clamp_(0, 1)  # A copy; then in place, for fresh memory takes most of the time.
    mean = _grey(images.mean((-2, -1), keepdim=True))
    images.mul_(contrast).add_((1 - contrast) * mean).clamp_(0, 1)
    if images.shape[-3] == 1:
        return images
    grey = _grey(images).mul_(1 - saturation)
    return images.mul_(saturation).add_(grey).clamp_(0, 1)


def _grey(images: Tensor) -> Tensor:
    """One channel, `[..., 1, height, width]`."""
    if images.shape[-3] == 1:
        return images
    red, green, blue = images.unbind(-3)
    return (LUMA[0] * red).add_(green, alpha=LUMA[1]).add_(blue, alpha=LUMA[2]).unsqueeze(-3)


def _reflected(places: Tensor, size: int) -> Tensor:
    """Places outside 0 .. size - 1 folded back at the ends."""
    return size - 1 - (size - 1 - places.abs()).abs()
