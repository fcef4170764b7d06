"""Kernels of a method's network, ready for their numbers."""

import copy

import torch
from torch import Tensor, nn

from lightning_ntk.networks.base import couples_examples
from lightning_ntk.ntk import empirical_ntk, functional, spectrum
from lightning_ntk.ntk.params import Params


def kernels(
    module: nn.Module, params: Params, x: Tensor, kind: str, by_layer: bool
) -> tuple[Tensor, dict[str, Tensor]]:
    """The kernel of inputs x `[n, ...]` as a matrix in float64 on the CPU, and each layer's part where it is wanted.

    `kind` is "full", or "trace": the mean over outputs, with which `method.kernel=trace` solves. Parameters of less
    than single precision are taken to single, and with them all that the network computes with: frozen ones, buffers.
    """
    if any(p.dtype.itemsize < 4 for p in module.parameters()):
        module = copy.deepcopy(module).float()
    full = {name: p.detach().float() if p.dtype.itemsize < 4 else p.detach() for name, p in params.items()}
    found = empirical_ntk(
        functional(module)[0],
        full,
        x.to(next(iter(full.values())).dtype),
        kind="mean_trace" if kind == "trace" else kind,
        coupled=couples_examples(module),
        by_layer=by_layer,
    )
    layers = {name: matrix(part) for name, part in found.items()} if by_layer else {}
    return sum(layers.values()) if by_layer else matrix(found), layers


def where_not_finite(module: nn.Module, params: Params, x: Tensor) -> str:
    """Which layers a kernel that is not finite comes from."""
    layers = {name.rpartition(".")[0] for name, p in params.items() if not bool(torch.isfinite(p).all())}
    if layers:
        return f"The kernel is not finite: the parameters of {', '.join(sorted(layers))} are not."
    parts = kernels(module, params, x, "trace", by_layer=True)[1]
    layers = {name for name, part in parts.items() if not bool(torch.isfinite(part).all())}
    return f"The kernel is not finite: the derivatives by {', '.join(sorted(layers))} are not."


def evenly(x: Tensor, most: int | None) -> Tensor:
    """At most so many examples of x `[n, ...]`, spread evenly: over the classes, where x is ordered by class."""
    n = x.shape[0]
    if most is None or n <= most:
        return x
    return x[torch.arange(most, device=x.device) * n // most]


def matrix(kernel: Tensor) -> Tensor:
    """A kernel as a symmetric matrix in float64 on the CPU, which decomposes small ones faster than a GPU."""
    return spectrum.as_matrix(kernel.detach().cpu())
