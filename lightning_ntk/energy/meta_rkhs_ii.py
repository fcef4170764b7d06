"""Meta-RKHS-II: the loss of the function adapted in closed form, and its exact gradient (Zhou et al. 2021, eq. 5-7).

One task has support inputs X `[n, ...]` with real targets Y `[n, C]`, and queries. With J the Jacobian of the network,
H = J(X) J(X)^T and phi from `ntk.flow`, the adapted function is the network linearised at theta and moved by w:

    r = Y - f(X),   a = phi(H) r,   w = J(X)^T a,   f_t(x) = f(x) + J(x) w.

Its loss L(f_t(x_q), y_q) has, with delta = dL/df_t, v = J(x_q)^T delta, c = J(X) v and b = phi(H) c, the gradient

    dL = d<delta, f(x_q) + J(x_q) w> + d<a, J(X) v> - <b, df(X)> + <G, d(J(X) J(X)^T)>,

where G is the adjoint of phi (`GradientFlow.adjoint`). A few eigenpairs carry G = sum_k s_k u_k u_k^T, each a term
s_k d||J(X)^T u_k||^2 = 2 s_k d<u_k, J(X) z_k> with z_k = J(X)^T u_k held fixed. So no query Jacobian is ever built, and
reverse mode never passes through the support Jacobian.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.func import grad_and_value, jvp, vjp, vmap

from lightning_ntk.energy.tasks import each_task
from lightning_ntk.ntk.flow import Approximation, GradientFlow
from lightning_ntk.ntk.jacobian import Jacobian, Network, Params, flatten, unflatten

# Maps query outputs [m, C] and query targets to a scalar.
QueryLoss = Callable[[Tensor, Tensor], Tensor]


@dataclasses.dataclass(frozen=True)
class ClosedForm:
    """How the adaptation is solved. See `ntk.flow.GradientFlow` for t, approximation and ridge.

    `coupled`: the network's `couples_examples`. `rank_tolerance`: relative error, in Frobenius norm, that may be left
    of the low-rank matrix G in the meta-gradient.
    """

    t: float
    approximation: Approximation = "exact"
    ridge: float = 0.0
    coupled: bool = True
    rank_tolerance: float = 1e-6


def adapt(network: Network, params: Params, support_x: Tensor, targets: Tensor, how: ClosedForm) -> Params:
    """w, the tangent that adapts the network to support inputs `[n, ...]` with real targets `[n, C]`."""
    return _solve(network, params, support_x, targets, how)[-1]


def adapted_outputs(network: Network, params: Params, tangent: Params, x: Tensor) -> Tensor:
    """f_t(x) = f(x) + J(x) w, `[m, C]`: one forward pass with a tangent. Differentiable in x."""
    outputs, change = jvp(lambda theta: network(theta, x), (params,), (tangent,))
    return outputs + change


def meta_gradient(
    network: Network,
    params: Params,
    support_x: Tensor,
    targets: Tensor,
    query_x: Tensor,
    query_y: Tensor,
    query_loss: QueryLoss,
    how: ClosedForm,
    *,
    tasks_per_chunk: int = 1,
) -> tuple[Tensor, Params]:
    """The mean query loss of the adapted functions of T tasks, and its exact gradient in theta.

    Args:
        support_x, targets: `[T, n, ...]` and real targets `[T, n, C]`.
        query_x, query_y: `[T, m, ...]` and `[T, ...]`, whatever `query_loss(outputs [m, C], query_y[i])` takes.
        tasks_per_chunk: tasks computed at once by vmap; 1 takes them one after the other. Each task in memory costs its
            support Jacobian and the activations of its query set.

    Returns:
        The loss (scalar) and the gradient (shapes of theta), both detached.
    """
    params = {name: p.detach() for name, p in params.items()}
    tasks = support_x.shape[0]
    total, gradient = 0.0, {name: torch.zeros_like(p) for name, p in params.items()}
    for data in zip(*(a.split(tasks_per_chunk) for a in (support_x, targets, query_x, query_y)), strict=True):
        loss, of_query, terms = each_task(lambda *task: _solve_and_query(network, params, *task, query_loss, how), data)
        terms = _truncate(terms, how.rank_tolerance)
        of_support = each_task(lambda x, *task: _support_terms(network, params, x, Terms(*task)), (data[0], *terms))
        total = total + loss.sum()
        gradient = {name: g + (of_query[name] + of_support[name]).sum(0) for name, g in gradient.items()}
    return total / tasks, {name: g / tasks for name, g in gradient.items()}


def with_gradient(value: Tensor, params: Params, gradient: Params) -> Tensor:
    """A scalar equal to `value` whose `backward` adds `gradient` to `params`.

    So a gradient that was computed by hand takes part in automatic optimisation: hooks of DDP, scaling and
    accumulation work as for any other loss. Differentiable once.
    """
    return _WithGradient.apply(value, list(gradient.values()), *params.values())


class _WithGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value, gradients, *parameters):
        ctx.save_for_backward(*gradients)
        return value.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, upstream):
        return None, None, *(upstream * g for g in ctx.saved_tensors)


class Terms(NamedTuple):
    """What the support part of the gradient needs, all constants; for T tasks with a leading axis on each."""

    jacobian: Tensor  # J(X), [n C, P]
    v: Tensor  # J(x_q)^T delta, [P]
    a: Tensor  # phi(H) r, [n C]
    b: Tensor  # phi(H) J(X) v, [n C]
    weights: Tensor  # eigenvalues of G by falling magnitude, [n C] or the leading k of them
    vectors: Tensor  # their eigenvectors as rows, [n C, n C] or [k, n C]


def _solve(network: Network, params: Params, x: Tensor, targets: Tensor, how: ClosedForm):
    """J(X) `[n C, P]`, the flow, r and a `[n C]` in float64, and w in the shapes of theta.

    Cost: the support Jacobian (n C numbers a parameter), one product of it with itself, one eigendecomposition of size
    n C in float64.
    """
    operator = Jacobian(network, params, x, coupled=how.coupled)
    jacobian = operator.dense().flatten(0, 1)
    flow = GradientFlow(jacobian @ jacobian.mT, how.t, approximation=how.approximation, ridge=how.ridge)
    residual = (targets - operator.outputs).flatten().double()
    a = flow.apply(residual)
    return jacobian, flow, residual, a, unflatten(a.to(jacobian.dtype) @ jacobian, operator.params)


def _solve_and_query(network, params, support_x, targets, query_x, query_y, query_loss, how):
    """Loss, d<delta, f(x_q) + J(x_q) w>, and the terms of the support part, of one task.

    <delta, J(x_q) w> is linear in w, so v = J(x_q)^T delta is its derivative in w: one backward pass gives both.
    """
    jacobian, flow, residual, a, tangent = _solve(network, params, support_x, targets, how)
    outputs, pullback = vjp(lambda theta, w: adapted_outputs(network, theta, w, query_x), params, tangent)
    delta, loss = grad_and_value(query_loss)(outputs, query_y)
    of_query, v = pullback(delta)
    v = flatten(v)
    c = jacobian @ v
    weights, vectors = torch.linalg.eigh(flow.adjoint(c, residual))
    order = weights.abs().argsort(descending=True)
    dtype = jacobian.dtype
    terms = Terms(
        jacobian, v, a.to(dtype), flow.apply(c).to(dtype), weights[order].to(dtype), vectors.mT[order].to(dtype)
    )
    return loss, of_query, terms


def _truncate(terms: Terms, tolerance: float) -> Terms:
    """Keep the fewest eigenpairs of G that leave out at most `tolerance` of its norm, in every task."""
    # Entry k: the squared norm of G without its first k eigenpairs, summed from the small end to keep its digits.
    left_out = terms.weights.double().square().flip(-1).cumsum(-1).flip(-1)
    rank = int((left_out > tolerance**2 * left_out[..., :1]).sum(-1).max())
    return terms._replace(weights=terms.weights[..., :rank], vectors=terms.vectors[..., :rank, :])


def _support_terms(network: Network, params: Params, x: Tensor, terms: Terms) -> Params:
    """d<a, J(X) v> - <b, df(X)> + sum_k 2 s_k d<u_k, J(X) z_k> of one task."""
    tangents = torch.cat([terms.v[None], terms.vectors @ terms.jacobian])
    cotangents = torch.cat([terms.a[None], 2 * terms.weights[:, None] * terms.vectors])

    def total(theta: Params) -> Tensor:
        def along(tangent: Tensor) -> Tensor:
            return jvp(lambda q: network(q, x), (theta,), (unflatten(tangent, params),))[1].flatten()

        return (vmap(along)(tangents) * cotangents).sum()

    gradient = torch.func.grad(total)(params)
    direct = unflatten(terms.b @ terms.jacobian, params)
    return {name: gradient[name] - direct[name] for name in params}
