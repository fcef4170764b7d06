"""Several gradient steps of the function under one kernel, for any loss, in the form of Meta-RKHS-II.

Step j moves the outputs on the support X by -alpha / k H g_j, with g_j = dl/df at the outputs that it starts from and
H = Theta(X, X). So the adapted function is f(x) + Theta(x, X) a with

    a_0 = 0,   a_{j+1} = a_j - alpha / k dl/df(f(X) + H a_j),   a = a_k:

whose meta-gradient (`energy.meta_rkhs_ii`) needs no more than da. The k steps are taken, and differentiated, on vectors
of n C numbers, and cost little beside the support Jacobian of a convolutional network (docs/META_RKHS_I.md).
"""

import dataclasses
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import grad, vjp

from lightning_ntk.energy.closed_form import Solution

# Enough for two or three digits of the largest eigenvalue, where it stands apart from the next.
POWER_ITERATIONS = 10

# Maps outputs [n, C] and targets to a scalar: a mean over examples.
TaskLoss = Callable[[Tensor, Tensor], Tensor]
# Multiplies `[n, C]` by the second derivative of a loss in the outputs.
Curvature = Callable[[Tensor], Tensor]


@dataclasses.dataclass(frozen=True)
class EulerSteps:
    """How the adaptation is done; takes the place of `energy.closed_form.ClosedForm`.

    Attributes:
        loss: of the support outputs `[n, C]` and targets. `F.cross_entropy` and `F.mse_loss` themselves are much
            quicker than other functions (`slopes`).
        alpha: of all steps together.
        steps: k.
        step_cap: c, see `capped`; None for none.
        coupled: the network's `couples_examples`.
        rank_tolerance: see `energy.support_gradient.truncate`.
    """

    loss: TaskLoss
    alpha: float
    steps: int
    step_cap: float | None = None
    coupled: bool = True
    rank_tolerance: float = 1e-6
    kernel = "full"

    def solve(self, kernel: Tensor, outputs: Tensor, targets: Tensor) -> Solution:
        """a after k steps, from H `[n C, n C]`, f(X) `[n, C]` and the targets of the loss."""
        kernel, outputs = 0.5 * (kernel + kernel.mT).double(), outputs.double()
        targets = targets.double() if targets.is_floating_point() else targets
        largest = lambda: largest_eigenvalue(lambda u: kernel @ u, outputs.flatten())  # noqa: E731
        step = capped(self.alpha, self.steps, self.step_cap, outputs.shape[0], largest) / self.steps

        slope = slopes(self.loss, targets, outputs.shape[-1])
        a = torch.zeros_like(outputs).flatten()
        before, curvatures = [], []
        for _ in range(self.steps):
            g, curvature = slope(outputs + (kernel @ a).view_as(outputs))
            before.append(a)
            curvatures.append(curvature)
            a = a - step * g.flatten()

        def derivatives(c: Tensor) -> tuple[Tensor, Tensor]:
            # Backwards: c_j = d<c, a>/da_j, and u_j that in the outputs at which step j takes its slope.
            u = []
            for curvature in reversed(curvatures):
                u.append(-step * curvature(c.view_as(outputs)).flatten())
                c = c + kernel @ u[-1]
            u = torch.stack(u[::-1])
            of_kernel = u.mT @ torch.stack(before)
            return -u.sum(0), 0.5 * (of_kernel + of_kernel.mT)

        return Solution(a, derivatives)


def slopes(loss: TaskLoss, targets: Tensor, classes: int) -> Callable[[Tensor], tuple[Tensor, Curvature]]:
    """Maps outputs `[n, C]`, C = `classes`, to dl/df there, `[n, C]`, and the derivative of that.

    Written out for the two losses of `MetaLearner.loss`, as nested derivatives of `torch.func` would take most of the
    time of a step on a few numbers.
    """
    if loss is F.mse_loss:

        def squared(outputs: Tensor) -> tuple[Tensor, Curvature]:
            scale = 2 / outputs.numel()
            return scale * (outputs - targets), lambda u: scale * u

        return squared
    if loss is F.cross_entropy and not targets.is_floating_point():
        one_hot = targets[:, None] == torch.arange(classes, device=targets.device)

        def cross_entropy(outputs: Tensor) -> tuple[Tensor, Curvature]:
            n, p = outputs.shape[0], outputs.softmax(-1)
            return (p - one_hot.to(p.dtype)) / n, lambda u: p * (u - (p * u).sum(-1, keepdim=True)) / n

        return cross_entropy

    def by_autodiff(outputs: Tensor) -> tuple[Tensor, Curvature]:
        g, pullback = vjp(lambda at: grad(loss)(at, targets), outputs)
        return g, lambda u: pullback(u)[0]  # The second derivative is symmetric.

    return by_autodiff


def capped(
    alpha: float, steps: int, step_cap: float | None, examples: int, largest: Callable[[], Tensor]
) -> float | Tensor:
    """alpha, or less: each of its steps is at most c * 2 n / lambda_max, with c = `step_cap` and n = `examples`."""
    if step_cap is None:
        return alpha
    return (steps * step_cap * 2 * examples / largest()).clamp(max=alpha)


def largest_eigenvalue(multiply: Callable[[Tensor], Tensor], like: Tensor) -> Tensor:
    """Of a symmetric, positive operator on tensors `like`, from below, by power iteration."""
    # Any start that is not orthogonal to the eigenvector; the same one each time, also inside a vmap.
    direction = torch.arange(1, 1 + like.numel(), dtype=like.dtype, device=like.device).cos().view_as(like)
    for _ in range(POWER_ITERATIONS):
        direction = direction / direction.norm().clamp(min=torch.finfo(direction.dtype).tiny)  # Of the operator 0.
        image = multiply(direction)
        value, direction = (direction * image).sum(), image
    return value.detach()
