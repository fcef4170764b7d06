"""What the methods share that adapt by plain descent and do not differentiate through it: many tasks side by side."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.func import vmap

from lightning_ntk.energy.tasks import Planner
from lightning_ntk.episode import Episode
from lightning_ntk.methods.base import MetaLearner, Predictor
from lightning_ntk.networks.base import couples_examples
from lightning_ntk.ntk.checks import check_derivatives, check_is_function, check_outputs
from lightning_ntk.ntk.layers import plain_attention
from lightning_ntk.ntk.network import call, functional
from lightning_ntk.ntk.params import Params

# Tasks share the overhead of a step, which is most of it where they are small. Above this part of the examples that are
# worked on at once elsewhere, grouped convolutions cost more than is shared (measured on a CPU, 28x28 and 84x84).
SHARED_PART = 1 / 8

# From the parameters to be optimised to their optimiser.
OptimizerOf = Callable[[Iterable[Tensor]], torch.optim.Optimizer]


class DescentLearner(MetaLearner):
    """A method whose adapted parameters come from steps on a loss of the support set, taken as they are.

    A subclass gives `adapted_params`, most likely by `descend`. `predict` then adapts as many tasks side by side as
    the plan says: steps on a few small images are mostly overhead, which tasks then share.
    """

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        check_is_function(self.network)
        self.planner = Planner(coupled=couples_examples(self.network))

    def adapted_params(self, support_x: Tensor, support_y: Tensor) -> Params:
        """The adapted parameters `[T, *shape]` of T tasks, from their stacked support sets `[T, n, ...]`."""
        raise NotImplementedError

    def adapt(self, support_x: Tensor, support_y: Tensor) -> Predictor:
        params = task_params(self.adapted_params(support_x[None], support_y[None]), 0)
        return lambda x: call(self.network, params, x)

    def predict(self, episodes: Episode) -> Tensor:
        outputs = []
        for chunk_x, chunk_y in self.chunks(episodes.support_x, episodes.support_y):
            adapted = self.adapted_params(chunk_x, chunk_y)
            for task in range(len(chunk_x)):
                query_x = episodes.query_x[len(outputs)]
                outputs.append(call(self.network, task_params(adapted, task), query_x))
        return torch.stack(outputs)

    def chunks(self, x: Tensor, y: Tensor, examples: int | None = None) -> Iterable[tuple[Tensor, Tensor]]:
        """Stacked tasks `[T, n, ...]` in chunks to be worked on side by side, with `examples` (n) of each in a step."""
        network, params = functional(self.network)
        at_once = SHARED_PART * self.planner.chunks(network, params, x, x).pairs
        size = max(1, int(at_once / (examples or x.shape[1])))
        return zip(x.split(size), y.split(size), strict=True)

    def task_loss(self, params: Params, x: Tensor, y: Tensor) -> Tensor:
        """The loss of one task's examples `[n, ...]` at other parameters than the network's own."""
        return self.loss(check_outputs(call(self.network, params, x), x), y)


def descend(
    objective: Callable[..., Tensor],
    start: Params,
    tasks: int,
    batches: Sequence[tuple[Tensor, Tensor]],
    optimizer_of: OptimizerOf,
) -> tuple[Params, Tensor]:
    """T descents side by side, from the same parameters; what each finds is what it would find alone.

    Args:
        objective: of one task's parameters, inputs `[n, ...]` and targets.
        start: theta, not stacked and not changed.
        tasks: T.
        batches: one for each step: inputs `[T, n, ...]` and targets of the T tasks.
        optimizer_of: makes an optimiser that treats each number by itself (SGD, Adam), or tasks would mix.

    Returns:
        The parameters `[T, *shape]` after the last step, and the objective before each step `[steps, T]`; detached.
    """
    check_derivatives()
    leaves = {name: torch.stack([p.detach()] * tasks).requires_grad_() for name, p in start.items()}
    optimizer = optimizer_of(list(leaves.values()))
    values = []
    with torch.enable_grad(), plain_attention():
        for x, y in batches:
            losses = task_losses(objective, leaves, x, y)
            gradients = torch.autograd.grad(
                losses.sum(), list(leaves.values()), allow_unused=True, materialize_grads=True
            )
            for leaf, gradient in zip(leaves.values(), gradients, strict=True):
                # A fused optimiser goes through memory in order, whatever the strides: a vmap's gradient has others.
                leaf.grad = gradient.contiguous()
            optimizer.step()
            values.append(losses.detach())
    found = {name: leaf.detach() for name, leaf in leaves.items()}
    return found, torch.stack(values) if values else torch.zeros(0, tasks)


def task_losses(objective: Callable[..., Tensor], params: Params, x: Tensor, y: Tensor) -> Tensor:
    """An objective at each task's own parameters `[T, *shape]`, on its examples `[T, n, ...]`: `[T]`."""
    if x.shape[0] > 1:
        return vmap(objective)(params, x, y)
    # One task goes without the vmap, whose convolutions are grouped ones.
    return objective(task_params(params, 0), x[0], y[0]).unsqueeze(0)


def task_params(params: Params, task: int) -> Params:
    """One task's parameters out of stacked ones `[T, *shape]`."""
    return {name: p[task] for name, p in params.items()}
