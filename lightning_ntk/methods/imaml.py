"""iMAML: the meta-gradient at the end of a proximal inner problem, by the implicit function theorem."""

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from lightning_ntk.energy.given_gradient import with_gradient
from lightning_ntk.episode import Episode, TaskSpec
from lightning_ntk.errors import check_at_least, check_not_negative, check_positive
from lightning_ntk.methods.descent import DescentLearner, descend, task_losses
from lightning_ntk.ntk.checks import check_second_derivatives
from lightning_ntk.ntk.network import functional
from lightning_ntk.ntk.params import Params, unflatten

# Where the Hessian is not positive, the curvature of the linear system can come close to 0, and a step along such a
# direction is huge and means nothing. A convex task has at least 1.
LEAST_CURVATURE = 0.1


class IMAML(DescentLearner):
    """Minimises the query loss at the solution of a regularised task (Rajeswaran et al. 2019).

        E_m[ L_query(phi_m) ],   phi_m = argmin_phi L_support(phi) + regularization / 2 |phi - theta|^2

    phi_m is what k steps of gradient descent from theta reach. The meta-gradient is that of the exact solution,
    g_m = (I + H / regularization)^-1 grad L_query(phi_m) with H the Hessian of L_support at phi_m, solved by conjugate
    gradient; no inner step is kept for it. It is exact as far as both problems are solved and `damping` is 0: the
    largest of the tasks' |grad L_query - A g| / |grad L_query|, A the system's matrix, is logged as
    `meta_gradient/cg_residual`. The value logged as the training loss is E_m[ L_query(phi_m) ].

    Cross-entropy in classification, squared loss in regression. Cost of a task in a meta-step, in the terms of Zhou et
    al. (2021), Table 1: O(n (k + c) C1) for c products with the Hessian, in the memory of one double backward pass,
    whatever k is. The paper's other inner solver (Hessian-free, with a line search) is not built.

    Args:
        regularization: lambda (2.0 on Omniglot in the paper).
        inner_lr: step size of the gradient descent; below 2 / (largest eigenvalue of H + regularization) it converges.
        adapt_steps: k (16 on 5-way Omniglot in the paper).
        test_adapt_steps: k in validation and test.
        cg_steps: c, at most so many steps of conjugate gradient (5 in the paper). It ends earlier where the system is
            solved, or where it turns out not to be safely positive definite (ours): far from a minimum H is not.
        damping: added to `regularization` in the linear system alone. It is not in the paper; the authors' code has 10,
            as we have: without it, the system of a network with batch statistics was often indefinite.
        lr: meta learning rate of Adam.
    """

    def __init__(
        self,
        network: nn.Module,
        spec: TaskSpec,
        *,
        regularization: float = 2.0,
        inner_lr: float = 0.1,
        adapt_steps: int = 16,
        test_adapt_steps: int = 16,
        cg_steps: int = 5,
        damping: float = 10.0,
        lr: float = 1e-3,
    ) -> None:
        super().__init__(network, spec, lr=lr)
        check_second_derivatives(network)
        check_at_least(0, adapt_steps, "method.adapt_steps")
        check_at_least(0, test_adapt_steps, "method.test_adapt_steps")
        check_positive(inner_lr, "method.inner_lr")
        check_positive(regularization, "method.regularization")
        check_at_least(1, cg_steps, "method.cg_steps")
        check_not_negative(damping, "method.damping")
        self.regularization = regularization
        self.inner_lr = inner_lr
        self.adapt_steps = adapt_steps
        self.test_adapt_steps = test_adapt_steps
        self.cg_steps = cg_steps
        self.damping = damping

    def meta_loss(self, episodes: Episode) -> Tensor:
        _, theta = functional(self.network)
        found, start = [], 0
        for support_x, support_y in self.chunks(episodes.support_x, episodes.support_y):
            part = slice(start, start + len(support_x))
            start = part.stop
            on_support = functools.partial(task_losses, self.task_loss, x=support_x, y=support_y)
            on_query = functools.partial(
                task_losses, self.task_loss, x=episodes.query_x[part], y=episodes.query_y[part]
            )
            phi = self.solve(support_x, support_y, self.adapt_steps)
            damped = self.regularization + self.damping
            found.append(implicit_gradients(on_support, on_query, phi, damped, self.cg_steps))
        gradients, losses, residuals = (torch.cat(parts) for parts in zip(*found, strict=True))
        self.reached = {"cg_residual": residuals.max()}
        return with_gradient(losses.mean(), theta, unflatten(gradients.mean(0), theta))

    def adapted_params(self, support_x: Tensor, support_y: Tensor) -> Params:
        return self.solve(support_x, support_y, self.test_adapt_steps)

    def solve(self, support_x: Tensor, support_y: Tensor, steps: int) -> Params:
        """phi `[T, *shape]` of T tasks: the regularised task by so many steps of gradient descent."""
        theta = {name: p.detach() for name, p in functional(self.network)[1].items()}

        def objective(phi: Params, x: Tensor, y: Tensor) -> Tensor:
            distance = sum((phi[name] - p).square().sum() for name, p in theta.items())
            return self.task_loss(phi, x, y) + self.regularization / 2 * distance

        gradient_descent = functools.partial(torch.optim.SGD, lr=self.inner_lr)
        return descend(objective, theta, len(support_x), [(support_x, support_y)] * steps, gradient_descent)[0]


def implicit_gradients(
    support_losses: Callable[[Params], Tensor],
    query_losses: Callable[[Params], Tensor],
    phi: Params,
    regularization: float,
    cg_steps: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Solves (I + H_m / regularization) g_m = grad L_query(phi_m) for T tasks at once, by conjugate gradient.

    Args:
        support_losses, query_losses: stacked parameters to the losses `[T]`, each of its own task's parameters.
        phi: `[T, *shape]`.
        regularization: lambda, with the damping on top.
        cg_steps: at most so many products with each Hessian H_m, that of L_support at phi_m.

    Returns:
        g `[T, P]`, L_query(phi) `[T]`, and the relative residuals reached `[T]`.
    """
    with torch.enable_grad():
        leaves = [p.detach().requires_grad_() for p in phi.values()]
        params = dict(zip(phi, leaves, strict=True))
        losses = query_losses(params)
        unused = {"allow_unused": True, "materialize_grads": True}
        target = _rows(torch.autograd.grad(losses.sum(), leaves, **unused))
        # A task's loss knows its own parameters only: the Hessian of the sum has the tasks' Hessians as its blocks.
        slope = torch.autograd.grad(support_losses(params).sum(), leaves, create_graph=True, **unused)

    def product(vectors: Tensor) -> Tensor:
        pieces = vectors.split([leaf[0].numel() for leaf in leaves], dim=1)
        directions = [piece.view_as(leaf) for piece, leaf in zip(pieces, leaves, strict=True)]
        by_hessian = torch.autograd.grad(slope, leaves, directions, retain_graph=True, **unused)
        return vectors + _rows(by_hessian) / regularization

    solution, residuals = conjugate_gradient(product, target, cg_steps)
    return solution, losses.detach(), residuals


def conjugate_gradient(product: Callable[[Tensor], Tensor], target: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """x `[T, P]` with A_m x_m = target_m for T symmetric positive definite A_m, started at 0.

    Args:
        product: x to A x, all `[T, P]`.
        steps: at most so many (at least 1), each with one product. A task's steps end where its system is solved, or
            the curvature of A_m along the next direction is below LEAST_CURVATURE. Where it is so along the first one,
            which is the target, x is the target.

    Returns:
        x, and |target - A x| / |target| `[T]`. Inner products are summed in float64.
    """
    solution, residual, direction = torch.zeros_like(target), target, target
    scale = size = _dot(target, target)  # Squared norms, of the target and of what is left of it.
    going = torch.ones_like(scale, dtype=torch.bool)
    for number in range(steps):
        moved = product(direction)
        curvature = _dot(direction, moved)
        if number == 0:
            unsolvable = (curvature < LEAST_CURVATURE * scale).unsqueeze(1)
            solution, residual = torch.where(unsolvable, target, 0), torch.where(unsolvable, target - moved, target)
        going = (
            going
            & (curvature >= LEAST_CURVATURE * _dot(direction, direction))
            & (size > torch.finfo(target.dtype).eps ** 2 * scale)
        )
        step = torch.where(going, size / curvature, 0).to(target.dtype).unsqueeze(1)
        solution = solution + step * direction
        residual = residual - step * moved
        before, size = size, _dot(residual, residual)
        direction = residual + torch.where(going, size / before, 0).to(target.dtype).unsqueeze(1) * direction
    return solution, torch.where(scale > 0, (size / scale).sqrt(), 0)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a.double() * b.double()).sum(1)


def _rows(parts: Sequence[Tensor]) -> Tensor:
    """Tensors `[T, *shape]` as the rows `[T, P]` of a matrix."""
    return torch.cat([part.reshape(len(part), -1) for part in parts], dim=1)
