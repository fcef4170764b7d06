"""Norms whose derivatives are right when reverse mode goes through forward mode.

PyTorch's own `F.layer_norm`, `F.instance_norm` and `F.batch_norm` of batch statistics have forward-mode derivatives
that treat the mean and the variance as constants when reverse mode differentiates them again: d/dtheta of J v comes out
wrong without a warning (seen with torch 2.14; `tests/ntk/test_norms.py`). The same formulas written out are right.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._C._functorch import maybe_current_level
from torch.autograd import forward_ad
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from lightning_ntk.ntk.batch_norm import batch_norm as closed_batch_norm
from lightning_ntk.ntk.convolution import AXES

# Batch norm of images from this size on (channels * height * width) is in closed form. Smaller ones, it slows down.
SMALLEST_IMAGE = 20480
# The modules that call these functions.
MODULES = (nn.LayerNorm, _BatchNorm, _InstanceNorm)


def layer_norm(input, normalized_shape, weight=None, bias=None, eps=1e-5) -> Tensor:
    """`F.layer_norm`."""
    return _normalised(input, tuple(range(-len(normalized_shape), 0)), eps, weight, bias)


def instance_norm(
    input,
    running_mean=None,
    running_var=None,
    weight=None,
    bias=None,
    use_input_stats=True,
    momentum=0.1,
    eps=1e-5,
) -> Tensor | None:
    """`F.instance_norm`; None with running averages, which are PyTorch's to keep."""
    if running_mean is not None or not use_input_stats:
        return None
    return _normalised(input, tuple(range(2, input.dim())), eps, *_of_channels(input, weight, bias))


def batch_norm(
    input, running_mean, running_var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5
) -> Tensor | None:
    """`F.batch_norm` of batch statistics; None with running averages, which are PyTorch's to use and to keep."""
    if running_mean is not None or not training:
        return None
    if input.dim() != AXES or weight is None or bias is None:
        return _normalised(input, (0, *range(2, input.dim())), eps, *_of_channels(input, weight, bias))
    return _of_images(input, weight, bias, eps)


def batch_statistics(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Batch norm of images `[n, channels, h, w]` by their own statistics, right under every nesting of derivatives.

    Outside of all transforms by `F.batch_norm`, the fastest, which reverse mode alone differentiates rightly. But not
    of large images with their channels last on a CPU: its second derivative takes several times as long there.
    """
    single = x.numel() == x.shape[1]  # One value a channel, which PyTorch refuses.
    # The compiler is asked for first: it cannot follow the questions after it.
    if single or torch.compiler.is_compiling() or maybe_current_level() is not None or forward_ad._current_level >= 0:
        return _of_images(x, weight, bias, eps)
    if x.device.type == "cpu" and _has_closed_form(x, weight, bias) and not x.is_contiguous():
        return closed_batch_norm(x, weight, bias, eps)
    return F.batch_norm(x, None, None, weight, bias, training=True, eps=eps)


def _has_closed_form(x: Tensor, weight: Tensor, bias: Tensor) -> bool:
    of_32_or_64_bits = x.dtype in (torch.float32, torch.float64) and weight.dtype == bias.dtype == x.dtype
    left_alone = not (torch.compiler.is_compiling() or torch.is_autocast_enabled(x.device.type))
    return x.shape[1:].numel() >= SMALLEST_IMAGE and of_32_or_64_bits and left_alone


def _of_images(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    if _has_closed_form(x, weight, bias):
        return closed_batch_norm(x, weight, bias, eps)
    # As PyTorch does, statistics of 16-bit numbers in 32 bits.
    wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    variance, mean = torch.var_mean(wide, dim=(0, 2, 3), correction=0)
    scale = weight * torch.rsqrt(variance + eps)
    result = x * scale.view(-1, 1, 1) + (bias - mean * scale).view(-1, 1, 1)
    return result if wide is x else result.to(weight.dtype)


def _normalised(x: Tensor, dims: tuple[int, ...], eps: float, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    # As PyTorch does: statistics of 16-bit numbers in 32 bits, and the result too under autocast.
    wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    variance, mean = torch.var_mean(wide, dim=dims, correction=0, keepdim=True)
    result = (wide - mean) * torch.rsqrt(variance + eps)
    result = result if weight is None else result * weight
    result = result if bias is None else result + bias
    return result if torch.is_autocast_enabled(x.device.type) else result.to(x.dtype)


def _of_channels(x: Tensor, *parameters: Tensor | None) -> list[Tensor | None]:
    """Parameters `[channels]`, as they stand beside `[n, channels, ...]`."""
    return [p if p is None else p.view(-1, *[1] * (x.dim() - 2)) for p in parameters]
