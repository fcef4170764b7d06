"""The lock of a folder that one process at a time writes: a run's, or a sweep's. It goes with its process, however."""

import contextlib
import os
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from lightning_ntk.errors import ConfigError

try:
    import fcntl
except ImportError:  # Windows.
    fcntl = None

LOCK_FILE = ".lock"
# Names the open file of a lock that this process was started with: a job of a sweep has one before it trains.
HELD_VARIABLE = "LIGHTNING_NTK_LOCK"


def lock(file: Path, wait_s: float = 0.0) -> int | None:
    """Take a lock; returns the open file that holds it until it is closed, or None when somebody else has it.

    A file system that knows no locks gives none: then this says so on stderr and goes on.
    """
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
    if fcntl is None:
        return descriptor
    deadline = time.monotonic() + wait_s
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            if time.monotonic() >= deadline:
                os.close(descriptor)
                return None
            time.sleep(0.1)
        except OSError as error:
            sys.stderr.write(
                f"{file.parent} is on a file system without locks ({error.strerror}): nothing keeps a second process "
                "out, so do not start one.\n"
            )
            break
    os.truncate(descriptor, 0)
    os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
    return descriptor


def holder(file: Path) -> str:
    """The process that has a lock, or had it last: `process NUMBER on MACHINE`."""
    return file.read_text(encoding="utf-8").strip()


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Hold the folder of a run.

    Raises:
        ConfigError: another process is at work on the run, or the folder cannot be written.
    """
    file = folder / LOCK_FILE
    if _is_held_from_the_start(file):
        yield
        return
    try:
        held = lock(file)
        who = None if held is not None else holder(file)
    except OSError as error:
        raise ConfigError(f"{folder} cannot be written: {error.strerror}.") from error
    if held is None:
        raise ConfigError(f"{folder} is being written by another process ({who}). Wait for it, or end it.")
    try:
        yield
    finally:
        os.close(held)


def _is_held_from_the_start(file: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(int(os.environ[HELD_VARIABLE])), file.stat())
    except (KeyError, ValueError, OSError):
        return False


def is_locked(file: Path) -> bool:
    """Whether a living process has a lock."""
    if fcntl is None or not file.exists():
        return False
    with file.open("r+b") as target:  # NFS gives locks to those who may write.
        try:
            fcntl.flock(target, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:  # No locks here.
            return False
    return False
