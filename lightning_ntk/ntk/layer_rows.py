"""Jacobian rows of uncoupled examples from what their layers saw: one backward pass for each output, of all examples.

A layer's weight gradient for one example needs the layer's input and the cotangent of its output for that example.
So C backward passes down to the layers' outputs, and one small product a layer, example and output, give all rows. The
layers served are `F.conv2d`, `F.linear` on vectors, and the affine part of `F.group_norm`; a network that uses its
parameters in any other way is left to `ntk.jacobian`, whose vmap serves everything.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from lightning_ntk.ntk.convolution import geometry_of, weight_gradient

Params = dict[str, Tensor]
# From the cotangents of a layer's outputs, [n, ...], to rows of its parameters, {name: [n, *shape]}.
RowsOf = Callable[[Tensor], Params]


def layer_rows(network, params: Params, x: Tensor) -> tuple[Params, Tensor] | None:
    """Rows `{name: [n, C, *shape]}` and outputs `[n, C]` for inputs `[n, ...]`; None for a network it cannot serve.

    Everything is computed on detached values.
    """
    with torch.enable_grad():
        with _Capture(params) as capture:
            outputs = network(params, x.detach())
        if capture.unserved or capture.seen != set(params) or not outputs.requires_grad:
            return None
        layer_outputs = [output for output, _ in capture.layers]
        found: dict[str, list[Tensor]] = {name: [] for name in params}
        for c in range(outputs.shape[1]):
            more = c + 1 < outputs.shape[1]
            cotangents = torch.autograd.grad(outputs[:, c].sum(), layer_outputs, retain_graph=more)
            with torch.no_grad():
                for cotangent, (_, rows_of) in zip(cotangents, capture.layers, strict=True):
                    for name, rows in rows_of(cotangent).items():
                        found[name].append(rows)
    return {name: torch.stack(rows, dim=1) for name, rows in found.items()}, outputs.detach()


class _Capture(TorchFunctionMode):
    """Keeps the output of each layer, and how its parameters' rows follow from the output's cotangents."""

    def __init__(self, params: Params) -> None:
        super().__init__()
        self.names = {id(p): name for name, p in params.items()}
        self.layers: list[tuple[Tensor, RowsOf]] = []
        self.seen: set[str] = set()
        self.unserved = False

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        used = [self.names[id(leaf)] for leaf in tree_leaves((args, kwargs)) if id(leaf) in self.names]
        if not used:
            return func(*args, **kwargs)
        served = {torch.conv2d: self._conv2d, F.linear: self._linear, F.group_norm: self._group_norm}.get(func)
        result = served(*args, **kwargs) if served is not None and self.seen.isdisjoint(used) else None
        self.seen.update(used)
        if result is None:
            self.unserved = True
            return func(*args, **kwargs)
        output, rows_of = result
        if not output.requires_grad:  # The first layers: here the graph begins. (Hooks on modules want no leaf.)
            output = output.requires_grad_().view_as(output)
        self.layers.append((output, rows_of))
        return output

    def _name(self, parameter: Tensor | None) -> str | None:
        return self.names.get(id(parameter))

    def _conv2d(self, input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
        if input.dim() != 4 or isinstance(padding, str):
            return None
        if input.device.type == "cpu":
            input = input.contiguous(memory_format=torch.channels_last)
        seen, shape = input.detach(), weight.shape
        geometry = geometry_of(stride, padding, dilation, groups)
        names = self._name(weight), self._name(bias)

        def rows_of(cotangent: Tensor) -> Params:
            rows = {}
            if names[0]:
                rows[names[0]] = weight_gradient(seen[:, None], cotangent[:, None], shape, geometry)
            if names[1]:
                rows[names[1]] = cotangent.sum((2, 3))
            return rows

        return torch.conv2d(input, weight, bias, stride, padding, dilation, groups), rows_of

    def _linear(self, input, weight, bias=None):
        if input.dim() != 2:
            return None
        seen, names = input.detach(), (self._name(weight), self._name(bias))

        def rows_of(cotangent: Tensor) -> Params:
            rows = {names[0]: cotangent[:, :, None] * seen[:, None, :], names[1]: cotangent}
            return {name: row for name, row in rows.items() if name}

        return F.linear(input, weight, bias), rows_of

    def _group_norm(self, input, num_groups, weight=None, bias=None, eps=1e-5):
        if input.dim() != 4 or weight is None or bias is None:
            return None
        normalised = F.group_norm(input, num_groups, eps=eps)
        seen, names = normalised.detach(), (self._name(weight), self._name(bias))

        def rows_of(cotangent: Tensor) -> Params:
            rows = {names[0]: (cotangent * seen).sum((2, 3)), names[1]: cotangent.sum((2, 3))}
            return {name: row for name, row in rows.items() if name}

        return normalised * weight[:, None, None] + bias[:, None, None], rows_of
