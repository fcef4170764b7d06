"""How fast episodes are trained on, and what holds them up."""

import time
from typing import Any

import pytorch_lightning as pl
import torch

from callbacks.timing import WARM_UP_STEPS


class Throughput(pl.Callback):
    """Logs, over the training steps since the last validation:

    - `time/episodes_per_s`: training episodes of all ranks together a second;
    - `time/data_share`: the share of the time in which the loop waited for its next batch: drawing episodes and copying
      them to the device. Towards 1, more `data.num_workers` help;
    - `gpu/utilization`: mean percent of time in which a kernel ran (NVIDIA's own figure, sampled with the metrics that
      are logged), on a GPU with nvidia-ml-py installed; elsewhere nothing.

    The first steps of a process, which allocate and compile, do not count where there are more. Rank 0's numbers.
    """

    def __init__(self) -> None:
        self._steps_left_out = 0
        self._reads_gpu = True
        self._begin(0.0)

    def _begin(self, now: float) -> None:
        self._start = self._mark = now
        self._waited = 0.0
        self._episodes = 0
        self._gpu: list[float] = []

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._begin(time.perf_counter())

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._waited += time.perf_counter() - self._mark

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._steps_left_out < WARM_UP_STEPS and batch_idx + 1 < trainer.num_training_batches:
            self._steps_left_out += 1
            self._begin(now(pl_module.device))
            return
        self._episodes += batch.tasks * trainer.world_size
        # With log_every_n_steps=0 no metric is logged in between.
        if trainer.log_every_n_steps and trainer.global_step % trainer.log_every_n_steps == 0:
            self._sample_gpu(pl_module.device)
        self._mark = time.perf_counter()

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._seconds = now(pl_module.device) - self._start

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.sanity_checking or not self._episodes:
            return
        pl_module.log("time/episodes_per_s", self._episodes / self._seconds)
        pl_module.log("time/data_share", self._waited / self._seconds)
        if self._gpu:
            pl_module.log("gpu/utilization", sum(self._gpu) / len(self._gpu))

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._begin(time.perf_counter())  # In the middle of an epoch, too (`val_check_interval`).

    def _sample_gpu(self, device: torch.device) -> None:
        if device.type != "cuda" or not self._reads_gpu:
            return
        try:
            self._gpu.append(float(torch.cuda.utilization(device)))
        except (ImportError, RuntimeError):  # Without nvidia-ml-py, or where the driver does not tell.
            self._reads_gpu = False


def now(device: torch.device) -> float:
    """The time, once the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
