"""`Blocks`: memory for images that are gathered, used again once nobody holds it."""

import weakref

import numpy as np
import torch
from torch import Tensor

# Blocks that are kept while nobody has them: a batch that is used, the next one, and an episode beside them.
KEPT = 3


class Blocks:
    """Hands out blocks of bytes as tensors, and takes each back when the last tensor over it is gone.

    Images of a batch are tens of megabytes. The C library asks the system for so much anew each time and gives it back
    at once; the system then clears each page as it is first written, which takes several times as long as gathering the
    images. Who holds a tensor, a view of it or an array over it keeps its bytes, as with any other memory.
    """

    def __init__(self) -> None:
        self._free: list[np.ndarray] = []

    def take(self, size: int) -> Tensor:
        """uint8 `[size]` of any content."""
        block = self._free.pop() if self._free else None
        if block is None or len(block) < size:
            block = np.empty(size, dtype=np.uint8)
        # A view of its own for who takes it: when torch lets go of the view, the block is free.
        lent = block[:size]
        weakref.finalize(lent, self._give_back, block).atexit = False
        return torch.from_numpy(lent)

    def _give_back(self, block: np.ndarray) -> None:
        if len(self._free) < KEPT:
            self._free.append(block)

    def __getstate__(self) -> dict:
        # Another process has blocks of its own.
        return {"_free": []}
