"""The part of Meta-RKHS-II's meta-gradient that comes from the support set's Jacobian (see `energy.meta_rkhs_ii`).

    d<a, J(X) v> + <G, d(J(X) J(X)^T)> - <b, df(X)> = <M, dJ(X)> - <b, df(X)>,     M = a v^T + 2 G J(X),  [n C, P].

<M, dJ(X)> is a sum of terms d<u, J(X) z> with constant u and z, each a reverse pass through a forward-mode derivative:

* By the singular value decomposition M = sum_k u_k z_k^T. A few terms carry it (2 where t = inf, where the flow has
  come to rest, or by Pade 1/1), each a pass over all n examples.
* Where examples are not coupled, row (i, c) of M concerns output c of example i alone. So C passes over all examples,
  each example along tangents of its own, are exact whatever the rank.
"""

import itertools
from typing import NamedTuple

import torch
from torch import Tensor
from torch.func import jvp, vmap

from lightning_ntk.energy.closed_form import Solution, Work
from lightning_ntk.ntk.jacobian import gradient_and_value
from lightning_ntk.ntk.network import Network
from lightning_ntk.ntk.params import Params, add, in_chunks, inner_products, unflatten


class SupportTerms(NamedTuple):
    """What the support part needs, all constants; for T tasks with a leading axis on each."""

    jacobian: Tensor  # J(X), [n C, P]
    v: Tensor  # J(x_q)^T delta, [P]
    a: Tensor  # phi(H) r, [n C]
    b: Tensor  # phi(H) J(X) v, [n C]
    adjoint: Tensor  # G, [n C, n C]
    singular: Tensor  # the singular values of M, falling, [n C] in float64
    left: Tensor  # rows u_k: its left singular vectors, [n C, n C]; once truncated [k, n C]

    def right(self, left: Tensor) -> Tensor:
        """z = M^T u for each row u of `left` `[k, n C]`: `[k, P]`."""
        return torch.outer(left @ self.a, self.v) + 2 * (left @ self.adjoint) @ self.jacobian


def support_terms(
    jacobian: Tensor, kernel: Tensor, solution: Solution, v: Tensor, *, by_rows: bool = False
) -> SupportTerms:
    """The terms of one task, from J(X) `[n C, P]`, H `[n C, n C]`, what was solved with it, and v `[P]`.

    M is the product of [a, 2 G] and the rows v and J(X), whose inner products N are known: the left singular vectors of
    M are those of the small matrix [a, 2 G] N^(1/2). In float64. With `by_rows` none are computed: M's rows serve.
    """
    c = inner_products(jacobian, v[None]).squeeze(-1)
    b, adjoint = solution.derivatives(c)
    rounded = [x.to(v.dtype) for x in (solution.a, b, adjoint)]
    if by_rows:
        return SupportTerms(jacobian, v, *rounded, adjoint.new_zeros(0), v.new_zeros(0, c.shape[0]))
    norm = inner_products(v[None], v[None]).squeeze()
    inner = torch.cat([torch.cat([norm[None], c])[None], torch.cat([c[:, None], 0.5 * (kernel + kernel.mT)], 1)])
    scales, axes = torch.linalg.eigh(inner)
    factor = torch.cat([solution.a[:, None], 2 * adjoint], 1) @ (axes * scales.clamp(min=0).sqrt())
    left, singular, _ = torch.linalg.svd(factor, full_matrices=False)
    return SupportTerms(jacobian, v, *rounded, singular, left.mT.to(v.dtype))


def truncate(terms: SupportTerms, outputs: int, coupled: bool, tolerance: float) -> tuple[SupportTerms, bool, Tensor]:
    """Keep the fewest singular vectors of M that leave out at most `tolerance` of its Frobenius norm, in every task.

    Where that are more than the C = `outputs` rows of M that an uncoupled example has, its rows serve instead. With
    `tolerance` 0 nothing is left out, and no number is read: the host does not wait for a GPU.

    Returns:
        The terms, whether M's rows serve, and the part of the norm left out (scalar, float64).
    """
    if tolerance == 0:
        return terms, not coupled, terms.singular.new_zeros(())
    # Entry k: the norm of M without its first k terms, relative to all; summed from the small end to keep its digits.
    remains = terms.singular.square().flip(-1).cumsum(-1).flip(-1).sqrt()
    remains = remains / remains[..., :1].clamp(min=torch.finfo(remains.dtype).tiny)
    rank = max(1, int((remains > tolerance).sum(-1).max()))
    if not coupled and rank > outputs:
        return terms, True, remains.new_zeros(())
    left_out = remains[..., rank].max() if rank < remains.shape[-1] else remains.new_zeros(())
    return terms._replace(left=terms.left[..., :rank, :]), False, left_out


def support_gradient(
    network: Network, params: Params, x: Tensor, terms: SupportTerms, work: Work, *, by_rows: bool
) -> Params:
    """<M, dJ(X)> - <b, df(X)> of one task, in the shapes of theta, for support inputs x `[n, ...]`.

    `by_rows`: differentiate each example along its own rows of M instead of all along the vectors in `terms`.
    """
    vectors, n = terms.left.shape[0], x.shape[0]
    if by_rows:
        outputs = terms.a.shape[0] // n
        basis = torch.eye(n * outputs, dtype=terms.a.dtype, device=x.device).unflatten(0, (n, outputs))  # [n, C, n C]
        pieces = zip(in_chunks(x, work.at_once(outputs)), in_chunks(basis, work.at_once(outputs)), strict=True)
        parts = (
            along_own(network, params, some, terms.right(rows.flatten(0, 1)).unflatten(0, rows.shape[:2]), work)
            for some, rows in pieces
        )
    else:
        if work.coupled:  # All examples along a few tangents at a time.
            lefts = in_chunks(terms.left, work.at_once(n))
            pieces = ((x, terms.right(some), some.unflatten(1, (n, -1))) for some in lefts)
        else:  # A few examples along all tangents at a time.
            tangents, cotangents = terms.right(terms.left), terms.left.unflatten(1, (n, -1))
            xs, us = in_chunks(x, work.at_once(vectors)), in_chunks(cotangents, work.at_once(vectors), dim=1)
            pieces = ((some, tangents, u) for some, u in zip(xs, us, strict=True))
        parts = (_along_shared(network, params, *piece, work) for piece in pieces)
    return add(itertools.chain([unflatten(-(terms.b @ terms.jacobian), params)], parts))


def _along_shared(
    network: Network, params: Params, x: Tensor, tangents: Tensor, cotangents: Tensor, work: Work
) -> Params:
    """sum_k d<u_k, J(X) z_k> for inputs `[n, ...]`, tangents z `[k, P]` and cotangents u `[k, n, C]`."""

    def total(theta: Params) -> Tensor:
        def along(tangent: Tensor) -> Tensor:
            return jvp(lambda q: network(q, x), (theta,), (unflatten(tangent, params),))[1]

        found = along(tangents[0])[None] if tangents.shape[0] == 1 else vmap(along)(tangents)
        return (found * cotangents).sum()

    ((gradient,), _) = gradient_and_value(total, params, batched=work.batched)
    return gradient


def along_own(network: Network, params: Params, x: Tensor, tangents: Tensor, work: Work) -> Params:
    """sum_ic d[J(x_i) z_ic]_c for uncoupled inputs `[n, ...]`, each output along its own tangent z, `[n, C, P]`."""

    def total(theta: Params) -> Tensor:
        def of_one(example: Tensor, own: Tensor) -> Tensor:
            def along(tangent: Tensor) -> Tensor:
                return jvp(lambda q: network(q, example[None])[0], (theta,), (unflatten(tangent, params),))[1]

            return vmap(along)(own).diagonal().sum()

        return vmap(of_one)(x, tangents).sum()

    ((gradient,), _) = gradient_and_value(total, params, batched=work.batched)
    return gradient
