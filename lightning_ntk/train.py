"""`lightning-ntk train`: train one method on one data set, test it, and leave a run folder."""

import dataclasses
import logging
import os
import sys
import warnings
from pathlib import Path

import pytorch_lightning as pl
import torch
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.accelerators import CPUAccelerator
from pytorch_lightning.utilities.exceptions import MisconfigurationException

from lightning_ntk import run_folder
from lightning_ntk.checkpointing import AtomicCheckpoints, checkpoint_callbacks, save_untrained
from lightning_ntk.cli_arguments import parse_command
from lightning_ntk.config import check_types, compose_config, instantiate, plain
from lightning_ntk.episode import TaskSpec
from lightning_ntk.errors import ConfigError
from lightning_ntk.methods.base import MetaLearner
from lightning_ntk.results import RunResult, mean_and_ci95, package_versions, write_results
from lightning_ntk.run_folder import Checkpoint
from lightning_ntk.tracking import CsvMetrics, check_wandb, wandb_logger


def main(argv: list[str] | None = None) -> None:
    """Train as the command line asks; see `lightning-ntk train --help`."""
    command = parse_command("train", argv)
    if command is None:
        return
    overrides, config_folder, checkpoint = command.overrides, command.config_folder, None
    resumed_from = [o.partition("=")[2] for o in overrides if o.startswith("ckpt=") and o != "ckpt=null"]
    if resumed_from:
        checkpoint = run_folder.load_checkpoint(resumed_from[-1], "ckpt")
        run_folder.check_no_other_folder(checkpoint, overrides)
        # The run's own settings, and what is asked now on top.
        overrides = checkpoint.settings() + overrides
        config_folder = config_folder or checkpoint.config_folder
    config = compose_config("train", overrides, config_folder)
    if command.show_config:
        sys.stdout.write(OmegaConf.to_yaml(config))
        return
    if checkpoint is not None:
        run_folder.check_same_model(checkpoint, config, "ckpt")
        check_continues(checkpoint, config)
    train(config, overrides, checkpoint, config_folder)


def train(
    config: DictConfig, overrides: list[str], checkpoint: Checkpoint | None = None, config_folder: str | None = None
) -> Path:
    """Run one training, from a composed config; returns the run folder. All bad input is found before it exists."""
    quiet()
    check_steps(config)
    check_wandb(config.logger.wandb)
    method_name, data_name = choice_name(config.method), choice_name(config.data)
    resumed = checkpoint is not None and checkpoint.folder is not None
    folder = checkpoint.folder if resumed else run_folder.new_run_folder(config, method_name, data_name)
    os.environ[run_folder.RUN_FOLDER_VARIABLE] = str(folder)

    data = build_data(config)
    method = build_method(config, data.spec)
    method.run = {
        "config": plain(config),
        "overrides": list(overrides),
        "config_folder": None if config_folder is None else str(Path(config_folder).expanduser().resolve()),
        "spec": dataclasses.asdict(data.spec),
    }
    loggers = [CsvMetrics(folder / "metrics.csv", checkpoint.content["global_step"] if resumed else None)]
    callbacks = [instantiate(entry, f"callbacks.{name}") for name, entry in config.callbacks.items()]
    best, last = checkpoint_callbacks(folder, data)
    trainer = build_trainer(config, data, loggers, [*callbacks, *([best] if best else []), last])
    if trainer.is_global_zero:
        run_folder.create(folder, config, overrides)
        announce(config, data, method, checkpoint)
    if config.logger.wandb is not None:
        tracker = wandb_logger(config.logger.wandb, folder, method=method_name, data=data_name, seed=config.seed)
        tracker.log_hyperparams(plain(config))
        trainer.loggers = [*loggers, tracker]

    try:
        if method.meta_trains:
            resume_from = None if checkpoint is None else str(checkpoint.file)
            trainer.fit(method, datamodule=data, ckpt_path=resume_from, weights_only=True)
        elif trainer.is_global_zero:
            save_untrained(method, last.file)
        if config.test:
            chosen = best if best is not None and method.meta_trains and config.test_checkpoint == "best" else last
            result = run_test(trainer, method, data, config, chosen.file)
            if trainer.is_global_zero:
                write_results(folder, result)
                report(result)
        if trainer.is_global_zero:
            sys.stdout.write(f"{folder}\n")
    except SystemExit:  # How Lightning ends on Ctrl+C.
        if not trainer.interrupted:
            raise
        raise KeyboardInterrupt(f"Go on with: lightning-ntk train ckpt={folder}") from None
    finally:
        if config.logger.wandb is not None:
            finish_wandb()
    return folder


# ---- the parts ---------------------------------------------------------------------------------------------------


def check_steps(config: DictConfig) -> None:
    """Raise `ConfigError` for step counts that make no whole number of meta-epochs."""
    for key in ("steps", "val_every"):
        if isinstance(config[key], bool) or not isinstance(config[key], int) or config[key] < 1:
            raise ConfigError(f"{key} must be a whole number of at least 1, but got {config[key]!r}.")
    # As far as numpy's global generator takes it.
    if isinstance(config.seed, bool) or not isinstance(config.seed, int) or not 0 <= config.seed < 2**32:
        raise ConfigError(f"seed must be a whole number from 0 to {2**32 - 1}, but got {config.seed!r}.")
    if not isinstance(config.test, bool):
        raise ConfigError(f"test must be true or false, but got {config.test!r}.")
    if config.steps % config.val_every:
        below = [d for d in range(1, config.val_every) if config.steps % d == 0][-1]
        raise ConfigError(
            f"steps={config.steps} is no multiple of val_every={config.val_every}: use val_every={below}, or "
            f"steps={config.steps // config.val_every * config.val_every or config.val_every}."
        )
    if config.test_checkpoint not in ("best", "last"):
        raise ConfigError(f"test_checkpoint must be 'best' or 'last', but got {config.test_checkpoint!r}.")


def check_continues(checkpoint: Checkpoint, config: DictConfig) -> None:
    """Raise `ConfigError` when a checkpoint's run would go on as another one."""
    if config.val_every != checkpoint.config["val_every"]:
        raise ConfigError(
            f"val_every={config.val_every} differs from the run's {checkpoint.config['val_every']}: it sets the length "
            "of the epochs that the run has counted, so it cannot change in the middle. Leave val_every= out."
        )
    if config.seed != checkpoint.config["seed"]:
        raise ConfigError(
            f"seed={config.seed} differs from the run's {checkpoint.config['seed']}, which drew the initial parameters "
            "that it goes on from. Leave seed= out."
        )
    nothing_left = config.steps if checkpoint.folder is not None else config.steps - 1  # A new folder needs a step.
    if checkpoint.content["global_step"] > nothing_left:
        raise ConfigError(
            f"steps={config.steps}: the checkpoint has {checkpoint.content['global_step']} steps already. Ask for more."
        )


def announce(
    config: DictConfig, data: pl.LightningDataModule, method: MetaLearner, checkpoint: Checkpoint | None
) -> None:
    """Say what the settings do not let one expect."""
    if method.meta_trains and checkpoint is not None and checkpoint.content["global_step"] == config.steps:
        sys.stdout.write(f"The run has finished its {config.steps} steps; steps=MORE would train it for longer.\n")
    elif method.meta_trains and not data.has_split("val"):
        sys.stdout.write("The data has no validation split: the last checkpoint is the one tested.\n")


def build_data(config: DictConfig) -> pl.LightningDataModule:
    """The datamodule, ready to draw episodes."""
    data = instantiate(config.data, "data")
    data.prepare_data()
    data.setup()
    return data


def build_method(config: DictConfig, spec: TaskSpec) -> MetaLearner:
    """The network with the seed's initial parameters, and the method around it."""
    pl.seed_everything(config.seed, workers=True, verbose=False)
    network = instantiate(
        config.network, "network", input_shape=spec.input_shape, outputs=spec.outputs, mean=spec.mean, std=spec.std
    )
    return instantiate(config.method, "method", network=network, spec=spec)


def build_trainer(config: DictConfig, data: pl.LightningDataModule, loggers: list, callbacks: list) -> pl.Trainer:
    """Lightning's Trainer with what this framework decides for it."""
    settings = plain(config.trainer)
    devices = settings.get("devices")
    if isinstance(devices, int) and devices > 1 and settings.get("strategy") == "auto":
        settings["strategy"] = "ddp"
    check_types(settings, pl.Trainer, "trainer")
    try:
        trainer = pl.Trainer(
            **settings,
            plugins=[AtomicCheckpoints()],
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
    except (MisconfigurationException, ValueError, TypeError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ConfigError(f"trainer settings: {reason} (trainer.devices={devices}, see trainer.*)") from error
    # Lightning counts the GPUs; on CPUs it would start any number of processes.
    if isinstance(trainer.accelerator, CPUAccelerator) and trainer.num_devices > (os.cpu_count() or 1):
        raise ConfigError(f"trainer.devices={devices} processes are asked for, but there are {os.cpu_count()} cores.")
    return trainer


def run_test(
    trainer: pl.Trainer, method: MetaLearner, data: pl.LightningDataModule, config: DictConfig, weights: Path
) -> RunResult:
    """Test the weights of a checkpoint and gather the results."""
    method.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True)["state_dict"])
    measured = {name: float(value) for name, value in trainer.callback_metrics.items() if "/" in name}
    trainer.test(method, datamodule=data, verbose=False)
    measured |= {name: float(value) for name, value in trainer.callback_metrics.items() if "/" in name}
    timing = next((c for c in trainer.callbacks if hasattr(c, "meta_step_s")), None)
    timings = {}
    if timing is not None:
        timings = {"meta_step_s": timing.meta_step_s, "fit_s": timing.fit_s, "test_s": timing.test_s}
        measured["memory/peak_mib"] = timing.peak_mib
    for name, values in method.scores.items():  # Logged values went through float32.
        measured[f"test/{name}"], measured[f"test/{name}_ci95"] = mean_and_ci95(values)
    return RunResult(
        method=choice_name(config.method),
        data=choice_name(config.data),
        seed=config.seed,
        metrics=measured,
        episodes={f"test/{name}": values for name, values in method.scores.items()},
        episode_ids=data.episode_ids(),
        task=data.task_settings(),
        timings=timings,
        versions=package_versions(),
        config=plain(config),
    )


def report(result: RunResult) -> None:
    """Say how it went."""
    for name, values in result.episodes.items():
        mean, half_width = mean_and_ci95(values)
        shown = (
            f"{100 * mean:.2f} ± {100 * half_width:.2f} %"
            if name.endswith("accuracy")
            else f"{mean:.4f} ± {half_width:.4f}"
        )
        sys.stdout.write(f"{result.method} on {result.data}: {name} {shown} over {len(values)} episodes\n")


def choice_name(config: DictConfig) -> str:
    """The name of a group's choice, from its module: "meta_rkhs_ii"."""
    return config._target_.split(".")[-2]


def finish_wandb() -> None:
    import wandb

    wandb.finish()


def quiet() -> None:
    """Keep Lightning's advice out of the output, narrowly; its warnings about real trouble stay."""
    for name in ("pytorch_lightning", "lightning_fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in (
        ".*does not have many workers.*",  # Drawing an episode costs less than handing it over.
        ".*Checkpoint directory .* exists.*",  # Ours are overwritten on purpose.
        ".*The number of training batches .* is smaller than the logging interval.*",
        ".*recommended to use .*sync_dist=True.*",  # Scores are gathered before they are logged.
        ".*torch.jit.script.*",  # Two deprecations inside torch and Lightning.
        ".*treespec, LeafSpec.*",
    ):
        warnings.filterwarnings("ignore", message=message)


if __name__ == "__main__":
    from lightning_ntk.cli import guarded

    sys.exit(guarded(main))
