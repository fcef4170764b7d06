"""`lightning-ntk train`: train one method on one data set, test it, and leave a run folder."""

import contextlib
import dataclasses
import logging
import os
import shlex
import sys
import warnings
from pathlib import Path

import pytorch_lightning as pl
import torch
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.callbacks import EarlyStopping, LearningRateFinder, StochasticWeightAveraging
from pytorch_lightning.loggers import Logger

from lightning_ntk.episode import TaskSpec
from lightning_ntk.errors import ConfigError
from lightning_ntk.methods.base import MetaLearner, measurements, training_measurements
from lightning_ntk.running import cluster, random_state, run_folder
from lightning_ntk.running.checkpoint import (
    Checkpoint,
    changed_defaults,
    check_continues,
    check_no_other_folder,
    check_same_model,
    check_same_parameters,
    check_same_tasks,
    load_checkpoint,
)
from lightning_ntk.running.checkpointing import checkpoint_callbacks, save_untrained
from lightning_ntk.running.interruption import Interruption
from lightning_ntk.running.lock import writing
from lightning_ntk.running.report import report_lines
from lightning_ntk.running.results import FILE_NAME, RunResult, mean_and_ci95, package_versions, write_results
from lightning_ntk.running.run import Run
from lightning_ntk.running.run_folder_names import RUN_FOLDER_VARIABLE
from lightning_ntk.running.schedule import CosineSchedule
from lightning_ntk.running.trainer import build_trainer, check_optimisation
from lightning_ntk.settings.arguments import parse_command
from lightning_ntk.settings.building import instantiate
from lightning_ntk.settings.config import compose_config, plain
from lightning_ntk.settings.overrides import key_of, last_value
from lightning_ntk.settings.paths import as_path
from lightning_ntk.settings.top_level import check_steps, check_top_level
from lightning_ntk.tracking.loggers import CsvMetrics
from lightning_ntk.tracking.wandb_run import WandbRun, check_wandb


def main(argv: list[str] | None = None) -> None:
    """Train as the command line asks; see `lightning-ntk train --help`."""
    command = parse_command("train", argv)
    if command is None:
        return
    overrides, config_folder, checkpoint, inherited = command.overrides, command.config_folder, None, []
    resumed_from = last_value(overrides, "ckpt")
    if resumed_from is not None:
        checkpoint, inherited, config_folder = taken_up(resumed_from, overrides, config_folder)
        check_no_other_folder(checkpoint, overrides)
    config = compose_config("train", overrides, config_folder, inherited)
    if checkpoint is None or checkpoint.folder is None:
        # A job that the cluster starts again goes on in its own folder, whatever checkpoint it began from.
        restarted_from = run_folder.restarted_from(config)
        if restarted_from is not None:
            overrides = [o for o in overrides if key_of(o) not in ("ckpt", "run_dir")]
            checkpoint, inherited, config_folder = taken_up(restarted_from, overrides, config_folder)
            config = compose_config("train", overrides, config_folder, inherited)
    if command.show_config:
        sys.stdout.write(OmegaConf.to_yaml(config))
        return
    if checkpoint is not None:
        check_same_model(checkpoint, config, "ckpt")
        check_continues(checkpoint, config)
    elif config.ckpt is not None:
        raise ConfigError(f"ckpt={config.ckpt} must stand on the command line: the run's own settings come with it.")
    train(config, inherited + overrides, checkpoint, config_folder)


def taken_up(path: str, overrides: list[str], config_folder: str | None) -> tuple[Checkpoint, list[str], str | None]:
    """The checkpoint that a run goes on from, the run's own overrides, on top of which come those that are asked now,
    and the configuration folder: the one that is asked, or else the run's own."""
    checkpoint = load_checkpoint(path, "ckpt")
    return checkpoint, checkpoint.settings(overrides), config_folder or checkpoint.config_folder


def train(
    config: DictConfig, overrides: list[str], checkpoint: Checkpoint | None = None, config_folder: str | None = None
) -> Path:
    """Run one training, from a composed config; returns the run folder. After bad input, nothing of it is left."""
    quiet()
    if cluster.is_child():
        cluster.die_with_parent()
    check_top_level(config)
    check_steps(config)
    wandb = config.logger.get("wandb")
    check_wandb(wandb)
    resumed = checkpoint is not None and checkpoint.folder is not None
    names = config.choices.method, config.choices.data
    folder, made = (checkpoint.folder, []) if resumed else run_folder.new_run_folder(config, *names)
    os.environ[RUN_FOLDER_VARIABLE] = str(folder)
    held = contextlib.ExitStack()
    try:
        data = training_data(config, checkpoint)
        method = training_method(config, data, checkpoint)
        method.run = {
            "config": plain(config),
            "overrides": list(overrides),
            "config_folder": None if config_folder is None else str(as_path(config_folder, "--config-dir").resolve()),
            "spec": dataclasses.asdict(data.spec),
            "content": data.content_hash(),
        }
        loggers = [CsvMetrics(folder / "metrics.csv", checkpoint.content["global_step"] if resumed else None)]
        interruption = Interruption()
        trainer = trainer_of(Run(method, data, config, folder, config_folder), loggers, interruption)
        if trainer.is_global_zero:
            new = run_folder.make(folder)
            held.enter_context(writing(folder))
            if resumed or not cluster.is_restarted():
                run_folder.check_is_ours(folder, checkpoint if resumed else None)
            made += new  # Nobody else's, from here on.
            run_folder.record(folder, config, overrides)
        tracker = contextlib.nullcontext()
        if wandb is not None:
            tracker = WandbRun(wandb, folder, plain(config), data.task_settings())
            tracker.start()
            trainer.loggers = [*loggers, tracker]
    except BaseException:
        held.close()
        run_folder.discard(folder, made)
        raise
    with held, interruption.saying(lambda: how_to_go_on(folder)), cluster.requeued_on_signal(folder), tracker:
        if trainer.is_global_zero:
            announce(config, data, method, checkpoint, config_folder)
            if resumed and checkpoint.content["global_step"] < config.steps:
                (folder / FILE_NAME).unlink(missing_ok=True)  # Of an earlier end, which this run goes beyond.
        fit_and_test(trainer, method, data, config, folder, checkpoint)
    return folder


def training_data(config: DictConfig, checkpoint: Checkpoint | None) -> pl.LightningDataModule:
    """The data to train on, which must fit the checkpoint that a run goes on from."""
    data, name = build_data(config), config.choices.data
    if not data.has_split("train"):
        raise ConfigError(
            f"data={name} has no training classes: test a run on it, by lightning-ntk evaluate run=RUN data={name}."
        )
    if checkpoint is not None:
        check_same_tasks(checkpoint, data.spec, "ckpt")
    check_follows(data, config)
    return data


def training_method(config: DictConfig, data: pl.LightningDataModule, checkpoint: Checkpoint | None) -> MetaLearner:
    """The method to train, which must fit the data and the checkpoint that a run goes on from."""
    method = build_method(config, data.spec)
    check_ways(method, data)
    check_optimisation(method, config.lr_schedule)
    if checkpoint is not None:
        check_same_parameters(checkpoint, method, "ckpt")
    return method


def trainer_of(run: Run, loggers: list[Logger], interruption: Interruption) -> pl.Trainer:
    """The trainer with all callbacks of a run, which are shown it, and the method in the trainer's precision."""
    callbacks = build_callbacks(run.config)
    prepare_callbacks(callbacks, run)
    best, last = checkpoint_callbacks(run.folder, run.data)
    schedule = [CosineSchedule(run.config.steps)] if run.config.lr_schedule == "cosine" else []
    own = [*schedule, *callbacks, *([best] if best else []), last, interruption]
    trainer = build_trainer(run.config, run.data, run.folder, loggers, own)
    run.data.check_shared(trainer.world_size)
    run.method.check_precision(run.config.trainer.get("precision"), trains=True)
    # Lightning does so once a checkpoint is loaded, which has rounded it by then.
    trainer.precision_plugin.convert_module(run.method)
    return trainer


def fit_and_test(
    trainer: pl.Trainer,
    method: MetaLearner,
    data: pl.LightningDataModule,
    config: DictConfig,
    folder: Path,
    checkpoint: Checkpoint | None,
) -> None:
    """Train from the start or from a checkpoint, test, and write the results."""
    last = folder / "checkpoints" / "last.ckpt"
    best = last.with_name("best.ckpt") if method.meta_trains and data.has_split("val") else last
    if method.meta_trains:
        resume_from = None if checkpoint is None else str(checkpoint.file)
        if checkpoint is not None and has_stopped_early(trainer, checkpoint, config):
            trainer.fit_loop.max_epochs = checkpoint.content["epoch"] + 1  # There is nothing left to train.
            if trainer.is_global_zero:
                sys.stdout.write("The run has stopped early; steps=MORE would train it for longer.\n")
        trainer.fit(method, datamodule=data, ckpt_path=resume_from, weights_only=True)
    elif trainer.is_global_zero:
        save_untrained(method, last)
    if config.test:
        tested = best if config.test_checkpoint == "best" else last
        result = run_test(trainer, method, data, config, tested if method.meta_trains else None)
        if trainer.is_global_zero:
            write_results(folder, result)
            report(result)
            for logger in trainer.loggers:
                if isinstance(logger, WandbRun):
                    logger.log_result(result, trainer.global_step)
    if trainer.is_global_zero:
        sys.stdout.write(f"{folder}\n")


def has_stopped_early(trainer: pl.Trainer, checkpoint: Checkpoint, config: DictConfig) -> bool:
    """Whether an EarlyStopping callback has ended the run before, and no more steps are asked for now.

    Lightning's asks only after one more epoch.
    """
    states = checkpoint.content.get("callbacks", {})
    stopped = any(
        states.get(callback.state_key, {}).get("stopped_epoch")
        for callback in trainer.callbacks
        if isinstance(callback, EarlyStopping)
    )
    return stopped and config.steps <= checkpoint.config["steps"]


# ---- the parts ---------------------------------------------------------------------------------------------------


def announce(
    config: DictConfig,
    data: pl.LightningDataModule,
    method: MetaLearner,
    checkpoint: Checkpoint | None,
    config_folder: str | None,
) -> None:
    """Say what the settings do not let one expect."""
    if method.meta_trains and checkpoint is not None and checkpoint.content["global_step"] == config.steps:
        sys.stdout.write(f"The run has finished its {config.steps} steps; steps=MORE would train it for longer.\n")
    elif method.meta_trains and not data.has_split("val"):
        sys.stdout.write("The data has no validation split: the last checkpoint is the one tested.\n")
    if checkpoint is not None and have_changed(data, config, checkpoint):
        sys.stdout.write(
            "The data have changed since the run was written: what it has learned and measured until now is of others. "
            "Train anew for results of one kind.\n"
        )
    if checkpoint is not None and (changed := changed_defaults(checkpoint, config_folder)):
        sys.stdout.write(
            "Defaults have changed since the run was written, and it goes on with today's where you set nothing else "
            f"({'; '.join(changed)}).\n"
        )


def have_changed(data: pl.LightningDataModule, config: DictConfig, checkpoint: Checkpoint) -> bool:
    """Whether the test episodes, or the statistics of the training images, are others under the same settings."""
    kept = checkpoint.content["run"]
    if plain(config.data) != checkpoint.config["data"]:
        return False
    now = (data.content_hash(), data.spec)
    return now != (kept.get("content", now[0]), checkpoint.spec)


def how_to_go_on(folder: Path) -> str:
    """What to do about a run that was interrupted."""
    if (folder / "checkpoints" / "last.ckpt").exists():
        return f"Go on with: lightning-ntk train ckpt={shlex.quote(str(folder))}"
    return f"There is no checkpoint yet: delete {shlex.quote(str(folder))} and train again."


def build_data(config: DictConfig, stage: str | None = None) -> pl.LightningDataModule:
    """The datamodule, ready to draw the episodes of a stage; whether other splits could give any is not asked."""
    data = instantiate(config.data, "data", pl.LightningDataModule)
    data.prepare_data()
    data.setup(stage)
    return data


def build_method(config: DictConfig, spec: TaskSpec) -> MetaLearner:
    """The network with the seed's initial parameters, and the method around it."""
    pl.seed_everything(config.seed, workers=True, verbose=False)
    return make_method(config, spec)


def make_method(config: DictConfig, spec: TaskSpec) -> MetaLearner:
    """The method around its network, whose parameters are yet to be given."""
    made_for = {"input_shape": spec.input_shape, "outputs": spec.outputs, "mean": spec.mean, "std": spec.std}
    network = instantiate(config.network, "network", torch.nn.Module, **made_for)
    return instantiate(config.method, "method", MetaLearner, network=network, spec=spec)


def build_callbacks(config: DictConfig) -> list[pl.Callback]:
    """The callbacks chosen by callbacks=[NAME,NAME,...]."""
    entries = {name: entry for name, entry in (config.get("callbacks") or {}).items() if entry is not None}
    for name, entry in entries.items():
        if "_target_" not in entry:  # Settings alone: of a callback that was not chosen, or of a YAML without a class.
            raise ConfigError(
                f"callbacks.{name} must have a _target_ that names a class, but has settings alone. Choose it, by "
                f"callbacks=[...,{name}], or leave it out, by ~callbacks.{name}."
            )
    callbacks = {name: instantiate(entry, f"callbacks.{name}", pl.Callback) for name, entry in entries.items()}
    for name, callback in callbacks.items():
        if isinstance(callback, StochasticWeightAveraging):
            raise ConfigError(
                f"callbacks.{name}: StochasticWeightAveraging puts its average into the method after the last "
                "checkpoint, which is what a run tests and keeps. Use pytorch_lightning.callbacks.WeightAveraging, "
                "whose average is in the checkpoints."
            )
        if isinstance(callback, LearningRateFinder):
            raise ConfigError(
                f"callbacks.{name}: LearningRateFinder sets another rate than method.lr, which the run is recorded by, "
                "and a run that goes on would begin its steps anew. Search for method.lr by lightning-ntk sweep "
                "search=optuna."
            )
    return list(callbacks.values())


def prepare_callbacks(callbacks: list[pl.Callback], run: Run) -> None:
    """Show the probe callbacks (`callbacks.base`) the run before it begins."""
    names = [callback.name for callback in callbacks if hasattr(callback, "prepare")]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(
                f"callbacks: several have the name {name!r}, by which results are kept. Choose one of them, or give a "
                "class of your own another name."
            )
    with random_state.kept(run.method.device):
        for callback in callbacks:
            if hasattr(callback, "prepare"):
                callback.prepare(run)


def check_follows(data: pl.LightningDataModule, config: DictConfig) -> None:
    """Raise `ConfigError` for data whose class takes neither the length of the epochs nor the seed from the run."""
    for key, value in (("steps_per_epoch", config.val_every), ("seed", config.seed)):
        if key not in config.data and getattr(data, key, value) != value:
            raise ConfigError(
                f"data: {type(data).__name__} has {key} = {getattr(data, key)}, where the run has {value}. Let its "
                "__init__ take **settings and hand them to super().__init__."
            )


def check_ways(method: MetaLearner, data: pl.LightningDataModule) -> None:
    """Raise `ConfigError` when the evaluation episodes have more ways than the method can tell apart."""
    ways = data.task_settings().get("ways")  # Regression has none.
    outputs = method.spec.outputs
    if ways is not None and ways > outputs and not method.any_ways:
        raise ConfigError(
            f"data.eval_ways={ways} exceeds data.ways={outputs}: the network's head has one output for each of the "
            f"{outputs} ways it is trained on. Raise data.ways and train again, lower data.eval_ways, or use a method "
            "without a head (method=protonet, method=nearest_centroid)."
        )


def run_test(
    trainer: pl.Trainer, method: MetaLearner, data: pl.LightningDataModule, config: DictConfig, weights: Path | None
) -> RunResult:
    """Test the weights of a checkpoint (None: the method as it is) and gather the results."""
    tested = {}
    if weights is not None:
        checkpoint = torch.load(weights, map_location="cpu", weights_only=True)
        method.load_state_dict(checkpoint["state_dict"])
        tested = {"checkpoint": weights.name, "step": checkpoint["global_step"]}
    # What training logged: before this process took it up, and since.
    measured = method.measured | training_measurements(trainer)
    trainer.test(method, datamodule=data, verbose=False)
    measured |= measurements(trainer)
    timing = next((c for c in trainer.callbacks if hasattr(c, "meta_step_s")), None)
    timings = {}
    if timing is not None:
        timings = {"meta_step_s": timing.meta_step_s, "fit_s": timing.fit_s, "test_s": timing.test_s}
        measured["memory/peak_mib"] = timing.peak_mib
    probes = {}
    for callback in (c for c in trainer.callbacks if getattr(c, "stage", None) == "test"):
        measured |= callback.metrics  # As precise as they were computed.
        timings |= {f"{callback.name}_{stage}_s": seconds for stage, seconds in callback.seconds.items() if seconds}
        probes[callback.name] = callback.result()
    for name, values in method.scores.items():  # Logged values went through float32.
        measured[f"test/{name}"], measured[f"test/{name}_ci95"] = mean_and_ci95(values)
    return RunResult(
        method=config.choices.method,
        data=config.choices.data,
        seed=config.seed,
        metrics=measured,
        episodes={f"test/{name}": values for name, values in method.scores.items()},
        episode_ids=data.episode_ids(),
        task=data.task_settings(),
        timings=timings,
        versions=package_versions(),
        config=plain(config),
        probes=probes,
        tested=tested,
    )


def report(result: RunResult) -> None:
    """Say how it went."""
    sys.stdout.writelines(f"{line}\n" for line in report_lines(result))


def quiet() -> None:
    """Keep Lightning's advice out of the output, narrowly; its warnings about real trouble stay."""
    for name in ("pytorch_lightning", "lightning_fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for name in (
        "pytorch_lightning.profilers",  # The report of a trainer.profiler.
        "lightning_fabric.strategies.launchers",  # That a rank has died, before the others are killed for it.
    ):
        logging.getLogger(name).setLevel(logging.INFO)
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
