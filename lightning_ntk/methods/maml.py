"""MAML and FOMAML, through learn2learn, with two options of MAML++."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from lightning_ntk.episode import Episode, TaskSpec
from lightning_ntk.errors import ConfigError, check_at_least, check_positive
from lightning_ntk.methods.base import MetaLearner, Predictor
from lightning_ntk.methods.inner_loop import learn2learn_algorithm
from lightning_ntk.ntk.checks import check_derivatives, check_is_function, check_outputs, check_second_derivatives


class MAML(MetaLearner):
    """Minimises the query loss after k gradient steps on the support loss (Finn et al. 2017).

        E_m[ L_query(theta_k) ],   theta_0 = theta,   theta_{i+1} = theta_i - inner_lr grad L_support(theta_i)

    Cross-entropy in classification, squared loss in regression. Cost of a task in a meta-step, in the terms of Zhou et
    al. (2021), Table 1: O(n (k + 1) C1) first order; second order differentiates through the k steps besides and keeps
    all of them in memory.

    `multi_step_loss` and `learn_inner_lrs` are two parts of MAML++ (Antoniou et al. 2019). Its loss is
    E_m[ sum_i v_i L_query(theta_i) ] over the steps i = 1..k, with weights v that move from 1/k each to the last step
    alone. (There they change with the epoch and the early ones stay above a small bound; here they change with each
    meta-step, and fall to 0.)

    Args:
        inner_lr: step size of the inner loop, at training and at test (0.01 for sine waves, 0.4 on 5-way Omniglot and
            0.01 on mini-ImageNet in the paper).
        adapt_steps: k, inner steps in training (1 on 5-way Omniglot and for sine waves, 5 on mini-ImageNet in the
            paper).
        test_adapt_steps: inner steps in validation and test (10 in Zhou et al. 2021).
        first_order: FOMAML, which takes the inner gradients as constants.
        multi_step_loss: meta-steps until only the last inner step's loss counts; 0 for that from the start (MAML).
        learn_inner_lrs: learn a step size for each inner step, from `inner_lr` on; steps beyond k take the last one's.
            (MAML++ has one for each layer, too.) `inner_lr` then has no effect at test.
        lr: meta learning rate of Adam (0.001 in the paper).
    """

    adapts_differentiably = True

    def __init__(
        self,
        network: nn.Module,
        spec: TaskSpec,
        *,
        inner_lr: float = 0.1,
        adapt_steps: int = 5,
        test_adapt_steps: int = 10,
        first_order: bool = False,
        multi_step_loss: int = 0,
        learn_inner_lrs: bool = False,
        lr: float = 1e-3,
    ) -> None:
        super().__init__(network, spec, lr=lr)
        check_is_function(network)
        if not first_order:
            check_second_derivatives(network)
        check_at_least(0, adapt_steps, "method.adapt_steps")
        check_at_least(0, test_adapt_steps, "method.test_adapt_steps")
        check_positive(inner_lr, "method.inner_lr")
        if multi_step_loss < 0:
            raise ConfigError(f"method.multi_step_loss must be 0 or more meta-steps, but got {multi_step_loss}.")
        if learn_inner_lrs and adapt_steps == 0:
            raise ConfigError("method.learn_inner_lrs=true needs inner steps: set method.adapt_steps to at least 1.")
        self.inner_lr = inner_lr
        self.adapt_steps = adapt_steps
        self.test_adapt_steps = test_adapt_steps
        self.first_order = first_order
        self.multi_step_loss = multi_step_loss
        self.inner_lrs = nn.Parameter(torch.full((adapt_steps,), inner_lr)) if learn_inner_lrs else None
        self._algorithm = learn2learn_algorithm("MAML")

    def meta_loss(self, episodes: Episode) -> Tensor:
        losses = [self.task_loss(self.network, t.support_x, t.support_y, t.query_x, t.query_y) for t in episodes]
        return torch.stack(losses).mean()

    def task_loss(self, module: nn.Module, x: Tensor, y: Tensor, query_x: Tensor, query_y: Tensor) -> Tensor:
        """The query loss of a module adapted to x `[n, ...]` and y, or the weighted sum of it after each step."""
        learners = self.inner_steps(module, x, y, self.adapt_steps, self.first_order)
        return sum(
            weight * self.loss(check_outputs(learner(query_x), query_x), query_y)
            for weight, learner in zip(self.step_weights(), learners, strict=True)
            if weight > 0
        )

    def step_weights(self) -> list[float]:
        """What the query loss after 0, 1, ..., k inner steps counts, at this meta-step."""
        k = self.adapt_steps
        if k == 0:
            return [1.0]
        early = max(0.0, 1 - self.global_step / self.multi_step_loss) / k if self.multi_step_loss else 0.0
        return [0.0, *[early] * (k - 1), 1 - early * (k - 1)]

    @torch.enable_grad()
    def adapt(self, support_x: Tensor, support_y: Tensor) -> Predictor:
        # Nobody differentiates through the inner steps here, unless the support asks for it.
        first_order = not support_x.requires_grad
        return self.inner_loop(self.network, support_x, support_y, self.test_adapt_steps, first_order)

    def inner_loop(self, module: nn.Module, x: Tensor, y: Tensor, steps: int, first_order: bool) -> nn.Module:
        """A clone of a module after gradient steps on the loss of its outputs for x `[n, ...]` with targets y."""
        *_, learner = self.inner_steps(module, x, y, steps, first_order)
        return learner

    def inner_steps(
        self, module: nn.Module, x: Tensor, y: Tensor, steps: int, first_order: bool
    ) -> Iterator[nn.Module]:
        """The clone after 0, 1, ..., `steps` gradient steps: one module, changed whenever the next is asked for."""
        check_derivatives()
        # Parameters that are frozen, or that nothing uses, stay as they are.
        algorithm = self._algorithm(module, lr=self.inner_lr, first_order=first_order, allow_nograd=True)
        learner = algorithm.clone()
        yield learner
        for step in range(steps):
            if self.inner_lrs is not None:
                learner.lr = self.inner_lrs[min(step, self.adapt_steps - 1)]
            learner.adapt(self.loss(check_outputs(learner(x), x), y))
            yield learner
