"""`lightning-ntk evaluate`: test a finished run again, with other ways, shots, data or test-time settings."""

import hashlib
import re
import sys
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from lightning_ntk.episode import TaskSpec
from lightning_ntk.errors import ConfigError
from lightning_ntk.running import cluster, run_folder
from lightning_ntk.running.checkpoint import Checkpoint, check_same_model, check_same_parameters, load_checkpoint
from lightning_ntk.running.interruption import Interruption
from lightning_ntk.running.results import write_results
from lightning_ntk.running.run import Run
from lightning_ntk.running.run_folder_names import EVALUATIONS_FOLDER
from lightning_ntk.running.trainer import build_trainer
from lightning_ntk.settings.arguments import parse_command
from lightning_ntk.settings.config import compose_config, conf_folder
from lightning_ntk.settings.overrides import key_of, last_value
from lightning_ntk.settings.top_level import check_top_level
from lightning_ntk.train import (
    build_callbacks,
    build_data,
    build_method,
    check_ways,
    prepare_callbacks,
    quiet,
    report,
    run_test,
)

# Settings that change nothing of a test.
OF_TRAINING = {
    "seed": "data.eval_seed=N draws other test episodes",
    "steps": "train ckpt=RUN steps=MORE goes on with it",
    "val_every": "leave it out",
    "lr_schedule": "leave it out",
    "test": "evaluate always tests",
    "test_checkpoint": "use checkpoint=best or checkpoint=last",
    "method.lr": "leave it out",
    "recipe": "set what the test takes by itself (method.NAME=VALUE)",
}
# What a run was told of the place and the split of its own data.
OF_ONE_DATA_SET = {"data.root", "data.split_file"}


def main(argv: list[str] | None = None) -> None:
    """Evaluate as the command line asks; see `lightning-ntk evaluate --help`."""
    command = parse_command("evaluate", argv)
    if command is None:
        return
    own, overrides = split_overrides(command.overrides)
    if "run" not in own:
        raise ConfigError("run=FOLDER is missing: it names the run folder to evaluate.")
    checkpoint = load_checkpoint(own["run"], "run", own.get("checkpoint", "best"))
    config = evaluation_config(checkpoint, overrides, command.config_folder)
    check_top_level(config)
    if command.show_config:
        sys.stdout.write(OmegaConf.to_yaml(config))
        return
    config_folder = command.config_folder or checkpoint.config_folder
    evaluate(checkpoint, config, evaluation_name(own, overrides + other_checkpoint(checkpoint)), config_folder)


def evaluation_name(own: dict[str, str], overrides: list[str]) -> str:
    """The folder of an evaluation: as named, or else after what differs from the run's own test."""
    if "name" in own:
        if not re.fullmatch(r"[\w=-][\w.=,-]*", own["name"]):
            raise ConfigError(f"name={own['name']} must be a folder name of letters, digits and -_=,. alone.")
        return own["name"]
    asked = ",".join(overrides)
    name = re.sub(r"[^\w.=-]+", "_", asked)
    if len(name) > 120:  # File systems allow 255 bytes.
        name = f"{name[:100]}_{hashlib.sha256(asked.encode()).hexdigest()[:12]}"
    return name or "again"


def other_checkpoint(checkpoint: Checkpoint) -> list[str]:
    """What tells a checkpoint from the one that its run folder is evaluated by, so that each has results of its own.

    A lone file has a folder of its own already.
    """
    usual = "best" if checkpoint.file.with_name("best.ckpt").is_file() else "last"
    is_usual = checkpoint.folder is None or checkpoint.file.stem == usual
    return [] if is_usual else [f"checkpoint={checkpoint.file.stem}"]


def evaluations_folder(checkpoint: Checkpoint) -> Path:
    """Where the evaluations of a checkpoint go: into its run folder or, for a lone file, to one under ./runs that is
    known by its whole path: others may have its name."""
    if checkpoint.folder is not None:
        return checkpoint.folder / EVALUATIONS_FOLDER
    path = hashlib.sha256(str(checkpoint.file).encode()).hexdigest()[:8]
    return Path.cwd() / "runs" / f"{checkpoint.file.stem}_{path}" / EVALUATIONS_FOLDER


def split_overrides(words: list[str]) -> tuple[dict[str, str], list[str]]:
    """The settings of conf/evaluate.yaml, and the overrides of the run."""
    keys = [key for key in OmegaConf.load(conf_folder() / "evaluate.yaml") if isinstance(key, str)]
    own, overrides = {}, []
    for word in words:
        key = key_of(word)
        if key in keys:
            value = last_value([word], key)
            # As it is written: `true` and 1e-3 are names, too.
            own |= {} if value is None else {key: value if isinstance(value, str) else word.partition("=")[2]}
        elif key in ("ckpt", "run_dir"):
            raise ConfigError(
                f"{word}: run=FOLDER names what is evaluated, and name= the folder inside it for the results."
            )
        else:
            overrides.append(word)
    return own, overrides


def evaluation_config(checkpoint: Checkpoint, overrides: list[str], config_folder: str | None = None) -> DictConfig:
    """The run's config with the overrides on top.

    The network and the method are the trained ones, whatever recipe belongs to the data now asked for; of the method,
    the settings named in an override change. Other data leave the run's own behind where they have no place for it.
    """
    keys = keys_of(overrides)
    of_training = OF_TRAINING | tested_by_others(checkpoint.config["method"])
    for key in keys:
        if key in of_training:
            raise ConfigError(f"{key}= belongs to training, which is over: {of_training[key]}.")
    # An experiment is a setting of the data, too; and where the run's data lie says nothing of others.
    asked = last_value(overrides, "data")
    left = {"experiment"} if "data" in keys else set()
    left |= OF_ONE_DATA_SET if asked not in (None, checkpoint.config["choices"]["data"]) else set()
    inherited = [o for o in checkpoint.settings(overrides) if key_of(o) not in left]
    composed = compose_config("train", overrides, config_folder or checkpoint.config_folder, inherited)
    trained = OmegaConf.create(checkpoint.config)
    if any(key in ("method", "network") or key.startswith("network.") for key in keys):
        check_same_model(checkpoint, composed, "run")
    for key in keys:
        if key.startswith("method."):
            OmegaConf.update(trained, key, OmegaConf.select(composed, key))
    composed.method, composed.network, composed.seed = trained.method, trained.network, trained.seed
    composed.choices.method, composed.choices.network = trained.choices.method, trained.choices.network
    return composed


def tested_by_others(method: dict[str, Any]) -> dict[str, str]:
    """The settings of a method that have a test_SETTING beside them, which is the one that a test takes."""
    return {f"method.{name}": f"method.test_{name}=N is the test's" for name in method if f"test_{name}" in method}


def keys_of(overrides: list[str]) -> list[str]:
    """The keys that overrides set: of `method={KEY: VALUE}`, those in it."""
    keys = []
    for override in overrides:
        key = key_of(override)
        value = last_value([override], key)
        keys += [f"{key}.{name}" for name in value] if isinstance(value, dict) else [key]
    return keys


def evaluate(checkpoint: Checkpoint, config: DictConfig, name: str, config_folder: str | None = None) -> Path:
    """Test a checkpoint under a config, with its callbacks; writes RUN/evaluations/NAME/results.json and returns that
    folder."""
    quiet()
    folder = evaluations_folder(checkpoint) / name
    run_folder.check_writable(folder, "run")
    data = build_data(config, "test")
    method = build_method(config, checkpoint.spec)
    check_fits(checkpoint.spec, data.spec, any_ways=method.any_ways)
    check_ways(method, data)
    check_same_parameters(checkpoint, method, "run")
    # Timing observes training alone.
    callbacks = [c for c in build_callbacks(config) if hasattr(c, "prepare")]
    prepare_callbacks(callbacks, Run(method, data, config, folder, config_folder))
    interruption = Interruption()
    trainer = build_trainer(config, data, folder, loggers=[], callbacks=[*callbacks, interruption])
    data.check_shared(trainer.world_size, ["test"])
    method.check_precision(config.trainer.get("precision"), trains=False)
    # Lightning does so once a checkpoint is loaded, which has rounded it by then.
    trainer.precision_plugin.convert_module(method)
    advice = "There is no result; the run is as it was."
    with interruption.saying(lambda: advice), cluster.requeued_on_signal(folder):
        result = run_test(trainer, method, data, config, checkpoint.file)
    if trainer.is_global_zero:
        run_folder.make(folder)
        run_folder.record(folder, config, [])
        write_results(folder, result)
        report(result)
        sys.stdout.write(f"{folder}\n")
    return folder


def check_fits(trained: TaskSpec, now: TaskSpec, *, any_ways: bool) -> None:
    """Raise `ConfigError` unless a network trained on one kind of task can take another.

    `any_ways`: the method needs no output for each way.
    """
    if now.kind != trained.kind:
        raise ConfigError(f"data: the run was trained for {trained.kind}, but the data asked for is {now.kind}.")
    if now.input_shape != trained.input_shape:
        raise ConfigError(
            f"data: the network takes inputs of shape {trained.input_shape}, but the data's are {now.input_shape}. "
            "Set data.image_size and data.channels to the trained ones."
        )
    if now.outputs != trained.outputs and not any_ways:
        raise ConfigError(
            f"data.ways={now.outputs}: the network's head has {trained.outputs} outputs, one for each of the ways it "
            f"was trained on. Keep data.ways={trained.outputs} and set data.eval_ways (at most {trained.outputs})."
        )


if __name__ == "__main__":
    from lightning_ntk.cli import guarded

    sys.exit(guarded(main))
