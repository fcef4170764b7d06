"""Tensors in the shapes of a network's parameters, by name: as vectors, added, multiplied, and worked on in parts."""

import functools
from collections.abc import Iterable

import torch
from torch import Tensor

Params = dict[str, Tensor]
# Parameters that one float32 product sums over.
PRODUCT_BLOCK = 8192


def in_chunks(tensor: Tensor, size: int | None, dim: int = 0) -> tuple[Tensor, ...]:
    """Cut a tensor along an axis into the fewest, equal parts of at most `size` (at least 1); None leaves it whole."""
    if size is None:
        return (tensor,)
    return tensor.tensor_split(-(-tensor.shape[dim] // max(1, size)), dim)


def groups_at_once(pairs: int | None, group: int) -> int | None:
    """How many groups of so many pairs make up `pairs`, at least one; None, for all, where that is None."""
    return None if pairs is None else max(1, pairs // group)


def flatten(params: Params, batch_dims: int = 0) -> Tensor:
    """Concatenate parameter-shaped tensors to one vector `[..., P]`, keeping `batch_dims` leading axes."""
    return torch.cat([p.reshape(*p.shape[:batch_dims], -1) for p in params.values()], dim=-1)


def unflatten(vector: Tensor, like: Params) -> Params:
    """Cut a vector `[P]` into tensors of the shapes and types of `like`: the inverse of `flatten`."""
    pieces = vector.split([p.numel() for p in like.values()])
    return {name: piece.view_as(p).to(p.dtype) for (name, p), piece in zip(like.items(), pieces, strict=True)}


def add(summands: Iterable[Params]) -> Params:
    """The sum of parameter-shaped tensors; one summand of an iterator is in memory at a time."""
    return functools.reduce(lambda total, more: {name: total[name] + more[name] for name in total}, summands)


def inner_products(a: Tensor, b: Tensor, *, exact: bool = False) -> Tensor:
    """a b^T in float64, for a `[..., k, P]` and b `[..., l, P]`.

    Float32 products over millions of parameters lose digits that a kernel's small eigenvalues need (1e-3 of them were
    seen at P = 12 million): short blocks are multiplied, and their results summed in float64. Numbers of 16 bits
    are taken to 32 before.

    `exact`: multiply in float64, at twice the time or more: for kernels whose eigenvalues near 0 are told from it.
    """
    if a.dtype == torch.float64:
        return a @ b.mT
    blocks = zip(a.split(PRODUCT_BLOCK, dim=-1), b.split(PRODUCT_BLOCK, dim=-1), strict=True)
    dtype = torch.float64 if exact else torch.float32
    return sum((x.to(dtype) @ y.to(dtype).mT).double() for x, y in blocks)
