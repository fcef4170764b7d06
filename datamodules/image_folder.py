"""Any folder of images in class folders."""

import contextlib
import itertools
import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from datamodules.base import SPLITS
from datamodules.cached import CachedImages
from datamodules.files.cache import Items, reading
from datamodules.files.decoding import EXTENSIONS, Item, decode, image_files, is_image
from datamodules.files.splits import find_split_file, read_split
from datamodules.files.storage import digest_some, fact, visible
from datamodules.images import Classes
from lightning_ntk.errors import ConfigError, DataError
from lightning_ntk.settings.paths import as_path

# Class folders of at least so many files go through the decoded cache. Fewer are read in about a second.
CACHED_FROM = 2000
VERSION = 2  # Raise when `_items` changes: the cache is keyed by it.

EXPECTED = """Expected either
  ROOT/train/CLASS/*.png, ROOT/test/CLASS/*.png and, if you validate, ROOT/val/CLASS/*.png
or one folder of classes, ROOT/CLASS/*.png, and data.split_file=FILE.csv with the header "split,class"."""


class ImageFolder(CachedImages):
    """Images in class folders, split by folders (train/, val/, test/) or by a file. `val` may be missing.

    A root that holds no more than test/ and val/ is a data set to test on: out of distribution, or with
    `lightning-ntk evaluate`.

    Args:
        root: the folder.
        split_file: CSV with header `split,class`; a class is a folder relative to root and may be nested
            ("Greek/character01"). The bare name of a file in conf/splits will do: "omniglot_small".
        image_size: side of the square that images are resized to, in pixels.
        channels: 3 (RGB) or 1 (grey).
        **rest: see `CachedImages`.

    conf/experiment/omniglot_small.yaml is an example.
    """

    def __init__(
        self,
        *,
        root: str | None = None,
        split_file: str | None = None,
        image_size: int = 84,
        channels: int = 3,
        **rest: Any,
    ) -> None:
        super().__init__(image_size=image_size, channels=channels, **rest)
        if root is None:
            raise ConfigError(f"data.root is missing: data.root=PATH names the folder of images. {EXPECTED}")
        self.root = as_path(root, "data.root")
        self.split_file = None if split_file is None else find_split_file(split_file)

    @property
    def trains(self) -> bool:
        """Whether there is anything to train on."""
        folders = {path.name for path in visible(self.root) if path.is_dir()} if self.root.is_dir() else set()
        return self.split_file is not None or "test" not in folders or not folders <= {"test", "val"}

    def prepare_data(self) -> None:
        if reading(self._is_large, reading(self._folders)):
            super().prepare_data()

    def class_splits(self) -> dict[str, Classes]:
        folders = reading(self._folders)
        if reading(self._is_large, folders):
            return super().class_splits()

        def decoded(folder: Path) -> np.ndarray:
            return np.stack([decode(item, self.form) for item in reading(_items, folder)])

        return {
            split: {name: decoded(folder) for name, folder in classes.items()} for split, classes in folders.items()
        }

    def unreadable(self) -> Iterator[str]:
        for path in (path for classes in reading(self._folders).values() for path in classes.values()):
            try:
                yield from self.undecodable(reading(_items, path))
            except DataError as error:
                yield str(error)

    def passed_over(self) -> Iterator[str]:
        folders = {path for classes in reading(self._folders).values() for path in classes.values()}
        others = [other for path in folders for other in reading(_others, path) if other not in folders]
        kinds = Counter(_kind(path) for path in others if not path.is_dir())
        if kinds:
            listed = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
            yield f"Files passed over in class folders: {listed}. Images are {', '.join(EXTENSIONS)}."
        inner = sorted(str(path.relative_to(self.root)) for path in others if path.is_dir())
        if inner:
            yield f"Folders passed over in class folders: {len(inner)}, the first {inner[0]}."
        beside = [] if self.split_file is not None else reading(_beside, self.root)
        if beside:
            first = beside[0].relative_to(self.root)
            yield f"Files beside class folders, of no class and passed over: {len(beside)}, the first {first}."

    def made_from(self) -> list[Any]:
        classes = [(split, name, path) for split, own in self._folders().items() for name, path in sorted(own.items())]
        files = [image_files(path) for _, _, path in classes]
        known = [[split, name, list(map(fact, own))] for (split, name, _), own in zip(classes, files, strict=True)]
        # Names, sizes and times agree between two variants of uncompressed images whose times were set.
        return [VERSION, known, digest_some(list(itertools.chain(*files)))]

    @contextlib.contextmanager
    def opened(self, workspace: Path) -> Iterator[Callable[[str], Items]]:
        folders = self._folders()
        yield lambda split: {name: _items(path) for name, path in folders.get(split, {}).items()}

    @staticmethod
    def _is_large(folders: dict[str, dict[str, Path]]) -> bool:
        files = (file for classes in folders.values() for path in classes.values() for file in path.iterdir())
        return next(itertools.islice(files, CACHED_FROM - 1, None), None) is not None

    def _folders(self) -> dict[str, dict[str, Path]]:
        """The folder of each class of each split."""
        if not self.root.is_dir():
            raise ConfigError(f"data.root={self.root} is not a folder. {EXPECTED}")
        folders = self._split_by_folders() if self.split_file is None else self._split_by_file(self.split_file)
        for split in ("train", "test") if self.trains else ("test",):
            if not folders.get(split):
                where = f"{self.root / split}" if self.split_file is None else f"data.split_file={self.split_file}"
                raise ConfigError(f"{where} has no classes to {split} on. {EXPECTED}")
        return folders

    def _split_by_folders(self) -> dict[str, dict[str, Path]]:
        splits = {split: self.root / split for split in SPLITS if _is_folder(self.root / split)}
        missing = [split for split in ("train", "test") if split not in splits and (self.trains or split == "test")]
        if missing:
            raise ConfigError(f"data.root={self.root} has no folder {' and no folder '.join(missing)}. {EXPECTED}")
        if "val" not in splits:
            meant = [p.name for p in visible(self.root) if p.is_dir() and p.name.lower().startswith(("val", "dev"))]
            if meant:
                raise ConfigError(f"data.root={self.root} has the folder {meant[0]}, but validation is val. Rename it.")
        return {
            split: {class_name(path): path for path in sorted(visible(folder)) if _is_folder(path)}
            for split, folder in splits.items()
        }

    def _split_by_file(self, file: Path) -> dict[str, dict[str, Path]]:
        split_file = read_split(file)
        missing = [name for names in split_file.classes.values() for name in names if not (self.root / name).is_dir()]
        if missing:  # Only then are all folders looked through, for a name that is close.
            there = {name for names in split_file.classes.values() for name in names} - set(missing)
            split_file.check_known({*_below(self.root), *there}, f"folder of {self.root}")
        return {split: {name: self.root / name for name in names} for split, names in split_file.classes.items()}


def _items(folder: Path) -> list[Item]:
    return [Item(file, upright=True) for file in image_files(folder)]


def _others(folder: Path) -> list[Path]:
    """What a class folder holds besides images, hidden things apart."""
    return [path for path in visible(folder) if not is_image(path)]


def _kind(file: Path) -> str:
    suffix = file.suffix.lower() or "without extension"
    return f"{suffix} that is no file" if suffix in EXTENSIONS else suffix


def _beside(root: Path) -> list[Path]:
    """What lies in split folders and is no class folder, hidden things apart."""
    splits = (root / split for split in SPLITS if (root / split).is_dir())
    return sorted(path for folder in splits for path in visible(folder) if not path.is_dir())


def _is_folder(path: Path) -> bool:
    if path.is_symlink() and not path.exists():
        raise DataError(f"{path} is a link to {os.readlink(path)}, which is not there. Restore it, or remove the link.")
    return path.is_dir()


def class_name(folder: Path) -> str:
    """The name of a class folder, of any letters and signs that can be written down."""
    try:
        folder.name.encode()
    except UnicodeEncodeError as error:
        shown = os.fsencode(folder).decode(errors="replace")
        raise DataError(f"Class folder {shown} has a name that is not UTF-8. Rename it.") from error
    return folder.name


def _below(root: Path) -> Iterator[str]:
    for path in root.rglob("*"):
        if path.is_dir():
            yield path.relative_to(root).as_posix()
