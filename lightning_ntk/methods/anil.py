"""ANIL, through learn2learn: MAML whose inner loop adapts the head alone."""

import torch
from torch import Tensor, nn

from lightning_ntk.episode import Episode, TaskSpec
from lightning_ntk.methods.base import MetaLearner, Predictor
from lightning_ntk.methods.inner_loop import check_inner_loop, learn2learn_maml


class ANIL(MetaLearner):
    """Minimises E_m[ L_query(body, head - k gradient steps on L_support) ] (Raghu et al. 2020).

    Cross-entropy in classification, squared loss in regression. Cost per task: one forward and backward pass of the
    body over support and query, and k steps of the head.

    Args:
        inner_lr: step size of the head's inner loop, at training and at test.
        adapt_steps: k, inner steps in training.
        test_adapt_steps: inner steps in validation and test.
        first_order: take the inner gradients as constants.
        lr: meta learning rate, of the body and of the head's start.
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
            features = self.network.embed(task.support_x)
            head = self._inner_loop(features, task.support_y, self.adapt_steps, self.first_order)
            losses.append(self.loss(head(self.network.embed(task.query_x)), task.query_y))
        return torch.stack(losses).mean()

    def adapt(self, support_x: Tensor, support_y: Tensor) -> Predictor:
        with torch.no_grad():
            features = self.network.embed(support_x)
        with torch.enable_grad():
            head = self._inner_loop(features, support_y, self.test_adapt_steps, first_order=True)
        return lambda x: head(self.network.embed(x))

    def _inner_loop(self, features: Tensor, support_y: Tensor, steps: int, first_order: bool) -> nn.Module:
        head = self._algorithm(self.network.head, lr=self.inner_lr, first_order=first_order).clone()
        for _ in range(steps):
            head.adapt(self.loss(head(features), support_y))
        return head
