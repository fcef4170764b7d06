"""Any folder of images in class folders."""

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from datamodules.base import SPLITS, check_at_least
from datamodules.images import Classes, ImageDataModule
from lightning_ntk.config import conf_folder
from lightning_ntk.errors import ConfigError, DataError, nearest_name

EXTENSIONS = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")

EXPECTED = """Expected either
  ROOT/train/CLASS/*.png, ROOT/test/CLASS/*.png and, if you validate, ROOT/val/CLASS/*.png
or one folder of classes, ROOT/CLASS/*.png, and data.split_file=FILE.csv with the header "split,class"."""


class ImageFolder(ImageDataModule):
    """Images in class folders, split by folders (train/, val/, test/) or by a file. `val` may be missing.

    Args:
        root: the folder.
        split_file: CSV with header `split,class`; a class is a folder relative to root and may be nested
            ("Greek/character01"). The bare name of a file in conf/splits will do: "omniglot_small".
        image_size: side of the square that images are resized to, in pixels.
        channels: 3 (RGB) or 1 (grey).
        invert: 255 - value, for dark ink on white paper (Omniglot).
        **episodes: see `ImageDataModule`.

    conf/experiment/omniglot_small.yaml is an example.
    """

    def __init__(
        self,
        *,
        root: str | None = None,
        split_file: str | None = None,
        image_size: int = 84,
        channels: int = 3,
        invert: bool = False,
        **episodes: Any,
    ) -> None:
        super().__init__(**episodes)
        check_at_least(8, image_size, "data.image_size")
        if channels not in (1, 3):
            raise ConfigError(f"data.channels must be 1 (grey) or 3 (RGB), but got {channels}.")
        if root is None:
            raise ConfigError(f"data.root is missing: data.root=PATH names the folder of images. {EXPECTED}")
        self.root = Path(root).expanduser()
        self.split_file = None if split_file is None else find_split_file(split_file)
        self.image_size = image_size
        self.channels = channels
        self.invert = invert

    def class_splits(self) -> dict[str, Classes]:
        if not self.root.is_dir():
            raise ConfigError(f"data.root={self.root} is not a folder. {EXPECTED}")
        folders = self._split_by_folders() if self.split_file is None else self._split_by_file(self.split_file)
        return {split: {name: self._load(path) for name, path in classes.items()} for split, classes in folders.items()}

    def _split_by_folders(self) -> dict[str, dict[str, Path]]:
        splits = {split: self.root / split for split in SPLITS if (self.root / split).is_dir()}
        missing = [split for split in ("train", "test") if split not in splits]
        if missing:
            raise ConfigError(f"data.root={self.root} has no folder {' and no folder '.join(missing)}. {EXPECTED}")
        return {
            split: {path.name: path for path in sorted(folder.iterdir()) if path.is_dir()}
            for split, folder in splits.items()
        }

    def _split_by_file(self, file: Path) -> dict[str, dict[str, Path]]:
        try:
            with file.open(newline="", encoding="utf-8") as lines:
                rows = list(csv.DictReader(lines))
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise ConfigError(f"data.split_file={file} cannot be read: {error}") from error
        if not rows or not {"split", "class"} <= rows[0].keys():
            raise ConfigError(f'data.split_file={file} must be a CSV file with the header "split,class" and rows.')
        splits: dict[str, dict[str, Path]] = {}
        for row in rows:
            split, name = row["split"], row["class"]
            if split not in SPLITS:
                raise ConfigError(f"data.split_file={file} names the split {split!r}; expected train, val or test.")
            if not (self.root / name).is_dir():
                near = nearest_name(name, _folders(self.root))
                raise DataError(
                    f"data.split_file={file} names class {name!r}, which is no folder of {self.root}.{near}"
                )
            splits.setdefault(split, {})[name] = self.root / name
        return splits

    def _load(self, folder: Path) -> np.ndarray:
        files = sorted(path for path in folder.iterdir() if path.suffix.lower() in EXTENSIONS)
        if not files:
            raise DataError(f"Class folder {folder} holds no images ({', '.join(EXTENSIONS)}). Remove it or fill it.")
        return np.stack([self._read(file) for file in files])

    def _read(self, file: Path) -> np.ndarray:
        """One image as uint8 `[channels, size, size]`."""
        try:
            with Image.open(file) as image:
                # A palette goes through RGB, and transparency is dropped, whatever the file's mode.
                converted = image.convert("RGB" if self.channels == 3 else "L")
        except (OSError, ValueError, SyntaxError) as error:
            raise DataError(f"Image {file} cannot be read ({error}). Replace or remove it.") from error
        size = (self.image_size, self.image_size)
        if converted.size != size:
            converted = converted.resize(size, Image.Resampling.BILINEAR)
        pixels = np.asarray(converted)
        pixels = pixels[None] if self.channels == 1 else pixels.transpose(2, 0, 1)
        return 255 - pixels if self.invert else pixels


def find_split_file(name: str) -> Path:
    """The file of that path, or the committed one of that name."""
    committed = conf_folder() / "splits" / f"{name}.csv"
    return committed if committed.is_file() else Path(name).expanduser()


def _folders(root: Path) -> Iterator[str]:
    for path in root.rglob("*"):
        if path.is_dir():
            yield path.relative_to(root).as_posix()
