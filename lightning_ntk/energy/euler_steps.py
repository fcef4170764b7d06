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
from torch import Tensor
from torch.func import grad, vjp

from lightning_ntk.energy.closed_form import Solution

# Enough for two or three digits of the largest eigenvalue, where it stands apart from the next.
POWER_ITERATIONS = 10

# Maps outputs [n, C] and targets to a scalar: a mean over examples.
TaskLoss = Callable[[Tensor, Tensor], Tensor]


@dataclasses.dataclass(frozen=True)
class EulerSteps:
    """How the adaptation is done; takes the place of `energy.closed_form.ClosedForm`.

    Attributes:
        loss: of the support outputs `[n, C]` and targets.
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

        def solution(h: Tensor, start: Tensor) -> Tensor:
            a = torch.zeros_like(start).flatten()
            for _ in range(self.steps):
                a = a - step * grad(self.loss)(start + (h @ a).view_as(start), targets).flatten()
            return a

        def derivatives(c: Tensor) -> tuple[Tensor, Tensor]:
            of_kernel, of_outputs = pullback(c)
            return -of_outputs.flatten(), 0.5 * (of_kernel + of_kernel.mT)

        a, pullback = vjp(solution, kernel, outputs)
        return Solution(a, derivatives)


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
        direction = direction / direction.norm()
        image = multiply(direction)
        value, direction = (direction * image).sum(), image
    return value.detach()
