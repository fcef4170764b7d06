"""The decoded cache: a data set's images as memory-mapped uint8 arrays, made once and shared by every process.

A cache is a folder `NAME-KEY` with one .npy file a split and an index.json; the key is a hash of what it is made from.
It is made beside its place and moved there whole, so a reader never sees half of one. Who needs it while another
process makes it waits for that.
"""

import contextlib
import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from datamodules.episodes.image_store import map_array
from datamodules.files.decoding import Format, Item, decode
from datamodules.files.storage import check_space, locked, replacing, scratch, writing
from lightning_ntk.errors import DataError

VERSION = 2  # Raise when the decoding or the layout changes: caches are keyed by it.
INDEX = "index.json"
AT_ONCE = 512  # Images decoded before they are written: what the memory holds, and the steps of the progress bar.

# The images of each class of a split, to be decoded.
Items = Mapping[str, Sequence[Item]]
# From a folder to work in to a context in which the items of a split can be asked for.
Opened = Callable[[Path], AbstractContextManager[Callable[[str], Items]]]


class PackedClasses(Mapping[str, np.ndarray]):
    """Classes whose images lie in one memory-mapped file: name to uint8 `[n, channels, height, width]`, uncopied.

    Pages are read when touched and shared between processes. Pickling one hands over the file's name, not its content.

    Attributes:
        images: all images, `[N, channels, height, width]`, class after class in the order of the names.
        digest: SHA-256 of names and images, as `ImageDataModule` computes it of arrays in memory.
    """

    def __init__(self, file: Path, digest: str, classes: Sequence[tuple[str, int]]) -> None:
        self.file, self.digest, self._classes = file, digest, classes
        self.images = map_array(file)
        ends = np.cumsum([0, *(count for _, count in classes)]).tolist()
        if self.images.dtype != np.uint8 or self.images.ndim != 4 or len(self.images) != ends[-1]:
            raise ValueError(f"{file} is not the array that its index describes")
        array = self.images.view(np.ndarray)  # Indexing a np.memmap is slower.
        self._views = {name: array[start:end] for (name, _), start, end in zip(classes, ends, ends[1:], strict=False)}

    def __getitem__(self, name: str) -> np.ndarray:
        return self._views[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._views)

    def __len__(self) -> int:
        return len(self._views)

    def __reduce__(self) -> tuple:
        return PackedClasses, (self.file, self.digest, self._classes)


def cache_key(*made_from: Any) -> str:
    """A hash of what a cache is made from: plain values, for example settings and the `storage.facts` of files."""
    return hashlib.sha256(json.dumps([VERSION, *made_from]).encode()).hexdigest()[:20]


def read_cache(folder: Path) -> dict[str, PackedClasses] | None:
    """The cached splits, or None when there is no such cache, or it is damaged.

    Raises:
        DataError: the system does not let it be read.
    """
    try:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        if not isinstance(index, dict) or not index:
            return None
        return {
            # What older caches have behind a class's name and count is a hash that nothing reads.
            split: PackedClasses(folder / f"{split}.npy", entry["digest"], [(c, n) for c, n, *_ in entry["classes"]])
            for split, entry in index.items()
        }
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError, EOFError):
        return None
    except OSError as error:
        raise DataError(
            f"The cache {folder} cannot be read: {error.strerror or error}. Permit reading it, or set data.cache_dir "
            "to another folder."
        ) from error


def load_or_build(folder: Path, form: Format, splits: Sequence[str], opened: Opened) -> dict[str, PackedClasses]:
    """The cached splits; made first if there are none.

    Args:
        folder: of this cache, below the folder of all caches.
        form: what the images become.
        splits: the names of those that there may be.
        opened: takes an empty folder to work in, and gives a context in which the images of a split can be asked for:
            an empty mapping for a split that the data set lacks.

    Raises:
        DataError: an image cannot be read, or the disk cannot be written. Nothing stays of what was begun.
    """
    found = read_cache(folder)
    if found is not None:
        return found
    with writing(folder.parent, "data.cache_dir"):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with locked(folder.with_name(f"{folder.name}.lock")) as alone:
            found = read_cache(folder)  # Another process may have made it meanwhile.
            if found is None:
                build(folder, form, splits, opened, alone)
                found = read_cache(folder)
    if found is None:
        raise DataError(
            f"The cache {folder} cannot be read back. Remove it, or set data.cache_dir to a folder on another disk."
        )
    return found


def build(folder: Path, form: Format, splits: Sequence[str], opened: Opened, alone: bool) -> None:
    """Decode all splits into a folder beside, and move it into place; `alone`: the caller holds the lock."""
    with replacing(folder, alone) as unfinished, scratch(folder.parent, folder.name) as workspace:
        index = {}
        with contextlib.ExitStack() as stack:
            open_split = reading(stack.enter_context, opened(workspace))
            for split in splits:
                items = reading(open_split, split)
                if items:
                    check_space(unfinished, sum(map(len, items.values())) * int(np.prod(form.shape)), "data.cache_dir")
                    index[split] = write_split(unfinished / f"{split}.npy", items, form)
        (unfinished / INDEX).write_text(json.dumps(index), encoding="utf-8")


def reading(function: Callable, *arguments: Any) -> Any:
    """The result of a function that reads a data set: what cannot be read there is not the cache's fault."""
    try:
        return function(*arguments)
    except OSError as error:
        raise DataError(f"{error.filename or 'The data set'} cannot be read: {error.strerror or error}.") from error


def write_split(file: Path, items: Items, form: Format) -> dict[str, Any]:
    """Decode the images of a split into a .npy file; returns its entry of the index.

    Written in order through the file, not through a map of it: a full disk is then an error, not a fatal signal.
    """
    names = sorted(items)
    every = [item for name in names for item in items[name]]
    whole = hashlib.sha256()
    classes = []
    with file.open("wb") as target, ThreadPoolExecutor(cores()) as pool, progress_bar() as progress:
        shape = (len(every), *form.shape)
        np.lib.format.write_array_header_1_0(target, {"descr": "|u1", "fortran_order": False, "shape": shape})
        task = progress.add_task(f"Decoding {file.stem}", total=len(every))
        for name in names:
            whole.update(name.encode())
            for start in range(0, len(items[name]), AT_ONCE):
                chunk = items[name][start : start + AT_ONCE]
                pixels = np.stack(list(pool.map(decode, chunk, [form] * len(chunk)))).tobytes()
                target.write(pixels)
                whole.update(pixels)
                progress.advance(task, len(chunk))
            classes.append((name, len(items[name])))
    return {"digest": whole.hexdigest(), "classes": classes}


def cores() -> int:
    """The cores that this process may use: a batch system gives it some of the machine's."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def progress_bar() -> Progress:
    """On a terminal's error output, and nowhere else."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty())
