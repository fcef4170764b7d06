"""Meta-RKHS-II: the loss of the function adapted in closed form, and its exact gradient (Zhou et al. 2021, eq. 5-7).

One task has support inputs X `[n, ...]` with real targets Y `[n, C]`, and queries. With J the Jacobian of the network,
H = J(X) J(X)^T and phi from `ntk.flow`, the adapted function is the network linearised at theta and moved by w:

    r = Y - f(X),   a = phi(H) r,   w = J(X)^T a,   f_t(x) = f(x) + J(x) w.

Its loss L(f_t(x_q), y_q) has, with delta = dL/df_t, v = J(x_q)^T delta, c = J(X) v and b = phi(H) c, the gradient

    dL = d<delta, f(x_q) + J(x_q) w> + d<a, J(X) v> - <b, df(X)> + <G, d(J(X) J(X)^T)>,

where G is the adjoint of phi (`GradientFlow.adjoint`). The query part is here, the support part in
`energy.support_gradient`. No query Jacobian is ever built, and reverse mode never passes through the support Jacobian.

`energy.euler_steps` finds another a, for any loss, in the place of phi(H) r: b and G are then its derivatives. What the
loss sees of the outputs (`how.seen`) then takes the place of f and J on the support; on the queries they are whole.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_ntk.energy import trace_kernel
from lightning_ntk.energy.closed_form import ClosedForm, Work
from lightning_ntk.energy.compiled import compiled
from lightning_ntk.energy.euler_steps import EulerSteps
from lightning_ntk.energy.support_gradient import SupportTerms, support_gradient, support_terms, truncate
from lightning_ntk.energy.tasks import each_task, one_by_one
from lightning_ntk.ntk.jacobian import Jacobian, adapted_outputs, gradient_and_value
from lightning_ntk.ntk.network import Network
from lightning_ntk.ntk.params import Params, add, flatten, in_chunks, inner_products, unflatten

# Maps query outputs [m, C] and query targets to a scalar: a mean over the examples.
QueryLoss = Callable[[Tensor, Tensor], Tensor]
# How a is found: `how.solve(H, f(X), targets)`.
How = ClosedForm | EulerSteps


class MetaGradient(NamedTuple):
    """The meta-gradient of T tasks and how it was reached.

    `loss`: scalar; `gradient`: shapes of theta; `tangents`: directions a support example was differentiated along;
    `left_out`: scalar, the largest part of the norm of the support term's matrix that the truncation left out.
    """

    loss: Tensor
    gradient: Params
    tangents: int
    left_out: Tensor


def adapt(
    network: Network,
    params: Params,
    support_x: Tensor,
    targets: Tensor,
    how: How,
    *,
    pairs_at_once: int | None = None,
) -> Callable[[Tensor], Tensor]:
    """The predictor `[m, ...] -> [m, C]` adapted to support inputs `[n, ...]` with real targets `[n, C]`.

    Differentiable in its input. `pairs_at_once`: see `ntk.Jacobian.rows`.
    """
    if how.kernel == "trace":
        return trace_kernel.adapt(network, params, support_x, targets, how, pairs_at_once)
    tangent = _solve(how.seen(network, targets), params, support_x, targets, how, pairs_at_once)[-1]
    return lambda x: adapted_outputs(network, params, tangent, x)


def meta_gradient(
    network: Network,
    params: Params,
    support_x: Tensor,
    targets: Tensor,
    query_x: Tensor,
    query_y: Tensor,
    query_loss: QueryLoss,
    how: How,
    *,
    tasks_per_chunk: int = 1,
    pairs_at_once: int | None = None,
    queries_apart: bool = False,
    compile: bool = False,
) -> MetaGradient:
    """The mean query loss of the adapted functions of T tasks, and its exact gradient in theta, both detached.

    Args:
        support_x, targets: `[T, n, ...]` and real targets `[T, n, C]`, or whatever the loss of `EulerSteps` takes.
        query_x, query_y: `[T, m, ...]` and `[T, m, ...]`, whatever `query_loss(outputs [m, C], query_y[i])` takes.
        tasks_per_chunk: tasks computed at once by vmap; 1 takes them one after the other. Each task in memory costs its
            support Jacobian and the activations of so many pairs.
        pairs_at_once: pairs of an example and a direction that a task is worked on at once; None takes all. It bounds
            the memory of activations, not that of the support Jacobian. A coupled network's queries cannot be parted.
        queries_apart: take the query sets of a chunk's tasks one by one, and the rest of the tasks by vmap.
        compile: compile the query part (`energy.compiled`), which is then taken apart. Not for `how.kernel` "trace".
    """
    params = {name: p.detach() for name, p in params.items()}
    chunks = []
    for data in zip(*(a.split(tasks_per_chunk) for a in (support_x, targets, query_x, query_y)), strict=True):
        batched = data[0].shape[0] > 1
        work = Work(how.coupled, pairs_at_once, batched, queries_apart=queries_apart or compile, compile=compile)
        of_chunk = _by_trace_kernel if how.kernel == "trace" else _by_full_kernel
        chunks.append(of_chunk(network, params, data, query_loss, how, work))
    losses, gradients, tangents, left_out = zip(*chunks, strict=True)
    tasks = support_x.shape[0]
    gradient = {name: g / tasks for name, g in add(gradients).items()}
    return MetaGradient(sum(losses) / tasks, gradient, max(tangents), torch.stack(left_out).max())


def _by_full_kernel(network, params, data, query_loss, how, work) -> MetaGradient:
    """The sums over the tasks of one chunk."""

    support_network = how.seen(network, data[1])

    def solve_and_query(*task: Tensor) -> tuple[Tensor, Params, SupportTerms]:
        return _solve_and_query(network, support_network, params, *task, query_loss, how, work)

    def support_part(x: Tensor, *terms: Tensor) -> Params:
        return support_gradient(support_network, params, x, SupportTerms(*terms), work, by_rows=by_rows)

    loss, of_query, terms = each_task(solve_and_query, data)
    outputs = terms.a.shape[-1] // data[0].shape[1]
    terms, by_rows, left_out = truncate(terms, outputs, how.coupled, how.rank_tolerance)
    tangents = outputs if by_rows else terms.left.shape[-2]
    of_support = each_task(support_part, (data[0], *terms))
    gradient = {name: (of_query[name] + of_support[name]).sum(0) for name in params}
    return MetaGradient(loss.sum(), gradient, tangents, left_out)


def _by_trace_kernel(network, params, data, query_loss, how, work) -> MetaGradient:
    """The sums over the tasks of one chunk."""

    def whole(*task: Tensor) -> tuple[Tensor, Params]:
        return trace_kernel.task_gradient(network, params, *task, query_loss, how, work)

    loss, gradient = each_task(whole, data)
    return MetaGradient(
        loss.sum(), {name: g.sum(0) for name, g in gradient.items()}, data[1].shape[-1], loss.new_zeros(())
    )


def _solve(network: Network, params: Params, x: Tensor, targets: Tensor, how: How, pairs_at_once: int | None):
    """J(X) `[n C, P]`, H, what was solved with it, and w in the shapes of theta.

    Cost: the support Jacobian (n C numbers a parameter), one product of it with itself, one solution of size n C in
    float64.
    """
    operator = Jacobian(network, params, x, coupled=how.coupled)
    jacobian = operator.dense(pairs_at_once).flatten(0, 1)
    kernel = inner_products(jacobian, jacobian, exact=how.inverts)
    solution = how.solve(kernel, operator.outputs, targets)
    return jacobian, kernel, solution, unflatten(solution.a.to(jacobian.dtype) @ jacobian, operator.params)


def _solve_and_query(network, support_network, params, support_x, targets, query_x, query_y, query_loss, how, work):
    """Loss, d<delta, f(x_q) + J(x_q) w>, and the terms of the support part, of one task."""
    jacobian, kernel, solution, tangent = _solve(support_network, params, support_x, targets, how, work.pairs_at_once)
    part = _query_part_apart if work.batched and work.queries_apart else _query_part
    loss, of_query, v = part(network, params, tangent, query_x, query_y, query_loss, work)
    by_rows = how.rank_tolerance == 0 and not how.coupled
    return loss, of_query, support_terms(jacobian, kernel, solution, flatten(v), by_rows=by_rows)


def _query_part(network, params, tangent, query_x, query_y, query_loss, work):
    """Loss, d<delta, f(x_q) + J(x_q) w> and v: the derivatives of the loss in theta, with w held fixed, and in w."""
    at_once = None if work.coupled else work.pairs_at_once
    parts = []
    for x, y in zip(in_chunks(query_x, at_once), in_chunks(query_y, at_once), strict=True):
        share = x.shape[0] / query_x.shape[0]
        part = (network, params, tangent, x, y, query_loss, share)
        if work.compile:  # `torch.func`'s gradients: the compiler knows what can be freed.
            parts.append(compiled(_query_gradient, *part, True))
        else:
            parts.append(_query_gradient(*part, work.batched))
    gradients, losses = zip(*parts, strict=True)
    of_query, v = zip(*gradients, strict=True)
    return sum(losses), add(of_query), add(v)


def _query_gradient(network, params, tangent, x, y, query_loss, share, batched):
    """The gradients, in theta and in w, of so large a share of the query loss, and its value."""

    def loss(theta: Params, w: Params) -> Tensor:
        return share * query_loss(adapted_outputs(network, theta, w, x), y)

    return gradient_and_value(loss, params, tangent, batched=batched)


def _query_part_apart(network, params, tangent, query_x, query_y, query_loss, work):
    """`_query_part` outside of the vmap over tasks."""
    work = dataclasses.replace(work, batched=False)

    def of_task(x: Tensor, y: Tensor, *w: Tensor) -> tuple[Tensor, ...]:
        w = dict(zip(params, w, strict=True))
        loss, of_query, v = _query_part(network, params, w, x, y, query_loss, work)
        return loss, *of_query.values(), *v.values()

    loss, *found = one_by_one(of_task, query_x, query_y, *tangent.values())
    of_query, v = (dict(zip(params, half, strict=True)) for half in (found[: len(params)], found[len(params) :]))
    return loss, of_query, v
