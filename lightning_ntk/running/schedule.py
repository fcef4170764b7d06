"""The meta learning rate over the steps of a run."""

import math
from typing import Any

import pytorch_lightning as pl

# The key under which an optimiser's parameters keep the rate that the schedule begins with; it is in checkpoints.
UNSCHEDULED = "unscheduled_lr"


class CosineSchedule(pl.Callback):
    """Sets the optimiser's learning rate before each meta-step, and logs that of `method.lr` as `train/lr`.

        lr (1 + cos(pi step / steps)) / 2     (Loshchilov & Hutter 2017, eq. 5, without restarts)

    Parameters whose optimiser has another rate than `method.lr` keep the ratio to it. The rate follows from the number
    of the step alone. So a run that is taken up goes on along the same curve, and one that is taken up with more
    `steps` along the curve of those. Reptile's serial form (`method.serial=true`) walks with `method.lr` through the
    tasks of a step and goes the scheduled share of the whole way.

    Args:
        steps: meta-steps of the run in all.
    """

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        def scheduled(rate: float) -> float:
            return rate * (1 + math.cos(math.pi * trainer.global_step / self.steps)) / 2

        for optimizer in trainer.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = scheduled(group.setdefault(UNSCHEDULED, group["lr"]))
        pl_module.log("train/lr", scheduled(pl_module.lr))
