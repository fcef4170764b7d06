"""Nearest class mean on raw inputs: the reference point that tells whether features help."""

from torch import Tensor, nn

from lightning_ntk.episode import TaskSpec
from lightning_ntk.methods.base import MetaLearner, Predictor
from lightning_ntk.methods.protonet import check_classification, class_means


class NearestCentroid(MetaLearner):
    """Assigns an example to the class with the nearest mean of its support examples. Nothing is trained.

        f_k(x) = -|x - c_k|^2 / d,   c_k = mean of x_i over the support examples of class k, for inputs of d numbers

    (The division, which changes no decision, keeps the outputs in the range of logits.) No meta-step; a task at test
    costs O(n) and uses no network. A task may have any number of ways. No paper of its own.

    Raises:
        ConfigError: the tasks are regressions.
    """

    meta_trains = False
    any_ways = True
    adapts_differentiably = True
    couples_queries = False  # Whatever the network is like: it is not asked.

    def __init__(self, network: nn.Module, spec: TaskSpec) -> None:
        super().__init__(network, spec)
        check_classification(spec, "nearest_centroid")

    def adapt(self, support_x: Tensor, support_y: Tensor) -> Predictor:
        centroids = class_means(support_x.flatten(1), support_y)
        return lambda x: -(x.flatten(1).unsqueeze(1) - centroids).square().mean(-1)
