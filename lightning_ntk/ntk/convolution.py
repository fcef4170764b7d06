"""Convolution in a form that stays fast under nested derivatives and vmap.

PyTorch differentiates convolutions correctly, but under vmap its rules fall back on layouts and kernels that cost
several times the arithmetic. Here convolution is a family of three bilinear functions, closed under differentiation:
`convolve(x, w)`, its gradient in x, and its gradient in w. Like a matrix product, each takes leading batch axes on
either factor, which broadcast; vmap adds such an axis, or folds it into the images where one weight serves them all.

On a CPU the leading axes are a loop over dense convolutions in channels-last layout, which oneDNN is fastest in. On a
GPU they are folded into the images, the channels or the groups of a single convolution.
"""

import dataclasses
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

# The axes of images [n, channels, h, w] and of weights [out, in, kh, kw]; axes before them are leading ones.
AXES = 4
# On a CPU, PyTorch hands a single image to oneDNN only if it has more numbers than this; its own kernel is slower.
ONEDNN_ABOVE = 20480


@dataclasses.dataclass(frozen=True)
class Geometry:
    """What a 2d convolution is besides its tensors."""

    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None = None, groups: int = 1) -> Tensor:
        settings = (self.stride, self.padding, self.dilation, False, (0, 0), self.groups * groups)
        return torch.convolution(x, weight, bias, *settings)

    def backward(self, cotangent: Tensor, x: Tensor, weight: Tensor, of_x: bool, groups: int = 1) -> Tensor:
        settings = (self.stride, self.padding, self.dilation, False, (0, 0), self.groups * groups)
        wanted = (of_x, not of_x, False)
        gradients = torch.ops.aten.convolution_backward.default(cotangent, x, weight, None, *settings, wanted)
        return gradients[0] if of_x else gradients[1]

    def image_shape(self, x: torch.Size, weight: torch.Size) -> tuple[int, int, int, int]:
        """Shape of the convolution of images of one shape with weights of another, leading axes aside."""
        sizes = [
            (size + 2 * padding - dilation * (window - 1) - 1) // stride + 1
            for size, window, stride, padding, dilation in zip(
                x[-2:], weight[-2:], self.stride, self.padding, self.dilation, strict=True
            )
        ]
        return (x[-AXES], weight[-AXES], *sizes)


def _loops(tensor: Tensor) -> bool:
    """Whether leading axes are a loop of dense convolutions, or folded into one grouped convolution."""
    return tensor.device.type == "cpu" and tensor.shape[-3:].numel() > ONEDNN_ABOVE


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    """x `[..., n, in, h, w]` with weight `[..., out, in / groups, kh, kw]` and bias `[..., out]` or None."""
    return _Convolve.apply(x, weight, bias, geometry)


def patches(x: Tensor, window: tuple[int, int], geometry: Geometry) -> Tensor:
    """What each place of a convolution's output sees of x `[n, in, h, w]`: `[n, in * kh * kw, places]`.

    As `F.unfold`, in half of its time on a CPU.
    """
    (down, across), settings = geometry.padding, (window, geometry.stride, geometry.dilation)
    x = F.pad(x, (across, across, down, down))
    for axis, size, stride, dilation in zip((2, 3), *settings, strict=True):
        x = x.unfold(axis, dilation * (size - 1) + 1, stride)[..., ::dilation]
    return x.permute(0, 1, 4, 5, 2, 3).flatten(4).flatten(1, 3)


def geometry_of(stride, padding, dilation, groups: int) -> Geometry:
    """From the arguments of `F.conv2d`, each a number or a pair."""
    return Geometry(*((v, v) if isinstance(v, int) else tuple(v) for v in (stride, padding, dilation)), groups)


class _Bilinear(torch.autograd.Function):
    """Common to the three: saving two factors, for reverse and forward mode alike."""

    generate_vmap_rule = False

    @classmethod
    def _save(cls, ctx, first: Tensor, second: Tensor, geometry: Geometry) -> None:
        ctx.save_for_backward(first, second)
        ctx.save_for_forward(first, second)
        ctx.set_materialize_grads(False)
        ctx.geometry = geometry


class _Convolve(_Bilinear):
    @staticmethod
    def forward(x, weight, bias, geometry):
        if not _loops(x):
            return _convolve_in_groups(x, weight, bias, geometry)
        if bias is None:
            return _each(geometry.forward, x, weight)
        return _each(lambda x, w, b: geometry.forward(x, w, b.flatten()), x, weight, bias[..., None, None, None, :])

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, bias, geometry = inputs
        _Convolve._save(ctx, x, weight, geometry)
        ctx.bias_shape = None if bias is None else bias.shape

    @staticmethod
    def backward(ctx, cotangent):
        x, weight = ctx.saved_tensors
        of_x = of_weight = of_bias = None
        if ctx.needs_input_grad[0]:
            of_x = summed(_InputGradient.apply(cotangent, weight, x.shape[-AXES:], ctx.geometry), x.shape)
        if ctx.needs_input_grad[1]:
            of_weight = summed(_WeightGradient.apply(x, cotangent, weight.shape[-AXES:], ctx.geometry), weight.shape)
        if ctx.needs_input_grad[2]:
            of_bias = summed(cotangent.sum((-4, -2, -1)), ctx.bias_shape)
        return of_x, of_weight, of_bias, None

    @staticmethod
    def jvp(ctx, x_tangent, weight_tangent, bias_tangent, _):
        x, weight = ctx.saved_tensors
        parts = []
        if x_tangent is not None:
            parts.append(convolve(x_tangent, weight, None, ctx.geometry))
        if weight_tangent is not None:
            parts.append(convolve(x, weight_tangent, bias_tangent, ctx.geometry))
        elif bias_tangent is not None:
            lead = torch.broadcast_shapes(x.shape[:-AXES], weight.shape[:-AXES], bias_tangent.shape[:-1])
            shape = ctx.geometry.image_shape(x.shape, weight.shape)
            parts.append(bias_tangent[..., None, :, None, None].expand(*lead, *shape))
        return sum(parts[1:], parts[0])

    @staticmethod
    def vmap(info, in_dims, x, weight, bias, geometry):
        one_weight = in_dims[1] is None and in_dims[2] is None
        x, weight, bias = batch_axis_first(in_dims, (AXES, AXES, 1), x, weight, bias)
        if one_weight and weight.dim() == AXES + 1 and (bias is None or bias.dim() == 2) and x.dim() == AXES + 1:
            folded = convolve(x.flatten(0, 1), weight[0], None if bias is None else bias[0], geometry)
            return folded.unflatten(0, (info.batch_size, -1)), 0
        return convolve(x, weight, bias, geometry), 0


class _InputGradient(_Bilinear):
    """d<cotangent, convolve(x, weight)> / dx, `[..., *shape]`."""

    @staticmethod
    def forward(cotangent, weight, shape, geometry):
        if not _loops(cotangent):
            return _input_gradient_in_groups(cotangent, weight, shape, geometry)
        x = cotangent.new_empty(1).expand(shape)
        return _each(lambda c, w: geometry.backward(c, x, w, of_x=True), cotangent, weight)

    @staticmethod
    def setup_context(ctx, inputs, output):
        cotangent, weight, ctx.shape, geometry = inputs
        _InputGradient._save(ctx, cotangent, weight, geometry)

    @staticmethod
    def backward(ctx, direction):
        cotangent, weight = ctx.saved_tensors
        of_cotangent = of_weight = None
        if ctx.needs_input_grad[0]:
            of_cotangent = summed(convolve(direction, weight, None, ctx.geometry), cotangent.shape)
        if ctx.needs_input_grad[1]:
            gradient = _WeightGradient.apply(direction, cotangent, weight.shape[-AXES:], ctx.geometry)
            of_weight = summed(gradient, weight.shape)
        return of_cotangent, of_weight, None, None

    @staticmethod
    def jvp(ctx, cotangent_tangent, weight_tangent, *_):
        cotangent, weight = ctx.saved_tensors
        parts = []
        if cotangent_tangent is not None:
            parts.append(_InputGradient.apply(cotangent_tangent, weight, ctx.shape, ctx.geometry))
        if weight_tangent is not None:
            parts.append(_InputGradient.apply(cotangent, weight_tangent, ctx.shape, ctx.geometry))
        return sum(parts[1:], parts[0])

    @staticmethod
    def vmap(info, in_dims, cotangent, weight, shape, geometry):
        one_weight = in_dims[1] is None
        cotangent, weight = batch_axis_first(in_dims, (AXES, AXES), cotangent, weight)
        if one_weight and weight.dim() == AXES + 1 and cotangent.dim() == AXES + 1:
            shape = (info.batch_size * shape[0], *shape[1:])
            folded = _InputGradient.apply(cotangent.flatten(0, 1), weight[0], shape, geometry)
            return folded.unflatten(0, (info.batch_size, -1)), 0
        return _InputGradient.apply(cotangent, weight, shape, geometry), 0


class _WeightGradient(_Bilinear):
    """d<cotangent, convolve(x, weight)> / dweight, `[..., *shape]`."""

    @staticmethod
    def forward(x, cotangent, shape, geometry):
        if not _loops(x):
            return _weight_gradient_in_groups(x, cotangent, shape, geometry)
        weight = x.new_empty(1).expand(shape)
        return _each(lambda x, c: geometry.backward(c, x, weight, of_x=False), x, cotangent)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, cotangent, ctx.shape, geometry = inputs
        _WeightGradient._save(ctx, x, cotangent, geometry)

    @staticmethod
    def backward(ctx, direction):
        x, cotangent = ctx.saved_tensors
        of_x = of_cotangent = None
        if ctx.needs_input_grad[0]:
            of_x = summed(_InputGradient.apply(cotangent, direction, x.shape[-AXES:], ctx.geometry), x.shape)
        if ctx.needs_input_grad[1]:
            of_cotangent = summed(convolve(x, direction, None, ctx.geometry), cotangent.shape)
        return of_x, of_cotangent, None, None

    @staticmethod
    def jvp(ctx, x_tangent, cotangent_tangent, *_):
        x, cotangent = ctx.saved_tensors
        parts = []
        if x_tangent is not None:
            parts.append(_WeightGradient.apply(x_tangent, cotangent, ctx.shape, ctx.geometry))
        if cotangent_tangent is not None:
            parts.append(_WeightGradient.apply(x, cotangent_tangent, ctx.shape, ctx.geometry))
        return sum(parts[1:], parts[0])

    @staticmethod
    def vmap(info, in_dims, x, cotangent, shape, geometry):
        return _WeightGradient.apply(*batch_axis_first(in_dims, (AXES, AXES), x, cotangent), shape, geometry), 0


# ---- leading axes --------------------------------------------------------------------------------------------------


def batch_axis_first(in_dims, axes, *tensors: Tensor | None) -> list[Tensor | None]:
    """Tensors with one more leading axis in front, for vmap: the one it has (`in_dims`), or one of length 1.

    `axes`: of each, how many are its own, behind the leading ones. Those are filled up to the same number, so that the
    new one stands before those of all.
    """

    def fronted(tensor: Tensor, dim: int | None) -> Tensor:
        return tensor.unsqueeze(0) if dim is None else tensor.movedim(dim, 0)

    # vmap gives a dimension for each argument, also for those after the tensors.
    first = [None if t is None else fronted(t, dim) for t, dim in zip(tensors, in_dims, strict=False)]
    leading = [0 if t is None else t.dim() - own for t, own in zip(first, axes, strict=True)]
    return [
        None if t is None else t.reshape(t.shape[0], *[1] * (max(leading) - there), *t.shape[1:])
        for t, there in zip(first, leading, strict=True)
    ]


def summed(gradient: Tensor, shape: torch.Size) -> Tensor:
    """The sum over the leading axes that a factor of this shape was broadcast along."""
    surplus = gradient.dim() - len(shape)
    if surplus:
        gradient = gradient.sum(tuple(range(surplus)))
    broadcast = tuple(axis for axis, size in enumerate(shape) if size == 1 < gradient.shape[axis])
    return gradient.sum(broadcast, keepdim=True) if broadcast else gradient


def _each(function: Callable, *tensors: Tensor) -> Tensor:
    """A function of tensors of 4 axes, for each index of their broadcast leading axes, in channels-last layout."""
    lead = torch.broadcast_shapes(*(t.shape[:-AXES] for t in tensors))
    if not lead:
        return function(*map(_channels_last, tensors))
    each = zip(*(_unbound(t.expand(*lead, *t.shape[-AXES:])) for t in tensors), strict=True)
    results = [function(*map(_channels_last, parts)).movedim(1, -1) for parts in each]
    return torch.stack(results).movedim(-1, 2).unflatten(0, lead)


def _unbound(tensor: Tensor) -> list[Tensor]:
    """The tensors of 4 axes at each index of the leading axes."""
    parts = [tensor]
    for _ in tensor.shape[:-AXES]:
        parts = [part for longer in parts for part in longer.unbind()]
    return parts


def _channels_last(tensor: Tensor) -> Tensor:
    tensor = tensor.contiguous(memory_format=torch.channels_last)
    if tensor.shape[0] == 1:  # PyTorch tells the layout by all strides, that of the single image included.
        tensor = tensor.as_strided(tensor.shape, (tensor.numel(), *tensor.stride()[1:]))
    return tensor


# ---- one grouped convolution, for GPUs -----------------------------------------------------------------------------


def _sorted_axes(first: Tensor, second: Tensor, geometry: Geometry) -> tuple[Tensor, Tensor, list[int]]:
    """Both with their leading axes as three: those only the first has, those only the second has, and shared ones.

    Returns:
        first `[A, 1, S, ...]`, second `[1, B, S, ...]`, and the sizes A, B and S by the original axes, to undo it.
    """
    lead = torch.broadcast_shapes(first.shape[:-AXES], second.shape[:-AXES])
    first, second = (t.reshape(*[1] * (len(lead) + AXES - t.dim()), *t.shape) for t in (first, second))
    kinds: list[list[int]] = [[], [], []]
    for axis in range(len(lead)):
        only_first, only_second = second.shape[axis] == 1, first.shape[axis] == 1
        kind = 2 if geometry.groups > 1 or only_first == only_second else 0 if only_first else 1
        kinds[kind].append(axis)
    order = [axis for kind in kinds for axis in kind]
    sizes = [[lead[axis] for axis in kind] for kind in kinds]
    a, b, s = (torch.Size(kind).numel() for kind in sizes)
    own = range(len(lead), len(lead) + AXES)

    def arranged(t: Tensor, has_a: bool) -> Tensor:
        wanted = [lead[x] if (x in kinds[2] or x in kinds[0 if has_a else 1]) else 1 for x in range(len(lead))]
        t = t.expand(*wanted, *t.shape[-AXES:]).permute(*order, *own)
        return t.reshape(a if has_a else 1, 1 if has_a else b, s, *t.shape[-AXES:])

    return arranged(first, True), arranged(second, False), order, sizes


def _restored(result: Tensor, order: list[int], sizes: list[list[int]]) -> Tensor:
    """`[A, B, S, ...]` with the leading axes as they were."""
    result = result.reshape(*[size for kind in sizes for size in kind], *result.shape[3:])
    inverse = sorted(range(len(order)), key=order.__getitem__)
    return result.permute(*inverse, *range(len(order), len(order) + AXES))


def _convolve_in_groups(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    if x.dim() == weight.dim() == AXES and (bias is None or bias.dim() == 1):
        return geometry.forward(x.contiguous(), weight.contiguous(), bias)
    result = _convolve_batched(x, weight, geometry)
    return result if bias is None else result + bias[..., None, :, None, None]


def _convolve_batched(x: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    x, weight, *undo = _sorted_axes(x, weight, geometry)
    (a, _, s, n), b = x.shape[:4], weight.shape[1]
    x = x.permute(0, 1, 3, 2, 4, 5, 6).reshape(a * n, s * x.shape[4], *x.shape[5:])
    out = weight.shape[3]
    weight = weight.permute(0, 2, 1, 3, 4, 5, 6).reshape(s * b * out, *weight.shape[4:])
    result = geometry.forward(x, weight, groups=s)
    result = result.view(a, n, s, b, out, *result.shape[2:]).permute(0, 3, 2, 1, 4, 5, 6)
    return _restored(result, *undo)


def _input_gradient_in_groups(cotangent: Tensor, weight: Tensor, shape: tuple, geometry: Geometry) -> Tensor:
    cotangent, weight, *undo = _sorted_axes(cotangent, weight, geometry)
    (a, _, s, n, out), b = cotangent.shape[:5], weight.shape[1]
    cotangent = cotangent.permute(0, 1, 3, 2, 4, 5, 6).reshape(a * n, s * out, *cotangent.shape[5:])
    # [S out, B in / groups, kh, kw]
    weight = weight.permute(0, 2, 3, 1, 4, 5, 6).reshape(s * out, b * weight.shape[4], *weight.shape[5:])
    channels, *image = shape[1:]
    x = cotangent.new_empty(1).expand(a * n, s * b * channels, *image)
    result = geometry.backward(cotangent, x, weight, of_x=True, groups=s)
    return _restored(result.view(a, n, s, b, channels, *image).permute(0, 3, 2, 1, 4, 5, 6), *undo)


def _weight_gradient_in_groups(x: Tensor, cotangent: Tensor, shape: tuple, geometry: Geometry) -> Tensor:
    x, cotangent, *undo = _sorted_axes(x, cotangent, geometry)
    (a, _, s, n, channels), (b, out) = x.shape[:5], (cotangent.shape[1], cotangent.shape[4])
    x = x.permute(1, 3, 2, 0, 4, 5, 6).reshape(n, s * a * channels, *x.shape[5:])
    cotangent = cotangent.permute(0, 3, 2, 1, 4, 5, 6).reshape(n, s * b * out, *cotangent.shape[5:])
    inputs, *window = shape[1:]
    weight = x.new_empty(1).expand(s * b * out, a * inputs, *window)
    result = geometry.backward(cotangent, x, weight, of_x=False, groups=s)
    return _restored(result.view(s, b, out, a, inputs, *window).permute(3, 1, 0, 2, 4, 5, 6), *undo)
