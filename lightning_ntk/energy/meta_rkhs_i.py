"""Meta-RKHS-I: energies that stand in for an inner loop (Zhou et al. 2021, eq. 4), for one task each.

The paper's energy is E(alpha, f) = E_m[ L_m(f) - alpha ||grad_f L_m(f)||_H^2 ], and by its Theorem 2 the squared norm
in the RKHS of the neural tangent kernel is that of the ordinary gradient, ||grad_theta L_m||^2. Three estimators:

* `literal`: both terms on one batch. Biased by the gradient's noise, and **unbounded below**: a gradient norm can be
  made as large as one likes, so minimising it with Adam diverges.
* `cross`: <grad L(support), grad L(query)> in place of the squared norm: unbiased, but unbounded below all the same.
* `euler`: the query loss of the function after one gradient step in the RKHS,
  E_m[ L_query(f - alpha grad_f L_support(f)) ] with grad_f L(f) = sum_i Theta(., x_i) dl/df(x_i). Its first-order
  expansion in alpha is `cross`, and it is bounded below by 0. With k steps of alpha / k, each at the function that the
  step before has reached and all under the kernel at theta, the expansion is the same; as k grows they become the
  gradient flow for time alpha, which for the squared loss is Meta-RKHS-II's.
"""

import torch
from torch import Tensor
from torch.func import grad, grad_and_value, jvp, vjp

from lightning_ntk.energy.euler_steps import TaskLoss, largest_eigenvalue
from lightning_ntk.ntk.checks import check_outputs
from lightning_ntk.ntk.jacobian import adapted_outputs
from lightning_ntk.ntk.network import Network
from lightning_ntk.ntk.params import Params, in_chunks

# Of an energy: a number, or a scalar tensor where it is chosen for each task.
Step = float | Tensor


def literal(network: Network, params: Params, x: Tensor, y: Tensor, loss: TaskLoss, alpha: Step) -> Tensor:
    """L - alpha ||grad L||^2 on one batch `[n, ...]` with its targets. Cost: a double backward pass."""
    gradient, value = loss_gradient(network, params, x, y, loss)
    return value - alpha * sum(g.square().sum() for g in gradient.values())


def cross(
    network: Network,
    params: Params,
    support_x: Tensor,
    support_y: Tensor,
    query_x: Tensor,
    query_y: Tensor,
    loss: TaskLoss,
    alpha: Step,
) -> Tensor:
    """L_query - alpha <grad L_support, grad L_query>."""
    on_query, value = loss_gradient(network, params, query_x, query_y, loss)
    on_support, _ = loss_gradient(network, params, support_x, support_y, loss)
    return value - alpha * sum((on_support[name] * on_query[name]).sum() for name in params)


def euler(
    network: Network,
    params: Params,
    support_x: Tensor,
    support_y: Tensor,
    query_x: Tensor,
    query_y: Tensor,
    loss: TaskLoss,
    alpha: Step,
    steps: int = 1,
    *,
    pairs_at_once: int | None = None,
) -> Tensor:
    """L_query of f + J w, w from `euler_tangent`. No inner loop through the network: parameters stay at theta.

    `pairs_at_once`: queries that go through an uncoupled network together; None takes all.
    """
    tangent = euler_tangent(network, params, support_x, support_y, loss, alpha, steps)
    parts = [adapted_outputs(network, params, tangent, x) for x in in_chunks(query_x, pairs_at_once)]
    return loss(torch.cat(parts), query_y)


def euler_tangent(
    network: Network, params: Params, x: Tensor, y: Tensor, loss: TaskLoss, alpha: Step, steps: int = 1
) -> Params:
    """The tangent w along which k = `steps` gradient steps of alpha / k in the RKHS move f to f + J w.

    Step j moves the outputs on the support x `[n, ...]` by -alpha / k Theta(x, x) g_j, g_j = dl/df at the outputs
    `[n, C]` that it starts from, and so w = -alpha / k J(x)^T sum_j g_j. Differentiable in theta.

    Cost: a forward pass, k vjps and k - 1 jvps, all on the support.
    """
    outputs, pullback = vjp(lambda theta: check_outputs(network(theta, x), x), params)
    slope = grad(loss)
    total = slope(outputs, y)
    for _ in range(steps - 1):
        change = jvp(lambda theta: network(theta, x), (params,), pullback(total))[1]
        total = total + slope(outputs - alpha / steps * change, y)
    return {name: -alpha / steps * g for name, g in pullback(total)[0].items()}


def largest_ntk_eigenvalue(network: Network, params: Params, x: Tensor) -> Tensor:
    """Of the NTK on x `[n, ...]`, from below: a vjp and a jvp an iteration. Without a gradient."""
    params = {name: p.detach() for name, p in params.items()}
    outputs, pullback = vjp(lambda theta: network(theta, x), params)

    def multiply(u: Tensor) -> Tensor:
        return jvp(lambda theta: network(theta, x), (params,), pullback(u))[1]

    return largest_eigenvalue(multiply, outputs)


def loss_gradient(network: Network, params: Params, x: Tensor, y: Tensor, loss: TaskLoss) -> tuple[Params, Tensor]:
    """grad_theta L on one batch, and L; both differentiable in theta again."""
    return grad_and_value(lambda theta: loss(check_outputs(network(theta, x), x), y))(params)
