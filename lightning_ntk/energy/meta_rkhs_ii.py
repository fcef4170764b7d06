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

import torch
from torch import Tensor
from torch.func import jvp

from lightning_ntk.ntk.flow import Approximation, GradientFlow
from lightning_ntk.ntk.jacobian import Jacobian, Network, Params, flatten, unflatten

# Maps query outputs [m, C] and query targets to a scalar.
QueryLoss = Callable[[Tensor, Tensor], Tensor]


@dataclasses.dataclass(frozen=True)
class ClosedForm:
    """How the adaptation is solved. See `ntk.flow.GradientFlow` for t, approximation and ridge.

    `coupled`: the network's `couples_examples`. `rank_tolerance`: relative error, in Frobenius norm, that may be left of
    the low-rank matrix G in the meta-gradient.
    """

    t: float
    approximation: Approximation = "exact"
    ridge: float = 0.0
    coupled: bool = True
    rank_tolerance: float = 1e-6


@dataclasses.dataclass(frozen=True)
class SolvedTask:
    """The adaptation to one support set: everything here is detached from the graph."""

    jacobian: Tensor  # J(X), [n C, P]
    flow: GradientFlow
    residual: Tensor  # r, [n C], float64
    coefficients: Tensor  # a, [n C], float64
    tangent: Params  # w, the shapes of theta


def solve(network: Network, params: Params, support_x: Tensor, targets: Tensor, how: ClosedForm) -> SolvedTask:
    """Solve the adaptation to support inputs `[n, ...]` with real targets `[n, C]`.

    Cost: the support Jacobian (n C numbers a parameter), one product of it with itself, one eigendecomposition of size
    n C in float64.
    """
    operator = Jacobian(network, params, support_x, coupled=how.coupled)
    jacobian = operator.dense().flatten(0, 1)
    flow = GradientFlow(jacobian @ jacobian.T, how.t, approximation=how.approximation, ridge=how.ridge)
    residual = (targets - operator.outputs).flatten().double()
    coefficients = flow.apply(residual)
    tangent = unflatten(coefficients.to(jacobian.dtype) @ jacobian, operator.params)
    return SolvedTask(jacobian, flow, residual, coefficients, tangent)


def adapted_outputs(network: Network, params: Params, tangent: Params, x: Tensor) -> Tensor:
    """f_t(x) = f(x) + J(x) w, `[m, C]`: one forward pass with a tangent. Differentiable in x."""
    outputs, change = jvp(lambda theta: network(theta, x), (params,), (tangent,))
    return outputs + change


def loss_and_gradient(
    network: Network,
    params: Params,
    support_x: Tensor,
    targets: Tensor,
    query_x: Tensor,
    query_y: Tensor,
    query_loss: QueryLoss,
    how: ClosedForm,
) -> tuple[Tensor, Params]:
    """The query loss of the adapted function of one task, and its exact gradient in theta.

    Args:
        support_x, targets: `[n, ...]` and real targets `[n, C]`.
        query_x, query_y: `[m, ...]` and whatever `query_loss(outputs [m, C], query_y)` takes.

    Returns:
        The detached loss (scalar) and the gradient (shapes of theta).
    """
    params = {name: p.detach() for name, p in params.items()}
    task = solve(network, params, support_x, targets, how)
    loss, delta_gradient, v = _query_terms(network, params, task.tangent, query_x, query_y, query_loss)
    gradient = _support_terms(network, params, task, v, support_x, how.rank_tolerance)
    return loss, {name: delta_gradient[name] + gradient[name] for name in params}


def _query_terms(
    network: Network, params: Params, tangent: Params, x: Tensor, y: Tensor, query_loss: QueryLoss
) -> tuple[Tensor, Params, Params]:
    """The loss, d<delta, f(x_q) + J(x_q) w>, and v = J(x_q)^T delta.

    <delta, J(x_q) w> is linear in w, so v is simply its derivative in w: one backward pass gives both.
    """
    theta = {name: p.clone().requires_grad_() for name, p in params.items()}
    w = {name: p.clone().requires_grad_() for name, p in tangent.items()}
    with torch.enable_grad():
        outputs = adapted_outputs(network, theta, w, x)
        loss = query_loss(outputs, y)
        gradients = torch.autograd.grad(loss, [*theta.values(), *w.values()])
    names = list(params)
    count = len(names)
    return (
        loss.detach(),
        dict(zip(names, gradients[:count], strict=True)),
        dict(zip(names, gradients[count:], strict=True)),
    )


def _support_terms(
    network: Network, params: Params, task: SolvedTask, v: Params, support_x: Tensor, rank_tolerance: float
) -> Params:
    """d<a, J(X) v> - <b, df(X)> + sum_k 2 s_k d<u_k, J(X) z_k>."""
    jacobian = task.jacobian
    c = jacobian @ flatten(v)
    b = task.flow.apply(c)
    weights, vectors = _leading_eigenpairs(task.flow.adjoint(c, task.residual), rank_tolerance)
    vectors = vectors.to(jacobian.dtype)
    tangents = [v, *(unflatten(z, params) for z in vectors @ jacobian)]
    cotangents = torch.cat([task.coefficients[None], 2 * weights[:, None] * vectors]).to(jacobian.dtype)

    theta = {name: p.clone().requires_grad_() for name, p in params.items()}
    with torch.enable_grad():
        total = sum(
            (jvp(lambda q: network(q, support_x), (theta,), (tangent,))[1].flatten() * cotangent).sum()
            for tangent, cotangent in zip(tangents, cotangents, strict=True)
        )
        # The last layer's bias enters J v without entering J: its gradient here is 0.
        gradients = torch.autograd.grad(total, list(theta.values()), allow_unused=True, materialize_grads=True)
    direct = unflatten(b.to(jacobian.dtype) @ jacobian, params)
    return {name: g - direct[name] for (name, g) in zip(params, gradients, strict=True)}


def _leading_eigenpairs(symmetric: Tensor, tolerance: float) -> tuple[Tensor, Tensor]:
    """Eigenvalues s `[k]` and eigenvectors as rows `[k, N]`, the fewest that leave out at most `tolerance` of the norm."""
    eigenvalues, eigenvectors = torch.linalg.eigh(symmetric)
    order = eigenvalues.abs().argsort(descending=True)
    squares = eigenvalues[order].square()
    left_out = squares.sum() - squares.cumsum(0)
    count = int((left_out > tolerance**2 * squares.sum()).sum()) + 1
    kept = order[:count]
    return eigenvalues[kept], eigenvectors[:, kept].T


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
