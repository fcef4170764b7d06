"""What a datamodule asks its Trainer, for one of many ranks at the start of training."""

from types import SimpleNamespace
from typing import Any


def trainer_of(rank: int, world_size: int, **others: Any) -> SimpleNamespace:
    progress = SimpleNamespace(current=SimpleNamespace(processed=0))
    return SimpleNamespace(
        global_rank=rank,
        world_size=world_size,
        overfit_batches=0,
        fit_loop=SimpleNamespace(epoch_progress=progress),
        **others,
    )
