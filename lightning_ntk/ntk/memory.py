"""How much memory a network's work takes, and how much of it to do at once."""

import dataclasses
import os
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch._C._functorch import get_unwrapped, is_functorch_wrapped_tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# On a CPU, tensors up to about this size are taken again from the allocator's heap and from the cache. glibc maps
# larger ones anew each time (its threshold ends at 32 MiB), and every page of them then costs a fault.
CPU_TENSOR_BYTES = 33 * 2**20
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
    params, one = {name: p.detach() for name, p in params.items()}, x[:1].clone()  # Networks may write over it.
    with torch.no_grad(), _Recorder(one) as recorder:
        network(params, one)
    sizes = [tensor.numel() * tensor.element_size() for tensor in recorder.made.values()] or [1]
    return Footprint(max(sizes), sum(sizes))


class _Recorder(TorchDispatchMode):
    """Keeps every tensor that an operation makes of the input or of what was made of it, by its storage: views count
    once, those of the input never. What is made of parameters alone, no further example asks for."""

    def __init__(self, input: Tensor) -> None:
        super().__init__()
        while is_functorch_wrapped_tensor(input):  # Inside a vmap, operations are seen on what it has wrapped.
            input = get_unwrapped(input)
        self.input = _storage(input)
        self.made: dict[int, Tensor] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        taken = {_storage(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        if self.input in taken or not taken.isdisjoint(self.made):
            for leaf in tree_leaves(result):
                if isinstance(leaf, Tensor) and _storage(leaf) != self.input:
                    self.made[_storage(leaf)] = leaf
        return result


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def available_bytes(device: torch.device) -> int:
    """Free memory of a device: of a GPU what its allocator can still hand out, of a CPU what the system can give, and
    no more than the process's control groups (a container's, a SLURM job's) leave it."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    for line in _lines(Path("/proc/meminfo")):
        if line.startswith("MemAvailable:"):
            free = 1024 * int(line.split()[1])
    return min([free, *left_by_control_groups(Path("/"))])


def left_by_control_groups(root: Path) -> list[int]:
    """Bytes that each control group above the process has left, of those with a limit, versions 1 and 2 alike."""
    left = []
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, group = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        files = _VERSION_1 if controllers else _VERSION_2
        top = root / "sys/fs/cgroup" / files.folder
        group = top / group.lstrip("/")
        for place in (group, *(above for above in group.parents if above.is_relative_to(top))):
            limit = _number(place / files.limit)
            used = _number(place / files.used) if limit is not None else None
            if used is not None:
                # Pages of files can be taken back, as in MemAvailable.
                cached = (line.split() for line in _lines(place / "memory.stat"))
                used -= sum(int(size) for name, size in cached if name in files.cached)
                left.append(max(0, limit - used))
    return left


class _GroupFiles(NamedTuple):
    """Where a version of control groups has its numbers."""

    folder: str
    limit: str
    used: str
    cached: tuple[str, str]


_VERSION_1 = _GroupFiles(
    "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", ("total_active_file", "total_inactive_file")
)
_VERSION_2 = _GroupFiles("", "memory.max", "memory.current", ("active_file", "inactive_file"))


def _number(file: Path) -> int | None:
    """A file's number of bytes; None for one that is not there, for "max", or for version 1's way to say so, 2**63."""
    text = "".join(_lines(file))
    return int(text) if text.isdecimal() and int(text) < 2**62 else None


def _lines(file: Path) -> list[str]:
    """Of a text file; none where it cannot be read."""
    try:
        return file.read_text().splitlines()
    except OSError:
        return []
