"""A grid in Hydra's override grammar: which settings vary, and one job for each combination."""

import hashlib
import itertools
import re
from collections.abc import Sequence
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException

from lightning_ntk.errors import ConfigError
from lightning_ntk.settings.overrides import GRAMMAR, key_of, parse, readable

# File systems allow 255 bytes; the folders inside a job's need some of a path, too.
LONGEST_NAME = 120


class _Choices:
    """What Hydra's `glob` asks of a config loader: the choices of a group, the user's own among them."""

    def __init__(self, known: dict[str, dict[str, str]]) -> None:
        self.known = known

    def get_group_options(self, group: str, results_filter: Any = None) -> list[str]:
        if group not in self.known:
            raise ConfigError(
                f"{group}=glob(...) needs a group of choices, but {group!r} is none. Groups: {', '.join(self.known)}."
            )
        return list(self.known[group])


def read_overrides(words: Sequence[str], known: dict[str, dict[str, str]]) -> list[Override]:
    """Hydra's reading of the overrides, the last one of a key where it is given twice.

    Args:
        known: the groups and their choices, for `glob`.

    Raises:
        ConfigError: an override is not in Hydra's grammar.
    """
    parser = OverridesParser.create(config_loader=_Choices(known))
    read: dict[str, Override] = {}
    for word in words:
        try:
            override = parser.parse_overrides([word])[0]
        except HydraException:
            override = parse(_readable_list(word))  # Paths, or an error that says what is wrong.
        if key_of(word) in ("run_dir", "ckpt"):
            raise ConfigError(f"{word}: each job of a sweep has a folder of its own. Set out=FOLDER for all of them.")
        read.pop(key_of(word), None)
        read[key_of(word)] = override
    return list(read.values())


def _readable_list(word: str) -> str:
    """The override with those of its values in quotes that Hydra's grammar has no place for; a comma parts values."""
    key, assigns, value = word.partition("=")
    if not assigns or value.startswith(GRAMMAR):
        return readable(word)
    return f"{key}={','.join(readable(f'{key}={part}').partition('=')[2] for part in value.split(','))}"


def values_of(override: Override) -> list[str]:
    """The values that an override takes one after the other, each as it is written in an override."""
    if override.is_delete():
        return [""]
    if not override.is_sweep_override():
        return [override.get_value_element_as_str()]
    if not override.is_discrete_sweep():
        raise ConfigError(
            f"{override.input_line}: an interval has no list of values. Search in it with search=optuna, or give "
            "values: a,b,c or range(start,stop,step)."
        )
    values = list(dict.fromkeys(override.sweep_string_iterator()))
    if not values:
        raise ConfigError(f"{override.input_line} stands for no value at all.")
    return values


def expand(overrides: Sequence[Override], most: int) -> dict[str, list[str]]:
    """`{name: overrides of the job}`: every combination of the values, named after what varies.

    Args:
        most: the number of jobs from which on a grid is refused.

    Raises:
        ConfigError: there are more jobs than `most`, or an interval stands among the values.
    """
    axes = [(override, values_of(override)) for override in overrides]
    number = 1
    for _, values in axes:
        number *= len(values)
    if number > most:
        sizes = " x ".join(str(len(values)) for _, values in axes if len(values) > 1)
        raise ConfigError(
            f"The grid has {number} jobs ({sizes}), more than max_jobs={most}. Say --many, or max_jobs={number}, if "
            "that is what you want."
        )
    jobs: dict[str, list[str]] = {}
    taken: set[str] = set()
    for combination in itertools.product(*(values for _, values in axes)):
        words = [assignment(o, value) for (o, _), value in zip(axes, combination, strict=True)]
        varying = [word for word, (o, _) in zip(words, axes, strict=True) if o.is_sweep_override()]
        name = folder_name(varying)
        # Some file systems do not tell capitals apart, and two values may differ in what no folder name holds.
        if name.lower() in taken:
            name = f"{name}_{digest(','.join(varying))}"
        taken.add(name.lower())
        jobs[name] = words
    return jobs


def assignment(override: Override, value: str) -> str:
    """KEY=VALUE with one value of an override (with its + or ~ where it has one)."""
    return override.input_line if override.is_delete() else f"{override.get_key_element()}={value}"


def folder_name(words: Sequence[str]) -> str:
    """A readable folder name from overrides: `method=maml,seed=0`."""
    text = ",".join(words)
    name = re.sub(r"[^\w.=,+-]+", "_", text) or "job"
    return f"{name[:100]}_{digest(text)}" if len(name.encode()) > LONGEST_NAME else name


def digest(text: str) -> str:
    """Eight digits that stand for a text."""
    return hashlib.sha256(text.encode()).hexdigest()[:8]
