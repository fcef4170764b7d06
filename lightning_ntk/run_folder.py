"""The run folder: what a run leaves, where it is, and how one is taken up again."""

import dataclasses
import datetime
import os
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from lightning_ntk.config import plain
from lightning_ntk.errors import ConfigError
from lightning_ntk.run_folder_names import CONFIG_FILE, OVERRIDES_FILE

# Set by the first process of a multi-process run for those that it starts.
RUN_FOLDER_VARIABLE = "LIGHTNING_NTK_RUN_FOLDER"


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A checkpoint of one of our runs.

    Attributes:
        file: where it is.
        content: what Lightning saved: `state_dict`, `global_step`, ... and our `run`.
        config, overrides, config_folder: of the run that wrote it.
        spec: the TaskSpec of its training data, as a dict.
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

    def settings(self) -> list[str]:
        """The overrides that made the run what it is, without those that say where it comes from and goes."""
        return [o for o in self.overrides if not o.startswith(("ckpt=", "run_dir="))]

    @property
    def spec(self) -> dict[str, Any]:
        return self.content["run"]["spec"]

    @property
    def folder(self) -> Path | None:
        """The run folder that it lies in, or None when it was moved out of one."""
        folder = self.file.parent.parent
        return folder if (folder / CONFIG_FILE).is_file() else None


def load_checkpoint(path: str, key: str, name: str = "last") -> Checkpoint:
    """Load a checkpoint, from its file or as `checkpoints/NAME.ckpt` of a run folder. Nothing is unpickled freely.

    Args:
        key: the config key that named it, for error messages.
    """
    file = Path(path).expanduser()
    if file.is_dir():
        file = file / "checkpoints" / f"{name}.ckpt"
    if not file.is_file():
        raise ConfigError(f"{key}={path}: there is no checkpoint {file}. Give a run folder or a .ckpt file.")
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises many types on a file that is none of its own.
        raise ConfigError(f"{key}={path}: {file} cannot be read as a checkpoint ({type(error).__name__}).") from error
    if not isinstance(content, dict) or "run" not in content:
        raise ConfigError(f"{key}={path}: {file} was not written by lightning_ntk.")
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


def check_no_other_folder(checkpoint: Checkpoint, overrides: list[str]) -> None:
    """Raise `ConfigError` when a run that goes on in its own folder is sent to another."""
    if checkpoint.folder is not None and any(o.startswith("run_dir=") for o in overrides):
        raise ConfigError(
            f"run_dir= cannot be set with ckpt=: the run goes on in its own folder, {checkpoint.folder}. For a new run "
            "from these parameters, copy the .ckpt file out of the folder first."
        )


def new_run_folder(config: DictConfig, method: str, data: str) -> Path:
    """Where a new run goes: `run_dir`, or a folder of its own under ./runs. Not created yet.

    Raises:
        ConfigError: there is a run already, or the folder cannot be written.
    """
    if "LOCAL_RANK" in os.environ and RUN_FOLDER_VARIABLE in os.environ:
        return Path(os.environ[RUN_FOLDER_VARIABLE])
    if config.run_dir == "":
        raise ConfigError("run_dir is empty: name a folder, or leave it out.")
    if config.run_dir is not None:
        folder = Path(str(config.run_dir)).expanduser().resolve()
        if (folder / CONFIG_FILE).exists():
            raise ConfigError(
                f"run_dir={config.run_dir} already holds a run. Go on with it by ckpt={config.run_dir}, "
                "delete it, or name another."
            )
    else:
        stamp = datetime.datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
        base = Path.cwd() / "runs" / f"{stamp}_{data}_{method}_seed{config.seed}"
        folder = base
        for number in range(2, 1000):
            if not folder.exists():
                break
            folder = base.with_name(f"{base.name}_{number}")
    check_writable(folder, "run_dir")
    return folder


def check_writable(folder: Path, key: str) -> None:
    """Raise `ConfigError` when a folder, which need not exist, cannot be made or written to."""
    ancestor = next(path for path in (folder, *folder.parents) if path.exists())
    if not ancestor.is_dir() or not os.access(ancestor, os.W_OK):
        raise ConfigError(f"{key}={folder} cannot be written: {ancestor} is no folder that you can write to.")


def create(folder: Path, config: DictConfig, overrides: list[str]) -> None:
    """Make the folder and record the resolved config and the overrides that led to it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        OmegaConf.save(config, folder / CONFIG_FILE, resolve=True)
        OmegaConf.save(OmegaConf.create(list(overrides)), folder / OVERRIDES_FILE)
    except OSError as error:
        raise ConfigError(f"run_dir={folder} cannot be written: {error}") from error


def _last(target: str) -> str:
    return target.rsplit(".", 1)[-1]
