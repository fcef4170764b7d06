"""A run that is over, in Python: its trained method and its data."""

from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from omegaconf import DictConfig, OmegaConf

from lightning_ntk.methods.base import MetaLearner
from lightning_ntk.running import random_state
from lightning_ntk.running.checkpoint import Checkpoint, check_same_parameters, load_checkpoint
from lightning_ntk.train import build_data, make_method


def load_method(run: str | Path, *, checkpoint: str = "best", **settings: Any) -> MetaLearner:
    """The trained method of a run: `load_method(run).adapt(support_x, support_y)` is a predictor for a task of yours.

    Inputs are as its `spec` says, `[n, *spec.input_shape]`, images as floats in [0, 1]; targets are class numbers
    `[n]` from 0 on, or floats `[n, C]` in regression.

    Args:
        run: a run folder, or a checkpoint file.
        checkpoint: of a run folder, "best" (by validation; the last where there was none) or "last".
        **settings: of the method, in the place of the run's own, such as `t=100.0`.

    Returns:
        The method in evaluation mode, on the CPU; `.to(device)` moves it. Its parameters, and the batches of
        `load_data`, are as precise as those of the run (`method.dtype`). Random generators are as they were.

    Raises:
        ConfigError: there is no such run, or the settings are not the method's, or would change its parameters.
    """
    found = load_checkpoint(str(run), "run", checkpoint)
    with random_state.kept(torch.device("cpu")):  # Initial parameters are drawn, and go.
        method = make_method(_config(found, "method", settings), found.spec)
    check_same_parameters(found, method, "run")
    if found.dtype != method.dtype:  # Of a run whose trainer.precision was 64-true or bf16-true.
        method.to(found.dtype)
    method.load_state_dict(found.content["state_dict"])
    method.run = found.content["run"]
    return method.eval()


def load_data(run: str | Path, **settings: Any) -> pl.LightningDataModule:
    """The data of a run: `load_data(run).batch("test", range(8))` are the first episodes that it was tested on.

    Args:
        run: a run folder, or a checkpoint file.
        **settings: of the data, in the place of the run's own, such as `eval_shots=5`.

    Raises:
        ConfigError: there is no such run, the settings are not the data's, or the data are no longer where they were.
        DataError: they cannot be read.
    """
    found = load_checkpoint(str(run), "run")
    data = build_data(_config(found, "data", settings))
    data.precision = found.dtype
    return data


def _config(checkpoint: Checkpoint, group: str, settings: dict[str, Any]) -> DictConfig:
    """The config of a run with other settings of a group."""
    config = OmegaConf.create(checkpoint.config)
    config[group].update(settings)
    return config
