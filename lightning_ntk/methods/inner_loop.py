"""What methods share beside their base: learn2learn's lazy import, and checks of settings and networks."""

import contextlib
import io

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
