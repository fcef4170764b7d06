"""MAML and FOMAML, through learn2learn."""

import torch
from torch import Tensor, nn

from lightning_ntk.episode import Episode, TaskSpec
from lightning_ntk.methods.base import MetaLearner, Predictor
from lightning_ntk.methods.inner_loop import check_inner_loop, learn2learn_maml


class MAML(MetaLearner):
    """Minimises E_m[ L_query(theta - k gradient steps on L_support) ] (Finn et al. 2017).

    Cross-entropy in classification, squared loss in regression. Cost per task, in the terms of Zhou et al. (2021),
    Table 1: O(n (k + 1) C1) first order; second order differentiates through the k steps besides.

    Args:
        inner_lr: step size of the inner loop, at training and at test.
        adapt_steps: k, inner steps in training.
        test_adapt_steps: inner steps in validation and test (10 in Zhou et al. 2021).
        first_order: FOMAML, which takes the inner gradients as constants.
        lr: meta learning rate.
    """

    def __init__(
        self,
        network: nn.Module,
        spec: TaskSpec,
        *,
        inner_lr: float = 0.1,
        adapt_steps: int = 5,
        test_adapt_steps: int = 10,
        first_order: bool = False,
        lr: float = 1e-3,
    ) -> None:
        super().__init__(network, spec, lr=lr)
        check_inner_loop(adapt_steps, inner_lr, "adapt_steps", "inner_lr")
        check_inner_loop(test_adapt_steps, inner_lr, "test_adapt_steps", "inner_lr")
        self.inner_lr = inner_lr
        self.adapt_steps = adapt_steps
        self.test_adapt_steps = test_adapt_steps
        self.first_order = first_order
        self._algorithm = learn2learn_maml()

    def meta_loss(self, episodes: Episode) -> Tensor:
        losses = []
        for task in episodes:
            learner = self.inner_loop(self.network, task.support_x, task.support_y, self.adapt_steps, self.first_order)
            losses.append(self.loss(learner(task.query_x), task.query_y))
        return torch.stack(losses).mean()

    @torch.enable_grad()
    def adapt(self, support_x: Tensor, support_y: Tensor) -> Predictor:
        # Nobody differentiates through the inner steps here.
        return self.inner_loop(self.network, support_x, support_y, self.test_adapt_steps, first_order=True)

    def inner_loop(self, module: nn.Module, x: Tensor, y: Tensor, steps: int, first_order: bool) -> nn.Module:
        """A clone of a module after gradient steps on the loss of its outputs for x `[n, ...]` with targets y."""
        learner = self._algorithm(module, lr=self.inner_lr, first_order=first_order).clone()
        for _ in range(steps):
            learner.adapt(self.loss(learner(x), y))
        return learner
