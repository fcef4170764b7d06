"""CIFAR-FS and FC100: the 100 classes of CIFAR-100 as few-shot benchmarks, 600 images of 32x32 pixels each."""

from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from datamodules.files.cache import Items
from datamodules.files.decoding import Item
from datamodules.files.pickles import load_pickle
from datamodules.files.storage import data_folder
from datamodules.published import Part, PublishedImages
from lightning_ntk.errors import DataError

FOLDER = "cifar-100-python"
ARCHIVE = f"{FOLDER}.tar.gz"
URLS = (f"https://www.cs.toronto.edu/~kriz/{ARCHIVE}",)
# Names of the folder that both take without data.root; the others are those that each had before.
PLACES = ("cifar_100", "cifar_fs", "fc100")
CHECKSUM = "md5:eb9058c3a382ffc7106e4002c42a8d85"


class Cifar100(PublishedImages):
    """A class is one of CIFAR-100's fine labels ("maple_tree"); CIFAR's own training and test images go together.

    Args:
        root: see `PublishedImages`; the default folder, `cifar_100`, is one for both.
        image_size: the images have 32 x 32 pixels.
        **rest: see `PublishedImages`.
    """

    name = "cifar_100"
    native_size = 32
    source: ClassVar[str] = "See https://www.cs.toronto.edu/~kriz/cifar.html"
    tree: ClassVar[str] = f"  ROOT/{FOLDER}/train, test and meta, or ROOT/{ARCHIVE}"

    def __init__(
        self, *, root: str | None = None, image_size: int | None = None, channels: int = 3, **rest: Any
    ) -> None:
        super().__init__(root=root, image_size=image_size, channels=channels, **rest)
        if root is None:
            places = [data_folder(None, name) for name in PLACES]
            filled = (place for place in places if any((place / name).exists() for name in (FOLDER, ARCHIVE)))
            self.root = next(filled, places[0])

    def parts(self) -> list[Part]:
        return [Part(FOLDER, ARCHIVE, URLS, CHECKSUM)]

    def items(self, split: str, paths: dict[str, Path]) -> Items:
        (names,) = _entries(paths[FOLDER] / "meta", "fine_label_names")
        self.split.check_known(names, f"fine label of {paths[FOLDER] / 'meta'}")
        found: dict[str, list[Item]] = {name: [] for name in self.split.classes[split]}
        for file in (paths[FOLDER] / "train", paths[FOLDER] / "test"):
            images, labels = _entries(file, "data", "fine_labels")
            images = np.asarray(images)
            if images.dtype != np.uint8 or images.shape != (len(labels), 3 * 32 * 32):
                raise DataError(f"data of {file} must be uint8 [images, 3072], one row for each of its fine_labels.")
            # A row is the red, the green, then the blue plane.
            images = images.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
            for number, label in enumerate(labels):
                if not 0 <= label < len(names):
                    raise DataError(f"Image {number} of {file} has the label {label}, but there are {len(names)}.")
                if names[label] in found:
                    found[names[label]].append(Item(images[number], f"{number} of {file}"))
        return found


class CifarFS(Cifar100):
    """CIFAR-FS: 64, 16 and 20 classes, drawn at random (Bertinetto et al. 2019)."""

    name = "cifar_fs"


class FC100(Cifar100):
    """FC100: 60, 20 and 20 classes of 12, 4 and 4 superclasses, so that kinds are unseen (Oreshkin et al. 2018)."""

    name = "fc100"


def _entries(file: Path, *keys: str) -> list[Any]:
    """Entries of a pickled dict."""
    content = load_pickle(file)
    if not isinstance(content, dict) or not set(keys) <= content.keys():
        raise DataError(f"Pickle {file} must hold a dict with {' and '.join(keys)}.")
    return [content[key] for key in keys]
