"""What Meta-RKHS-II is asked to compute, and how much of it at once."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from lightning_ntk.ntk.flow import Approximation, GradientFlow, gradient_flow
from lightning_ntk.ntk.network import Network
from lightning_ntk.ntk.params import groups_at_once

# Products in float32 put eigenvalues off by about 1e-7 of the largest, and phi, at most the smaller of t and 1 / ridge,
# multiplies that. Meta-gradients of a network trained on sine waves were off by 0.1 % at t = 1e3, 0.4 % at 3e3, and
# 1.3 % at 1e4, and several times their norm at 1e6; with products in float64 by 0.05, 0.04, 0.5 and 2.5 %.
LARGEST_PHI = 1e3


class Solution(NamedTuple):
    """The adaptation to one task, f(x) + Theta(x, X) a, and how a depends on H and f(X). All in float64.

    Attributes:
        a: `[n C]`.
        derivatives: maps c `[n C]` to b `[n C]` and the symmetric G `[n C, n C]` with d<c, a> = <G, dH> - <b, df(X)>.
    """

    a: Tensor
    derivatives: Callable[[Tensor], tuple[Tensor, Tensor]]


@dataclasses.dataclass(frozen=True)
class ClosedForm:
    """How the adaptation is solved. See `ntk.flow.GradientFlow` for t, approximation and ridge.

    Attributes:
        coupled: the network's `couples_examples`.
        rank_tolerance: see `energy.support_gradient.truncate`.
        kernel: "full", or "trace" (`energy.trace_kernel`, for networks that do not couple examples).
    """

    t: float
    approximation: Approximation = "exact"
    ridge: float = 0.0
    coupled: bool = True
    rank_tolerance: float = 1e-6
    kernel: Literal["full", "trace"] = "full"

    def seen(self, network: Network, targets: Tensor) -> Network:
        """The network whose f(X) and H `solve` takes: the squared loss sees all outputs."""
        return network

    @property
    def inverts(self) -> bool:
        """Whether the kernel's smallest eigenvalues are divided by: it has to be more exact than float32 products."""
        return min(self.t, 1 / self.ridge if self.ridge else math.inf) > LARGEST_PHI

    def flow_settings(self, kernel: Tensor, dtype: torch.dtype) -> dict[str, Any]:
        """What `GradientFlow` takes beside t, for a kernel `[N, N]` from a Jacobian of that type.

        Support examples that are alike have rows that differ by rounding, and the square of that is an eigenvalue.
        """
        of_rows = torch.finfo(dtype).eps
        rounding = max(torch.finfo(kernel.dtype).eps, len(kernel) * of_rows**2)
        return {"approximation": self.approximation, "ridge": self.ridge, "rounding": rounding}

    def solve(self, kernel: Tensor, outputs: Tensor, targets: Tensor) -> Solution:
        """a = phi(H) (Y - f(X)), from H `[n C, n C]`, f(X) and real targets Y `[n, C]`."""
        settings = self.flow_settings(kernel, outputs.dtype)
        flow = GradientFlow(kernel, self.t, **settings)
        residual = (targets - outputs).flatten().double()
        # Where it is differentiated through: by the flow's own formula, not by that of `eigh`.
        a = gradient_flow(kernel, residual, self.t, **settings) if kernel.requires_grad else flow.apply(residual)
        return Solution(a, lambda c: (flow.apply(c), flow.adjoint(c, residual)))


@dataclasses.dataclass(frozen=True)
class Work:
    """How a task is worked on.

    Attributes:
        coupled: whether the network couples its examples.
        pairs_at_once: pairs of an example and a direction at once; None takes all.
        batched: whether this happens inside a vmap over tasks.
        queries_apart: whether the query sets are taken out of that vmap, one by one.
        compile: whether the gradients of a query set are compiled.
    """

    coupled: bool
    pairs_at_once: int | None
    batched: bool
    queries_apart: bool = False
    compile: bool = False

    def at_once(self, group: int) -> int | None:
        """How many groups of so many pairs at once; None takes all."""
        return groups_at_once(self.pairs_at_once, group)
