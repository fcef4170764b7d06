"""Meta-RKHS-I: a fast-adaptive regulariser in place of an inner loop."""

import math

import torch
from torch import Tensor, nn

from lightning_ntk.energy import meta_rkhs_i as energy
from lightning_ntk.energy.meta_rkhs_ii import adapted_outputs
from lightning_ntk.energy.tasks import check_tasks_per_chunk, each_task
from lightning_ntk.episode import Episode, TaskSpec
from lightning_ntk.errors import ConfigError, DivergenceError
from lightning_ntk.methods.base import MetaLearner, Predictor
from lightning_ntk.methods.inner_loop import check_inner_loop
from lightning_ntk.ntk.jacobian import functional

ENERGIES = ("euler", "cross", "literal")
ADAPTATIONS = ("gradient_descent", "euler")

# A cross-entropy or a mean squared error is positive, so an energy this far below 0 is the norm term running away.
DIVERGED_BELOW = -100.0


class MetaRKHSI(MetaLearner):
    """Minimises E_m[ L_m(f) - alpha ||grad_f L_m(f)||_H^2 ] (Zhou et al. 2021, eq. 4) or its bounded form.

    Cross-entropy in classification, squared loss in regression. Cost per task, in the paper's terms: O(n C1).

    Args:
        energy: "euler" (default; ours): the query loss after one gradient step in the RKHS, bounded below by 0, whose
            first-order expansion in alpha is eq. 4. "literal": eq. 4 as written, on one batch (support and query
            together). "cross": eq. 4 with its unbiased estimator. The last two are unbounded below and diverge under
            Adam sooner or later; training then stops with `DivergenceError`. See `energy.meta_rkhs_i`.
        alpha: step of the energy. By Theorems 3 and 4 it stands for k inner steps of size alpha / k.
        adaptation: at test, "gradient_descent" is the paper's (`adapt_steps` steps of `adapt_lr`); "euler" takes the
            single functional step that the euler energy trains for.
        adapt_steps: the paper uses 10.
        adapt_lr: step size of the gradient descent.
        tasks_per_chunk: tasks computed at once by vmap.
        lr: meta learning rate.
    """

    def __init__(
        self,
        network: nn.Module,
        spec: TaskSpec,
        *,
        energy: str = "euler",
        alpha: float = 0.5,
        adaptation: str = "gradient_descent",
        adapt_steps: int = 10,
        adapt_lr: float = 0.1,
        tasks_per_chunk: int = 4,
        lr: float = 1e-3,
    ) -> None:
        super().__init__(network, spec, lr=lr)
        if energy not in ENERGIES:
            raise ConfigError(f"method.energy must be one of {', '.join(ENERGIES)}, but got {energy!r}.")
        if adaptation not in ADAPTATIONS:
            raise ConfigError(f"method.adaptation must be one of {', '.join(ADAPTATIONS)}, but got {adaptation!r}.")
        if not (alpha >= 0 and math.isfinite(alpha)):
            raise ConfigError(f"method.alpha must be a finite number >= 0, but got {alpha}.")
        check_inner_loop(adapt_steps, adapt_lr, "adapt_steps", "adapt_lr")
        check_tasks_per_chunk(tasks_per_chunk)
        self.energy = energy
        self.alpha = alpha
        self.adaptation = adaptation
        self.adapt_steps = adapt_steps
        self.adapt_lr = adapt_lr
        self.tasks_per_chunk = tasks_per_chunk

    def meta_loss(self, episodes: Episode) -> Tensor:
        data = (episodes.support_x, episodes.support_y, episodes.query_x, episodes.query_y)
        chunks = zip(*(part.split(self.tasks_per_chunk) for part in data), strict=True)
        return torch.cat([each_task(self._task_energy, chunk) for chunk in chunks]).mean()

    def _task_energy(self, support_x: Tensor, support_y: Tensor, query_x: Tensor, query_y: Tensor) -> Tensor:
        network, params = functional(self.network)
        if self.energy == "literal":
            x, y = torch.cat([support_x, query_x]), torch.cat([support_y, query_y])
            return energy.literal(network, params, x, y, self.loss, self.alpha)
        form = energy.euler if self.energy == "euler" else energy.cross
        return form(network, params, support_x, support_y, query_x, query_y, self.loss, self.alpha)

    def check_finite(self, loss: Tensor) -> None:
        if loss < DIVERGED_BELOW:
            raise DivergenceError(
                f"The {self.energy} energy of Meta-RKHS-I fell to {loss.item():.3g} at step {self.global_step}: it is "
                "unbounded below and its norm term has run away. Use method.energy=euler (bounded), or lower "
                f"method.alpha (now {self.alpha}) or method.lr (now {self.lr}) and stop earlier."
            )
        super().check_finite(loss)

    def adapt(self, support_x: Tensor, support_y: Tensor) -> Predictor:
        network, params = functional(self.network)
        params = {name: p.detach() for name, p in params.items()}
        if self.adaptation == "euler":
            tangent = energy.euler_step(network, params, support_x, support_y, self.loss, self.alpha)
            return lambda x: adapted_outputs(network, params, tangent, x)
        adapted = params
        for _ in range(self.adapt_steps):
            step = energy.euler_step(network, adapted, support_x, support_y, self.loss, self.adapt_lr)
            adapted = {name: p + step[name] for name, p in adapted.items()}
        return lambda x: network(adapted, x)
