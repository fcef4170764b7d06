"""Configuration: conf/ composed with the user's overrides by Hydra, and errors that name the nearest key.

Hydra's compose API is used rather than `@hydra.main`: see docs/ARCHITECTURE.md.
"""

import collections.abc
import inspect
import re
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, InstantiationException
from hydra.utils import instantiate as hydra_instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lightning_ntk.errors import ConfigError, nearest_name

# Folders that hold no choices of a config group.
NOT_GROUPS = ("splits",)
# The types that a setting's value is checked against, in words.
KINDS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    type(None): "null",
}


def conf_folder() -> Path:
    """The folder of the configuration: inside the package when installed, at the top of a checkout."""
    package = Path(__file__).resolve().parent
    installed = package / "conf"
    return installed if installed.is_dir() else package.parent / "conf"


def groups(folders: list[Path]) -> dict[str, dict[str, str]]:
    """`{group: {choice: one-line description}}` of all config groups in the given folders, later folders added."""
    found: dict[str, dict[str, str]] = {}
    for folder in folders:
        for group in sorted(path for path in folder.iterdir() if path.is_dir() and path.name not in NOT_GROUPS):
            for file in sorted(group.glob("*.yaml")):
                found.setdefault(group.name, {})[file.stem] = describe(file)
    return found


def describe(file: Path) -> str:
    """The first comment line of a YAML file that is not a Hydra directive."""
    for line in file.read_text(encoding="utf-8").splitlines():
        if line.startswith("#") and not line.startswith("# @"):
            return line.lstrip("# ").strip()
    return ""


def compose_config(name: str, overrides: list[str], extra_folder: str | None = None) -> DictConfig:
    """conf/NAME.yaml with the overrides applied, in Hydra's override grammar.

    Args:
        extra_folder: a folder of the user's own config groups, searched besides conf/.

    Raises:
        ConfigError: for a misspelt key, group or choice (with the nearest name), or anything Hydra refuses.
    """
    folders = [conf_folder()]
    overrides = list(overrides)
    if extra_folder is not None:
        extra = Path(extra_folder).expanduser().resolve()
        if not extra.is_dir():
            raise ConfigError(f"--config-dir={extra_folder} is not a folder.")
        folders.append(extra)
        overrides.append(f"hydra.searchpath=[file://{extra}]")
    chosen = check_choices(overrides, groups(folders))
    try:
        return _compose(name, overrides)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(explain(error, name, chosen)) from error


def _compose(name: str, overrides: list[str]) -> DictConfig:
    # A composition inside another program's Hydra application must not disturb it, nor be disturbed.
    outer = GlobalHydra.instance().hydra
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(config_dir=str(conf_folder()), version_base="1.3"):
            return compose(config_name=name, overrides=overrides)
    finally:
        GlobalHydra.instance().hydra = outer


def check_choices(overrides: list[str], known: dict[str, dict[str, str]]) -> list[str]:
    """The overrides that choose from a group, or say where groups are.

    Raises:
        ConfigError: for a choice that does not exist, or an override that cannot be parsed.
    """
    try:
        parsed = OverridesParser.create().parse_overrides(overrides)
    except HydraException as error:
        raise ConfigError(f"An override is written KEY=VALUE, for example data.ways=5: {_first_line(error)}") from error
    chosen = []
    for override in parsed:
        choices = known.get(override.key_or_group)
        if "@" in override.input_line or (choices is None and override.key_or_group != "hydra.searchpath"):
            continue
        value = None if override.is_delete() else override.value()
        if choices is not None and value is None:
            raise ConfigError(
                f"{override.input_line}: {override.key_or_group} takes one of its choices, or leave it out. "
                f"Choices: {', '.join(choices)}."
            )
        if choices is not None and isinstance(value, str) and value not in choices:
            raise ConfigError(
                f"{override.key_or_group}={value} does not exist.{nearest_name(value, choices)} "
                f"Choices: {', '.join(choices)}."
            )
        chosen.append(override.input_line)
    return chosen


def explain(error: Exception, name: str, chosen: list[str]) -> str:
    """Hydra's message in one line, with the nearest key of the chosen groups where a key is misspelt."""
    text = str(error)
    match = re.search(r"Could not override '([^']+)'", text) or re.search(r"Key '([^']+)' is not in struct", text)
    if match:
        key = match.group(1)
        keys = dotted_keys(_compose(name, chosen))
        return f"There is no setting {key!r}.{nearest_name(key, keys)} See --help, or --cfg for all settings."
    return _first_line(error)


def dotted_keys(config: Any, prefix: str = "") -> list[str]:
    """All keys of a config, nested ones with dots."""
    keys = []
    for key in config:
        keys.append(prefix + str(key))
        node = OmegaConf.select(config, str(key), throw_on_missing=False)
        if isinstance(node, DictConfig):
            keys += dotted_keys(node, f"{prefix}{key}.")
    return keys


def instantiate(config: DictConfig, key: str, **arguments: Any) -> Any:
    """Build the object that a config's `_target_` names: the one place that calls Hydra's `instantiate`.

    Args:
        key: where the config stands, for error messages ("method").
        **arguments: objects handed over beside the settings.
    """
    try:
        # Partial: the objects must not pass through OmegaConf, which turns dataclasses into dicts.
        factory = hydra_instantiate(config, _convert_="all", _partial_=True)
    except InstantiationException as error:
        raise ConfigError(f"{key}: {_first_line(error)}") from error
    check_types(factory.keywords, factory.func, key)
    try:
        return factory(**arguments)
    except TypeError as error:
        match = re.search(r"unexpected keyword argument '(\w+)'", str(error))
        if match is None or match.group(1) not in config:
            raise
        names = inspect.signature(factory.func).parameters
        near = nearest_name(match.group(1), names)
        raise ConfigError(f"{key}.{match.group(1)} is no setting of {config['_target_']}.{near}") from error


def check_types(settings: dict[str, Any], function: Callable, key: str) -> None:
    """Raise `ConfigError` for a setting whose type is plainly not the one that a class or function annotates."""
    try:
        hints = typing.get_type_hints(function.__init__ if inspect.isclass(function) else function)
    except NameError:  # Annotations for a type checker's eyes only.
        return
    for name, value in settings.items():
        if name in hints and not _matches(value, hints[name]):
            kinds = [hints[name]] if hints[name] in KINDS else typing.get_args(hints[name])
            named = " or ".join(KINDS[kind] for kind in kinds if kind in KINDS) or str(hints[name])
            raise ConfigError(f"{key}.{name} must be {named}, but got {value!r}.")


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


def plain(config: DictConfig) -> dict[str, Any]:
    """The resolved config as plain dicts, lists and scalars."""
    return OmegaConf.to_container(config, resolve=True)


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]
