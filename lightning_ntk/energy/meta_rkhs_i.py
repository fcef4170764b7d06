"""Meta-RKHS-I: energies that stand in for an inner loop (Zhou et al. 2021, eq. 4), for one task each.

The paper's energy is E(alpha, f) = E_m[ L_m(f) - alpha ||grad_f L_m(f)||_H^2 ], and by its Theorem 2 the squared norm
in the RKHS of the neural tangent kernel is that of the ordinary gradient, ||grad_theta L_m||^2. Three estimators:

* `literal`: both terms on one batch. Biased by the gradient's noise, and **unbounded below**: a gradient norm can be
  made as large as one likes, so minimising it with Adam diverges.
* `cross`: <grad L(support), grad L(query)> in place of the squared norm: unbiased, but unbounded below all the same.
* `euler`: the query loss of the function after one gradient step in the RKHS,
  E_m[ L_query(f - alpha grad_f L_support(f)) ] with grad_f L(f) = sum_i Theta(., x_i) dl/df(x_i). Its first-order
  expansion in alpha is `cross`, and it is bounded below by 0.
"""

from collections.abc import Callable

from torch import Tensor
from torch.func import grad_and_value, jvp

from lightning_ntk.ntk.jacobian import Network, Params

# Maps outputs [n, C] and targets to a scalar: a mean over examples.
TaskLoss = Callable[[Tensor, Tensor], Tensor]


def literal(network: Network, params: Params, x: Tensor, y: Tensor, loss: TaskLoss, alpha: float) -> Tensor:
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
    alpha: float,
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
    alpha: float,
) -> Tensor:
    """L_query of f + J w with w = -alpha grad L_support. No inner loop: one vjp and one jvp."""
    tangent = euler_step(network, params, support_x, support_y, loss, alpha)
    outputs, change = jvp(lambda theta: network(theta, query_x), (params,), (tangent,))
    return loss(outputs + change, query_y)


def euler_step(network: Network, params: Params, x: Tensor, y: Tensor, loss: TaskLoss, alpha: float) -> Params:
    """-alpha grad_theta L(support): the tangent along which one gradient step in the RKHS moves the function."""
    gradient, _ = loss_gradient(network, params, x, y, loss)
    return {name: -alpha * g for name, g in gradient.items()}


def loss_gradient(network: Network, params: Params, x: Tensor, y: Tensor, loss: TaskLoss) -> tuple[Params, Tensor]:
    """grad_theta L on one batch, and L; both differentiable in theta again."""
    return grad_and_value(lambda theta: loss(network(theta, x), y))(params)
