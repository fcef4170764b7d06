"""The context in which a network's layers are the engine's: fast under nested derivatives and vmap."""

import contextlib
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from lightning_ntk.errors import ConfigError
from lightning_ntk.ntk import linear_algebra, norms
from lightning_ntk.ntk.convolution import ONEDNN_ABOVE, convolve, geometry_of
from lightning_ntk.ntk.pooling import Window, max_pool
from lightning_ntk.ntk.standardise import standardise

# Layers on smaller images (channels * height * width) stay PyTorch's own: there the engine's bookkeeping costs more
# than it saves, and its loops over single images would be without oneDNN.
SMALLEST_IMAGE = ONEDNN_ABOVE
# The fused ways to compute attention have no forward-mode derivative.
ATTENTION = (F.scaled_dot_product_attention, F.multi_head_attention_forward)


@contextlib.contextmanager
def plain_attention() -> Iterator[None]:
    """Attention from matrix products: PyTorch's fused ways lack second derivatives, and its transformer layer for
    evaluation has none at all."""
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)


class engine_layers(TorchFunctionMode):
    """Inside, `F.conv2d`, `F.max_pool2d` and `F.group_norm` of any network are the engine's, and so are `ntk.norms` and
    `ntk.linear_algebra`.

    Under autocast the first three stay PyTorch's own, which choose their precision. Attention is computed from matrix
    products, whose derivatives PyTorch has. What the network computes under a `torch.no_grad()` of its own is a
    constant in both modes of derivatives: forward mode by itself goes on through it.
    """

    def __enter__(self):
        self.tracked = torch.is_grad_enabled()
        return super().__enter__()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if self.tracked and not torch.is_grad_enabled():
            with forward_ad._set_fwd_grad_enabled(False):
                return func(*args, **kwargs)
        if func in ATTENTION:
            with sdpa_kernel(SDPBackend.MATH):
                return func(*args, **kwargs)
        serve = _SERVED.get(func)
        replaced = None if serve is None else serve(*args, **kwargs)
        return func(*args, **kwargs) if replaced is None else replaced


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


def _as_average(input, output_size):
    return input.mean((-2, -1), keepdim=True) if output_size in (1, (1, 1)) else None


def _as_layer_norm(input, normalized_shape, weight=None, bias=None, eps=1e-5, cudnn_enable=True):
    return norms.layer_norm(input, normalized_shape, weight, bias, eps)


def _as_batch_norm(input, weight, bias, running_mean, running_var, training, momentum, eps, cudnn_enabled):
    return norms.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)


def _as_instance_norm(input, weight, bias, running_mean, running_var, use_input_stats, momentum, eps, cudnn_enabled):
    return norms.instance_norm(input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps)


def _as_prelu(input, weight):
    slope = weight if weight.numel() == 1 else weight.view(-1, *[1] * (input.dim() - 2))
    return torch.where(input > 0, input, slope * input)


def _as_glu(input, dim=-1):
    value, gate = input.chunk(2, dim)
    return value * gate.sigmoid()


def _as_hardsigmoid(input, inplace=False):
    return F.relu6(input + 3) / 6


def _as_embedding(input, weight, padding_idx=None, *settings, **more):
    if padding_idx is None:
        return None
    is_padding = torch.arange(len(weight), device=weight.device) == padding_idx % len(weight)
    weight = torch.where(is_padding.unsqueeze(1), weight.detach(), weight)
    return F.embedding(input, weight, None, *settings, **more)


def _as_weight_norm(v, g, dim=0):
    return v * (g / torch.norm_except_dim(v, 2, dim))


def _as_cdist(x1, x2, p=2.0, compute_mode=None):
    return torch.linalg.vector_norm(x1.unsqueeze(-2) - x2.unsqueeze(-3), p, -1)


def _as_select_scatter(input, src, dim, index):
    index %= input.shape[dim]
    return input.slice_scatter(src.unsqueeze(dim), dim, index, index + 1)


def _unless_product(input, dim, index, src, reduce, *, include_self=True):
    if reduce == "prod":
        raise _refusal("cumprod, or the exponential of a sum of logarithms,")


def _as_eigh(A, UPLO="L"):
    return torch.return_types.linalg_eigh(linear_algebra.eigh(A, UPLO))


def _as_slogdet(A):
    return torch.return_types.linalg_slogdet(linear_algebra.slogdet(A))


def _refuse(replacement: str):
    def refuse(*args, **kwargs):
        raise _refusal(replacement)

    return refuse


def _refusal(replacement: str) -> ConfigError:
    return ConfigError(
        f"The network calls a function of PyTorch's whose derivatives come out wrong here. Call {replacement} instead."
    )


def _pair(value) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else tuple(value)


# What the engine has instead of a function of PyTorch's: with the same arguments, its result, or None to leave it.
_SERVED = {
    torch.conv2d: _as_convolve,
    F.max_pool2d: _as_max_pool,
    torch.max_pool2d: _as_max_pool,
    F.group_norm: _as_standardise,
    # PyTorch's own of these are wrong, and so are served at any size.
    F.batch_norm: norms.batch_norm,
    F.layer_norm: norms.layer_norm,
    F.instance_norm: norms.instance_norm,
    torch.layer_norm: _as_layer_norm,
    torch.batch_norm: _as_batch_norm,
    torch.instance_norm: _as_instance_norm,
    torch.native_layer_norm: _refuse("F.layer_norm"),
    torch.native_batch_norm: _refuse("F.batch_norm"),
    torch.linalg.solve: linear_algebra.solve,
    **dict.fromkeys((torch.linalg.det, torch.det, Tensor.det), linear_algebra.det),
    **dict.fromkeys((torch.linalg.slogdet, torch.slogdet, Tensor.slogdet), _as_slogdet),
    **dict.fromkeys((torch.logdet, Tensor.logdet), linear_algebra.logdet),
    **dict.fromkeys((torch.cholesky_inverse, Tensor.cholesky_inverse), linear_algebra.cholesky_inverse),
    torch.linalg.eigh: _as_eigh,
    torch.cdist: _as_cdist,
    **dict.fromkeys((torch.select_scatter, Tensor.select_scatter), _as_select_scatter),
    **dict.fromkeys((torch.scatter_reduce, Tensor.scatter_reduce, Tensor.scatter_reduce_), _unless_product),
    **dict.fromkeys((torch.linalg.householder_product, torch.orgqr, Tensor.orgqr), linear_algebra.householder_product),
    torch.linalg.solve_ex: _refuse("torch.linalg.solve"),
    **dict.fromkeys((torch.linalg.lu_solve, torch.lu_solve, Tensor.lu_solve), _refuse("torch.linalg.solve")),
    torch.linalg.tensorsolve: _refuse("torch.linalg.solve"),
    # With channels last, vmap falls back on a slow way, with a warning.
    F.adaptive_avg_pool2d: _as_average,
    # And of these, forward-mode derivatives have no reverse mode, or fail under vmap; weight norm's second are wrong.
    torch.prelu: _as_prelu,
    F.glu: _as_glu,
    F.hardsigmoid: _as_hardsigmoid,
    torch._weight_norm: _as_weight_norm,
    # In forward mode padding is no constant, as it is in reverse mode.
    F.embedding: _as_embedding,
}
