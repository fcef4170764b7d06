"""ANIL, through learn2learn: MAML whose inner loop adapts the head alone."""

from typing import Any

import torch
from torch import Tensor, nn

from lightning_ntk.episode import Episode, TaskSpec
from lightning_ntk.methods.base import Predictor
from lightning_ntk.methods.inner_loop import check_parts
from lightning_ntk.methods.maml import MAML


class ANIL(MAML):
    """Minimises the query loss after k gradient steps of the head alone (Raghu et al. 2020).

        E_m[ L_query(body, head_k) ],   head_{i+1} = head_i - inner_lr grad_head L_support(body, head_i)

    Takes MAML's arguments; the inner loop they describe runs on the head. Cost of a task in a meta-step: one forward
    and backward pass of the body over support and query, O(n C1) in the terms of Zhou et al. (2021), Table 1, and k
    steps of the head. The defaults of our YAMLs are MAML's.

    Raises:
        ConfigError: the network has no `embed` and `head`.
    """

    def __init__(self, network: nn.Module, spec: TaskSpec, **settings: Any) -> None:
        check_parts(network, "anil", ("embed", "head"), "Use method=maml, which adapts the whole of any network.")
        super().__init__(network, spec, **settings)

    def meta_loss(self, episodes: Episode) -> Tensor:
        losses = []
        for task in episodes:
            features, query_features = self.network.embed(task.support_x), self.network.embed(task.query_x)
            losses.append(self.task_loss(self.network.head, features, task.support_y, query_features, task.query_y))
        return torch.stack(losses).mean()

    def adapt(self, support_x: Tensor, support_y: Tensor) -> Predictor:
        asked = support_x.requires_grad  # As in MAML.
        with torch.set_grad_enabled(asked):
            features = self.network.embed(support_x)
        with torch.enable_grad():
            head = self.inner_loop(self.network.head, features, support_y, self.test_adapt_steps, not asked)
        return lambda x: head(self.network.embed(x))
