"""Several gradient steps of the function under one kernel, for any loss, in the form of Meta-RKHS-II.

Step j moves the outputs on the support X by -alpha / k H g_j, with g_j = dl/df at the outputs that it starts from and
H = Theta(X, X). So the adapted function is f(x) + Theta(x, X) a with

    a_0 = 0,   a_{j+1} = a_j - alpha / k dl/df(f(X) + H a_j),   a = a_k:

whose meta-gradient (`energy.meta_rkhs_ii`) needs no more than da. The k steps are taken, and differentiated, on vectors
of n C numbers, and cost little beside the support Jacobian of a convolutional network (docs/META_RKHS_I.md).

Cross-entropy does not change when a number is added to all C outputs of an example. So dl/df sums to 0 over the
classes, and C - 1 contrasts of the outputs are all that it sees of them (`seen`): f, J, H and a above are those of the
contrasts, with one backward pass less for each example, and the adapted function is the same.
"""

import dataclasses
from collections.abc import Callable
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import grad, vjp

from lightning_ntk.energy.closed_form import Solution
from lightning_ntk.ntk.network import Network, composed

# Enough for the largest eigenvalue to 1 % on the tasks of docs/META_RKHS_I.md.
KRYLOV_STEPS = 10
SQUARINGS = 12  # To 2^-12 of it within the Krylov space.

# Maps outputs [n, C] and targets to a scalar: a mean over examples.
TaskLoss = Callable[[Tensor, Tensor], Tensor]
# Multiplies `[n, C]` by the second derivative of a loss in the outputs.
Curvature = Callable[[Tensor], Tensor]


@dataclasses.dataclass(frozen=True)
class EulerSteps:
    """How the adaptation is done; takes the place of `energy.closed_form.ClosedForm`.

    Attributes:
        loss: of the support outputs `[n, C]` and targets. `F.cross_entropy` and `F.mse_loss` themselves are much
            quicker than other functions (`slopes`, `seen`).
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
    # As in `ClosedForm`; there is no choice here.
    kernel: ClassVar[str] = "full"
    inverts: ClassVar[bool] = False

    def seen(self, network: Network, targets: Tensor) -> Network:
        """The network whose f(X) and H `solve` takes: that of the contrasts for cross-entropy of class numbers."""
        return seen(network, self.loss, targets)

    def solve(self, kernel: Tensor, outputs: Tensor, targets: Tensor) -> Solution:
        """a after k steps, from H `[n C, n C]`, f(X) `[n, C]` and the targets of the loss; C is that of `seen`."""
        kernel, outputs = 0.5 * (kernel + kernel.mT).double(), outputs.double()
        targets = targets.double() if targets.is_floating_point() else targets

        def largest() -> Tensor:
            return largest_eigenvalue(lambda u: kernel @ u, outputs.flatten())

        step = capped(self.alpha, self.steps, self.step_cap, outputs.shape[0], largest) / self.steps

        slope = slopes(self.loss, targets, outputs)
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


def seen(network: Network, loss: TaskLoss, targets: Tensor) -> Network:
    """The network of the numbers that a loss depends on: the C - 1 contrasts of its C outputs where that is
    cross-entropy of class numbers, and otherwise the network itself."""
    return composed(network, _contrasts) if _sees_contrasts(loss, targets) else network


def seen_numbers(loss: TaskLoss, outputs: int) -> int:
    """How many numbers a loss depends on, of so many outputs of an example; cross-entropy is that of class numbers."""
    return outputs - 1 if loss is F.cross_entropy else outputs


def _sees_contrasts(loss: TaskLoss, targets: Tensor) -> bool:
    # Of targets that are probabilities only where they sum to 1, which is not looked at.
    return loss is F.cross_entropy and not targets.is_floating_point()


def _contrasts(outputs: Tensor) -> Tensor:
    return outputs @ _helmert(outputs.shape[-1], outputs)


def _helmert(classes: int, like: Tensor) -> Tensor:
    """Orthonormal columns `[C, C - 1]` that sum to 0: the mean of the first j classes less the class after them."""
    row = torch.arange(classes, dtype=like.dtype, device=like.device)[:, None]
    j = row.mT[:, 1:]
    return ((row < j).to(like.dtype) - j * (row == j)) / (j * (j + 1)).sqrt()


def slopes(loss: TaskLoss, targets: Tensor, like: Tensor) -> Callable[[Tensor], tuple[Tensor, Curvature]]:
    """Maps what a loss sees of outputs, `[n, C]` as `like`, to dl/df there, `[n, C]`, and the derivative of that.

    Written out for the two losses of `MetaLearner.loss`, as nested derivatives of `torch.func` would take most of the
    time of a step on a few numbers.
    """
    if loss is F.mse_loss:

        def squared(outputs: Tensor) -> tuple[Tensor, Curvature]:
            scale = 2 / outputs.numel()
            return scale * (outputs - targets), lambda u: scale * u

        return squared
    if _sees_contrasts(loss, targets):
        n, classes = like.shape[0], like.shape[1] + 1
        basis = _helmert(classes, like)
        one_hot = (targets[:, None] == torch.arange(classes, device=targets.device)).to(like.dtype)

        def cross_entropy(contrasts: Tensor) -> tuple[Tensor, Curvature]:
            p = (contrasts @ basis.mT).softmax(-1)

            def curvature(u: Tensor) -> Tensor:
                u = u @ basis.mT
                return (p * (u - (p * u).sum(-1, keepdim=True)) / n) @ basis

            return ((p - one_hot) / n) @ basis, curvature

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
    """Of a symmetric, positive operator on tensors `like`: that of its restriction to a Krylov space, and so from below
    (Lanczos; Golub and Van Loan, Matrix Computations, ch. 10, with whole orthogonalisation)."""
    tiny = torch.finfo(like.dtype).tiny  # Of the operator 0.
    # Any start that is not orthogonal to the eigenvector; the same one each time, also inside a vmap.
    following = torch.arange(1, 1 + like.numel(), dtype=like.dtype, device=like.device).cos().view_as(like)
    basis, images = [], []
    for _ in range(min(KRYLOV_STEPS, like.numel())):
        for _ in range(2):  # Once is not enough where nothing but rounding is left: the space is exhausted.
            for direction in basis:
                following = following - (direction * following).sum() * direction
        direction = following / following.norm().clamp(min=tiny)
        following = multiply(direction)
        basis.append(direction)
        images.append(following)
    restricted = torch.stack(basis).flatten(1) @ torch.stack(images).flatten(1).mT
    restricted = 0.5 * (restricted + restricted.mT)
    # The largest eigenvalue of a few numbers, without a decomposition, for which a GPU's host would wait.
    power = restricted
    for _ in range(SQUARINGS):
        power = power / power.norm().clamp(min=tiny)
        power = power @ power
    return ((restricted * power).sum() / power.trace().clamp(min=tiny)).detach()
