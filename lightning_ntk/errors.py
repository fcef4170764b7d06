"""Errors a user can act on: each message says what was expected, what came, and what to change.

The command line prints these and exits with their status, 2 for bad input; anything else is a bug and keeps its
traceback.
"""

import difflib
import math
from collections.abc import Iterable


class LightningNTKError(Exception):
    """Base of every error this package raises on purpose. The command line ends with its `status`."""

    status = 2


class ConfigError(LightningNTKError, ValueError):
    """A setting is missing, misspelt or out of range. The message names the config key to change."""


class DataError(LightningNTKError, ValueError):
    """A data set on disk is not what it must be. The message names the file or folder."""


class DivergenceError(LightningNTKError, ArithmeticError):
    """Training left the finite numbers, or an energy that is unbounded below ran away."""


class MissingDependencyError(LightningNTKError, ImportError):
    """An optional package is needed for what was asked. The message gives the install command."""


class JobsFailedError(LightningNTKError):
    """A sweep has come to its end, and jobs of it have failed. The message names them, their errors and their logs."""

    status = 1


def nearest_name(name: str, choices: Iterable[str]) -> str:
    """A clause to end an error with: `` Did you mean 'x'?``, or an empty string when nothing is close."""
    close = difflib.get_close_matches(name, list(choices), n=1, cutoff=0.5)
    return f" Did you mean {close[0]!r}?" if close else ""


def check_at_least(minimum: int, value: int, key: str) -> None:
    """Raise `ConfigError` naming the key unless value is a whole number >= minimum."""
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise ConfigError(f"{key} must be a whole number of at least {minimum}, but got {value!r}.")


def check_positive(value: float, key: str) -> None:
    """Raise `ConfigError` naming the key unless value is a finite number > 0."""
    if not 0 < value < math.inf:
        raise ConfigError(f"{key} must be a finite positive number, but got {value!r}.")


def check_not_negative(value: float, key: str) -> None:
    """Raise `ConfigError` naming the key unless value is a finite number >= 0."""
    if not 0 <= value < math.inf:
        raise ConfigError(f"{key} must be a finite number >= 0, but got {value!r}.")
