"""Jacobian rows of uncoupled examples from what their layers saw: one backward pass for each output, of all examples.

A layer's weight gradient for one example needs the layer's input and the cotangent of its output for that example.
So C backward passes down to the layers' outputs, and small products of the two, give all rows. The layers served are
`F.conv2d`, `F.linear` on vectors, and the affine part of `F.group_norm`; a network that uses its parameters in any
other way is left to `ntk.jacobian`, whose vmap serves everything. So is one that puts its examples into another order,
in which a layer's rows would be those of others: where an operation is not known to keep it, the rows are checked.
"""

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from lightning_ntk.ntk.checks import check_outputs
from lightning_ntk.ntk.convolution import Geometry, geometry_of, patches
from lightning_ntk.ntk.network import Network
from lightning_ntk.ntk.params import Params

# From c cotangents of a layer's output, [n, ...] each, writes the rows of its parameters, {name: [n, c, *shape]}.
FillRows = Callable[[list[Tensor], Params], None]
# Backward passes whose cotangents are held, so that one product serves them: what a forward pass makes, once or twice.
OUTPUTS_AT_ONCE = 5
# What a convolution saw is put together for so many bytes of examples at a time, below what glibc maps anew.
PATCH_BYTES = 24 * 2**20


def layer_rows(network: Network, params: Params, x: Tensor) -> tuple[Params, Tensor] | None:
    """Rows `{name: [n, C, *shape]}` and outputs `[n, C]` for inputs `[n, ...]`; None for a network it cannot serve.

    Everything is computed on detached values.

    Raises:
        ConfigError: outputs of another shape.
    """
    if torch.is_autocast_enabled(x.device.type) or not x.is_floating_point():
        return None
    with torch.enable_grad():
        # All that follows from the examples has a graph, what does not is none of a layer's business.
        examples = x.detach().requires_grad_().clone()  # No leaf: it may be written over.
        with _Capture(params, len(x)) as capture:
            outputs = network(params, examples)
        check_outputs(outputs, x)
        if capture.unserved or capture.seen != set(params) or not outputs.requires_grad:
            return None
        if any(layer.was_written_over() for layer in capture.layers):
            return None
        edges = [layer.edge for layer in capture.layers]
        found = {name: p.new_empty(*outputs.shape, *p.shape) for name, p in params.items()}
        last = outputs.shape[1] - 1
        for start in range(0, last + 1, OUTPUTS_AT_ONCE):
            some = range(start, min(start + OUTPUTS_AT_ONCE, last + 1))
            cotangents = [
                torch.autograd.grad(outputs[:, c].sum(), edges, retain_graph=c < last, allow_unused=True) for c in some
            ]
            of_some = {name: rows[:, some.start : some.stop] for name, rows in found.items()}
            with torch.no_grad():
                for layer, *of_layer in zip(capture.layers, *cotangents, strict=True):
                    # An output that does not use the layer has none.
                    of_layer = [layer.zeros() if u is None else u for u in of_layer]
                    layer.fill_rows(of_layer, of_some)
    if capture.unsure and not _add_up(found, network, params, x):
        return None
    return found, outputs.detach()


class _Layer:
    """A layer's place in the graph, and how its parameters' rows follow from the cotangents of its output.

    The place stays that of the layer when its output is written over (`nn.ReLU(inplace=True)`), which changes what the
    tensor stands for. Its input must stay, as it is needed for the rows.
    """

    def __init__(self, input: Tensor, output: Tensor, fill_rows: FillRows) -> None:
        self.edge = torch.autograd.graph.get_gradient_edge(output)
        self.fill_rows = fill_rows
        self.zeros = functools.partial(torch.zeros, output.shape, dtype=output.dtype, device=output.device)
        self._input, self._version = input.detach(), input._version

    def was_written_over(self) -> bool:
        """Whether its input is no longer what it was."""
        return self._input._version != self._version


def _functions(*names: str) -> set[Callable]:
    """Of torch, of tensors and of `torch.nn.functional`, those of these names, and those that write into place."""
    owners, names = (torch, Tensor, F), [*names, *(f"{name}_" for name in names)]
    return {getattr(owner, name) for name in names for owner in owners if hasattr(owner, name)}


# What leaves examples in their order in the first axis, where as many come out.
KEEPING = _functions(
    *("add", "sub", "mul", "div", "pow", "__radd__", "__rsub__", "__rmul__", "__rtruediv__", "__pow__", "where"),
    *("neg", "abs", "square", "sqrt", "rsqrt", "exp", "log", "sin", "cos", "erf", "clamp", "tanh", "sigmoid"),
    *("relu", "relu6", "leaky_relu", "elu", "selu", "celu", "gelu", "silu", "mish", "softplus", "logsigmoid"),
    *("hardtanh", "hardsigmoid", "hardswish", "max_pool2d", "avg_pool2d", "adaptive_avg_pool2d", "group_norm"),
    *("flatten", "unflatten", "reshape", "view", "contiguous", "clone", "to"),
)
# The same, where their weight does not follow from the examples.
WITH_WEIGHT = _functions("conv2d", "linear", "matmul", "mm", "__matmul__")
# The same, where they are told of other axes.
OVER_AXES = _functions("mean", "sum", "amax")
# What may put another axis into the place of theirs.
MOVING = _functions("transpose", "movedim", "permute")


def _keeps_order(func: Callable, args: tuple, kwargs: dict, result: object, n: int) -> bool:
    """Whether examples surely stand in the same places of the result as in those of the arguments.

    Parts of the batch, known by their length, may be put together again in another order.
    """
    if func is Tensor.__setitem__:
        return False
    made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor) and leaf.requires_grad]
    if not made:
        return True
    if any(leaf.shape[:1] != (n,) for leaf in made):
        return False
    if func in WITH_WEIGHT:
        return len(args) > 1 and not args[1].requires_grad and 2 <= args[0].dim() == result.dim()
    if func in OVER_AXES:
        axes = args[1] if len(args) > 1 else kwargs.get("dim", 0)
        axes = axes if isinstance(axes, tuple | list) else (axes,)
        return bool(axes) and all(axis % args[0].dim() for axis in axes)
    if func in MOVING:
        return bool(args) and result.stride()[:1] == args[0].stride()[:1]
    if func is Tensor.__getitem__:
        first = args[1][0] if isinstance(args[1], tuple) and args[1] else args[1]
        return isinstance(first, slice) and first == slice(None)
    return func in KEEPING


def _add_up(rows: Params, network, params: Params, x: Tensor) -> bool:
    """Whether the rows, weighed at random and summed, are what a backward pass gives: those of others are not."""
    leaves = {name: p.detach().requires_grad_() for name, p in params.items()}
    with torch.enable_grad():
        outputs = network(leaves, x.detach().clone())
    weights = torch.randn(outputs.shape, generator=torch.Generator().manual_seed(0)).to(outputs)
    expected = torch.autograd.grad(outputs, list(leaves.values()), weights, materialize_grads=True)
    error = size = 0.0
    for of_one, summed in zip(rows.values(), expected, strict=True):
        of_one = of_one.flatten(0, 1).flatten(1)
        error = error + (weights.flatten().to(of_one) @ of_one - summed.flatten()).square().sum()
        size = size + of_one.square().sum()
    return bool(error <= torch.finfo(x.dtype).eps * size)  # The root of both: half of the digits.


class _Capture(TorchFunctionMode):
    """Keeps each layer that parameters `params` have, of those whose input is n examples in their own order."""

    def __init__(self, params: Params, n: int) -> None:
        super().__init__()
        self.names = {id(p): name for name, p in params.items()}
        self.n = n
        self.layers: list[_Layer] = []
        self.seen: set[str] = set()
        self.unserved = False
        self.unsure = False

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        leaves = tree_leaves((args, kwargs))
        if any(map(self._is_foreign, leaves)):
            args, kwargs = tree_map(lambda leaf: leaf.detach() if self._is_foreign(leaf) else leaf, (args, kwargs))
        used = [self.names[id(leaf)] for leaf in leaves if id(leaf) in self.names]
        if not used:
            result = func(*args, **kwargs)
            self.unsure |= not _keeps_order(func, args, kwargs, result, self.n)
            return result
        served = {torch.conv2d: self._conv2d, F.linear: self._linear, F.group_norm: self._group_norm}.get(func)
        if not torch.is_grad_enabled():  # A network's own no_grad: the output is in no graph.
            served = None
        result = served(*args, **kwargs) if served is not None and self.seen.isdisjoint(used) else None
        self.seen.update(used)
        if result is None:
            self.unserved = True
            return func(*args, **kwargs)
        input, output, fill_rows = result
        self.layers.append(_Layer(input, output, fill_rows))
        return output

    def _is_foreign(self, leaf: object) -> bool:
        """Whether it is a trainable tensor that is not among `params`: nothing is to be seen through it."""
        return isinstance(leaf, Tensor) and leaf.is_leaf and leaf.requires_grad and id(leaf) not in self.names

    def _is_examples(self, input: Tensor, dims: int) -> bool:
        """Whether an input is made of the examples, the first axis theirs, and is no parameter."""
        return input.dim() == dims and len(input) == self.n and input.requires_grad and id(input) not in self.names

    def _name(self, parameter: Tensor | None) -> str | None:
        return self.names.get(id(parameter))

    def _conv2d(self, input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
        if not self._is_examples(input, 4) or isinstance(padding, str):
            return None
        if input.device.type == "cpu":
            input = input.contiguous(memory_format=torch.channels_last)
        geometry = geometry_of(stride, padding, dilation, groups)
        seen, names = input.detach(), (self._name(weight), self._name(bias))

        def fill_rows(cotangents: list[Tensor], rows: Params) -> None:
            if names[0]:
                _fill_weight_rows(rows[names[0]], seen, cotangents, geometry)
            if names[1]:
                rows[names[1]][:] = torch.stack([u.sum((2, 3)) for u in cotangents], 1)

        return input, torch.conv2d(input, weight, bias, stride, padding, dilation, groups), fill_rows

    def _linear(self, input, weight, bias=None):
        if not self._is_examples(input, 2):
            return None
        seen, names = input.detach(), (self._name(weight), self._name(bias))

        def fill_rows(cotangents: list[Tensor], rows: Params) -> None:
            stacked = torch.stack(cotangents, 1)
            if names[0]:
                rows[names[0]][:] = stacked[..., None] * seen[:, None, None, :]
            if names[1]:
                rows[names[1]][:] = stacked

        return input, F.linear(input, weight, bias), fill_rows

    def _group_norm(self, input, num_groups, weight=None, bias=None, eps=1e-5):
        if not self._is_examples(input, 4) or weight is None or bias is None:
            return None
        normalised = F.group_norm(input, num_groups, eps=eps)
        seen, names = normalised.detach(), (self._name(weight), self._name(bias))

        def fill_rows(cotangents: list[Tensor], rows: Params) -> None:
            if names[0]:
                rows[names[0]][:] = torch.stack([(u * seen).sum((2, 3)) for u in cotangents], 1)
            if names[1]:
                rows[names[1]][:] = torch.stack([u.sum((2, 3)) for u in cotangents], 1)

        return normalised, normalised * weight[:, None, None] + bias[:, None, None], fill_rows


def _fill_weight_rows(rows: Tensor, x: Tensor, cotangents: list[Tensor], geometry: Geometry) -> None:
    """Rows of a convolution's weight, `[n, c, *shape]`, from its input `[n, ...]` and c cotangents of its output.

    Products of what each place of the output saw and its cotangents, a few examples at a time, as one number of the
    input is seen from many places.
    """
    groups, window = geometry.groups, rows.shape[-2:]
    rows = rows.flatten(3).unflatten(2, (groups, -1))  # [n, c, groups, out / groups, in kh kw]
    out, wide = rows.shape[-2:]
    at_once = max(1, PATCH_BYTES // (groups * wide * cotangents[0][0, 0].numel() * x.element_size()))
    for place, some, *of_some in zip(*(t.split(at_once) for t in (rows, x, *cotangents)), strict=True):
        seen = patches(some, window, geometry).unflatten(1, (groups, -1))
        columns = [u.unflatten(1, (groups, -1)).flatten(3).mT for u in of_some]  # [n, groups, places, out / groups]
        if wide > out:  # Putting them side by side pays where each is multiplied by many.
            place[:] = (torch.cat(columns, -1).mT @ seen.mT).unflatten(2, (-1, out)).movedim(1, 2)
        else:
            for c, column in enumerate(columns):
                place[:, c] = (seen @ column).mT
