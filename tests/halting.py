"""A callback with which a training stands still, so that a test can do something to it in the middle."""

import os
import time

import pytorch_lightning as pl


class Halt(pl.Callback):
    """Stands still at the start of meta-epoch 2 where the environment has HALT."""

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.current_epoch == 2 and "HALT" in os.environ:
            time.sleep(1000)
