"""What methods share beside their base: learn2learn's lazy import, and checks of settings and networks."""

import contextlib
import io
import math

from torch import nn

from lightning_ntk.errors import ConfigError, MissingDependencyError

INSTALL_LINE = 'pip install "pip>=25" && pip install learn2learn==0.2.0 --config-settings="--build-option=build_ext"'


def learn2learn_algorithm(name: str) -> type:
    """A class of `learn2learn.algorithms`, imported on first use."""
    try:
        # learn2learn imports gym, which prints a notice about its own maintenance on every import.
        with contextlib.redirect_stderr(io.StringIO()):
            import learn2learn.algorithms as algorithms
    except ImportError as error:
        raise MissingDependencyError(
            f"This method runs on learn2learn, which cannot be imported ({error}). Install it with: {INSTALL_LINE}"
        ) from error
    return getattr(algorithms, name)


def check_inner_steps(**settings: int) -> None:
    """Raise `ConfigError` unless these settings of a method are 0 or more."""
    for key, value in settings.items():
        if value < 0:
            raise ConfigError(f"method.{key} must be 0 or more, but got {value}.")


def check_positive(**settings: float) -> None:
    """Raise `ConfigError` unless these settings of a method are finite and above 0."""
    for key, value in settings.items():
        if not (value > 0 and math.isfinite(value)):
            raise ConfigError(f"method.{key} must be a finite positive number, but got {value}.")


def check_not_negative(**settings: float) -> None:
    """Raise `ConfigError` unless these settings of a method are finite and at least 0."""
    for key, value in settings.items():
        if not (value >= 0 and math.isfinite(value)):
            raise ConfigError(f"method.{key} must be a finite number >= 0, but got {value}.")


def check_parts(network: nn.Module, method: str, parts: tuple[str, ...], instead: str) -> None:
    """Raise `ConfigError` unless a network has the parts that a method works on (see `networks.base`)."""
    missing = [part for part in parts if not callable(getattr(network, part, None))]
    if missing:
        raise ConfigError(
            f"method={method} needs a network with {' and '.join(parts)}, as networks.base.EpisodeNetwork has them, "
            f"but {type(network).__name__} has no {' and no '.join(missing)}. {instead}"
        )


def check_choice(value: str, choices: tuple[str, ...], key: str) -> None:
    """Raise `ConfigError` unless a setting is one of its choices."""
    if value not in choices:
        raise ConfigError(f"method.{key} must be one of {', '.join(choices)}, but got {value!r}.")
