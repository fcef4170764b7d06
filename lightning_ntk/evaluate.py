"""`lightning-ntk evaluate`: test a finished run again, with other ways, shots, data or test-time settings."""

import hashlib
import re
import sys
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from lightning_ntk import run_folder
from lightning_ntk.cli_arguments import parse_command
from lightning_ntk.config import compose_config, conf_folder
from lightning_ntk.episode import TaskSpec
from lightning_ntk.errors import ConfigError
from lightning_ntk.results import write_results
from lightning_ntk.run_folder import Checkpoint
from lightning_ntk.run_folder_names import EVALUATIONS_FOLDER
from lightning_ntk.train import build_data, build_method, build_trainer, quiet, report, run_test


def main(argv: list[str] | None = None) -> None:
    """Evaluate as the command line asks; see `lightning-ntk evaluate --help`."""
    command = parse_command("evaluate", argv)
    if command is None:
        return
    own, overrides = split_overrides(command.overrides)
    if "run" not in own:
        raise ConfigError("run=FOLDER is missing: it names the run folder to evaluate.")
    if own.get("checkpoint", "best") not in ("best", "last"):
        raise ConfigError(f"checkpoint must be 'best' or 'last', but got {own['checkpoint']!r}.")
    which = own.get("checkpoint", "best")
    if which == "best" and not (Path(own["run"]).expanduser() / "checkpoints" / "best.ckpt").is_file():
        which = "last"  # A run without validation has no best.
    checkpoint = run_folder.load_checkpoint(own["run"], "run", which)
    config = evaluation_config(checkpoint, overrides, command.config_folder)
    if command.show_config:
        sys.stdout.write(OmegaConf.to_yaml(config))
        return
    evaluate(checkpoint, config, evaluation_name(own, overrides))


def evaluation_name(own: dict[str, str], overrides: list[str]) -> str:
    """The folder of an evaluation: as named, or else after what differs from the run's own test."""
    if "name" in own:
        if not re.fullmatch(r"[\w=-][\w.=,-]*", own["name"]):
            raise ConfigError(f"name={own['name']} must be a folder name of letters, digits and -_=,. alone.")
        return own["name"]
    asked = ",".join(overrides + (["checkpoint=last"] if own.get("checkpoint") == "last" else []))
    name = re.sub(r"[^\w.=-]+", "_", asked)
    if len(name) > 120:  # File systems allow 255 bytes.
        name = f"{name[:100]}_{hashlib.sha256(asked.encode()).hexdigest()[:12]}"
    return name or "again"


def split_overrides(words: list[str]) -> tuple[dict[str, str], list[str]]:
    """The settings of conf/evaluate.yaml, and the overrides of the run."""
    keys = [key for key in OmegaConf.load(conf_folder() / "evaluate.yaml") if isinstance(key, str)]
    own, overrides = {}, []
    for word in words:
        key, _, value = word.partition("=")
        if key in keys:
            own[key] = value
        else:
            overrides.append(word)
    return own, overrides


def evaluation_config(checkpoint: Checkpoint, overrides: list[str], config_folder: str | None = None) -> DictConfig:
    """The run's config with the overrides on top.

    The network and the method are the trained ones, whatever recipe belongs to the data now asked for; of the method,
    the settings named in an override change.
    """
    composed = compose_config("train", checkpoint.settings() + overrides, config_folder or checkpoint.config_folder)
    trained = OmegaConf.create(checkpoint.config)
    if any(o.startswith(("method=", "network=", "network.")) for o in overrides):
        run_folder.check_same_model(checkpoint, composed, "run")
    for override in overrides:
        key = override.partition("=")[0].lstrip("+~")
        if key.startswith("method."):
            OmegaConf.update(trained, key, OmegaConf.select(composed, key))
    composed.method, composed.network = trained.method, trained.network
    return composed


def evaluate(checkpoint: Checkpoint, config: DictConfig, name: str) -> Path:
    """Test a checkpoint under a config; writes RUN/evaluations/NAME/results.json and returns that folder."""
    quiet()
    base = checkpoint.folder or Path.cwd() / "runs" / checkpoint.file.stem
    folder = base / EVALUATIONS_FOLDER / name
    run_folder.check_writable(folder, "run")
    trained = TaskSpec(**{key: tuple(v) if isinstance(v, list) else v for key, v in checkpoint.spec.items()})
    data = build_data(config)
    check_fits(trained, data.spec)
    method = build_method(config, trained)
    trainer = build_trainer(config, data, loggers=[], callbacks=[])
    result = run_test(trainer, method, data, config, checkpoint.file)
    if trainer.is_global_zero:
        run_folder.create(folder, config, [])
        write_results(folder, result)
        report(result)
        sys.stdout.write(f"{folder}\n")
    return folder


def check_fits(trained: TaskSpec, now: TaskSpec) -> None:
    """Raise `ConfigError` unless a network trained on one kind of task can take another."""
    if now.kind != trained.kind:
        raise ConfigError(f"data: the run was trained for {trained.kind}, but the data asked for is {now.kind}.")
    if now.input_shape != trained.input_shape:
        raise ConfigError(
            f"data: the network takes inputs of shape {trained.input_shape}, but the data's are {now.input_shape}. "
            "Set data.image_size and data.channels to the trained ones."
        )
    if now.outputs != trained.outputs:
        raise ConfigError(
            f"data.ways={now.outputs}: the network's head has {trained.outputs} outputs, one for each of the ways it "
            f"was trained on. Keep data.ways={trained.outputs} and set data.eval_ways (at most {trained.outputs})."
        )


if __name__ == "__main__":
    from lightning_ntk.cli import guarded

    sys.exit(guarded(main))
