"""Where data sets and their caches lie, and writing there: all or nothing, one process at a time."""

import contextlib
import hashlib
import os
import secrets
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import platformdirs

from lightning_ntk.errors import DataError
from lightning_ntk.settings.paths import as_path

try:
    import fcntl
except ImportError:  # Windows: finished folders are still moved into place whole, but work may be done twice.
    fcntl = None


def data_folder(root: str | None, name: str) -> Path:
    """`data.root`, or the data set's folder below $LIGHTNING_NTK_DATA or the user's data folder."""
    if root is not None:
        return as_path(root, "data.root")
    default = os.environ.get("LIGHTNING_NTK_DATA") or platformdirs.user_data_dir("lightning_ntk")
    return as_path(default, "LIGHTNING_NTK_DATA") / name


def cache_folder(cache_dir: str | None) -> Path:
    """`data.cache_dir`, or $LIGHTNING_NTK_CACHE, or the user's cache folder."""
    if cache_dir is not None:
        return as_path(cache_dir, "data.cache_dir")
    default = os.environ.get("LIGHTNING_NTK_CACHE") or platformdirs.user_cache_dir("lightning_ntk")
    return as_path(default, "LIGHTNING_NTK_CACHE")


@contextlib.contextmanager
def writing(folder: Path, key: str) -> Iterator[None]:
    """Turn what the operating system says of a full or read-only disk into a `DataError` that names the setting."""
    try:
        yield
    except OSError as error:
        raise DataError(
            f"{folder} cannot be written: {error.strerror or error}. Make room there or permit writing, or set {key} "
            "to another folder."
        ) from error


def check_space(folder: Path, needed: int, key: str) -> None:
    """Raise `DataError` unless the disk of a folder has `needed` bytes free."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise DataError(
            f"{folder} has {in_units(free)} free, but {in_units(needed)} are needed. Make room there, or set {key} to "
            "another folder."
        )


def in_units(size: float) -> str:
    """A number of bytes as a person reads it."""
    for unit in ("bytes", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"


@contextlib.contextmanager
def locked(file: Path) -> Iterator[bool]:
    """Hold a file's lock: another process that asks for it waits. The lock goes when its process goes, however.

    Gives whether it is held: on Windows and on a file system without locks nobody waits, and others may be at work.
    """
    with file.open("a") as handle:
        held = fcntl is not None
        if held:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX)
            except OSError:
                held = False
        yield held


@contextlib.contextmanager
def scratch(parent: Path, name: str) -> Iterator[Path]:
    """A new folder beside its final place, removed at the end with whatever has not been moved out of it.

    Its permissions are the usual ones, for it may become a folder of a cache that several people share.
    """
    folder = parent / f"{name}.tmp-{secrets.token_hex(8)}"
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def remove_leftovers(parent: Path, name: str) -> None:
    """Remove the scratch folders that killed processes left; only while holding the lock of `name`."""
    for folder in parent.glob(f"{name}.tmp-*"):
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def replacing(folder: Path, alone: bool) -> Iterator[Path]:
    """A new folder that takes the place of `folder` at the end, where there is no error.

    Args:
        alone: the lock of `folder` is held: what killed processes left is removed first, and an old folder at the end.
            Otherwise other processes may be at work, and a folder that stands there at the end stays: it is theirs.
    """
    if alone:
        remove_leftovers(folder.parent, folder.name)
    with scratch(folder.parent, folder.name) as unfinished:
        yield unfinished
        if alone:
            shutil.rmtree(folder, ignore_errors=True)
        try:
            unfinished.rename(folder)
        except OSError:
            if alone or not folder.is_dir():
                raise


def visible(folder: Path) -> Iterator[Path]:
    """What lies in a folder, without what systems and editors hide there (.DS_Store, ._1.png, .ipynb_checkpoints)."""
    return (path for path in folder.iterdir() if not path.name.startswith("."))


def digest_some(files: Sequence[Path], most: int = 16) -> str:
    """SHA-256 of what at most so many files hold, evenly spaced among them: a sample, for a start must stay fast."""
    digest = hashlib.sha256()
    for file in files[:: max(1, -(-len(files) // most))]:
        digest.update(file.read_bytes())
    return digest.hexdigest()


def fact(file: Path) -> tuple[str, int, int]:
    """What a file is known by: name, size, time of the last change."""
    status = file.stat()
    return file.name, status.st_size, status.st_mtime_ns


def facts(path: Path) -> list[tuple[str, int, int]]:
    """What a file, or each visible file below a folder, is known by: relative name, size, time of the last change."""
    if path.is_file():
        return [fact(path)]
    found = []
    pending = [(str(path), "")]
    while pending:
        folder, prefix = pending.pop()
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if entry.is_dir():
                    pending.append((entry.path, f"{prefix}{entry.name}/"))
                else:
                    status = entry.stat()
                    found.append((prefix + entry.name, status.st_size, status.st_mtime_ns))
    return sorted(found)
