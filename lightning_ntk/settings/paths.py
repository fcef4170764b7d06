"""Paths that a user gives."""

from pathlib import Path
from typing import Any

from lightning_ntk.errors import ConfigError


def as_path(value: Any, key: str) -> Path:
    """A setting as a path, `~` read as the home folder; `ConfigError` when it can be none."""
    if isinstance(value, bool) or not isinstance(value, (str, int, Path)) or value == "" or "\0" in str(value):
        raise ConfigError(f"{key} must be a path, but got {value!r}.")
    try:
        return Path(str(value)).expanduser()
    except RuntimeError as error:
        raise ConfigError(f"{key}={value}: {error}") from error
