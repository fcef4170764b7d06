"""How a run writes its checkpoints: whole or not at all, and wherever the run folder lies."""

import os
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.plugins.io import TorchCheckpointIO

from lightning_ntk.errors import ConfigError
from lightning_ntk.methods.base import MetaLearner


class AtomicCheckpoints(TorchCheckpointIO):
    """Writes beside the target and renames.

    Lightning writes to the system's temporary folder and moves: a copy where that is another file system than the
    run's, and then a kill in the middle leaves a checkpoint that cannot be loaded.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_suffix(".tmp")
        file = temporary.open("wb")
        try:
            with file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
        except (OSError, RuntimeError) as error:
            failure = error.__context__ if isinstance(error, RuntimeError) else error  # torch.save hides it.
            if not isinstance(failure, OSError):
                raise
            temporary.unlink(missing_ok=True)
            raise ConfigError(
                f"{target} cannot be written: {failure.strerror}. What was saved before is whole: once there is room, "
                "go on from there with ckpt=."
            ) from error
        os.replace(temporary, target)


class RunCheckpoint(ModelCheckpoint):
    """One file that is overwritten, whole, at the end of each meta-epoch (or of each better one)."""

    def __init__(self, folder: Path, name: str, **settings: Any) -> None:
        super().__init__(
            folder / "checkpoints", name, enable_version_counter=False, save_on_train_epoch_end=True, **settings
        )
        self.file = folder / "checkpoints" / f"{name}.ckpt"

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the best score so far. Lightning forgets it when the run folder has been moved."""
        if not self.file.exists():  # The run goes on in a new folder, which has no best checkpoint yet.
            return
        path = str(self.file)
        moved = {"dirpath": self.dirpath, "best_model_path": path, "last_model_path": ""}
        if state["best_k_models"]:
            (score,) = state["best_k_models"].values()
            moved |= {"best_k_models": {path: score}, "kth_best_model_path": path}
        super().load_state_dict({**state, **moved})


def checkpoint_callbacks(folder: Path, data: pl.LightningDataModule) -> tuple[RunCheckpoint | None, RunCheckpoint]:
    """The best checkpoint by validation score (None where the data has no validation split), and the last."""
    best = None
    if data.has_split("val"):
        name, mode = ("accuracy", "max") if data.spec.kind == "classification" else ("mse", "min")
        best = RunCheckpoint(folder, "best", monitor=f"val/{name}", mode=mode)
    return best, RunCheckpoint(folder, "last")


def save_untrained(method: MetaLearner, file: Path) -> None:
    """Save a method that needs no training, so that it can be evaluated like any other."""
    content = {"state_dict": method.state_dict(), "global_step": 0, "run": method.run}
    AtomicCheckpoints().save_checkpoint(content, file)
