"""From settings to objects: Hydra's `instantiate`, with errors that name the key."""

import collections.abc
import inspect
import re
import sys
import traceback
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from hydra.errors import InstantiationException
from hydra.utils import get_object
from hydra.utils import instantiate as hydra_instantiate
from omegaconf import DictConfig

from lightning_ntk.errors import ConfigError, nearest_name

# Top-level packages of ours beside lightning_ntk, whose names a user's own folders may have.
OURS = ("callbacks", "datamodules")
# The types that a setting's value is checked against, in words.
KINDS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    type(None): "null",
}


def instantiate(config: DictConfig, key: str, kind: type = object, **arguments: Any) -> Any:
    """Build the object that a config's `_target_` names: the one place that calls Hydra's `instantiate`.

    Args:
        key: where the config stands, for error messages ("method").
        kind: what the object must be.
        **arguments: objects handed over beside the settings.
    """
    if not isinstance(config, DictConfig) or not config.get("_target_"):
        raise ConfigError(f"{key} must have a _target_ that names a class, but is {config}.")
    try:
        # Partial: the objects must not pass through OmegaConf, which turns dataclasses into dicts.
        factory = hydra_instantiate(config, _convert_="all", _partial_=True)
    except InstantiationException as error:
        # Hydra's lines: what failed, the exception behind it, and perhaps which part of the config.
        text, _, place = str(error).strip().partition("\nfull_key: ")
        cause = _cause(error, config["_target_"])
        text = text.replace(", set env var HYDRA_FULL_ERROR=1 to see chained exception.", f": {cause}")
        raise ConfigError(f"{place.strip() or key}: {' '.join(text.split()[:60])}") from error
    if inspect.isclass(factory.func) and not issubclass(factory.func, kind):
        raise ConfigError(f"{key}._target_={config['_target_']} is no {kind.__name__}.")
    for name in arguments:
        if name in factory.keywords:
            raise ConfigError(f"{key}.{name} cannot be set: the run gives it. Leave it out.")
    check_types(factory.keywords, factory.func, key)
    try:
        return factory(**arguments)
    except TypeError as error:
        match = re.search(r"unexpected keyword argument '(\w+)'", str(error))
        if "takes no arguments" in str(error) or (match is not None and match.group(1) in arguments):
            raise ConfigError(
                f"{key}: {config['_target_']} must take what it is given beside its settings, the keyword arguments "
                f"{', '.join(arguments)}, but {error}."
            ) from error
        if match is None or match.group(1) not in config:
            raise
        names = [name for function in _signatures(factory.func) for name in inspect.signature(function).parameters]
        near = nearest_name(match.group(1), names)
        raise ConfigError(f"{key}.{match.group(1)} is no setting of {config['_target_']}.{near}") from error


def takes(config: Any, name: str) -> bool:
    """Whether the class or function that a config names takes an argument."""
    if not isinstance(config, DictConfig) or not config.get("_target_"):
        return False
    try:
        signatures = _signatures(get_object(config["_target_"]))
        return any(name in inspect.signature(each).parameters for each in signatures)
    except Exception:  # Whatever a module of a user's raises; building it says so.
        return False


def _cause(error: BaseException, target: str) -> str:
    """The first exception behind one, where it was raised, and what to do about a module that is not found."""
    while error.__cause__ is not None:
        error = error.__cause__
    top = target.partition(".")[0]
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if _is_own(frame)]
    place = f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else ""
    if isinstance(error, ModuleNotFoundError) and top in OURS and top in sys.modules:
        there = Path(sys.modules[top].__file__ or "")
        if not (there.parent / "base.py").is_file():
            return f"{error}. `{top}` is {there} here, which hides the package of that name: call yours otherwise"
    if isinstance(error, ModuleNotFoundError) and "is not a package" in str(error):
        module, _, name = (error.name or "").rpartition(".")
        return f"{module} has no {name}"
    if isinstance(error, ModuleNotFoundError):
        is_target = (error.name or "").partition(".")[0] == top
        hint = "Is its folder on PYTHONPATH, as in PYTHONPATH=. lightning-ntk ...?" if is_target else "Install it."
        return f"{error}{place}. {hint}"
    return f"{type(error).__name__}: {error}{place}"


def _is_own(frame: traceback.FrameSummary) -> bool:
    """Whether a frame is neither the import machinery's, nor an installed package's, nor ours."""
    inner = ("<frozen", str(Path(__file__).parents[1]))
    return not frame.filename.startswith(inner) and "site-packages" not in frame.filename


def check_types(settings: dict[str, Any], function: Callable, key: str) -> None:
    """Raise `ConfigError` for a setting whose type is plainly not the one that a class or function annotates."""
    hints: dict[str, Any] = {}
    for signature in _signatures(function):
        try:
            hints = typing.get_type_hints(signature) | hints
        except (NameError, TypeError):  # Annotations for a type checker's eyes only.
            continue
    for name, value in settings.items():
        if name in hints and not _matches(value, hints[name]):
            raise ConfigError(f"{key}.{name} must be {_in_words(hints[name])}, but got {value!r}.{_decoded(value)}")


def _decoded(value: Any) -> str:
    """What to do about a number or truth value that came as text, as it does from the environment."""
    try:
        is_text = isinstance(value, str) and not isinstance(yaml.safe_load(value), str)
    except yaml.YAMLError:
        return ""
    return " (Of an environment variable, write ${oc.decode:${oc.env:NAME}}.)" if is_text else ""


def _signatures(function: Callable) -> list[Callable]:
    """What takes the settings: a function, or the constructor of a class and of those that it hands **settings to."""
    if not inspect.isclass(function):
        return [function]
    found = []
    for owner in function.__mro__:
        if "__init__" in vars(owner):
            found.append(owner.__init__)
            kinds = {parameter.kind for parameter in inspect.signature(owner.__init__).parameters.values()}
            if inspect.Parameter.VAR_KEYWORD not in kinds:
                break
    return found


def _in_words(hint: Any) -> str:
    """A type as a user would say it."""
    if hint in KINDS:
        return KINDS[hint]
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        words = dict.fromkeys(_in_words(argument) for argument in arguments)
        if KINDS[float] in words:
            words.pop(KINDS[int], None)  # It is one.
        return " or ".join(words)
    if origin in (list, tuple, collections.abc.Sequence):
        return f"a list (each item {_in_words(arguments[0])})"
    return str(hint)


def _matches(value: Any, hint: Any) -> bool:
    """Whether a value from YAML is of an annotated type; True for all but numbers, text, None, lists and unions."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_matches(value, argument) for argument in arguments)
    if hint in (int, float):
        return isinstance(value, (int, hint)) and not isinstance(value, bool)
    if hint in KINDS:
        return isinstance(value, hint)
    if origin in (list, tuple, collections.abc.Sequence):
        return isinstance(value, (list, tuple)) and all(_matches(item, arguments[0]) for item in value)
    return True
