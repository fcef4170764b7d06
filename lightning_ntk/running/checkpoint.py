"""A run that is taken up by one of its checkpoints: loading it, and whether what is asked now fits what it holds."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from lightning_ntk.episode import TaskSpec
from lightning_ntk.errors import ConfigError
from lightning_ntk.running.run_folder_names import CONFIG_FILE
from lightning_ntk.settings.config import compose_config, plain
from lightning_ntk.settings.overrides import key_of, still_valid
from lightning_ntk.settings.paths import as_path


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A checkpoint of one of our runs.

    Attributes:
        file: where it is.
        content: what Lightning saved: `state_dict`, `global_step`, ... and our `run`.
        config, overrides, config_folder: of the run that wrote it.
        spec: of its training data.
        dtype: of its parameters.
    """

    file: Path
    content: dict[str, Any]

    @property
    def config(self) -> dict[str, Any]:
        return self.content["run"]["config"]

    @property
    def overrides(self) -> list[str]:
        return self.content["run"]["overrides"]

    @property
    def config_folder(self) -> str | None:
        return self.content["run"].get("config_folder")

    def settings(self, overrides: Sequence[str]) -> list[str]:
        """The overrides that made the run what it is, to stand before those that are given now.

        Without those that say where it comes from and goes, and those that `overrides` gives in a way that Hydra
        refuses beside them.
        """
        return still_valid([o for o in self.overrides if key_of(o) not in ("ckpt", "run_dir")], overrides)

    @property
    def spec(self) -> TaskSpec:
        kept = self.content["run"]["spec"]
        return TaskSpec(**{key: tuple(value) if isinstance(value, list) else value for key, value in kept.items()})

    @property
    def dtype(self) -> torch.dtype:
        """The precision that its parameters were trained in."""
        floats = (value.dtype for value in self.content["state_dict"].values() if value.is_floating_point())
        return next(floats, torch.get_default_dtype())

    @property
    def folder(self) -> Path | None:
        """The run folder that it lies in, or None when it was moved out of one."""
        folder = self.file.parent.parent
        return folder if (folder / CONFIG_FILE).is_file() else None


def load_checkpoint(path: str, key: str, name: str = "last") -> Checkpoint:
    """Load a checkpoint, from its file or as `checkpoints/NAME.ckpt` of a run folder. Nothing is unpickled freely.

    Args:
        key: the config key that named it, for error messages.
        name: best or last; a run without validation has no best one, and its last is taken.
    """
    if name not in ("best", "last"):
        raise ConfigError(f"checkpoint must be 'best' or 'last', but got {name!r}.")
    file = folder = as_path(path, key)
    try:
        if folder.is_dir():
            file = folder / "checkpoints" / f"{name}.ckpt"
            if not file.is_file():
                file = file.with_name("last.ckpt")
        if not file.is_file():
            if (folder / CONFIG_FILE).is_file():
                raise ConfigError(
                    f"{key}={path}: the run was stopped before its first checkpoint (after val_every steps): "
                    "there is nothing to go on from. Delete the folder and train again."
                )
            raise ConfigError(f"{key}={path}: there is no checkpoint {file}. Give a run folder or a .ckpt file.")
    except OSError as error:  # A name that is too long.
        raise ConfigError(f"{key}={path} cannot be looked up: {error.strerror}.") from error
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises many types on a file that is none of its own.
        raise ConfigError(
            f"{key}={path}: {file} cannot be read as a checkpoint "
            f"({type(error).__name__}). The run's other one, of best.ckpt and last.ckpt, may be whole."
        ) from error
    if not isinstance(content, dict) or "run" not in content:
        raise ConfigError(f"{key}={path}: {file} was not written by lightning_ntk.")
    if not content["run"]:
        raise ConfigError(
            f"{key}={path}: {file} was written under a Trainer of your own, and tells neither the settings nor the "
            "data of its training. In Python, build the method as you did then, and load it by "
            f'method.load_state_dict(torch.load("{file}")["state_dict"]).'
        )
    return Checkpoint(file.resolve(), content)


def check_same_model(checkpoint: Checkpoint, config: DictConfig, key: str) -> None:
    """Raise `ConfigError` when the config asks for another method or network than the checkpoint holds."""
    asked = plain(config)
    was, now = checkpoint.config["method"]["_target_"], asked["method"]["_target_"]
    if was != now:
        raise ConfigError(
            f"{key}={checkpoint.file} is a checkpoint of {_last(was)}, but method={_last(now)} is asked for. "
            "Leave method= out to go on with the checkpoint's, or train anew without the checkpoint."
        )
    if checkpoint.config["network"] != asked["network"]:
        old, new = checkpoint.config["network"], asked["network"]
        differing = sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name))
        if "_target_" in differing:
            differing = ["_target_"]
        changes = ", ".join(f"network.{name}: {old.get(name)} there, {new.get(name)} asked" for name in differing)
        raise ConfigError(f"{key}={checkpoint.file} is a checkpoint of another network ({changes}).")


def check_same_parameters(checkpoint: Checkpoint, method: torch.nn.Module, key: str) -> None:
    """Raise `ConfigError` when the settings asked for make other parameters than the checkpoint holds."""
    was, now = (
        {name: tuple(p.shape) for name, p in state.items()}
        for state in (checkpoint.content["state_dict"], method.state_dict())
    )
    differing = sorted(name for name in was.keys() | now.keys() if was.get(name) != now.get(name))
    if differing:
        name = differing[0]
        raise ConfigError(
            f"{key}={checkpoint.file}: with the settings asked for, the method's parameters are not those of the "
            f"checkpoint ({name}: {was.get(name, 'none')} there, {now.get(name, 'none')} now). Leave out the settings "
            "of method= and network= that change them."
        )


def check_same_tasks(checkpoint: Checkpoint, spec: TaskSpec, key: str) -> None:
    """Raise `ConfigError` when the data's tasks are not what the checkpoint's network was made for."""
    for name, setting in (("kind", "data"), ("input_shape", "data"), ("outputs", "data.ways")):
        was, now = getattr(checkpoint.spec, name), getattr(spec, name)
        if was != now:
            raise ConfigError(
                f"{setting}: {key}={checkpoint.file} was trained for tasks of {name} {was}, but the data asked for has "
                f"{now}. Leave {setting}= out to go on with the run's own."
            )
    if (checkpoint.spec.mean is None) != (spec.mean is None):
        raise ConfigError(f"data.normalize differs from that of the run of {key}={checkpoint.file}. Leave it out.")


def changed_defaults(checkpoint: Checkpoint, config_folder: str | None) -> list[str]:
    """What the run's own overrides compose to today that was another value when it was written, as KEY: OLD, now NEW.

    YAML files, and the defaults of a later version, change under a run that is taken up again. Settings that came or
    went since are not among them.
    """
    try:
        today = _leaves(plain(compose_config("train", [], config_folder, checkpoint.settings([]))))
    except ConfigError:  # A choice of the run's is gone, and another in its place now.
        return []
    then = _leaves(checkpoint.config)
    same = [key for key in then if key in today and key not in ("ckpt", "run_dir")]
    return [f"{key}: {then[key]}, now {today[key]}" for key in same if then[key] != today[key]]


def _leaves(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values of nested dicts by dotted keys; a list is a value."""
    leaves = {}
    for key, value in config.items():
        leaves |= _leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return leaves


def check_no_other_folder(checkpoint: Checkpoint, overrides: list[str]) -> None:
    """Raise `ConfigError` when a run that goes on in its own folder is sent to another."""
    if checkpoint.folder is not None and any(key_of(o) == "run_dir" for o in overrides):
        raise ConfigError(
            f"run_dir= cannot be set with ckpt=: the run goes on in its own folder, {checkpoint.folder}. For a new run "
            "from these parameters, copy the .ckpt file out of the folder first."
        )


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


def _last(target: str) -> str:
    return target.rsplit(".", 1)[-1]
