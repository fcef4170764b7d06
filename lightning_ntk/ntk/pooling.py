"""Max pooling in a form that stays fast under nested derivatives and vmap.

`max_pool(x)` picks one entry of each window; its derivatives pick the same entries (`_Pick`) or put them back (`_Put`).
"""

import dataclasses

import torch
from torch import Tensor

from lightning_ntk.ntk.convolution import batch_axis_first

# Of images `[..., channels, h, w]`, and of the places in them `[..., entries]`.
_OWN_AXES = (3, 1)


@dataclasses.dataclass(frozen=True)
class Window:
    """What a 2d max pooling is besides its input."""

    size: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    ceil_mode: bool

    @property
    def overlap(self) -> bool:
        """Whether one entry can be the largest of several windows."""
        return any(s < d * (k - 1) + 1 for k, s, d in zip(self.size, self.stride, self.dilation, strict=True))


@dataclasses.dataclass(frozen=True)
class _Pooling:
    """The shapes `(channels, height, width)` before and after a max pooling, and whether its windows overlap."""

    image: tuple[int, int, int]
    pooled: tuple[int, int, int]
    overlap: bool


def _flat(x: Tensor) -> Tensor:
    """`[..., channels, h, w]` to `[..., channels * h * w]`, in the order that convolutions leave it in memory."""
    return x.movedim(-3, -1).flatten(-3) if x.device.type == "cpu" else x.flatten(-3)


def _unflat(x: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """The inverse of `_flat`."""
    channels, *image = shape
    return x.unflatten(-1, (*image, channels)).movedim(-1, -3) if x.device.type == "cpu" else x.unflatten(-1, shape)


def max_pool(x: Tensor, window: Window) -> Tensor:
    """x `[n, channels, h, w]` to the largest entries of its windows, `[n, channels, h', w']`."""
    return _MaxPool.apply(x, window)[0]


class _MaxPool(torch.autograd.Function):
    """Max pooling `[n, channels, h, w]` to the largest entries `[n, channels, h', w']`, and their places in `_flat`."""

    generate_vmap_rule = False

    @staticmethod
    def forward(x, window):
        on_cpu = x.device.type == "cpu"
        x = x.contiguous(memory_format=torch.channels_last if on_cpu else torch.contiguous_format)
        largest, where = torch.ops.aten.max_pool2d_with_indices(x, *dataclasses.astuple(window))
        channels = torch.arange(x.shape[1], device=x.device)[:, None, None]
        where = where * x.shape[1] + channels if on_cpu else where + channels * (x.shape[2] * x.shape[3])
        return largest, _flat(where)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, window = inputs
        largest, where = output
        ctx.mark_non_differentiable(where)
        ctx.save_for_backward(where)
        ctx.save_for_forward(where)
        ctx.set_materialize_grads(False)
        ctx.pooling = _Pooling(tuple(x.shape[-3:]), tuple(largest.shape[-3:]), window.overlap)

    @staticmethod
    def backward(ctx, cotangent, _):
        return _Put.apply(cotangent, ctx.saved_tensors[0], ctx.pooling), None

    @staticmethod
    def jvp(ctx, tangent, _):
        return _Pick.apply(tangent, ctx.saved_tensors[0], ctx.pooling), None

    @staticmethod
    def vmap(info, in_dims, x, window):
        folded = _MaxPool.apply(x.movedim(in_dims[0], 0).flatten(0, 1), window)
        return tuple(part.unflatten(0, (info.batch_size, -1)) for part in folded), (0, 0)


class _AtPlaces(torch.autograd.Function):
    """Common to both: linear in images, and nothing to be differentiated in the places `where`."""

    generate_vmap_rule = False

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, where, ctx.pooling = inputs
        ctx.save_for_backward(where)
        ctx.save_for_forward(where)


class _Pick(_AtPlaces):
    """The entries `where` of images `[..., channels, h, w]`, as `[..., channels, h', w']`."""

    @staticmethod
    def forward(x, where, pooling):
        shape = torch.broadcast_shapes(x.shape[:-3], where.shape[:-1])
        picked = _flat(x).expand(*shape, -1).gather(-1, where.expand(*shape, -1))
        return _unflat(picked, pooling.pooled)

    @staticmethod
    def backward(ctx, cotangent):
        return _Put.apply(cotangent, ctx.saved_tensors[0], ctx.pooling), None, None

    @staticmethod
    def jvp(ctx, tangent, *_):
        return _Pick.apply(tangent, ctx.saved_tensors[0], ctx.pooling)

    @staticmethod
    def vmap(info, in_dims, x, where, pooling):
        return _Pick.apply(*batch_axis_first(in_dims, _OWN_AXES, x, where), pooling), 0


class _Put(_AtPlaces):
    """Images `[..., channels, h, w]` of zeros but for values `[..., channels, h', w']`, each added at its `where`."""

    @staticmethod
    def forward(values, where, pooling):
        shape = torch.broadcast_shapes(values.shape[:-3], where.shape[:-1])
        channels, height, width = pooling.image
        x = values.new_zeros(*shape, channels * height * width)
        index, values = where.expand(*shape, -1), _flat(values).expand(*shape, -1)
        x = x.scatter_add_(-1, index, values) if pooling.overlap else x.scatter_(-1, index, values)
        return _unflat(x, pooling.image)

    @staticmethod
    def backward(ctx, cotangent):
        return _Pick.apply(cotangent, ctx.saved_tensors[0], ctx.pooling), None, None

    @staticmethod
    def jvp(ctx, tangent, *_):
        return _Put.apply(tangent, ctx.saved_tensors[0], ctx.pooling)

    @staticmethod
    def vmap(info, in_dims, values, where, pooling):
        return _Put.apply(*batch_axis_first(in_dims, _OWN_AXES, values, where), pooling), 0
