"""The settings of a sweep: conf/sweep.yaml, a named sweep, and the command line, in this order."""

import dataclasses
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lightning_ntk.errors import ConfigError, nearest_name
from lightning_ntk.settings.building import check_types
from lightning_ntk.settings.config import conf_folder, own_folder
from lightning_ntk.settings.overrides import key_of, parse, readable
from lightning_ntk.settings.paths import as_path
from lightning_ntk.sweep.wandb_sweep import check_not_wandb

CHOICES = {
    "launcher": ("local", "ray", "slurm"),
    "rerun": ("missing", "failed", "all"),
    "search": ("optuna", None),
}
# Settings that change nothing but under one choice, which a command that gives them must have made: a named sweep may
# hold those of several launchers.
OF_ONE_CHOICE = {
    "ray": ("launcher", "ray"),
    "slurm": ("launcher", "slurm"),
    "trials": ("search", "optuna"),
    "prune": ("search", "optuna"),
}


@dataclasses.dataclass(frozen=True)
class RaySettings:
    """Of launcher=ray."""

    address: str | None = None
    cpus: int = 1


@dataclasses.dataclass(frozen=True)
class SlurmSettings:
    """Of launcher=slurm. `extra` goes to submitit's slurm_additional_parameters."""

    cluster: str = "slurm"
    partition: str | None = None
    account: str | None = None
    minutes: int = 1440
    cpus: int = 4
    mem_gb: int | None = None
    extra: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a sweep is told beside the overrides of its jobs; conf/sweep.yaml says what each means."""

    sweep: str | None = None
    out: str | None = None
    launcher: str = "local"
    jobs: int | None = None
    retries: int = 2
    give_up: int | None = 5
    rerun: str = "missing"
    max_jobs: int = 1000
    baseline: str | None = None
    search: str | None = None
    trials: int = 20
    prune: bool = True
    ray: RaySettings = dataclasses.field(default_factory=RaySettings)
    slurm: SlurmSettings = dataclasses.field(default_factory=SlurmSettings)

    def __post_init__(self) -> None:
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ConfigError(
                    f"{name} must be {' or '.join(choice or 'null' for choice in choices)}, but got "
                    f"{getattr(self, name)!r}."
                    f"{nearest_name(str(getattr(self, name)), filter(None, choices))}"
                )
        if self.search is not None and self.launcher != "local" and self.jobs is None:
            raise ConfigError(
                f"search={self.search} under launcher={self.launcher} needs jobs=NUMBER, the trials at once: settings "
                "are chosen by the scores of earlier trials, of which there would be none if all began together."
            )
        for name, least in (("jobs", 1), ("retries", 0), ("give_up", 1), ("max_jobs", 1), ("trials", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigError(f"{name} must be at least {least}, but got {value}.")
        for name, value in (
            ("ray.cpus", self.ray.cpus),
            ("slurm.cpus", self.slurm.cpus),
            ("slurm.minutes", self.slurm.minutes),
        ):
            if value < 1:
                raise ConfigError(f"{name} must be at least 1, but got {value}.")


def read_settings(words: list[str], config_folder: str | None = None) -> tuple[Settings, list[str]]:
    """Split the words of a command line into the sweep's settings and the overrides of its jobs.

    Args:
        config_folder: the user's own configuration folder, whose sweep/NAME.yaml are found too.

    Raises:
        ConfigError: a setting is misspelt or of another type, or there is no sweep of this name.
    """
    defaults = OmegaConf.load(conf_folder() / "sweep.yaml")
    own = [word for word in words if key_of(word).split(".")[0] in defaults]
    overrides = [word for word in words if word not in own]
    given = OmegaConf.create()
    for word in own:
        override = parse(readable(word))
        if override.is_sweep_override():
            raise ConfigError(f"{word}: a setting of the sweep itself takes one value.")
        value = override.value()
        if key_of(word) == "out" and value is not None:  # A folder may be called 5.
            value = str(as_path(value, "out"))
        OmegaConf.update(given, override.key_or_group, value, force_add=True)
    named: dict[str, Any] = {}
    if given.get("sweep") is not None:
        named, listed = read_named(str(given.sweep), config_folder)
        changed = {key_of(word) for word in overrides}
        overrides = [word for word in listed if key_of(word) not in changed] + overrides
    OmegaConf.set_struct(defaults, True)
    OmegaConf.set_struct(defaults.slurm.extra, False)
    try:
        merged = OmegaConf.to_container(OmegaConf.merge(defaults, named, given), resolve=True)
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None) or "?"
        groups = ("ray", "slurm")
        known = [name for name in defaults if name not in groups]
        known += [f"{group}.{name}" for group in groups for name in defaults[group]]
        raise ConfigError(f"A sweep has no setting {key!r}.{nearest_name(str(key), known)}") from error
    settings = build_settings(merged)
    for word in own:
        key, value = OF_ONE_CHOICE.get(key_of(word).split(".")[0], ("", ""))
        if key and getattr(settings, key) != value:
            raise ConfigError(f"{word} is a setting of {key}={value} alone: add {key}={value}, or leave it out.")
    return settings, overrides


def build_settings(values: dict[str, Any]) -> Settings:
    """Settings from plain values, their types checked."""
    for group, kind in (("ray", RaySettings), ("slurm", SlurmSettings)):
        if not isinstance(values[group], dict):
            raise ConfigError(f"{group} holds several settings: set {group}.NAME=VALUE, but got {values[group]!r}.")
        check_types(values[group], kind, group)
        values[group] = kind(**values[group])
    try:
        check_types(values, Settings, "")
    except ConfigError as error:
        raise ConfigError(str(error).lstrip(".")) from error
    return Settings(**values)


def read_named(name: str, config_folder: str | None) -> tuple[dict[str, Any], list[str]]:
    """A named sweep: its settings and its overrides."""
    folders = [conf_folder(), *([own_folder(config_folder)] if config_folder else [])]
    found = {file.stem: file for folder in folders for file in sorted((folder / "sweep").glob("*.yaml"))}
    if name not in found:
        raise ConfigError(
            f"sweep={name} does not exist.{nearest_name(name, found)} Named sweeps: {', '.join(sorted(found))}."
        )
    content = load_yaml(found[name])
    check_not_wandb(content, found[name], config_folder)
    listed = content.pop("overrides", [])
    if not isinstance(listed, list):
        raise ConfigError(f"{found[name]}: overrides must be a list of KEY=VALUE.")
    return content, [str(word) for word in listed]


def load_yaml(file: Path) -> dict[str, Any]:
    """A YAML file that holds a mapping, as it is written: ${env} is W&B's to fill in."""
    try:
        content = OmegaConf.to_container(OmegaConf.load(file), resolve=False)
    except Exception as error:  # The YAML reader raises many types.
        raise ConfigError(f"{file} is not readable YAML: {str(error).strip().splitlines()[0]}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{file} must hold settings (KEY: VALUE).")
    return content
