"""Gaussian noise: the control that any attack must beat."""

import torch
from torch import Tensor

from lightning_ntk.attacks.base import Attacked, Predictor, check_eps, check_images, evaluate


def gaussian_noise(predict: Predictor, x: Tensor, y: Tensor, eps: float, *, generator: torch.Generator) -> Attacked:
    """x + eps g with g standard normal in each pixel, clipped to [0, 1].

    Its standard deviation is eps, so that before clipping its expected squared l2 norm, eps^2 times the number of
    pixels, is that of an l-infinity perturbation at its full size. Single pixels go beyond eps. One forward pass.

    Args:
        predict: images to logits.
        x, y: images `[*batch, channels, height, width]` in [0, 1] and labels `[*batch]`.
        eps: in [0, 1].

    Raises:
        ConfigError: eps out of range.
        DataError: x holds no images in [0, 1].
    """
    check_images(x, y)
    check_eps(eps)
    noise = torch.randn(x.shape, generator=generator, device=generator.device).to(x)
    images = (x + eps * noise).clamp(0, 1)
    return Attacked(images, evaluate(predict, images), torch.ones_like(y))
