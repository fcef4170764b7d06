"""Operations and bytes of a computation, counted as it runs: the arithmetic floor under a time."""

import dataclasses
from collections.abc import Callable, Sequence
from math import prod

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from lightning_ntk.benchmark.measure import FAILURES, Report, Work, once

aten = torch.ops.aten


@dataclasses.dataclass(frozen=True)
class Operations:
    """What a computation does.

    Attributes:
        flop: floating-point operations of matrix products and convolutions (a multiplication and an addition are two).
        bytes: read and written by all operations but views, each operand counted once an operation: what the memory
            would move if no cache held anything. None where another's count has none.
        by_kind: flop of each operation, `{"aten.convolution": ...}`.
    """

    flop: int
    bytes: int | None
    by_kind: dict[str, int]


def count(function: Callable[[], object]) -> Operations:
    """Run a function once and count what it does: through vmap, jvp, custom functions and backward passes."""
    flops, traffic = FlopCounterMode(display=False, custom_mapping=CONVOLUTIONS), _Traffic()
    with flops, traffic:
        function()
    by_kind = {str(kind): int(number) for kind, number in flops.get_flop_counts().get("Global", {}).items()}
    return Operations(sum(by_kind.values()), traffic.bytes, by_kind)


def count_all(works: Sequence[Work], report: Report) -> dict[str, Operations | None]:
    """The operations of each work that runs here; None where counting fails."""
    counts: dict[str, Operations | None] = {}
    for work in works:
        if work.run is None:
            continue
        report(f"{work.name}: counting operations")
        if work.reset is not None:
            work.reset()
        try:
            counts[work.name] = count(work.run)
        except FAILURES:
            counts[work.name] = None
    return counts


class _Traffic(TorchDispatchMode):
    """Sums the bytes of every operation's tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if not getattr(function, "is_view", False):
            tensors = tree_leaves((args, kwargs, result))
            self.bytes += sum(_bytes(t) for t in tensors if isinstance(t, torch.Tensor))
        return result


def _bytes(tensor: torch.Tensor) -> int:
    # Axes of stride 0 are expanded: their one element is read again from where it lies.
    sizes = [size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride]
    return prod(sizes) * tensor.element_size()


# torch's own formula for a weight's gradient multiplies by the number of groups, which vmap over weights makes many.


def _convolution(x, weight, _bias, _stride, _padding, _dilation, transposed, *_rest, out_shape=None, **_kwargs) -> int:
    return _products(x if transposed else out_shape, weight)


def _convolution_backward(gradient, x, weight, _bias, _s, _p, _d, transposed, _o, _groups, mask, **_kwargs) -> int:
    return (mask[0] + mask[1]) * _products(x if transposed else gradient, weight)


def _products(positions: list[int], weight: list[int]) -> int:
    """2 x images x places x filter taps x channels in x channels out: the weight `[out, in / groups, ...]` has the
    last three, `positions` `[images, channels, ...]` the first two. So are all three passes of a convolution."""
    return 2 * positions[0] * prod(positions[2:]) * prod(weight)


CONVOLUTIONS = {aten.convolution: _convolution, aten._convolution: _convolution}
CONVOLUTIONS[aten.convolution_backward] = _convolution_backward


def peak_rate(device: str, size: int | None = None) -> float:
    """Floating-point operations a second of a square float32 matrix product: the most that the machine does here."""
    size = size or (8192 if device == "cuda" else 2048)
    a = torch.rand(size, size, device=device)
    product = Work("product", lambda: a @ a)
    return 2 * size**3 / min(once(product, device) for _ in range(5))
