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
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    try:
        before = torch.get_float32_matmul_precision(), cudnn.allow_tf32
    except RuntimeError:  # The flags that PyTorch 2.9 brought are set; it then refuses to read these.
        places = (matmul, cudnn.conv, cudnn.rnn)
        values = [place.fp32_precision for place in places]
        for place in places:
            place.fp32_precision = "ieee"
        try:
            yield
        finally:
            for place, value in zip(places, values, strict=True):
                place.fp32_precision = value
        return
    torch.set_float32_matmul_precision("highest")
    cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        cudnn.allow_tf32 = before[1]


def in_full_precision(function: Callable[[Tensor], Tensor], device_type: str) -> Callable[[Tensor], Tensor]:
    """The function, computed in full precision wherever it is called."""

    @functools.wraps(function)
    def computed(x: Tensor) -> Tensor:
        with full_precision(device_type):
            return function(x)

    return computed
