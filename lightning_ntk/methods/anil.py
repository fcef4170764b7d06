"""ANIL, through learn2learn: MAML whose inner loop adapts the head alone."""

import torch
from torch import Tensor

from lightning_ntk.episode import Episode
from lightning_ntk.methods.base import Predictor
from lightning_ntk.methods.maml import MAML


class ANIL(MAML):
    """Minimises E_m[ L_query(body, head - k gradient steps on L_support) ] (Raghu et al. 2020).

    Takes MAML's arguments; the inner loop they describe runs on the head. Cost per task: one forward and backward pass
    of the body over support and query, and k steps of the head.
    """

    def meta_loss(self, episodes: Episode) -> Tensor:
        losses = []
        for task in episodes:
            features = self.network.embed(task.support_x)
            head = self.inner_loop(self.network.head, features, task.support_y, self.adapt_steps, self.first_order)
            losses.append(self.loss(head(self.network.embed(task.query_x)), task.query_y))
        return torch.stack(losses).mean()

    def adapt(self, support_x: Tensor, support_y: Tensor) -> Predictor:
        with torch.no_grad():
            features = self.network.embed(support_x)
        with torch.enable_grad():
            head = self.inner_loop(self.network.head, features, support_y, self.test_adapt_steps, first_order=True)
        return lambda x: head(self.network.embed(x))
