"""Reptile: towards the parameters that descent on each task ends in."""

import functools
import math
from typing import Any

import torch
from torch import Tensor, nn

from lightning_ntk.energy.given_gradient import with_gradient
from lightning_ntk.episode import Episode, TaskSpec
from lightning_ntk.errors import ConfigError, check_at_least, check_positive
from lightning_ntk.methods.descent import DescentLearner, descend
from lightning_ntk.methods.inner_loop import check_choice
from lightning_ntk.ntk.network import functional
from lightning_ntk.ntk.params import Params

OPTIMIZERS = ("sgd", "adam")


class Reptile(DescentLearner):
    """Moves theta towards the adapted parameters W_m of each task (Nichol et al. 2018).

        batched:  theta <- theta + lr mean_m( W_m(theta) - theta )
        serial:   theta <- theta + lr ( W_m(theta) - theta )   for one task m of the meta-batch after the other

    W_m(theta) is k steps of the inner optimiser on minibatches of all the task's examples: Reptile makes no difference
    between support and query in training. No objective is minimised in general. With one step of gradient descent on
    all examples, (theta - W_m) / inner_lr is the gradient of L_m(theta), and its mean over tasks that of the energy of
    Zhou et al. (2021), eq. 4, at alpha = 0.

    The update goes through automatic optimisation: the gradient handed over is theta - mean_m W_m (serial: theta's
    whole way divided by -lr), which plain gradient descent with step lr turns into the update above, and which DDP
    averages over processes. **The value logged as the training loss is the mean over tasks and over the k steps of the
    inner loss before each step**; the gradient handed over is not its gradient, but for the case of one step above.

    Cross-entropy in classification, squared loss in regression. Cost of a task in a meta-step, in the terms of Zhou et
    al., Table 1: O(n k C1); no memory beyond one step's.

    Args:
        inner_lr: step size of the inner optimiser (0.001 for Adam in the paper).
        inner_optimizer: "adam" with beta1 = 0, as in the paper, or "sgd". Its state starts afresh with each task.
        adapt_steps: k (5 on Omniglot and 8 on mini-ImageNet, 5-way, in the paper).
        batch_size: examples of a step in training (10 in the paper), drawn without replacement until all have had their
            turn, in an order that follows from the number of the meta-step; None takes all examples in each step.
        test_adapt_steps: steps in validation and test, each on the whole support set (50 in the paper).
        serial: one task after the other (the paper's Algorithm 1; batched is its Algorithm 2). Several processes
            walk through their own shares of the meta-batch, so that results depend on their number.
        outer_optimizer: "sgd" is the paper's; "adam" takes theta - mean_m W_m for a gradient (batched form only).
        lr: step towards the adapted parameters (1 at the start in the paper), or Adam's learning rate. It falls as
            `lr_schedule` says (to 0 linearly in the paper, along a half-cosine by default here). In the serial form it
            is the whole way through the tasks that the schedule shortens.
    """

    def __init__(
        self,
        network: nn.Module,
        spec: TaskSpec,
        *,
        inner_lr: float = 1e-3,
        inner_optimizer: str = "adam",
        adapt_steps: int = 5,
        batch_size: int | None = 10,
        test_adapt_steps: int = 50,
        serial: bool = False,
        outer_optimizer: str = "sgd",
        lr: float = 1.0,
    ) -> None:
        super().__init__(network, spec, lr=lr)
        check_at_least(0, adapt_steps, "method.adapt_steps")
        check_at_least(0, test_adapt_steps, "method.test_adapt_steps")
        check_positive(inner_lr, "method.inner_lr")
        check_choice(inner_optimizer, OPTIMIZERS, "inner_optimizer")
        check_choice(outer_optimizer, OPTIMIZERS, "outer_optimizer")
        if adapt_steps == 0:
            raise ConfigError("method.adapt_steps must be at least 1: Reptile learns from where the steps lead.")
        if batch_size is not None and batch_size < 1:
            raise ConfigError(f"method.batch_size must be at least 1, or null for all examples, but got {batch_size}.")
        if serial and outer_optimizer != "sgd":
            raise ConfigError("method.serial=true moves theta by itself: it needs method.outer_optimizer=sgd.")
        self.inner_lr = inner_lr
        self.inner_optimizer = inner_optimizer
        self.adapt_steps = adapt_steps
        self.batch_size = batch_size
        self.test_adapt_steps = test_adapt_steps
        self.serial = serial
        self.outer_optimizer = outer_optimizer

    def configure_optimizers(self) -> torch.optim.Optimizer:
        if self.outer_optimizer == "adam":
            return super().configure_optimizers()
        return torch.optim.SGD(self.parameters(), lr=self.lr)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        settings = checkpoint.get("run", {}).get("config", {}).get("method", {})  # None under a Trainer of one's own.
        was = settings.get("outer_optimizer", self.outer_optimizer)
        if was != self.outer_optimizer:
            raise ConfigError(
                f"method.outer_optimizer={self.outer_optimizer} cannot go on with the state of the run's own, {was}. "
                "Leave it out."
            )
        super().on_load_checkpoint(checkpoint)

    def meta_loss(self, episodes: Episode) -> Tensor:
        x = torch.cat([episodes.support_x, episodes.query_x], dim=1)
        y = torch.cat([episodes.support_y, episodes.query_y], dim=1)
        _, theta = functional(self.network)
        way, loss = (self._serial if self.serial else self._batched)(theta, x, y)
        return with_gradient(loss, theta, {name: -step for name, step in way.items()})

    def _batched(self, theta: Params, x: Tensor, y: Tensor) -> tuple[Params, Tensor]:
        """mean_m W_m - theta, and the inner loss."""
        ends, losses = [], []
        for chunk in self.chunks(x, y, self.batch_size):
            adapted, values = self._descend(theta, len(chunk[0]), self.minibatches(*chunk))
            ends.append(adapted)
            losses.append(values.mean(0))
        ways = {name: torch.cat([end[name] for end in ends]).mean(0) - p.detach() for name, p in theta.items()}
        return ways, torch.cat(losses).mean()

    def _serial(self, theta: Params, x: Tensor, y: Tensor) -> tuple[Params, Tensor]:
        """The way from theta through all tasks over lr, and the inner loss."""
        here, losses = {name: p.detach() for name, p in theta.items()}, []
        for task in range(len(x)):
            batches = self.minibatches(x[task : task + 1], y[task : task + 1])
            adapted, values = self._descend(here, 1, batches)
            here = {name: p.lerp(adapted[name][0], self.lr) for name, p in here.items()}
            losses.append(values.mean())
        return {name: (here[name] - p.detach()) / self.lr for name, p in theta.items()}, torch.stack(losses).mean()

    def minibatches(self, x: Tensor, y: Tensor) -> list[tuple[Tensor, Tensor]]:
        """The examples `[T, N, ...]` and targets of each of the k steps; all tasks are cut in the same way."""
        total = x.shape[1]
        if self.batch_size is None or self.batch_size >= total:
            return [(x, y)] * self.adapt_steps
        # By the meta-step alone, so that a resumed run and every process draw the same.
        order = torch.randperm(total, generator=torch.Generator().manual_seed(self.global_step)).to(x.device)
        cut = order.tensor_split(math.ceil(total / self.batch_size))
        return [(x[:, part], y[:, part]) for part in (cut[step % len(cut)] for step in range(self.adapt_steps))]

    def adapted_params(self, support_x: Tensor, support_y: Tensor) -> Params:
        batches = [(support_x, support_y)] * self.test_adapt_steps
        return self._descend(functional(self.network)[1], len(support_x), batches)[0]

    def _descend(self, start: Params, tasks: int, batches: list[tuple[Tensor, Tensor]]) -> tuple[Params, Tensor]:
        if self.inner_optimizer == "adam":
            optimizer = functools.partial(torch.optim.Adam, lr=self.inner_lr, betas=(0.0, 0.999), fused=True)
        else:
            optimizer = functools.partial(torch.optim.SGD, lr=self.inner_lr)
        return descend(self.task_loss, start, tasks, batches, optimizer)
