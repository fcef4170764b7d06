"""Batch normalisation by the statistics of the batch, with derivatives in closed form.

    f(x, w, b) = w y + b,     y = (x - m(x)) r,     r = (m((x - m(x))^2) + eps)^(-1/2),

with m the mean over a channel's entries, and s(t) = m(y t). The derivative along (t, w', b'), and the gradient in x and
w of its product with d, are

    D    = w T + w' y + b',                      T = r (t - m(t) - y s(t)),
    in x:  (w' - w r s(t)) r (d - m(d) - y s(d)) - w r s(d) T - w r^2 y q,      in w:  r N q,
           q = m(t d) - m(t) m(d) - s(t) s(d),   N: the entries of a channel.

Each is a sum of x, t and d with one coefficient for a channel. The coefficients need sums over channels, and those come
from PyTorch's kernel for the gradient of batch norm, in one pass over the images, with the gradients in t, w' and b'.
PyTorch's own rules for the same in elementary operations (`ntk.norms`) take four times as many passes.

Inside a vmap, and for derivatives of these derivatives, the formulas are evaluated by elementary operations.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.func import jvp

from lightning_ntk.ntk.convolution import AXES, batch_axis_first
from lightning_ntk.ntk.standardise import aligned

# The axes of images [..., n, channels, h, w] that the statistics of a channel are over.
SET = (-4, -2, -1)


def batch_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """f for images `[n, channels, h, w]`, weight and bias `[channels]`."""
    return _BatchNorm.apply(x, weight, bias, eps)[0]


class _BatchNorm(torch.autograd.Function):
    """f, and m(x) and r as `[channels]`."""

    generate_vmap_rule = False

    @staticmethod
    def forward(x, weight, bias, eps):
        return torch.ops.aten.native_batch_norm(x, weight, bias, None, None, True, 0.0, eps)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, _, ctx.eps = inputs
        _, *statistics = output
        ctx.mark_non_differentiable(*statistics)
        ctx.save_for_backward(x, weight, *statistics)
        ctx.save_for_forward(x, weight, *statistics)

    @staticmethod
    def backward(ctx, cotangent, *_):
        x, weight, *statistics = ctx.saved_tensors
        if torch.is_grad_enabled():  # These are to be differentiated, too.
            statistics = _statistics(x, ctx.eps)
        return *_gradients(cotangent, x, weight, *statistics, ctx.needs_input_grad[:3]), None

    @staticmethod
    def jvp(ctx, *tangents):
        return _Derivative.apply(*tangents[:3], *ctx.saved_tensors, ctx.eps)[0], None, None

    @staticmethod
    def vmap(info, in_dims, *inputs):
        *tensors, eps = inputs
        x, weight, bias = batch_axis_first(in_dims, (AXES, 1, 1), *tensors)
        mean, r = _statistics(x, eps)
        value = (x - _of_channels(mean)) * _of_channels(r) * _of_channels(weight) + _of_channels(bias)
        return _filled(info.batch_size, value, mean, r), (0, 0, 0)


class _Derivative(torch.autograd.Function):
    """D, and N s(t) and N m(t) as `[channels]`. A function of t, w', b', x and w; m(x) and r are given along."""

    generate_vmap_rule = False

    @staticmethod
    def forward(t, weight_tangent, bias_tangent, x, weight, mean, r, eps):
        return _derivative(t, weight_tangent, bias_tangent, x, weight, mean, r)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.eps = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(*tensors, *output[1:])
        ctx.save_for_forward(*tensors[:5])

    @staticmethod
    def backward(ctx, d, *_):
        t, weight_tangent, _, x, weight, *known = ctx.saved_tensors
        if torch.is_grad_enabled():
            statistics = _statistics(x, ctx.eps)
            known = *statistics, *_gradients(t, x, weight, *statistics, (False, True, True))[1:]
        mean, r, *sums = known
        of_t, of_weight_tangent, of_bias_tangent = _gradients(d, x, weight, mean, r, (True, True, True))
        n = _entries(x)
        s_t, m_t, s_d, m_d = (total / n for total in (*sums, of_weight_tangent, of_bias_tangent))
        q = _products(t, d) / n - m_t * m_d - s_t * s_d
        k, wrr = r * (weight_tangent - weight * r * s_t), weight * r.square()
        of_y = wrr * (s_d * s_t - q) - k * s_d
        constant = wrr * s_d * m_t - k * m_d - of_y * r * mean
        of_x = _sum_of(constant, (k, d), (-wrr * s_d, t), (of_y * r, x))
        return of_t, of_weight_tangent, of_bias_tangent, of_x, r * n * q, None, None, None

    @staticmethod
    def jvp(ctx, *tangents):
        given = zip(ctx.saved_tensors, tangents[:5], strict=True)
        directions = tuple(torch.zeros_like(primal) if d is None else d for primal, d in given)
        eps = ctx.eps

        def derivative(*primals):
            return _derivative(*primals, *_statistics(primals[3], eps))[0]

        with torch.enable_grad():  # By elementary operations.
            return jvp(derivative, ctx.saved_tensors, directions)[1], None, None

    @staticmethod
    def vmap(info, in_dims, *inputs):
        tensors = batch_axis_first(in_dims[:5], (AXES, 1, 1, AXES, 1), *inputs[:5])
        found = _derivative(*tensors, *_statistics(tensors[3], inputs[-1]))
        return _filled(info.batch_size, *found), (0, 0, 0)


def _derivative(t, weight_tangent, bias_tangent, x, weight, mean, r) -> tuple[Tensor, Tensor, Tensor]:
    """D, N s(t) and N m(t)."""
    _, *sums = _gradients(t, x, weight, mean, r, (False, True, True))
    s, m = (total / _entries(x) for total in sums)
    of_x = r * (weight_tangent - weight * r * s)
    constant = bias_tangent - weight * r * m - of_x * mean
    return _sum_of(constant, (weight * r, t), (of_x, x)), *sums


def _gradients(d: Tensor, x: Tensor, weight: Tensor, mean: Tensor, r: Tensor, wanted: Sequence[bool]) -> list:
    """The gradients of <d, f> in x, w and b: w r (d - m(d) - y s(d)), N s(d) and N m(d); None for one not wanted."""
    if d.dim() == x.dim() == AXES and not torch.is_grad_enabled():
        (d,) = aligned(x, d)
        found = torch.ops.aten.native_batch_norm_backward(d, x, weight, None, None, mean, r, True, 0.0, list(wanted))
    else:
        y = (x - _of_channels(mean)) * _of_channels(r)
        s, m = (y * d).sum(SET), d.sum(SET)
        n = _entries(x)
        of_x = _of_channels(weight * r) * (d - _of_channels(m / n) - y * _of_channels(s / n)) if wanted[0] else None
        found = of_x, s, m
    return [gradient if asked else None for gradient, asked in zip(found, wanted, strict=True)]


def _products(a: Tensor, b: Tensor) -> Tensor:
    """N m(a b): the gradient of <b, f> in w, were x = a, its mean 0 and r 1."""
    zeros = a.new_zeros(a.shape[-3])
    return _gradients(b, a, zeros, zeros, zeros + 1, (False, True, False))[1]


def _sum_of(constant: Tensor, *terms: tuple[Tensor, Tensor]) -> Tensor:
    """constant + sum of factor * images, for constant and factors `[..., channels]`, in the layout of the last."""
    result = _of_channels(constant)
    for factor, images in terms:
        result = torch.addcmul(result, *aligned(terms[-1][1], images), _of_channels(factor))
    return result


def _statistics(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """m(x) and r, `[..., channels]`."""
    variance, mean = torch.var_mean(x, dim=SET, correction=0)
    return mean, torch.rsqrt(variance + eps)


def _entries(x: Tensor) -> int:
    return x.shape[-4] * x.shape[-2:].numel()


def _of_channels(values: Tensor) -> Tensor:
    """Values `[..., channels]`, as they stand beside images."""
    return values[..., None, :, None, None]


def _filled(size: int, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Each with a leading axis of this size, instead of one of 1."""
    return tuple(t if t.shape[0] == size else t.repeat(size, *[1] * (t.dim() - 1)) for t in tensors)
