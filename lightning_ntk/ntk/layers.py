"""The context in which a network's layers are the engine's: fast under nested derivatives and vmap."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from lightning_ntk.ntk import norms
from lightning_ntk.ntk.batch_norm import batch_norm
from lightning_ntk.ntk.convolution import convolve, geometry_of
from lightning_ntk.ntk.pooling import Window, max_pool
from lightning_ntk.ntk.standardise import standardise

# Layers on smaller images (channels * height * width) stay PyTorch's own: there the engine's bookkeeping costs more
# than it saves, and PyTorch hands single images of that size to a slower kernel than oneDNN's.
SMALLEST_IMAGE = 20480


# The fused ways to compute attention have no forward-mode derivative.
ATTENTION = (F.scaled_dot_product_attention, F.multi_head_attention_forward)


class engine_layers(TorchFunctionMode):
    """Inside, the layers of any network in `_SERVED` are the engine's where it serves them.

    Under autocast, convolution, pooling, group norm and batch norm stay PyTorch's own, which choose their precision, or
    those of `ntk.norms`. Attention is computed from matrix products, whose derivatives PyTorch has.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in ATTENTION:
            with sdpa_kernel(SDPBackend.MATH):
                return func(*args, **kwargs)
        serve = _SERVED.get(func)
        replaced = None if serve is None else serve(*args, **kwargs)
        return func(*args, **kwargs) if replaced is None else replaced


class reverse_layers(TorchFunctionMode):
    """Inside, layers are the quickest for one pass of reverse mode, and right for nothing else: PyTorch's own."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is norms.batch_statistics:
            input, weight, bias, eps = args
            return F.batch_norm(input, None, None, weight, bias, training=True, eps=eps)
        return func(*args, **(kwargs or {}))


def _is_served(input: Tensor) -> bool:
    """Whether the engine takes over: images in a batch, large enough, and not under autocast."""
    large = input.dim() == 4 and input.shape[1:].numel() >= SMALLEST_IMAGE
    return large and not torch.is_autocast_enabled(input.device.type)


def _as_convolve(input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
    if isinstance(padding, str) or not _is_served(input):
        return None
    return convolve(input, weight, bias, geometry_of(stride, padding, dilation, groups))


def _as_max_pool(input, kernel_size, stride=None, padding=0, dilation=1, ceil_mode=False, return_indices=False):
    if return_indices or not _is_served(input):
        return None
    pairs = (_pair(kernel_size), _pair(stride or kernel_size), _pair(padding), _pair(dilation))
    return max_pool(input, Window(*pairs, ceil_mode))


def _as_standardise(input, num_groups, weight=None, bias=None, eps=1e-5):
    if not _is_served(input) or (weight is None) != (bias is None):
        return None
    result = standardise(input, num_groups, eps)
    return result if weight is None else torch.addcmul(bias.view(-1, 1, 1), result, weight.view(-1, 1, 1))


def _as_batch_statistics(input, weight, bias, eps):
    alike = input.dtype == weight.dtype == bias.dtype and input.dtype in (torch.float32, torch.float64)
    return batch_norm(input, weight, bias, eps) if alike and _is_served(input) else None


def _as_batch_norm(input, running_mean, running_var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5):
    if running_mean is not None or not training:  # Running averages are PyTorch's to use and to keep.
        return None
    found = None if weight is None or bias is None else _as_batch_statistics(input, weight, bias, eps)
    return norms.batch_norm(input, weight, bias, eps) if found is None else found


def _pair(value) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else tuple(value)


# What the engine has instead of a function of PyTorch's: with the same arguments, its result, or None to leave it.
_SERVED = {
    torch.conv2d: _as_convolve,
    F.max_pool2d: _as_max_pool,
    torch.max_pool2d: _as_max_pool,
    F.group_norm: _as_standardise,
    # PyTorch's own of these are wrong, and so are served at any size.
    F.batch_norm: _as_batch_norm,
    F.layer_norm: norms.layer_norm,
    F.instance_norm: norms.instance_norm,
    # The networks' own, which is right and is served where that is faster.
    norms.batch_statistics: _as_batch_statistics,
}
