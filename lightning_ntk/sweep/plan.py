"""From overrides to jobs: every key is looked up, and every job's needs are known, before anything starts."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from lightning_ntk.errors import ConfigError, check_at_least
from lightning_ntk.running.lock import LOCK_FILE, is_locked
from lightning_ntk.settings.config import compose_config
from lightning_ntk.settings.overrides import key_of
from lightning_ntk.settings.top_level import check_steps, check_top_level
from lightning_ntk.sweep.job import TEMPORARY_STATE_FILE, TRAIN, Job, Needs, State, has_result, read_state, result_error
from lightning_ntk.sweep.start import STATE_FILE, clear

# Settings beside the groups that decide what a job needs, or that are checked before one starts.
DECIDE_NEEDS = (
    *("steps", "val_every", "test", "test_checkpoint", "lr_schedule"),
    *("trainer.devices", "trainer.num_nodes", "trainer.accelerator", "data.tasks_per_step"),
)


def make_jobs(
    grid: dict[str, list[str]], out: Path, known: dict[str, dict[str, str]], config_folder: str | None
) -> list[Job]:
    """The jobs of a grid, each composed first.

    Args:
        grid: `{name: overrides}`.
        known: the groups and their choices.

    Raises:
        ConfigError: a key or a choice does not exist, or a setting beside the groups is of another type or range.
    """
    # Jobs that differ in plain values alone have the same keys: one composition, a tenth of a second, is for them all.
    composed: dict[tuple[str, ...], tuple[Needs, str]] = {}
    jobs = []
    for name, overrides in grid.items():
        deciding = tuple(o for o in overrides if key_of(o) in known or key_of(o) in DECIDE_NEEDS or is_odd_seed(o))
        if deciding not in composed:
            config = compose_config("train", overrides, config_folder)
            composed[deciding] = needs_of(config), config.choices.method
        needs, method = composed[deciding]
        jobs.append(Job(name, tuple(overrides), out / name, needs, config_folder, TRAIN, method))
    return jobs


def is_odd_seed(override: str) -> bool:
    """Whether an override sets the seed to something else than a number of up to nine digits, of which each will do."""
    return key_of(override) == "seed" and not re.fullmatch(r"seed=\d{1,9}", override)


def needs_of(config: DictConfig) -> Needs:
    """What a job of this config needs; `ConfigError` for settings with which it would end at once."""
    check_top_level(config)
    check_steps(config)
    trainer = config.trainer
    nodes = trainer.get("num_nodes", 1)
    check_at_least(1, nodes, "trainer.num_nodes")
    devices, tasks = count_devices(trainer.get("devices", 1)), config.data.get("tasks_per_step")
    if devices and isinstance(tasks, int) and tasks % (devices * nodes):
        raise ConfigError(
            f"data.tasks_per_step={tasks} tasks cannot be shared equally by {devices * nodes} processes "
            f"(trainer.devices={devices}, trainer.num_nodes={nodes}). Make it a multiple of {devices * nodes}."
        )
    return Needs(
        devices=devices,
        nodes=nodes,
        cpu=trainer.get("accelerator") == "cpu",
        steps=config.steps,
        tests=config.test,
    )


def count_devices(devices: Any) -> int:
    """How many devices Lightning would use; 0 for all there are."""
    if devices in (None, "auto", -1, "-1"):
        return 0
    if str(devices).isdigit() and int(devices) > 0:
        return int(devices)
    raise ConfigError(
        f"trainer.devices must be a number of devices or auto, but got {devices}. Which ones a job of a sweep gets is "
        "the launcher's to say; under launcher=local, CUDA_VISIBLE_DEVICES sets those that it hands out."
    )


def to_run(jobs: Sequence[Job], rerun: str) -> tuple[list[Job], list[Job], list[Job]]:
    """Split jobs into those to run now, those that have a result, and those that failed and are left alone.

    A folder whose results.json cannot be read (another version wrote it) counts as failed. Nothing is changed.

    Raises:
        ConfigError: a job's folder was made with other settings, or by nobody of us, or another process writes it.
    """
    todo, finished, failed = [], [], []
    for job in jobs:
        state = read_state(job.folder)
        check_ours(job)
        if begins_anew(job, rerun):
            check_free(job)
        if rerun == "all":
            todo.append(job)
            continue
        check_same_settings(job, state)
        if has_result(job, state):
            finished.append(job)
        elif state.status == "failed" or has_foreign_result(job):
            (todo if rerun == "failed" else failed).append(job)
        else:
            todo.append(job)
    return todo, finished, failed


def check_ours(job: Job) -> None:
    """Raise `ConfigError` when a job's folder holds files that no sweep has put there: they could be overwritten."""
    names = {path.name for path in job.folder.iterdir()} if job.folder.is_dir() else set()
    if STATE_FILE not in names and names - {TEMPORARY_STATE_FILE}:
        raise ConfigError(f"{job.folder} holds files that are not of a sweep. Name another folder by out=.")


def has_foreign_result(job: Job) -> bool:
    """Whether there is a results.json that this version cannot read."""
    return job.needs.tests and (job.folder / "results.json").exists() and result_error(job) is not None


def begins_anew(job: Job, rerun: str) -> bool:
    """Whether what a job's folder holds goes before the job runs."""
    return rerun == "all" or (rerun == "failed" and has_foreign_result(job))


def check_free(job: Job) -> None:
    """Raise `ConfigError` when a process is writing a job's folder."""
    if is_locked(job.folder / LOCK_FILE):
        raise ConfigError(f"{job.folder} is being written by another process. End it first.")


def start_anew(job: Job) -> None:
    """Remove what a job's folder holds, unless a process is writing it."""
    if job.folder.is_dir():
        check_free(job)
        clear(job.folder)


def check_same_settings(job: Job, made: State) -> None:
    """Raise `ConfigError` when a job's folder holds a run of other settings."""
    if not made.overrides:
        return
    changed = sorted(set(made.overrides) ^ set(job.overrides))
    if made.config_folder != job.config_folder:
        changed.append(f"--config-dir {made.config_folder or 'none'} and {job.config_folder or 'none'}")
    if changed:
        raise ConfigError(
            f"{job.folder} was made with other settings ({', '.join(changed)} differ). Name another folder by out=, or "
            "begin everything anew with --rerun all."
        )
