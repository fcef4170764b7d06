"""A function that computes gradients, compiled by `torch.compile`: docs/BENCHMARKS.md has when it pays."""

import functools
from collections.abc import Callable
from typing import Any

import torch

from lightning_ntk.errors import ConfigError
from lightning_ntk.ntk.network import Network, with_own_layers


def compiled(function: Callable, network: Network, *args: Any) -> Any:
    """`function(network, *args)`, compiled at the first call with each shape of the tensors in `args`.

    The network's layers are PyTorch's own, which the compiler fuses. What it has compiled belongs to the process, not
    to a method: nothing of it is copied or saved. Results are equal to rounding, and carry no graph.

    Raises:
        ConfigError: it could not be compiled.
    """
    try:
        with torch.no_grad():  # A caller's mode would be one more thing to compile for.
            return _compiled(function)(with_own_layers(network), *args)
    except Exception as error:
        if not type(error).__module__.startswith(("torch._dynamo.", "torch._inductor.")):  # They have no common class.
            raise
        reason = " ".join(str(error).partition("\n\n")[0].split())
        raise ConfigError(
            "method.compile=true needs a C++ compiler (g++, or the one named by $CXX), a network that torch.compile "
            f"can follow and at most eight shapes of query sets, but got {type(error).__name__}: {reason}. "
            "Set method.compile=false, which computes the same."
        ) from error


@functools.cache
def _compiled(function: Callable) -> Callable:
    # Inductor would keep images channels last on a CPU, where its reductions over them are slow.
    return torch.compile(function, fullgraph=True, dynamic=False, options={"layout_optimization": False})
