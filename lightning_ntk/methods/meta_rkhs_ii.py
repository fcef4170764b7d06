"""Meta-RKHS-II: adaptation by gradient flow in the RKHS of the network's NTK, solved in closed form."""

import torch
import torch.nn.functional as F
from pytorch_lightning.utilities import rank_zero_warn
from torch import Tensor, nn

from lightning_ntk.energy import meta_rkhs_ii as energy
from lightning_ntk.energy.closed_form import ClosedForm
from lightning_ntk.energy.given_gradient import with_gradient
from lightning_ntk.energy.tasks import Planner
from lightning_ntk.episode import Episode, TaskSpec
from lightning_ntk.errors import ConfigError
from lightning_ntk.methods.base import MetaLearner, Predictor
from lightning_ntk.networks.base import couples_examples, remedy_of_coupling
from lightning_ntk.ntk.checks import check_is_function
from lightning_ntk.ntk.flow import Approximation, check_flow_settings
from lightning_ntk.ntk.network import functional
from lightning_ntk.ntk.precision import full_precision, in_full_precision

# Backward passes of single images, for one task's support Jacobian, from which on a user should know what they cost.
MANY_PASSES = 20_000


class MetaRKHSII(MetaLearner):
    """Minimises E_m[ L_query(f_t) ] with f_t the closed-form adaptation (Zhou et al. 2021, eq. 5-7).

        f_t(x) = f(x) + Theta(x, X) H^-1 (I - e^{-tH}) (Y - f(X)),      t = inf: f(x) + Theta(x, X) H^-1 (Y - f(X))

    Classification is regression on one-hot targets shifted by 1/C (Arora et al. 2019); the query loss is the mean
    squared error. Cost per task, in the paper's terms: O(n C1 + n^3). See `energy.meta_rkhs_ii` for how. Whatever the
    trainer's precision, Jacobians are computed in the parameters' own, and kernels are summed and solved in float64.

    Args:
        t: time of the flow under the loss 1/2 sum_i |f(x_i) - y_i|^2, in (0, inf]; the paper uses 0.1 to inf.
        approximation: "exact", or the paper's Pade variants "pade11" and "pade22" (t100_PQ1, t100_PQ2).
        kernel: "full", n C x n C; or "trace", one n x n kernel that the classes share, as the paper's notation has it:
            a smaller solve, but slower in all (see `energy.trace_kernel`), and other results (docs/RESULTS.md). It
            needs a network that does not couple its examples.
        ridge: added to the kernel's eigenvalues (ours; for t = inf, where the kernel has directions that it
            hardly sees).
        rank_tolerance: relative error allowed in the low-rank part of the meta-gradient (ours). What was left out is
            logged as `meta_gradient/left_out`, the directions it took as `meta_gradient/tangents`. 0 takes all of it,
            C directions (n C where examples are coupled), and spares a GPU the wait for the choice.
        tasks_per_chunk: tasks computed at once by vmap (ours); None lets sizes and free memory decide.
        pairs_at_once: pairs of an example and a direction worked on at once within a task (ours): bounds the memory of
            activations; None lets sizes and free memory decide.
        compile: compile the query set's part of the meta-gradient, at the first step with each shape of query sets
            (ours). About half a minute each time, for shorter steps of some convolutional networks
            (docs/BENCHMARKS.md). The full kernel only. Adaptation at test is not compiled.
        lr: the paper's meta learning rate is 0.01.
    """

    solves_kernels = True
    adapts_differentiably = True

    def __init__(
        self,
        network: nn.Module,
        spec: TaskSpec,
        *,
        t: float = 10.0,
        approximation: Approximation = "exact",
        kernel: str = "full",
        ridge: float = 0.0,
        rank_tolerance: float = 1e-6,
        tasks_per_chunk: int | None = None,
        pairs_at_once: int | None = None,
        compile: bool = False,
        lr: float = 1e-2,
    ) -> None:
        super().__init__(network, spec, lr=lr)
        check_is_function(network, compiled=compile)
        t = float(t)
        check_flow_settings(t, approximation, ridge)
        if not 0 <= rank_tolerance < 1:
            raise ConfigError(f"method.rank_tolerance must be in [0, 1), but got {rank_tolerance}.")
        if kernel not in ("full", "trace"):
            raise ConfigError(f"method.kernel must be 'full' or 'trace', but got {kernel!r}.")
        coupled = couples_examples(network)
        if kernel == "trace" and coupled:
            raise ConfigError(
                "method.kernel=trace needs a network whose examples do not depend on each other. "
                f"{remedy_of_coupling(network)}, or method.kernel=full."
            )
        if kernel == "trace" and compile:
            raise ConfigError("method.compile=true needs method.kernel=full: trace lacks the part that it compiles.")
        self.compile_queries = compile
        self.how = ClosedForm(t, approximation, ridge, coupled, rank_tolerance, kernel)
        self.planner = Planner(
            tasks_per_chunk=tasks_per_chunk,
            pairs_at_once=pairs_at_once,
            coupled=coupled,
            outputs=spec.outputs,
            query_rows=kernel == "trace",
        )

    def regression_targets(self, y: Tensor) -> Tensor:
        """Real targets `[n, C]`: shifted one-hot vectors of class numbers `[n]`, or y itself in regression."""
        if self.spec.kind == "regression":
            return y
        return F.one_hot(y, self.spec.outputs).to(next(self.network.parameters()).dtype) - 1 / self.spec.outputs

    def probabilities(self, outputs: Tensor) -> Tensor:
        """Least squares on one-hot vectors estimates probabilities themselves: the outputs without their shift,
        negative ones cut to 0, and made to sum to 1."""
        # Where no class is left (all outputs far too low), all are alike.
        shares = (outputs + 1 / self.spec.outputs).clamp(min=torch.finfo(outputs.dtype).eps)
        return shares / shares.sum(-1, keepdim=True)

    def meta_loss(self, episodes: Episode) -> Tensor:
        network, params = functional(self.network)
        with full_precision(self.device.type):
            chunks = self.planner.chunks(network, params, episodes.support_x, episodes.query_x)
            loss, gradient, tangents, left_out = energy.meta_gradient(
                network,
                params,
                episodes.support_x,
                self.regression_targets(episodes.support_y),
                episodes.query_x,
                self.regression_targets(episodes.query_y),
                F.mse_loss,
                self.how,
                tasks_per_chunk=chunks.tasks,
                pairs_at_once=chunks.pairs,
                queries_apart=chunks.queries_apart,
                compile=self.compile_queries,
            )
        self.reached = {"tangents": float(tangents), "left_out": left_out}
        return with_gradient(loss, params, gradient)

    def training_step(self, episodes: Episode, batch_idx: int) -> Tensor:
        if self.global_step == 0:
            self._say_what_costs(episodes)
        return super().training_step(episodes, batch_idx)

    def _say_what_costs(self, episodes: Episode) -> None:
        n = episodes.support_x.shape[1]
        if self.how.coupled and n * n * self.spec.outputs > MANY_PASSES:
            rank_zero_warn(
                f"Where examples depend on each other, the support Jacobian of {n} examples and {self.spec.outputs} "
                f"outputs takes {n * self.spec.outputs} backward passes over all {n} examples in each task, and "
                f"elsewhere {self.spec.outputs}. {remedy_of_coupling(self.network)}."
            )

    def adapt(self, support_x: Tensor, support_y: Tensor) -> Predictor:
        if support_y.is_cpu:  # On a GPU the host would have to wait; of tests, `_collect` looks at the labels.
            self.check_labels(support_y)
        network, params = functional(self.network)
        params = {name: p.detach() for name, p in params.items()}
        with full_precision(self.device.type):
            pairs = self.planner.chunks(network, params, support_x[None], support_x[None]).pairs
            targets = self.regression_targets(support_y)
            predictor = energy.adapt(network, params, support_x, targets, self.how, pairs_at_once=pairs)
        return in_full_precision(predictor, self.device.type)
