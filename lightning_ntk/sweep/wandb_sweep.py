"""Sweeps in W&B's own format: W&B's server decides the settings, `wandb agent` starts our command with them."""

from pathlib import Path
from typing import Any

from lightning_ntk.errors import ConfigError
from lightning_ntk.settings.config import compose_config


def is_wandb(content: Any) -> bool:
    """Whether a YAML file is a sweep in W&B's format."""
    return "parameters" in content and "method" in content


def check_not_wandb(content: Any, file: Path, config_folder: str | None = None) -> None:
    """Raise `ConfigError`, with the commands to use, for a sweep that W&B runs; its parameters are looked up first."""
    if is_wandb(content):
        check_parameters(content, config_folder)
        raise ConfigError(
            f"{file} is a sweep of W&B's, whose server decides the settings. Start it with `wandb sweep {file}`, then "
            "`wandb agent ENTITY/PROJECT/ID` in as many processes as you like."
        )


def first_overrides(content: Any) -> list[str]:
    """One override for each parameter, with the first value that it may take."""
    words = []
    for key, given in content["parameters"].items():
        for name in ("value", "values", "min", "mu"):
            if name in given:
                words.append(f"{key}={given[name][0] if name == 'values' else given[name]}")
                break
        else:
            raise ConfigError(f"parameters.{key} must have value, values, or min and max.")
    return words


def check_parameters(content: Any, config_folder: str | None = None) -> None:
    """Raise `ConfigError` for a parameter that is no setting of ours, before W&B hands it to an agent."""
    fixed = [str(word) for word in content.get("command", []) if "=" in str(word) and not str(word).startswith("$")]
    compose_config("train", [*fixed, *first_overrides(content)], config_folder)
