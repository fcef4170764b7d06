"""What a callback is shown of a run before it begins."""

from dataclasses import dataclass
from pathlib import Path

import pytorch_lightning as pl
from omegaconf import DictConfig

from lightning_ntk.methods.base import MetaLearner


@dataclass(frozen=True)
class Run:
    """A training, or the evaluation of one, before anything of it is written.

    Attributes:
        method: at its initial parameters.
        data: ready to draw episodes.
        config: resolved; an evaluation's is the trained run's with what was asked for on top.
        folder: where results go: the run folder, or the evaluation's.
        config_folder: the user's own conf folder, if there is one.
    """

    method: MetaLearner
    data: pl.LightningDataModule
    config: DictConfig
    folder: Path
    config_folder: str | None = None
