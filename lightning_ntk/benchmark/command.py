"""`lightning-ntk benchmark`: settings in, tables out."""

import contextlib
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from lightning_ntk.benchmark.settings import Settings, help_page, parse_settings
from lightning_ntk.errors import ConfigError

if TYPE_CHECKING:
    from lightning_ntk.benchmark.rows import Table


def main(argv: list[str] | None = None) -> None:
    """Measure as the command line asks; see `lightning-ntk benchmark --help`."""
    words = list(sys.argv[1:] if argv is None else argv)
    if "--help" in words or "-h" in words:
        sys.stdout.write(help_page())
        return
    benchmark(parse_settings(words))


def benchmark(settings: Settings) -> dict:
    """Measure (or read `runs`), print, write; returns what benchmark.json holds.

    Raises:
        ConfigError: no such device, no such Python for the peers, or a folder that cannot be written.
    """
    # Imported here: --help and a misspelt word need no torch.
    from lightning_ntk.benchmark import report
    from lightning_ntk.benchmark.goals import figures
    from lightning_ntk.benchmark.machine import describe_machine
    from lightning_ntk.benchmark.measure import float32_and_threads
    from lightning_ntk.benchmark.peers import find_python
    from lightning_ntk.benchmark.runs import runs_table
    from lightning_ntk.benchmark.tables import measure_tables

    check_device(settings.device)
    find_python(settings.peers)
    try:
        settings.out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=settings.out).close()  # Now, rather than after the first table.
    except OSError as error:
        raise ConfigError(f"out={settings.out} cannot be written: {error}. Name another folder by out=.") from error
    tables: list[Table] = []
    with float32_and_threads(settings.threads), quiet(), progress() as say:
        say("the machine")
        machine = describe_machine(settings.device, settings.threads)
        if settings.runs is not None:
            source = [runs_table(settings.runs, settings.level)]
        else:
            source = measure_tables(settings, say, machine["versions"])
        for table in source:
            tables.append(table)
            # After each table: a long run that is stopped leaves what it has.
            content = report.write(settings.out, report.Result(machine, settings, tables, figures(tables, settings)))
    result = report.Result(machine, settings, tables, figures(tables, settings))
    report.show(result)
    sys.stdout.writelines(f"{settings.out / name}\n" for name in report.FILES)
    return content


def check_device(device: str) -> None:
    """Raise `ConfigError` when this torch has no such device."""
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device=cuda, but torch sees no GPU here. Use device=cpu, or look at `nvidia-smi`.")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the warnings that other packages give on first use."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning)
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        warnings.filterwarnings("ignore", message="Gym has been unmaintained")
        yield


@contextlib.contextmanager
def progress() -> Iterator[Callable[[str], None]]:
    """A function that says on stderr what is measured now: one line that changes, or plain lines in a log."""
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    console = Console(stderr=True, markup=False, highlight=False)
    if not console.is_terminal:
        yield lambda text: sys.stderr.write(f"{text}\n")
        return
    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn())
    # Redrawn seldom: the cores belong to what is measured.
    with Progress(*columns, console=console, transient=True, refresh_per_second=2) as bar:
        line = bar.add_task("starting", total=None)
        yield lambda text: bar.update(line, description=text)
