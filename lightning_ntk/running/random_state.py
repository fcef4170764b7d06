"""The global random generators: seeded for a while, and then as they were."""

import contextlib
import random
from collections.abc import Iterator

import numpy as np
import torch


@contextlib.contextmanager
def kept(device: torch.device) -> Iterator[None]:
    """Inside, torch (CPU and `device`), numpy and Python may draw what they like; afterwards they go on as before."""
    python, of_numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(of_numpy)


def seed_all(seed: int, device: torch.device) -> None:
    """Seed the generators that `kept` brings back. `seed` is below 2**32, as numpy needs."""
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)
