"""Lightning's Trainer, with what this framework decides for it."""

import atexit
import math
import os
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from omegaconf import DictConfig
from pytorch_lightning.accelerators import CPUAccelerator
from pytorch_lightning.plugins.environments import SLURMEnvironment
from pytorch_lightning.utilities.exceptions import MisconfigurationException

from lightning_ntk.errors import ConfigError
from lightning_ntk.methods.base import MetaLearner
from lightning_ntk.running import cluster
from lightning_ntk.running.checkpointing import AtomicCheckpoints
from lightning_ntk.settings.building import check_types
from lightning_ntk.settings.config import TRAINER_DECIDED, plain


def check_strategy(strategy: Any) -> None:
    """Raise `ConfigError` for a strategy other than DDP: parameters in parts have no Jacobian in one place. And for
    one whose ranks are children that take the scores with them."""
    if strategy is None or strategy == "auto":
        return
    if not str(strategy).startswith("ddp"):
        raise ConfigError(f"trainer.strategy must be auto, ddp or a variant of it (ddp_...), but got {strategy}.")
    if any(kind in str(strategy) for kind in ("spawn", "fork", "notebook")):
        raise ConfigError(
            f"trainer.strategy={strategy} tests in processes whose scores are lost with them. Use ddp, "
            "which starts the command once for each rank."
        )


def check_numbers(settings: dict[str, Any]) -> None:
    """Raise `ConfigError` for numbers that Lightning takes without a word and that mean nothing."""
    clip, every = settings.get("gradient_clip_val"), settings.get("log_every_n_steps")
    if clip is not None and not (clip > 0 and math.isfinite(clip)):
        raise ConfigError(f"trainer.gradient_clip_val must be a finite positive number, or null, but got {clip}.")
    if every is not None and every < 1:
        raise ConfigError(f"trainer.log_every_n_steps must be at least 1, but got {every}.")


def end_process_group() -> None:
    """Lightning ends NCCL's group when Python exits, and not gloo's, whose threads can abort a process that is over."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def build_trainer(
    config: DictConfig, data: pl.LightningDataModule, folder: Path, loggers: list, callbacks: list
) -> pl.Trainer:
    """The Trainer of a run, or of an evaluation, whose results go into `folder`.

    Raises:
        ConfigError: for settings that Lightning refuses, and those that would undo what the run is.
    """
    settings = plain(config.trainer)
    for name in settings:
        if name in TRAINER_DECIDED:
            raise ConfigError(f"trainer.{name} cannot be set: {TRAINER_DECIDED[name]}.")
    devices = settings.get("devices")
    if isinstance(devices, int) and devices > 1 and settings.get("strategy") == "auto":
        settings["strategy"] = "ddp"
    check_types(settings, pl.Trainer, "trainer")
    check_numbers(settings)
    check_strategy(settings.get("strategy"))
    try:
        plugins = [AtomicCheckpoints()]
        if cluster.is_slurm() and not cluster.is_torchrun():
            # Lightning's own requeueing saves in the middle of a step; see `cluster.requeued_on_signal`.
            plugins.append(SLURMEnvironment(auto_requeue=False))
        trainer = pl.Trainer(
            **settings,
            plugins=plugins,
            # Under SLURM, Lightning loads any hpc_ckpt_*.ckpt that lies there: by itself, in the current folder.
            default_root_dir=folder,
            max_epochs=config.steps // config.val_every,
            limit_val_batches=1.0 if data.has_split("val") else 0,
            num_sanity_val_steps=0,
            # Adaptation, kernels and attacks need gradients in evaluation; episodes shard themselves.
            inference_mode=False,
            use_distributed_sampler=False,
            enable_model_summary=False,
            logger=loggers,
            callbacks=callbacks,
        )
    except (MisconfigurationException, RuntimeError, ValueError, TypeError, ImportError) as error:
        reason = str(error).strip().split("\n")[0]
        asked = f"trainer.accelerator={settings.get('accelerator')}, trainer.devices={devices}"
        raise ConfigError(f"trainer settings: {reason} ({asked}, see trainer.*)") from error
    atexit.register(end_process_group)
    # Lightning counts the GPUs; on CPUs it would start any number of processes.
    if isinstance(trainer.accelerator, CPUAccelerator) and trainer.num_devices > (os.cpu_count() or 1):
        raise ConfigError(f"trainer.devices={devices} processes are asked for, but there are {os.cpu_count()} cores.")
    return trainer


def check_optimisation(method: MetaLearner, lr_schedule: str) -> None:
    """Raise `ConfigError` for a method of one's own that takes its steps in another way than runs count and schedule
    them: one optimiser, and one step of it for each meta-batch."""
    name = type(method).__name__
    if not method.automatic_optimization:
        raise ConfigError(
            f"method: {name} has automatic_optimization = False, but a run counts one step of the optimiser for each "
            "meta-batch. Return the loss from meta_loss, and let Lightning take the step."
        )
    try:
        optimisers, schedules = _parts_of(method.configure_optimizers())
    except Exception:  # Perhaps it asks for the trainer, which is not there yet; Lightning asks again.
        return
    if len(optimisers) > 1:
        raise ConfigError(
            f"method: {name} has {len(optimisers)} optimisers. Give one, with a group of parameters for each learning "
            "rate."
        )
    if schedules and lr_schedule != "constant":
        raise ConfigError(
            f"method: {name} has a learning rate schedule of its own, which lr_schedule={lr_schedule} would overwrite. "
            "Set lr_schedule=constant."
        )


def _parts_of(found: Any) -> tuple[list[Any], list[Any]]:
    """Optimisers and schedulers of what `configure_optimizers` gives, in the forms that Lightning takes."""
    if isinstance(found, dict):
        return [found["optimizer"]], [found["lr_scheduler"]] if "lr_scheduler" in found else []
    if isinstance(found, tuple | list):
        if len(found) == 2 and isinstance(found[0], list):
            return found[0], found[1]
        parts = [_parts_of(one) for one in found]
        return [o for optimisers, _ in parts for o in optimisers], [s for _, schedules in parts for s in schedules]
    return [found], []
