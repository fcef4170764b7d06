"""Prototypical networks: the nearest class mean in a learned space of features."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_ntk.episode import Episode, TaskSpec
from lightning_ntk.errors import ConfigError
from lightning_ntk.methods.base import MetaLearner, Predictor
from lightning_ntk.methods.inner_loop import check_parts


class ProtoNet(MetaLearner):
    """Minimises the query cross-entropy of distances to class means (Snell et al. 2017).

        E_m[ -log softmax_k( -|e(x) - c_k|^2 ) ],   c_k = mean of e(x_i) over the support examples x_i of class k

    e is the network without its head, so that a task may have any number of ways at test: the head is frozen and takes
    no part. Cost of a task in a meta-step: one forward and backward pass over support and query, O(n C1) in the terms
    of Zhou et al. (2021), Table 1; there is no inner loop.

    The paper trains with more ways than it tests (60 on Omniglot, 20 or 30 on mini-ImageNet): `data.ways` and
    `data.eval_ways`. Its learning rate is 0.001, halved every 2000 episodes; here it falls as
    `lr_schedule` says.

    Args:
        lr: meta learning rate of Adam.

    Raises:
        ConfigError: the tasks are regressions, or the network has no `embed`.
    """

    any_ways = True
    adapts_differentiably = True

    def __init__(self, network: nn.Module, spec: TaskSpec, *, lr: float = 1e-3) -> None:
        super().__init__(network, spec, lr=lr)
        check_classification(spec, "protonet")
        check_parts(network, "protonet", ("embed",), "Use method=maml, which takes any network.")
        if isinstance(getattr(network, "head", None), nn.Module):
            # Neither the optimiser nor DDP may wait for gradients that never come.
            network.head.requires_grad_(False)

    def embed(self, x: Tensor) -> Tensor:
        """e(x), `[n, width]`."""
        return self.network.embed(x)

    def meta_loss(self, episodes: Episode) -> Tensor:
        losses = [self.loss(self.adapt(t.support_x, t.support_y)(t.query_x), t.query_y) for t in episodes]
        return torch.stack(losses).mean()

    def adapt(self, support_x: Tensor, support_y: Tensor) -> Predictor:
        prototypes = class_means(self.embed(support_x), support_y)
        return lambda x: -(self.embed(x).unsqueeze(1) - prototypes).square().sum(-1)


def class_means(features: Tensor, labels: Tensor) -> Tensor:
    """`[ways, width]` from features `[n, width]` and class numbers `[n]`.

    A class without an example has no mean. (Methods that adapt the network's head have an output for it all the same.)

    Raises:
        ConfigError: a class below the largest has no example. On a GPU, which this would have to wait for, its mean is
            NaN, and with it the task's accuracy.
    """
    members = F.one_hot(labels).to(features.dtype)
    sizes = members.sum(0)
    if labels.is_cpu and not bool(sizes.all()):
        raise ConfigError(
            f"Expected support examples of each class from 0 to {len(sizes) - 1}, the largest label, but got none of "
            f"class {int((sizes == 0).nonzero()[0])}. Number the classes of a task from 0, without gaps."
        )
    return (members / sizes).T @ features


def check_classification(spec: TaskSpec, method: str) -> None:
    """Raise `ConfigError` for tasks that have no classes."""
    if spec.kind != "classification":
        raise ConfigError(
            f"method={method} classifies by the nearest class mean, but the data's tasks are of {spec.kind}. Use data "
            "with classes, or for regression method=meta_rkhs_ii, meta_rkhs_i, maml, or from_scratch as a reference."
        )
