"""Meta-RKHS-I: a fast-adaptive regulariser in place of an inner loop."""

import dataclasses
import math

import torch
from torch import Tensor, nn

from lightning_ntk.energy import meta_rkhs_i as energy
from lightning_ntk.energy.euler_steps import EulerSteps, capped, seen, seen_numbers
from lightning_ntk.energy.given_gradient import with_gradient
from lightning_ntk.energy.meta_rkhs_ii import adapt as adapt_on_kernel
from lightning_ntk.energy.meta_rkhs_ii import meta_gradient
from lightning_ntk.energy.tasks import Planner, each_task
from lightning_ntk.episode import Episode, TaskSpec
from lightning_ntk.errors import ConfigError, DivergenceError, check_at_least, check_not_negative, check_positive
from lightning_ntk.methods.base import MetaLearner, Predictor
from lightning_ntk.methods.inner_loop import check_choice
from lightning_ntk.networks.base import couples_examples
from lightning_ntk.ntk.checks import check_derivatives, check_is_function
from lightning_ntk.ntk.jacobian import adapted_outputs, gradient_and_value
from lightning_ntk.ntk.network import Network, functional
from lightning_ntk.ntk.params import Params, add
from lightning_ntk.ntk.precision import full_precision, in_full_precision

ENERGIES = ("euler", "cross", "literal")
ADAPTATIONS = ("gradient_descent", "euler")

# A cross-entropy or a mean squared error is positive, so an energy this far below 0 is the norm term running away.
DIVERGED_BELOW = -100.0

# Passes of a support example that one Euler step takes, and its part of the meta-gradient, where no kernel is built.
MATRIX_FREE_PASSES = 9


class MetaRKHSI(MetaLearner):
    """Minimises E_m[ L_m(f) - alpha ||grad_f L_m(f)||_H^2 ] (Zhou et al. 2021, eq. 4) or its bounded form.

    Cross-entropy in classification, squared loss in regression. Cost per task, in the paper's terms: O(n C1) for eq. 4
    and one Euler step, O(n C1 + k n^2) or O(n k C1) for k of them. docs/META_RKHS_I.md has what was tried.

    Args:
        energy: "euler" (default; ours): the query loss after `euler_steps` gradient steps in the RKHS, bounded below by
            0, whose first-order expansion in alpha is eq. 4. "literal": eq. 4 as written, on one batch (support and
            query together). "cross": eq. 4 with its unbiased estimator. The last two are unbounded below and diverge
            under Adam sooner or later; training then stops with `DivergenceError`. See `energy.meta_rkhs_i`.
        alpha: step of the energy. By Theorems 3 and 4 it stands for k inner steps of size alpha / k.
        euler_steps: k (ours), of the euler energy. The network's parameters stay where they are: each step moves the
            function, under the kernel at theta. 1 costs a vjp and a jvp. More are taken on the support's kernel, at the
            cost of Meta-RKHS-II's step and k small ones, or without it where it would cost more (`_by_kernel`).
        step_cap: c (ours): a step, alpha or alpha / euler_steps, is at most c * 2 n / lambda_max in each task, with
            lambda_max of the NTK on its n support examples, of what the loss sees of the outputs (for cross-entropy all
            but their mean); below c = 1 every step is stable wherever the loss curves by less than 1 in an output,
            below 0.5 for the squared error, which curves by 2. None leaves alpha as it is.
        adaptation: at test, "euler" takes the functional steps that the euler energy trains for; "gradient_descent" is
            the paper's, `adapt_steps` steps of `adapt_lr` through the network. None: what the energy trains for.
        adapt_steps: the paper uses 10.
        adapt_lr: step size of the gradient descent.
        tasks_per_chunk: tasks computed at once by vmap; None lets sizes and free memory decide.
        compile: as for Meta-RKHS-II (ours), of Euler steps on the support's kernel.
        lr: meta learning rate.
    """

    adapts_differentiably = True

    def __init__(
        self,
        network: nn.Module,
        spec: TaskSpec,
        *,
        energy: str = "euler",
        alpha: float = 1.0,
        euler_steps: int = 50,
        step_cap: float | None = None,
        adaptation: str | None = None,
        adapt_steps: int = 10,
        adapt_lr: float = 0.1,
        tasks_per_chunk: int | None = None,
        compile: bool = False,
        lr: float = 5e-3,
    ) -> None:
        super().__init__(network, spec, lr=lr)
        check_is_function(network, compiled=compile)
        check_choice(energy, ENERGIES, "energy")
        if adaptation not in (*ADAPTATIONS, None):
            raise ConfigError(
                f"method.adaptation must be one of {', '.join(ADAPTATIONS)}, or null, but got {adaptation!r}."
            )
        check_not_negative(alpha, "method.alpha")
        check_at_least(1, euler_steps, "method.euler_steps")
        if step_cap is not None and not (step_cap > 0 and math.isfinite(step_cap)):
            raise ConfigError(f"method.step_cap must be a finite positive number, or null, but got {step_cap}.")
        check_at_least(0, adapt_steps, "method.adapt_steps")
        check_positive(adapt_lr, "method.adapt_lr")
        if compile and (energy != "euler" or euler_steps == 1):
            raise ConfigError(
                "method.compile=true needs method.energy=euler and method.euler_steps above 1, which work on a kernel, "
                f"but got {energy} and {euler_steps}. Set method.compile=false."
            )
        self.compile_queries = compile
        self.energy = energy
        self.alpha = alpha
        self.euler_steps = euler_steps
        self.step_cap = step_cap
        self.adaptation = adaptation or ("euler" if energy == "euler" else "gradient_descent")
        self.adapt_steps = adapt_steps
        self.adapt_lr = adapt_lr
        self.coupled = couples_examples(network)
        outputs = seen_numbers(self.loss, spec.outputs) if energy == "euler" and euler_steps > 1 else 0
        self.planner = Planner(tasks_per_chunk=tasks_per_chunk, coupled=self.coupled, outputs=outputs)

    def meta_loss(self, episodes: Episode) -> Tensor:
        with full_precision(self.device.type):
            return self._meta_loss(episodes)

    def _meta_loss(self, episodes: Episode) -> Tensor:
        data = (episodes.support_x, episodes.support_y, episodes.query_x, episodes.query_y)
        network, params = functional(self.network)
        plan = self.planner.chunks(network, params, episodes.support_x, episodes.query_x)
        if self.energy == "euler" and self._by_kernel(examples=episodes.support_x.shape[1]):
            try:
                loss, gradient, _, _ = meta_gradient(
                    network,
                    params,
                    *data,
                    self.loss,
                    self.steps,
                    tasks_per_chunk=plan.tasks,
                    pairs_at_once=plan.pairs,
                    queries_apart=plan.queries_apart,
                    compile=self.compile_queries,
                )
            except torch.linalg.LinAlgError as error:  # A decomposition of numbers that are not finite.
                raise DivergenceError(
                    f"The {self.euler_steps} Euler steps of Meta-RKHS-I left the finite numbers: they are too long for "
                    f"the kernel. Lower method.alpha (now {self.alpha}) or method.lr (now {self.lr}), or set "
                    "method.step_cap=0.4, which keeps each step stable."
                ) from error
            return with_gradient(loss, params, gradient)
        pairs = None if self.coupled else plan.pairs  # A coupled network's queries cannot be parted.
        energies, gradients = [], []
        for chunk in zip(*(part.split(plan.tasks) for part in data), strict=True):

            def total(theta: Params, chunk: tuple[Tensor, ...] = chunk) -> Tensor:
                return each_task(lambda *task: self._task_energy(network, theta, *task, pairs), chunk).sum()

            (gradient,), value = gradient_and_value(total, params, batched=False)
            gradients.append(gradient)
            energies.append(value)
        gradient = {name: g / episodes.tasks for name, g in add(gradients).items()}
        return with_gradient(sum(energies) / episodes.tasks, params, gradient)

    @property
    def solves_kernels(self) -> bool:
        """Whether Euler steps are taken on a kernel, in training or at test."""
        return self.euler_steps > 1 and "euler" in (self.energy, self.adaptation)

    @property
    def steps(self) -> EulerSteps:
        """The steps of the euler energy. On a GPU all of their derivative is taken, so that the host need not wait to
        choose a part of it: without coupled examples, nothing else in them waits."""
        steps = EulerSteps(self.loss, self.alpha, self.euler_steps, self.step_cap, self.coupled)
        whole = self.device.type == "cuda" and not self.coupled
        return dataclasses.replace(steps, rank_tolerance=0.0) if whole else steps

    def _by_kernel(self, examples: int) -> bool:
        """Whether the support's kernel is worth building: it makes further steps free, but a first one dear.

        It takes a backward pass of an example for each of the C numbers that the loss sees of its outputs, or of all n
        for each of n C where they are coupled; without it, a step takes about MATRIX_FREE_PASSES passes of each.
        """
        passes = seen_numbers(self.loss, self.spec.outputs) * (examples if self.coupled else 1)
        return self.euler_steps > 1 and passes <= MATRIX_FREE_PASSES * self.euler_steps

    def _task_energy(self, network, params, support_x, support_y, query_x, query_y, pairs_at_once) -> Tensor:
        if self.energy == "literal":
            x, y = torch.cat([support_x, query_x]), torch.cat([support_y, query_y])
            return energy.literal(network, params, x, y, self.loss, self._alpha(network, params, x, y, 1))
        task = (support_x, support_y, query_x, query_y)
        if self.energy == "cross":
            return energy.cross(
                network, params, *task, self.loss, self._alpha(network, params, support_x, support_y, 1)
            )
        alpha = self._alpha(network, params, support_x, support_y, self.euler_steps)
        return energy.euler(network, params, *task, self.loss, alpha, self.euler_steps, pairs_at_once=pairs_at_once)

    def _alpha(self, network: Network, params: Params, x: Tensor, y: Tensor, steps: int) -> energy.Step:
        """alpha, or what the cap leaves of it, for so many steps on inputs `[n, ...]` of one task."""

        def largest() -> Tensor:
            return energy.largest_ntk_eigenvalue(seen(network, self.loss, y), params, x)

        return capped(self.alpha, steps, self.step_cap, x.shape[0], largest)

    def check_finite(self, loss: Tensor) -> None:
        if loss < DIVERGED_BELOW:
            raise DivergenceError(
                f"The {self.energy} energy of Meta-RKHS-I fell to {loss.item():.3g} at step {self.global_step}: it is "
                "unbounded below and its norm term has run away. Use method.energy=euler (bounded), or lower "
                f"method.alpha (now {self.alpha}) or method.lr (now {self.lr}) and stop earlier."
            )
        super().check_finite(loss)

    def adapt(self, support_x: Tensor, support_y: Tensor) -> Predictor:
        with full_precision(self.device.type):
            predictor = self._adapt(support_x, support_y)
        return in_full_precision(predictor, self.device.type)

    def _adapt(self, support_x: Tensor, support_y: Tensor) -> Predictor:
        check_derivatives()
        if support_y.is_cpu:  # On a GPU the host would have to wait; of tests, `_collect` looks at the labels.
            self.check_labels(support_y)
        network, params = functional(self.network)
        params = {name: p.detach() for name, p in params.items()}
        if self.adaptation == "euler" and self._by_kernel(examples=support_x.shape[0]):
            pairs = self.planner.chunks(network, params, support_x[None], support_x[None]).pairs
            return adapt_on_kernel(network, params, support_x, support_y, self.steps, pairs_at_once=pairs)
        if self.adaptation == "euler":
            alpha = self._alpha(network, params, support_x, support_y, self.euler_steps)
            tangent = energy.euler_tangent(network, params, support_x, support_y, self.loss, alpha, self.euler_steps)
            return lambda x: adapted_outputs(network, params, tangent, x)
        adapted = params
        for _ in range(self.adapt_steps):
            gradient, _ = energy.loss_gradient(network, adapted, support_x, support_y, self.loss)
            adapted = {name: p - self.adapt_lr * gradient[name] for name, p in adapted.items()}
        return lambda x: network(adapted, x)
