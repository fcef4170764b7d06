"""mini-ImageNet: 100 classes of ImageNet, 600 images each (Vinyals et al. 2016; split of Ravi and Larochelle 2017)."""

import csv
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from datamodules.base import SPLITS
from datamodules.files.cache import Items
from datamodules.files.decoding import Item
from datamodules.files.pickles import load_pickle
from datamodules.published import Part, PublishedImages
from lightning_ntk.errors import DataError

# The names of the cache pickles: of Ren et al. (2018), and of learn2learn for the validation split.
PICKLES = {split: (f"mini-imagenet-cache-{split}.pkl",) for split in SPLITS}
PICKLES["val"] += ("mini-imagenet-cache-validation.pkl",)
LISTS = ("images", *(f"{split}.csv" for split in SPLITS))
PICKLE_ARCHIVE = "mini-imagenet.tar.gz"
PICKLE_CHECKSUM = "md5:b38f1eb4251fb9459ecc8e7febf9b2eb"


class MiniImageNet(PublishedImages):
    """A class is a WordNet id. Read from the images and the lists of them, or from the cache pickles.

    Args:
        image_size: 84 is the custom; the pickles hold 84 x 84 pixels.
        **rest: see `PublishedImages`.
    """

    name = "mini_imagenet"
    native_size = 84
    source: ClassVar[str] = (
        "ImageNet's terms bind whoever uses it, so fetch it yourself: the pickles from "
        f"https://zenodo.org/record/7978538 (learn2learn) or as {PICKLE_ARCHIVE} from "
        "https://github.com/renmengye/few-shot-ssl-public; the images from https://image-net.org with the lists from https://github.com/twitter/meta-learning-lstm"
    )
    tree: ClassVar[str] = f"""  ROOT/mini-imagenet-cache-train.pkl, ...-val.pkl, ...-test.pkl, or ROOT/{PICKLE_ARCHIVE}
or
  ROOT/images/n0153282900000005.jpg ...
  ROOT/train.csv, ROOT/val.csv, ROOT/test.csv with the header filename,label"""

    def __init__(self, *, image_size: int | None = 84, channels: int = 3, **rest: Any) -> None:
        super().__init__(image_size=image_size, channels=channels, **rest)

    def parts(self) -> list[Part]:
        pickles = [PICKLE_ARCHIVE, *(name for names in PICKLES.values() for name in names)]
        is_begun = any(map(self.has, LISTS)) and not any(map(self.has, pickles))
        if self.has(*LISTS) or is_begun:
            return list(map(Part, LISTS))
        names = (next(filter(self.has, PICKLES[split]), PICKLES[split][0]) for split in SPLITS)
        return [Part(name, PICKLE_ARCHIVE, checksum=PICKLE_CHECKSUM) for name in names]

    def items(self, split: str, paths: dict[str, Path]) -> Items:
        read = self._from_list if "images" in paths else self._from_pickle
        missing, found = set(self.split.classes[split]), {}
        # A split's own file holds its classes, unless a split of one's own mixes them.
        for file in sorted(
            (path for name, path in paths.items() if name != "images"), key=lambda f: split not in f.name
        ):
            if missing:
                found |= read(file, missing, paths)
                missing -= found.keys()
        if missing:
            raise DataError(
                f"data.split_file={self.split.file} names class {min(missing)!r} for {split}, of which "
                f"data.root={self.root} has no images."
            )
        return {name: found[name] for name in self.split.classes[split]}

    def _from_list(self, file: Path, wanted: set[str], paths: dict[str, Path]) -> dict[str, list[Item]]:
        try:
            with file.open(newline="", encoding="utf-8-sig") as lines:
                rows = list(csv.DictReader(lines))
        except (UnicodeDecodeError, csv.Error) as error:
            raise DataError(f"{file} cannot be read: {error}") from error
        if not rows or not {"filename", "label"} <= rows[0].keys():
            raise DataError(f'{file} must be a CSV file with the header "filename,label" and rows.')
        found: dict[str, list[Item]] = {}
        for row in rows:
            if row["label"] in wanted:
                found.setdefault(row["label"], []).append(Item(paths["images"] / (row["filename"] or "")))
        return found

    def _from_pickle(self, file: Path, wanted: set[str], paths: dict[str, Path]) -> dict[str, list[Item]]:
        # A gigabyte: only what is asked of it is kept.
        content = load_pickle(file)
        if not isinstance(content, dict) or not {"image_data", "class_dict"} <= content.keys():
            raise DataError(f"Pickle {file} must hold a dict with image_data and class_dict.")
        images, classes = content["image_data"], content["class_dict"]
        if not isinstance(images, np.ndarray) or images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3:
            raise DataError(f"image_data of {file} must be uint8 [images, height, width, 3].")
        try:
            return {
                name: [Item(images[number], f"{number} of {file}") for number in numbers]
                for name, numbers in classes.items()
                if name in wanted
            }
        except (AttributeError, IndexError, TypeError) as error:
            raise DataError(f"class_dict of {file} must map names to numbers of images ({error}).") from error
