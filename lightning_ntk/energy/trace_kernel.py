"""Meta-RKHS-II with the trace kernel: one value for a pair of examples, shared by the C outputs.

    K(x, x') = 1/C sum_c J_c(x) J_c(x')^T,     f_t(x) = f(x) + K(x, X) phi(K(X, X)) (Y - f(X))

is what the paper's n x n notation and O(n^3) cost describe (Zhou et al. 2021, Table 1). The solve is C^3 times smaller
than the full kernel's, but the adapted function is no longer the network moved along one tangent: the queries'
Jacobian, m C rows, is built, and the meta-gradient takes C tangents for each example of support and query alike. So it
costs more than the full kernel unless n is large.

With a = phi(K) r `[n, C]`, delta = dL/df_t, c = K(x_q, X)^T delta, b = phi(K) c and G_c the adjoint for output c:

    dL = <delta, df(x_q)> - <b, df(X)> + <delta a^T, dK(x_q, X)> + sum_c <G_c, dK(X, X)>.

Both kernels are products of Jacobian rows, so the last two terms are sums of <Z, dJ> with a matrix Z of constants.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.func import grad_and_value

from lightning_ntk.energy.closed_form import ClosedForm, Work
from lightning_ntk.energy.support_gradient import along_own
from lightning_ntk.ntk.flow import GradientFlow, gradient_flow
from lightning_ntk.ntk.jacobian import Jacobian
from lightning_ntk.ntk.network import Network
from lightning_ntk.ntk.params import Params, add, in_chunks, inner_products, unflatten


def adapt(
    network: Network, params: Params, support_x: Tensor, targets: Tensor, how: ClosedForm, pairs_at_once: int | None
) -> Callable[[Tensor], Tensor]:
    """The predictor adapted to support inputs `[n, ...]` with targets `[n, C]`; differentiable in its input."""
    support, _, _, a = _solve(network, params, support_x, targets, how, pairs_at_once)
    moved = support.flatten(1).mT @ a.to(support.dtype) / support.shape[1]  # [C P, C]

    def predict(x: Tensor) -> Tensor:
        rows = Jacobian(network, params, x, coupled=False).dense(pairs_at_once)
        return network(params, x) + rows.flatten(1) @ moved

    return predict


def task_gradient(
    network: Network,
    params: Params,
    support_x: Tensor,
    targets: Tensor,
    query_x: Tensor,
    query_y: Tensor,
    query_loss: Callable[[Tensor, Tensor], Tensor],
    how: ClosedForm,
    work: Work,
) -> tuple[Tensor, Params]:
    """The query loss of one task and its exact gradient in theta. Shapes as in `energy.meta_rkhs_ii.meta_gradient`."""
    support, flow, residual, a = _solve(network, params, support_x, targets, how, work.pairs_at_once)
    operator = Jacobian(network, params, query_x, coupled=False)
    query = operator.dense(work.pairs_at_once)
    outputs, dtype = query.shape[1], query.dtype
    cross = inner_products(query.flatten(1), support.flatten(1)) / outputs  # [m, n]
    delta, loss = grad_and_value(query_loss)(operator.outputs + (cross @ a).to(dtype), query_y)
    c = cross.mT @ delta.double()
    b = _by_output(flow.apply, c).mT.to(dtype)
    adjoint = _by_output(flow.adjoint, c, residual).sum(0).to(dtype) / outputs
    pairs = delta @ a.to(dtype).mT / outputs  # [m, n]
    of_query = (pairs @ support.flatten(1)).view_as(query)
    of_support = (pairs.mT @ query.flatten(1) + 2 * adjoint @ support.flatten(1)).view_as(support)
    direct = delta.flatten() @ query.flatten(0, 1) - b.flatten() @ support.flatten(0, 1)
    parts = [unflatten(direct, params)]
    for x, rows in ((query_x, of_query), (support_x, of_support)):
        at_once = work.at_once(outputs)
        pieces = zip(in_chunks(x, at_once), in_chunks(rows, at_once), strict=True)
        parts += [along_own(network, params, some, own, work) for some, own in pieces]
    return loss, add(parts)


def _solve(network: Network, params: Params, x: Tensor, targets: Tensor, how: ClosedForm, pairs_at_once: int | None):
    """J(X) `[n, C, P]`, the flow of K(X, X), r and a `[n, C]` in float64."""
    operator = Jacobian(network, params, x, coupled=False)
    rows = operator.dense(pairs_at_once)
    kernel = inner_products(rows.flatten(1), rows.flatten(1), exact=how.inverts) / rows.shape[1]
    settings = how.flow_settings(kernel, rows.dtype)
    flow = GradientFlow(kernel, how.t, **settings)
    residual = (targets - operator.outputs).double()

    def solve(column: Tensor) -> Tensor:  # As in `ClosedForm.solve`.
        return gradient_flow(kernel, column, how.t, **settings) if kernel.requires_grad else flow.apply(column)

    return rows, flow, residual, _by_output(solve, residual).mT


def _by_output(function, *columns: Tensor) -> Tensor:
    """A function of vectors `[n]`, for each of the columns of matrices `[n, C]`, stacked."""
    return torch.stack([function(*vectors) for vectors in zip(*(c.unbind(-1) for c in columns), strict=True)])
