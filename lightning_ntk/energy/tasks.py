"""One function over many tasks: vmap where it pays, one after the other where it does not."""

from collections.abc import Callable

from torch import Tensor
from torch.func import vmap
from torch.utils._pytree import tree_map

from lightning_ntk.errors import ConfigError


def each_task(function: Callable, arguments: tuple[Tensor, ...]):
    """`vmap(function)(*arguments)` over the leading task axis.

    A single task goes without the vmap, whose batched tangents turn convolutions into slower, grouped ones.
    """
    if arguments[0].shape[0] > 1:
        return vmap(function)(*arguments)
    return tree_map(lambda result: result.unsqueeze(0), function(*(a[0] for a in arguments)))


def check_tasks_per_chunk(tasks_per_chunk: int) -> None:
    """Raise `ConfigError` unless a chunk holds a task."""
    if tasks_per_chunk < 1:
        raise ConfigError(f"method.tasks_per_chunk must be at least 1, but got {tasks_per_chunk}.")
