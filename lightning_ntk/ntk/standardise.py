"""Standardisation, the part of group norm without parameters, with derivatives in closed form.

    y = S(x) = (x - m(x)) r,     r = (m((x - m(x))^2) + eps)^(-1/2),     m: the mean over a set of entries.

A set is a group of channels of one image. S is the gradient of the convex function |set| / r, so its derivatives are
symmetric forms. With s(t) = m(y t),

    S'(x)[t]     = r (t - m(t) - y s(t)),
    S''(x)[t, d] = -r^2 ( s(d) (t - m(t)) + s(t) (d - m(d)) + y (m(t d) - m(t) m(d) - 3 s(t) s(d)) ),

and reverse mode needs no others: <c, S'[t]> = <S'[c], t>, <c, S''[t, d]> = <S''[c, t], d>. PyTorch's own rules take
several times as many passes over the images.

Images are `[..., n, channels, h, w]`; leading axes broadcast between arguments, and vmap adds them.
"""

import torch
from torch import Tensor
from torch.func import jvp, vjp

from lightning_ntk.ntk.convolution import AXES, batch_axis_first, summed


def standardise(x: Tensor, groups: int, eps: float) -> Tensor:
    """S(x) for images `[n, channels, h, w]`, in so many groups of channels."""
    return _Standardise.apply(x, groups, eps)[0]


class _Standardise(torch.autograd.Function):
    """S(x), and r as `[..., n, channels, 1, 1]`."""

    generate_vmap_rule = False

    @staticmethod
    def forward(x, groups, eps):
        return _standardised(x, groups, eps)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, ctx.groups, ctx.eps = inputs
        y, r = output
        ctx.mark_non_differentiable(r)
        ctx.save_for_backward(x, y, r)
        ctx.save_for_forward(x, y, r)

    @staticmethod
    def backward(ctx, cotangent, _):
        return _Slope.apply(cotangent, *ctx.saved_tensors, ctx.groups, ctx.eps), None, None

    @staticmethod
    def jvp(ctx, tangent, *_):
        x, y, r = ctx.saved_tensors
        return _Slope.apply(tangent, x, y, r, ctx.groups, ctx.eps), None

    @staticmethod
    def vmap(info, in_dims, x, groups, eps):
        return _Standardise.apply(x.movedim(in_dims[0], 0), groups, eps), (0, 0)


class _Slope(torch.autograd.Function):
    """S'(x)[t]. Depends on x alone: y = S(x) and r come along to be used, not differentiated."""

    generate_vmap_rule = False

    @staticmethod
    def forward(t, x, y, r, groups, eps):
        (t,) = aligned(y, t)
        mean, along = _mean(t, groups), _mean(y * t, groups)
        return torch.addcmul(torch.addcmul(-r * mean, t, r), y, -r * along)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.groups, ctx.eps = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, cotangent):
        t, x, y, r = ctx.saved_tensors
        of_t = of_x = None
        if ctx.needs_input_grad[0]:
            of_t = summed(_Slope.apply(cotangent, x, y, r, ctx.groups, ctx.eps), t.shape)
        if ctx.needs_input_grad[1]:
            of_x = summed(_Curvature.apply(cotangent, t, x, y, r, ctx.groups, ctx.eps), x.shape)
        return of_t, of_x, None, None, None, None

    @staticmethod
    def jvp(ctx, t_tangent, x_tangent, *_):
        t, x, y, r = ctx.saved_tensors
        parts = []
        if t_tangent is not None:
            parts.append(_Slope.apply(t_tangent, x, y, r, ctx.groups, ctx.eps))
        if x_tangent is not None:
            parts.append(_Curvature.apply(t, x_tangent, x, y, r, ctx.groups, ctx.eps))
        return sum(parts[1:], parts[0])

    @staticmethod
    def vmap(info, in_dims, t, x, y, r, groups, eps):
        return _Slope.apply(*batch_axis_first(in_dims, (AXES,) * 4, t, x, y, r), groups, eps), 0


class _Curvature(torch.autograd.Function):
    """S''(x)[t, d]. Its own derivatives, which hardly anything asks for, are those of PyTorch's rules."""

    generate_vmap_rule = False

    @staticmethod
    def forward(t, d, x, y, r, groups, eps):
        return _curvature(*aligned(y, t, d), y, r, groups)

    @staticmethod
    def setup_context(ctx, inputs, output):
        t, d, x, _, _, ctx.groups, ctx.eps = inputs
        ctx.save_for_backward(t, d, x)
        ctx.save_for_forward(t, d, x)

    @staticmethod
    def backward(ctx, cotangent):
        _, pullback = vjp(lambda *a: _curvature_of(*a, ctx.groups, ctx.eps), *ctx.saved_tensors)
        return *pullback(cotangent), None, None, None, None

    @staticmethod
    def jvp(ctx, t_tangent, d_tangent, x_tangent, *_):
        primals = ctx.saved_tensors
        given = zip(primals, (t_tangent, d_tangent, x_tangent), strict=True)
        tangents = tuple(torch.zeros_like(p) if tangent is None else tangent for p, tangent in given)
        return jvp(lambda *a: _curvature_of(*a, ctx.groups, ctx.eps), primals, tangents)[1]

    @staticmethod
    def vmap(info, in_dims, t, d, x, y, r, groups, eps):
        return _Curvature.apply(*batch_axis_first(in_dims, (AXES,) * 5, t, d, x, y, r), groups, eps), 0


def _standardised(x: Tensor, groups: int, eps: float) -> tuple[Tensor, Tensor]:
    # In two passes: `torch.var_mean` takes ten times as long on a CPU.
    centred = x - _mean(x, groups)
    r = torch.rsqrt(_mean(centred.square(), groups) + eps)
    return centred * r, r


def _curvature(t: Tensor, d: Tensor, y: Tensor, r: Tensor, groups: int) -> Tensor:
    m_t, m_d, m_td = _mean(t, groups), _mean(d, groups), _mean(t * d, groups)
    s_t, s_d = _mean(y * t, groups), _mean(y * d, groups)
    scale = -r.square()
    constant = -scale * (s_d * m_t + s_t * m_d)
    result = torch.addcmul(torch.addcmul(constant, t, scale * s_d), d, scale * s_t)
    return torch.addcmul(result, y, scale * (m_td - m_t * m_d - 3 * s_t * s_d))


def _curvature_of(t: Tensor, d: Tensor, x: Tensor, groups: int, eps: float) -> Tensor:
    """S''(x)[t, d] as a function of x."""
    return _curvature(t, d, *_standardised(x, groups, eps), groups)


def _mean(x: Tensor, groups: int) -> Tensor:
    """m(x) of images `[..., n, channels, h, w]`, the same in all of a group's channels: `[..., n, channels, 1, 1]`."""
    grouped = x.mean((-2, -1)).unflatten(-1, (groups, -1))
    return grouped.mean(-1, keepdim=True).expand_as(grouped).flatten(-2)[..., None, None]


def aligned(like: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    """The others in the memory layout of `like`: elementwise operations take several times as long on a mixture."""
    last = _channels_last(like)
    return tuple(
        t if _channels_last(t) == last else (t.movedim(-3, -1).contiguous().movedim(-1, -3) if last else t.contiguous())
        for t in others
    )


def _channels_last(images: Tensor) -> bool:
    return images.stride(-3) == 1
