"""What the benchmark can be told on its command line."""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_ntk.errors import ConfigError, nearest_name
from lightning_ntk.settings.paths import as_path

TABLES = {
    "kernel": "the support NTK beside neural-tangents and torch.func",
    "steps": "meta-steps of Meta-RKHS-I and -II beside learn2learn's MAML and FOMAML",
    "memory": "peak memory of one task, each method in a process of its own",
    "shots": "growth of the meta-step from `shots` to 5 x `shots`",
    "batch": "time a task over the size of the meta-batch",
    "norms": "the meta-steps under the normalisations of `norms`, as information",
    "compiled": "meta-steps under the normalisations of `norms` with method.compile=true beside those without",
    "attacks": "PGD in passes of the model, and SimBA on all queries at once beside one at a time",
    "resnet12": "time and memory of Meta-RKHS-II on ResNet-12",
    "scaling": "one training by two processes beside one, and what a sweep adds to a job",
    "data": "episodes a second beside learn2learn's transforms, and their share of a meta-step",
}
NORMS = ("group", "batch")

HELP = """usage: lightning-ntk benchmark [KEY=VALUE ...] [--quick]
       lightning-ntk benchmark runs=FOLDER [level=0.7]

Measure the engine beside its peers in one run: methods take turns, and ratios of medians are reported. Prints the
tables and writes benchmark.md and benchmark.json. `make peers` installs neural-tangents in an environment of its own.

  device=cpu          cpu or cuda
  tables={tables}
                      which tables, joined by commas:
{table_lines}
  norms=group         normalisations of the tables `norms` and `compiled`: group, batch or both (batch takes minutes
                      on a CPU)
  repeats=7           repetitions of each work; a slow one gets fewer, see limit_s
  limit_s=60          seconds that one work's repetitions may take together
  tasks=              tasks of a meta-step; default 1 on a CPU, 16 on a GPU
  threads=            CPU threads; default all
  peers=              the Python that has neural-tangents; default .venv-peers, as `make peers` makes it; none: without
  out=                folder of the results, which are written over; default ./runs/benchmark, and with --quick or
                      runs= ./runs/benchmark_quick and ./runs/benchmark_runs
  ways=5 shots=5 queries=15 image_size=84 channels=3 filters=32 seed=0
                      the problem: queries a class, images (1 channel: grey), Conv4's filters
  runs=FOLDER         compare finished trainings instead: seconds of training to a validation accuracy
  level=0.7           that accuracy
  --quick             small sizes and two repetitions: shows in a minute that everything works; the ratios mean little
  --help              this page

Examples:
  lightning-ntk benchmark --quick
  lightning-ntk benchmark device=cuda
  lightning-ntk benchmark tables=kernel,steps repeats=15
  lightning-ntk benchmark runs=runs/omniglot level=0.7
"""


@dataclasses.dataclass(frozen=True)
class Settings:
    """One benchmark; see `HELP` for each. `peers` is None for the default place, "none" to go without."""

    quick: bool = False
    device: str = "cpu"
    tables: tuple[str, ...] = tuple(TABLES)
    norms: tuple[str, ...] = ("group",)
    repeats: int = 7
    limit_s: float = 60.0
    tasks: int = 1
    threads: int | None = None
    peers: str | None = None
    out: Path = Path("runs/benchmark")
    ways: int = 5
    shots: int = 5
    queries: int = 15
    image_size: int = 84
    channels: int = 3
    filters: int = 32
    seed: int = 0
    runs: Path | None = None
    level: float = 0.7

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width."""
        return (self.channels, self.image_size, self.image_size)

    @property
    def is_standard(self) -> bool:
        """Whether this is the problem that the goals are stated for."""
        sizes = (self.ways, self.shots, self.queries, *self.image_shape, self.filters)
        return sizes == (5, 5, 15, 3, 84, 84, 32)


QUICK = {
    "tables": tuple(name for name in TABLES if name not in ("norms", "compiled", "resnet12", "scaling")),
    "repeats": 2,
    "shots": 1,
    "queries": 2,
    "image_size": 16,
    "filters": 8,
}
# Smallest values of the whole numbers.
LEAST = {"repeats": 1, "tasks": 1, "threads": 1, "ways": 2, "shots": 1, "queries": 1, "image_size": 16}
LEAST |= {"channels": 1, "filters": 1}
# And the largest, for what takes them.
MOST = 2**31 - 1


def help_page() -> str:
    """The text of --help."""
    lines = "\n".join(f"                        {name:<10}{text}" for name, text in TABLES.items())
    return HELP.format(tables=",".join(TABLES), table_lines=lines)


def parse_settings(words: Sequence[str]) -> Settings:
    """Settings from a command line's words.

    Raises:
        ConfigError: for an unknown or misspelt word, or a value of the wrong kind, naming the key.
    """
    names = [field.name for field in dataclasses.fields(Settings) if field.name != "quick"]
    given: dict[str, Any] = {}
    for word in words:
        key, has_value, text = word.partition("=")
        if word == "--quick":
            given["quick"] = True
        elif word.startswith("-"):
            bare = word.lstrip("-").partition("=")[0]
            near = f" Write {word.lstrip('-')}." if bare in names else nearest_name(word, ["--quick", "--help"])
            raise ConfigError(f"There is no option {word}.{near}")
        elif key not in names:
            raise ConfigError(f"benchmark has no setting {key!r}.{nearest_name(key, names)} See --help.")
        elif not has_value or not text:
            raise ConfigError(f"A setting is written KEY=VALUE, but got {word!r}. See --help.")
        else:
            given[key] = _value(key, text)
    tasks = {"tasks": 16} if given.get("device") == "cuda" and not given.get("quick") else {}
    settings = Settings(**{**tasks, **(QUICK if given.get("quick") else {}), **given})
    if "out" not in given and (settings.runs is not None or settings.quick):
        kind = "quick" if settings.runs is None else "runs"
        settings = dataclasses.replace(settings, out=settings.out.with_name(f"{settings.out.name}_{kind}"))
    if "level" in given and settings.runs is None:
        raise ConfigError("level= is read off finished runs: name their folder too, runs=FOLDER level=0.7.")
    if settings.filters % 8 and {"norms", "compiled"} & {*settings.tables} and "group" in settings.norms:
        raise ConfigError(f"filters={settings.filters} is no multiple of 8, which norms=group needs.")
    return settings


def _value(key: str, text: str) -> Any:
    """A setting's text as its type."""
    if key in ("tables", "norms"):
        choices = TABLES if key == "tables" else NORMS
        values = tuple(dict.fromkeys(text.split(",")))
        for value in values:
            if value not in choices:
                near = nearest_name(value, choices)
                raise ConfigError(f"{key}={value} does not exist.{near} Choices: {', '.join(choices)}.")
        return values
    if key == "device":
        if text not in ("cpu", "cuda"):
            raise ConfigError(f"device must be cpu or cuda, but got {text!r}.{nearest_name(text, ('cpu', 'cuda'))}")
        return text
    if key in ("out", "runs"):
        return as_path(text, key)
    if key == "peers":
        return text
    return _number(key, text)


def _number(key: str, text: str) -> float | int:
    """A number of the range that its setting has."""
    if key in ("level", "limit_s"):
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        highest = 1.0 if key == "level" else math.inf
        if not 0 < value <= highest:
            kind = "an accuracy in (0, 1]" if key == "level" else "a positive number of seconds"
            raise ConfigError(f"{key} must be {kind}, but got {text!r}.")
        return value
    least = LEAST.get(key, 0)
    if not text.isdecimal() or not least <= int(text) <= MOST:
        bound = f"at most {MOST}" if text.isdecimal() and int(text) > MOST else f"at least {least}"
        raise ConfigError(f"{key} must be a whole number of {bound}, but got {text!r}.")
    return int(text)
