"""How much memory a network's work takes, and how much of it to do at once."""

import dataclasses
import os
from pathlib import Path

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# On a CPU, tensors below this size are taken again from the allocator's heap and from the cache. glibc maps larger ones
# anew each time (its threshold ends at 32 MiB), and every page of them then costs a fault.
CPU_TENSOR_BYTES = 24 * 2**20
# Of the memory that is free, this part is planned with: derivatives of derivatives keep more than can be counted ahead.
PLANNED_PART = 0.5
# Tensors alive in a nested derivative, in units of a forward pass: values and tangents, and cotangents of both.
NESTED = 4


@dataclasses.dataclass(frozen=True)
class Footprint:
    """Bytes of one example on its way through a network: of the largest tensor, and of all of them together."""

    largest: int
    total: int

    def pairs_at_once(self, device: torch.device) -> int:
        """Pairs of an example and a direction to work on at once: what a CPU is fast with, or a GPU can hold."""
        if device.type == "cpu":
            return max(1, CPU_TENSOR_BYTES // self.largest)
        return max(1, int(PLANNED_PART * available_bytes(device)) // (NESTED * self.total))


def footprint(network, params: dict[str, Tensor], x: Tensor) -> Footprint:
    """Measured by a forward pass of one example, the first of x `[n, *input_shape]`."""
    params, one = {name: p.detach() for name, p in params.items()}, x[:1]
    with torch.no_grad(), _Recorder([*params.values(), one]) as recorder:
        network(params, one)
    sizes = [tensor.numel() * tensor.element_size() for tensor in recorder.made.values()] or [1]
    return Footprint(max(sizes), sum(sizes))


class _Recorder(TorchDispatchMode):
    """Keeps every tensor that an operation makes, by its storage: views count once, those of given tensors never."""

    def __init__(self, given: list[Tensor]) -> None:
        super().__init__()
        # Inside a vmap, a tensor has no storage of its own to tell.
        self.given = {t.untyped_storage().data_ptr() for t in given if not is_functorch_wrapped_tensor(t)}
        self.made: dict[int, Tensor] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.untyped_storage().data_ptr() not in self.given:
                self.made[leaf.untyped_storage().data_ptr()] = leaf
        return result


def available_bytes(device: torch.device) -> int:
    """Free memory of a device: of a GPU what its allocator can still hand out, of a CPU what the system can give."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return 1024 * int(line.split()[1])
    except OSError:
        pass
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
