"""The empirical neural tangent kernel Theta(x1, x2) = J(x1) J(x2)^T (Jacot et al. 2018)."""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from lightning_ntk.errors import ConfigError
from lightning_ntk.ntk.jacobian import Jacobian
from lightning_ntk.ntk.memory import PLANNED_PART, available_bytes, footprint
from lightning_ntk.ntk.network import Network
from lightning_ntk.ntk.params import Params, inner_products
from lightning_ntk.ntk.precision import full_precision

Kind = Literal["full", "trace", "mean_trace"]
# Layer names to kernels, or the one kernel under ALL.
Kernels = dict[str, Tensor]
ALL = ""


def empirical_ntk(
    network: Network,
    params: Params,
    x1: Tensor,
    x2: Tensor | None = None,
    *,
    kind: Kind = "full",
    coupled: bool = True,
    chunk_size: int | None = None,
    by_layer: bool = False,
) -> Tensor | dict[str, Tensor]:
    """Kernel between inputs x1 `[n1, ...]` and x2 `[n2, ...]` (x1 itself when None), a constant of theta.

    In full precision whatever autocast and TF32 are set to, and in the type of the parameters. The parameters are taken
    as they are: nothing of the kernel can be differentiated by them.

    Args:
        kind: "full" gives `[n1, n2, C, C]`. "trace" sums the C diagonal entries of each block, "mean_trace" divides
            that sum by C; both give `[n1, n2]`. (neural-tangents' "trace" is the mean.)
        coupled: whether an example's outputs depend on the others (batch statistics). False where they do not, as
            in most networks: the rows then take C backward passes over the n examples instead of n C.
        chunk_size: examples whose Jacobian rows, C P numbers each, are in memory at a time, of x1 and of x2. None takes
            all where they fit, else as many as fit half of the free memory. Rows that do not fit together are computed
            again: n / chunk_size times.
        by_layer: give the part of each layer, `{module name: kernel}`; the kernel is their sum. A parameter of the
            network itself, outside its layers, stands under its own name.

    Raises:
        ConfigError: an unknown kind, no examples, rows that do not fit into memory (the message says what would), or
            what `Jacobian` refuses.
    """
    if kind not in ("full", "trace", "mean_trace"):
        raise ConfigError(f"Expected argument `kind` to be 'full', 'trace' or 'mean_trace', but got {kind!r}.")
    for name, x in (("x1", x1), ("x2", x2)):
        if x is not None and not len(x):
            raise ConfigError(
                f"Expected argument `{name}` to hold an example or more, but its shape is {list(x.shape)}."
            )
    j1 = Jacobian(network, params, x1, coupled=coupled)
    j2 = j1 if x2 is None else Jacobian(network, params, x2, coupled=coupled)
    with full_precision(x1.device.type):
        pairs = footprint(network, params, x1).pairs_at_once(x1.device)
        size = fitting_chunk(j1, j2, chunk_size)
        kernels = _in_blocks(j1, j2, size, pairs, lambda *rows: _products(*rows, kind, by_layer))
    dtype = next(iter(params.values())).dtype  # Inputs may be whole numbers.
    kernels = {name: kernel.to(dtype) for name, kernel in kernels.items()}
    return kernels if by_layer else kernels[ALL]


def _in_blocks(
    j1: Jacobian, j2: Jacobian, size: int, pairs: int, products: Callable[[Params, Params], Kernels]
) -> Kernels:
    """Products of the rows of two Jacobians, or of one with itself, from blocks of so many examples of each."""
    starts1, starts2 = range(0, j1.x.shape[0], size), range(0, j2.x.shape[0], size)
    blocks: dict[tuple[int, int], Kernels] = {}
    for i in starts1:
        rows1 = j1.rows(i, i + size, pairs_at_once=pairs)
        for j in starts2:
            if j2 is j1 and j < i:  # The kernel of a set with itself is symmetric.
                blocks[i, j] = {name: _transposed(block) for name, block in blocks[j, i].items()}
                continue
            same = j2 is j1 and i == j
            rows2 = rows1 if same else j2.rows(j, j + size, pairs_at_once=pairs)
            blocks[i, j] = products(rows1, rows2)
    return {
        name: torch.cat([torch.cat([blocks[i, j][name] for j in starts2], dim=1) for i in starts1])
        for name in blocks[0, 0]
    }


def fitting_chunk(j1: Jacobian, j2: Jacobian, chunk_size: int | None) -> int:
    """The number of examples whose rows to hold, checked against the free memory before any work is done."""
    of_one = j1.output_count * sum(p.numel() * p.element_size() for p in j1.params.values())
    largest = max(j1.x.shape[0], j2.x.shape[0])
    planned = int(PLANNED_PART * available_bytes(j1.x.device))
    if chunk_size is not None and chunk_size < 1:
        raise ConfigError(f"chunk_size must be at least 1 example, but got {chunk_size}.")
    wanted = min(largest, chunk_size or largest)
    sides = 1 if j2 is j1 and wanted == largest else 2
    if sides * wanted * of_one <= planned:
        return wanted
    fits = planned // (2 * of_one)
    if chunk_size is not None or fits < 1:
        raise ConfigError(
            f"The Jacobian rows of {wanted} examples, {of_one / 2**20:.1f} MiB each, take "
            f"{sides * wanted * of_one / 2**30:.1f} GiB, but at most {planned / 2**30:.1f} GiB are used, "
            f"{PLANNED_PART:.0%} of what is free. "
            + (f"chunk_size={fits} would fit." if fits else "Not even one example fits: take a smaller network.")
        )
    return fits


def _products(rows1: Params, rows2: Params, kind: Kind, by_layer: bool) -> Kernels:
    """Inner products of rows `[k, C, ...]`, summed by layer or over all of them."""
    kernels: Kernels = {}
    for name in rows1:
        a, b = (rows[name].reshape(*rows[name].shape[:2], -1) for rows in (rows1, rows2))  # [k, C, p]
        (k1, c, _), k2 = a.shape, b.shape[0]
        if kind == "full":
            part = inner_products(a.flatten(0, 1), b.flatten(0, 1)).view(k1, c, k2, c).transpose(1, 2)
        else:
            part = inner_products(a.flatten(1), b.flatten(1))
            part = part / c if kind == "mean_trace" else part
        layer = name.rpartition(".")[0] or name if by_layer else ALL
        kernels[layer] = kernels[layer] + part if layer in kernels else part
    return kernels


def _transposed(block: Tensor) -> Tensor:
    """Theta(x2, x1) from Theta(x1, x2): both the examples and the outputs change places."""
    return block.transpose(0, 1).transpose(2, 3) if block.dim() == 4 else block.T
