"""The overrides of a command line: KEY=VALUE in Hydra's grammar, and what is wrong with one."""

import re
from collections.abc import Sequence
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException

from lightning_ntk.errors import ConfigError, nearest_name

# Groups of which several choices can be made at once: callbacks=[timing,ntk].
SEVERAL = ("callbacks",)
# Groups of which none need be chosen; ~recipe leaves out the tuned settings of a method on a data set.
OPTIONAL = ("experiment", "recipe")
# A value that starts so is meant in Hydra's grammar: a list, a dict, a quotation, an interpolation.
GRAMMAR = ("[", "{", "'", '"', "$")
# The ends of keys of files and folders. One that looks like a number (2024_01_31) stays what it is.
PATHS = ("run_dir", "ckpt", "run", "runs", "out", "root", "cache_dir", "split_file")


def key_of(override: str) -> str:
    """The key that an override sets, adds (+, ++) or deletes (~)."""
    return override.partition("=")[0].lstrip("+~")


def prefix_of(override: str) -> str:
    """What stands before the key of an override: nothing, `+`, `++` or `~`."""
    return override[: len(override) - len(override.lstrip("+~"))]


def still_valid(earlier: Sequence[str], later: Sequence[str]) -> list[str]:
    """The earlier overrides without those that cannot stand beside a later one of the same key.

    Hydra adds and deletes a key once: `+x=1 +x=1` and `~x ~x` are errors, and so is `~x x=1`.
    """
    given = {(prefix_of(o), key_of(o)) for o in later}
    excluding = {"": (), "+": ("+",), "++": ("+",), "~": ("~", "")}
    return [o for o in earlier if not any((p, key_of(o)) in given for p in excluding.get(prefix_of(o), ()))]


def last_value(overrides: list[str], key: str) -> Any:
    """What the last override of a key sets it to, or None."""
    found = [parse(readable(o)) for o in overrides if key_of(o) == key and "=" in o]
    if not found:
        return None
    return found[-1].input_line.partition("=")[2] if found[-1].is_sweep_override() else found[-1].value()


def parse(override: str) -> Override:
    """Hydra's reading of an override.

    Raises:
        ConfigError: it is not in Hydra's grammar.
    """
    if not key_of(override):
        raise ConfigError(f"An override is written KEY=VALUE, for example data.ways=5, but got {override!r}.")
    try:
        return OverridesParser.create().parse_override(override)
    except HydraException as error:
        reason = str(error).strip().split("\n")[0]
        raise ConfigError(
            f"An override is written KEY=VALUE, for example data.ways=5, but got {override!r}: {reason}."
        ) from error


def readable(override: str) -> str:
    """The override with its value in quotes where Hydra's grammar has no place for it: a path with `=`, `(`, `é`."""
    key, assigns, value = override.partition("=")
    if not assigns or value.startswith(GRAMMAR):
        return override
    try:
        parsed = parse(override)
        # A list of values to sweep over, unless it is a path.
        fits = not (parsed.is_sweep_override() and "/" in value)
        if fits and key_of(override).rpartition(".")[2] in PATHS:
            fits = not isinstance(parsed.value(), (int, float))
    except ConfigError:
        fits = False
    return override if fits else f"{key}={quoted(value)}"


def quoted(value: str) -> str:
    """A value in quotes of Hydra's grammar, where a backslash stands for itself but before a quote."""
    return "'" + re.sub(r"(\\*)('|$)", lambda m: 2 * m[1] + (m[2] and "\\'"), value) + "'"


def check_choices(overrides: list[str], known: dict[str, dict[str, str]]) -> list[str]:
    """The overrides that choose from a group, or say where groups are.

    Args:
        known: the groups and their choices.

    Raises:
        ConfigError: for a choice that does not exist, or an override that cannot be used.
    """
    chosen = []
    for override in map(parse, overrides):
        choices = known.get(override.key_or_group)
        if override.is_sweep_override() and override.key_or_group in SEVERAL:
            key, _, value = override.input_line.partition("=")
            raise ConfigError(f"{override.input_line}: several choices of {key} stand in brackets: {key}=[{value}].")
        if override.is_sweep_override():
            raise ConfigError(
                f"{override.input_line} lists several values, but one command is one run: start one for each. A comma "
                f"that belongs to the value needs quotes that reach us: \"{override.key_or_group}='...'\"."
            )
        if "@" in override.input_line or (choices is None and override.key_or_group != "hydra.searchpath"):
            if override.is_delete() and "." not in override.key_or_group and "@" not in override.input_line:
                raise ConfigError(f"{override.input_line}: this setting cannot be left out.")
            continue
        if choices is not None:
            _check_choice(override, choices)
        chosen.append(override.input_line)
    return chosen


def _check_choice(override: Override, choices: dict[str, str]) -> None:
    if override.is_delete() and override.key_or_group in OPTIONAL:
        return
    value = None if override.is_delete() else override.value()
    if isinstance(value, dict):  # Settings of a group at once: method={lr: 1}.
        return
    group = override.key_or_group
    several = isinstance(value, list) and group in SEVERAL
    names = value if several else [value]
    if not all(isinstance(name, str) for name in names):
        some = f"its choices, one or a list ({group}=[A,B])" if group in SEVERAL else "one of its choices"
        none = f"or choose none by ~{group}" if group in OPTIONAL else "or leave it out"
        raise ConfigError(f"{override.input_line}: {group} takes {some}, {none}. Choices: {', '.join(choices)}.")
    for name in names:
        if name not in choices:
            raise ConfigError(
                f"{group}={name} does not exist.{nearest_name(name, choices)} Choices: {', '.join(choices)}."
            )
