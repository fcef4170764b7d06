"""One function over many tasks: how much of them at once, by vmap where it pays."""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.func import vmap
from torch.utils._pytree import tree_map

from lightning_ntk.errors import ConfigError
from lightning_ntk.ntk.memory import PLANNED_PART, available_bytes, footprint
from lightning_ntk.ntk.network import Network
from lightning_ntk.ntk.params import Params

# Copies of a task's support Jacobian that live at one time: itself, while it is put together, and its products.
JACOBIAN_COPIES = 3
# The same with the trace kernel (`energy.trace_kernel.task_gradient`): of the support's rows, and of the queries' rows.
TRACE_COPIES = (4, 2)
# On a CPU, a query set whose tensors are larger than this goes through the network by itself. The vmap over tasks saves
# calls of operations, which is little beside its slower, grouped convolutions.
CPU_QUERY_BYTES = 2**20


@dataclasses.dataclass(frozen=True)
class Chunks:
    """How much is worked on at once: tasks by one vmap, and pairs of an example and a direction within a task.

    `queries_apart`: whether the tasks' query sets are taken one by one all the same.
    """

    tasks: int
    pairs: int
    queries_apart: bool = False


class Planner:
    """Decides how much is worked on at once, once for each shape of the tasks.

    Args:
        tasks_per_chunk, pairs_at_once: as set by the user; None leaves them to the plan.
        coupled: whether the network couples its examples.
        outputs: C, where a support Jacobian is built; 0 where none is.
        query_rows: whether the queries' Jacobian is built, too.

    Raises:
        ConfigError: a number below 1.
    """

    def __init__(
        self,
        *,
        tasks_per_chunk: int | None = None,
        pairs_at_once: int | None = None,
        coupled: bool,
        outputs: int = 0,
        query_rows: bool = False,
    ) -> None:
        for key, value in (("tasks_per_chunk", tasks_per_chunk), ("pairs_at_once", pairs_at_once)):
            if value is not None and value < 1:
                raise ConfigError(f"method.{key} must be at least 1, or null to choose it, but got {value}.")
        self.given = tasks_per_chunk, pairs_at_once
        self.coupled = coupled
        self.outputs = outputs
        self.query_rows = query_rows
        self._plans: dict[Any, Chunks] = {}

    def chunks(self, network: Network, params: Params, support_x: Tensor, query_x: Tensor) -> Chunks:
        """For tasks `[T, n, ...]` and `[T, m, ...]`: as much as is fast on a CPU, or as fits a GPU."""
        shape = (support_x.shape, query_x.shape, support_x.device)
        if shape not in self._plans:
            self._plans[shape] = self._plan(network, params, support_x, query_x)
        plan = self._plans[shape]
        tasks, pairs = self.given
        return dataclasses.replace(plan, tasks=tasks or plan.tasks, pairs=pairs or plan.pairs)

    def _plan(self, network: Network, params: Params, support_x: Tensor, query_x: Tensor) -> Chunks:
        # The largest work of a task is its support Jacobian, of n C pairs (n times as many where examples are coupled),
        # or its query set, of m.
        tasks, n, m = *support_x.shape[:2], query_x.shape[1]
        of_one = footprint(network, params, support_x[0])
        pairs = of_one.pairs_at_once(support_x.device)
        of_task = max(n * max(1, self.outputs) * (n if self.coupled and self.outputs else 1), m)
        of_support, of_queries = TRACE_COPIES if self.query_rows else (JACOBIAN_COPIES, 0)
        rows = self.outputs * (of_support * n + of_queries * m)
        held = rows * sum(p.numel() * p.element_size() for p in params.values())
        planned = int(PLANNED_PART * available_bytes(support_x.device))
        fitting = planned // held if held else tasks
        queries_apart = support_x.device.type == "cpu" and m * of_one.largest > CPU_QUERY_BYTES
        return Chunks(max(1, min(pairs // of_task, fitting, tasks)), pairs, queries_apart)


def each_task(function: Callable, arguments: tuple[Tensor, ...]):
    """`vmap(function)(*arguments)` over the leading task axis.

    A single task goes without the vmap, whose batched tangents turn convolutions into slower, grouped ones.
    """
    if arguments[0].shape[0] > 1:
        return vmap(function)(*arguments)
    return tree_map(lambda result: result.unsqueeze(0), function(*(a[0] for a in arguments)))


def one_by_one(function: Callable[..., tuple[Tensor, ...]], *tensors: Tensor) -> tuple[Tensor, ...]:
    """`function(*tensors)`; inside a vmap over tasks, one task after the other, outside of the vmap. No derivatives."""
    return _OneByOne.apply(function, *tensors)


class _OneByOne(torch.autograd.Function):
    generate_vmap_rule = False

    @staticmethod
    def forward(function, *tensors):
        return function(*tensors)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.mark_non_differentiable(*output)

    @staticmethod
    def vmap(info, in_dims, function, *tensors):
        each = [
            function(*(t if dim is None else t.select(dim, task) for t, dim in zip(tensors, in_dims[1:], strict=True)))
            for task in range(info.batch_size)
        ]
        return tuple(torch.stack(parts) for parts in zip(*each, strict=True)), (0,) * len(each[0])
