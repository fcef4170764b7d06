"""Full precision, whatever the trainer's."""

import contextlib
import functools
from collections.abc import Callable, Iterator

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
    backends = torch.backends
    places, name, full = [backends.cuda.matmul, backends.cudnn], "allow_tf32", False
    if hasattr(backends.cudnn, "conv"):  # From 2.9 on. Where both kinds of flags are set, PyTorch refuses to read any.
        places = [backends.cuda.matmul, backends.cudnn.conv, backends.mkldnn.matmul, backends.mkldnn.conv]
        name, full = "fp32_precision", "ieee"
    before = [getattr(place, name) for place in places]
    for place in places:
        setattr(place, name, full)
    try:
        yield
    finally:
        for place, value in zip(places, before, strict=True):
            setattr(place, name, value)


def in_full_precision(function: Callable[[Tensor], Tensor], device_type: str) -> Callable[[Tensor], Tensor]:
    """The function, computed in full precision wherever it is called."""

    @functools.wraps(function)
    def computed(x: Tensor) -> Tensor:
        with full_precision(device_type):
            return function(x)

    return computed
