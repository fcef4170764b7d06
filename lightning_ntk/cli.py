"""`lightning-ntk train|evaluate|sweep|compare|data|dashboard|benchmark`."""

import importlib
import os
import sys
from collections.abc import Callable

from lightning_ntk.running.allocation import keep_freed_memory
from lightning_ntk.version import __version__

COMMANDS = {
    "train": "train one method on one data set and test it",
    "evaluate": "test a finished run again, with other ways, shots, data or test-time settings",
    "sweep": "train a grid of settings, each run in a process of its own, or search for settings",
    "compare": "put runs into one table, figure and page, with paired differences",
    "data": "show what a data set holds and what is wrong with it, with a picture of episodes",
    "dashboard": "create or update the W&B workspace and report of a project",
    "benchmark": "measure the engine's time and memory beside its peers",
}
# Their help lists the choices of conf/; the others write their own.
COMPOSED = ("train", "evaluate", "sweep")
# Where a command is no module of its own name.
MODULES = {"sweep": "sweep.command", "dashboard": "comparison.dashboard"}
EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130
EXIT_UNREAD = 1
EXIT_LOST_RANK = 1


def main(argv: list[str] | None = None) -> int:
    """Dispatch a command line; returns the exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        lines = [f"  {name:<11}{text}" for name, text in COMMANDS.items()]
        sys.stdout.write("usage: lightning-ntk COMMAND ...\n\n" + "\n".join(lines))
        sys.stdout.write(
            "\n\nlightning-ntk COMMAND --help says more, --version which versions. Run folders go to ./runs.\n"
        )
        return 0
    if words[0] == "--version":
        from lightning_ntk.running.results import package_versions

        versions = {"lightning-ntk": __version__} | package_versions()
        named = ("lightning-ntk", "torch", "pytorch-lightning", "python")
        sys.stdout.write(", ".join(f"{name} {versions[name]}" for name in named) + "\n")
        return 0
    name, rest = words[0], words[1:]
    if name not in COMMANDS:
        from lightning_ntk.errors import nearest_name

        near = nearest_name(name, COMMANDS)
        sys.stderr.write(f"lightning-ntk: there is no command {name!r}.{near} Commands: {', '.join(COMMANDS)}.\n")
        return EXIT_USER_ERROR
    if name in COMPOSED and ("--help" in rest or "-h" in rest):
        # Without torch and Lightning: help is there at once.
        from lightning_ntk.settings.arguments import parse_command

        return guarded(lambda: parse_command(name, rest))
    return guarded(lambda: importlib.import_module(f"lightning_ntk.{MODULES.get(name, name)}").main(rest))


def guarded(command: Callable[[], object]) -> int:
    """Run a command, also one that was started as `python -m lightning_ntk.train`, as torchrun and W&B's agents do; an
    error that the user can act on becomes one line and its status. It ends where nobody reads its output any more."""
    keep_freed_memory()
    for stream in (sys.stdout, sys.stderr):
        # A progress bar has signs that not every output can write; a run must not end by one.
        if hasattr(stream, "reconfigure") and stream.errors == "strict":
            stream.reconfigure(errors="replace")
    try:
        status = _status_of(command)
        sys.stdout.flush()
    except BrokenPipeError:
        try:
            sys.stdout.write("\n")
            sys.stdout.flush()
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more at its end.
            return EXIT_UNREAD
        raise  # It was another pipe.
    return status


def _status_of(command: Callable[[], object]) -> int:
    from lightning_ntk.errors import LightningNTKError

    try:
        command()
    except LightningNTKError as error:
        sys.stderr.write(f"lightning-ntk: {error}\n")
        return error.status
    except RuntimeError as error:
        from lightning_ntk.running.cluster import LOST_RANK

        lost = LOST_RANK.search(str(error))
        if lost is None:
            raise
        sys.stderr.write(
            f"lightning-ntk: another process of this run has ended ({lost.group()}). It has said why, or was killed, "
            "perhaps because the memory was full.\n"
        )
        return EXIT_LOST_RANK
    except KeyboardInterrupt as interruption:
        sys.stderr.write(f"\nlightning-ntk: interrupted. {interruption}\n")
        return EXIT_INTERRUPTED
    return 0


if __name__ == "__main__":
    sys.exit(main())
