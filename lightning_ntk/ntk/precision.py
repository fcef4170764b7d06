"""Full precision, whatever the trainer's."""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor


@contextlib.contextmanager
def full_precision(device_type: str) -> Iterator[None]:
    """Without autocast and TF32: kernels of shortened numbers are conditioned too badly to be solved with."""
    with without_tf32(), torch.autocast(device_type, enabled=False):
        yield


@contextlib.contextmanager
def without_tf32() -> Iterator[None]:
    """Float32 products and convolutions in full, where the settings let their factors be shortened."""
    with contextlib.ExitStack() as stack:
        for ways in (_OF_PRODUCTS, _OF_CONVOLUTIONS):
            stack.enter_context(_in_full(ways))
        yield


def _flag(place: Any, name: str) -> tuple[Callable[[], Any], Callable[[Any], None]]:
    return functools.partial(getattr, place, name), functools.partial(setattr, place, name)


# PyTorch has several ways to set one precision, and refuses to read it in one way after it was set in another: how to
# read it, how to set it, and what is full.
_OF_PRODUCTS = (
    (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, "highest"),
    (*_flag(torch.backends.cuda.matmul, "allow_tf32"), False),
    (*_flag(torch.backends.cuda.matmul, "fp32_precision"), "ieee"),
)
_OF_CONVOLUTIONS = (
    (*_flag(torch.backends.cudnn, "allow_tf32"), False),
    (*_flag(getattr(torch.backends.cudnn, "conv", None), "fp32_precision"), "ieee"),
)


@contextlib.contextmanager
def _in_full(ways: Sequence[tuple[Callable[[], Any], Callable[[Any], None], Any]]) -> Iterator[None]:
    """A precision in full, set and put back in the first way in which it can be read."""
    for get, put, full in ways:
        try:
            before = get()
        except RuntimeError:
            continue
        put(full)
        try:
            yield
        finally:
            put(before)
        return
    yield


def in_full_precision(function: Callable[[Tensor], Tensor], device_type: str) -> Callable[[Tensor], Tensor]:
    """The function, computed in full precision wherever it is called."""

    @functools.wraps(function)
    def computed(x: Tensor) -> Tensor:
        with full_precision(device_type):
            return function(x)

    return computed
