"""No meta-learning at all: the reference point that tells whether meta-learning helps."""

import copy

import torch
from torch import Tensor, nn

from lightning_ntk.episode import TaskSpec
from lightning_ntk.methods.base import MetaLearner, Predictor
from lightning_ntk.methods.inner_loop import check_inner_loop


class FromScratch(MetaLearner):
    """Trains the randomly initialised network on each task's support set alone, with Adam. There is no meta-training.

    Args:
        adapt_steps: steps of Adam on the support loss.
        adapt_lr: its learning rate.
    """

    meta_trains = False

    def __init__(self, network: nn.Module, spec: TaskSpec, *, adapt_steps: int = 50, adapt_lr: float = 1e-3) -> None:
        super().__init__(network, spec)
        check_inner_loop(adapt_steps, adapt_lr, "adapt_steps", "adapt_lr")
        self.adapt_steps = adapt_steps
        self.adapt_lr = adapt_lr

    @torch.enable_grad()
    def adapt(self, support_x: Tensor, support_y: Tensor) -> Predictor:
        network = copy.deepcopy(self.network)
        optimizer = torch.optim.Adam(network.parameters(), lr=self.adapt_lr)
        for _ in range(self.adapt_steps):
            optimizer.zero_grad()
            self.loss(network(support_x), support_y).backward()
            optimizer.step()
        return network
