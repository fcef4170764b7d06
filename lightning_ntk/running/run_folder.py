"""The run folder: where it is, who may write to it, and what is recorded in it."""

import contextlib
import datetime
import os
import shlex
import shutil
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from lightning_ntk.errors import ConfigError
from lightning_ntk.running import cluster
from lightning_ntk.running.checkpoint import Checkpoint, load_checkpoint
from lightning_ntk.running.run_folder_names import CONFIG_FILE, OVERRIDES_FILE, RUN_FOLDER_VARIABLE
from lightning_ntk.settings.paths import as_path


def new_run_folder(config: DictConfig, method: str, data: str) -> tuple[Path, list[Path]]:
    """Where a new run goes: `run_dir`, not made yet, or a folder of its own under ./runs.

    The latter is made at once: a run that starts in the same second then takes another.

    Returns:
        The folder, and the folders that were made, innermost first, for `discard`.

    Raises:
        ConfigError: there is a run already, or the folder cannot be written.
    """
    if cluster.is_child():
        return Path(os.environ[RUN_FOLDER_VARIABLE]), []
    folder = agreed_folder(config, method, data)
    if folder is not None:
        check_writable(folder, "run_dir")
        # A job that was stopped before its first checkpoint starts again in the folder that it made.
        if cluster.is_first() and not cluster.is_restarted() and (folder / CONFIG_FILE).exists():
            raise ConfigError(
                f"run_dir={config.run_dir or folder} already holds a run. Go on with it by "
                f"{shlex.quote(f'ckpt={config.run_dir or folder}')}, delete it, or name another."
            )
        return folder, []
    stamp = datetime.datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    base = Path.cwd() / "runs" / f"{stamp}_{data}_{method}_seed{config.seed}"
    folder, number = base, 1
    while True:
        check_writable(folder, "run_dir")
        made = missing_folders(folder)
        try:
            folder.mkdir(parents=True)
            return folder, made
        except FileExistsError:
            number += 1
            folder = base.with_name(f"{base.name}_{number}")
        except OSError as error:
            raise ConfigError(f"run_dir={folder} cannot be written: {error}") from error


def agreed_folder(config: DictConfig, method: str, data: str) -> Path | None:
    """The folder that all ranks of a job find by themselves, and find again after a restart: as set, or by the job.

    None where there is neither: one process is then free to choose.
    """
    if config.run_dir is not None:
        return as_path(config.run_dir, "run_dir").resolve()
    job = cluster.job_name()
    return None if job is None else Path.cwd() / "runs" / f"{data}_{method}_seed{config.seed}_{job}"


def restarted_from(config: DictConfig) -> str | None:
    """The folder to go on from when the cluster has started this job again; None where there is nothing yet."""
    if not cluster.is_restarted():
        return None
    folder = agreed_folder(config, config.choices.method, config.choices.data)
    return None if folder is None or not (folder / "checkpoints" / "last.ckpt").exists() else str(folder)


def check_writable(folder: Path, key: str) -> None:
    """Raise `ConfigError` when a folder, which need not exist, cannot be made or written to."""
    try:
        ancestor = next(path for path in (folder, *folder.parents) if path.exists())
    except OSError as error:  # A name that is too long.
        raise ConfigError(f"{key}={folder} cannot be written: {error.strerror}.") from error
    if not ancestor.is_dir() or not os.access(ancestor, os.W_OK):
        raise ConfigError(f"{key}={folder} cannot be written: {ancestor} is no folder that you can write to.")


def make(folder: Path) -> list[Path]:
    """Make the folder where it is not there; returns the folders that were made, innermost first, for `discard`."""
    made = missing_folders(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        discard(folder, made)
        raise ConfigError(f"run_dir={folder} cannot be written: {error}") from error
    return made


def check_is_ours(folder: Path, checkpoint: Checkpoint | None) -> None:
    """Once the folder is held: raise `ConfigError` when another process began a run, or went on with it, before that.

    Args:
        checkpoint: what the run goes on from; None for a new one.
    """
    if checkpoint is None:
        if (folder / CONFIG_FILE).exists():
            raise ConfigError(
                f"run_dir={folder}: another process has begun a run there meanwhile. Start this one again, or name "
                "another folder by run_dir=."
            )
    elif load_checkpoint(str(checkpoint.file), "ckpt").content["global_step"] != checkpoint.content["global_step"]:
        raise ConfigError(f"ckpt={folder}: another process has gone on with the run meanwhile. Start this one again.")


def record(folder: Path, config: DictConfig, overrides: list[str]) -> None:
    """Write the resolved config and the overrides that led to it."""
    is_new = not (folder / CONFIG_FILE).exists()
    try:
        OmegaConf.save(config, folder / CONFIG_FILE, resolve=True)
        OmegaConf.save(OmegaConf.create(list(overrides)), folder / OVERRIDES_FILE)
    except OSError as error:
        if is_new:
            with contextlib.suppress(OSError):
                (folder / CONFIG_FILE).unlink()
        raise ConfigError(f"run_dir={folder} cannot be written: {error}") from error


def missing_folders(folder: Path) -> list[Path]:
    """The folders that are to be made for one, innermost first."""
    return [path for path in (folder, *folder.parents) if not path.exists()]


def discard(folder: Path, made: list[Path]) -> None:
    """Undo `make`, where it made the folder."""
    if folder in made:
        shutil.rmtree(folder, ignore_errors=True)
        for path in made[1:]:
            with contextlib.suppress(OSError):  # Others may use it by now.
                path.rmdir()
