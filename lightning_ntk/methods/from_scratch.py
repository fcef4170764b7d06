"""No meta-learning at all: the reference point that tells whether meta-learning helps."""

import functools

import torch
from torch import Tensor, nn

from lightning_ntk.episode import TaskSpec
from lightning_ntk.errors import check_at_least, check_positive
from lightning_ntk.methods.descent import DescentLearner, descend
from lightning_ntk.ntk.network import functional
from lightning_ntk.ntk.params import Params


class FromScratch(DescentLearner):
    """Trains the randomly initialised network on each task's support set alone, with Adam. There is no meta-training.

        theta_m = k steps of Adam on L_support(theta), from the seed's initial parameters

    Cross-entropy in classification, squared loss in regression. No meta-step; a task at test costs O(n k C1), in the
    terms of Zhou et al. (2021), Table 1. No paper of its own: steps and step size are ours.
    Small tasks are trained side by side, each as if alone.

    Args:
        adapt_steps: k, steps of Adam on the support loss.
        adapt_lr: its learning rate.
    """

    meta_trains = False

    def __init__(self, network: nn.Module, spec: TaskSpec, *, adapt_steps: int = 50, adapt_lr: float = 1e-3) -> None:
        super().__init__(network, spec)
        check_at_least(0, adapt_steps, "method.adapt_steps")
        check_positive(adapt_lr, "method.adapt_lr")
        self.adapt_steps = adapt_steps
        self.adapt_lr = adapt_lr

    def adapted_params(self, support_x: Tensor, support_y: Tensor) -> Params:
        adam = functools.partial(torch.optim.Adam, lr=self.adapt_lr, fused=True)
        batches = [(support_x, support_y)] * self.adapt_steps
        return descend(self.task_loss, functional(self.network)[1], len(support_x), batches, adam)[0]
