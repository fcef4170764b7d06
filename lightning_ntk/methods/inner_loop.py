"""What the methods built on learn2learn share: the lazy import and the inner loop of MAML."""

import contextlib
import io
import math

from lightning_ntk.errors import ConfigError, MissingDependencyError

INSTALL_LINE = 'pip install "pip>=25" && pip install learn2learn==0.2.0 --config-settings="--build-option=build_ext"'


def learn2learn_maml():
    """The class `learn2learn.algorithms.MAML`, imported on first use."""
    try:
        # learn2learn imports gym, which prints a notice about its own maintenance on every import.
        with contextlib.redirect_stderr(io.StringIO()):
            from learn2learn.algorithms import MAML
    except ImportError as error:
        raise MissingDependencyError(
            f"This method runs on learn2learn, which cannot be imported ({error}). Install it with: {INSTALL_LINE}"
        ) from error
    return MAML


def check_inner_loop(steps: int, step_size: float, steps_key: str, size_key: str) -> None:
    """Raise `ConfigError` unless an inner loop of this many steps of this size makes sense."""
    if steps < 0:
        raise ConfigError(f"method.{steps_key} must be 0 or more, but got {steps}.")
    if not (step_size > 0 and math.isfinite(step_size)):
        raise ConfigError(f"method.{size_key} must be a finite positive number, but got {step_size}.")
