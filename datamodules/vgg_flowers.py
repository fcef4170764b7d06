"""VGG Flowers 102: 8189 photographs of 102 kinds of flowers (Nilsback and Zisserman 2008)."""

from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import scipy.io

from datamodules.files.cache import Items
from datamodules.files.decoding import Item
from datamodules.published import Part, PublishedImages
from lightning_ntk.errors import DataError

URL = "https://www.robots.ox.ac.uk/~vgg/data/flowers/102/"
LABELS = "imagelabels.mat"


class VggFlowers(PublishedImages):
    """A class is a label of imagelabels.mat, "1" to "102". The split is Meta-Dataset's (Triantafillou et al. 2020).

    Args:
        **rest: see `PublishedImages`.
    """

    name = "vgg_flowers"
    source: ClassVar[str] = f"See {URL}"
    tree: ClassVar[str] = """  ROOT/jpg/image_00001.jpg ..., or ROOT/102flowers.tgz
  ROOT/imagelabels.mat"""

    def __init__(self, *, image_size: int | None = 84, channels: int = 3, **rest: Any) -> None:
        super().__init__(image_size=image_size, channels=channels, **rest)

    def parts(self) -> list[Part]:
        return [
            Part("jpg", "102flowers.tgz", (f"{URL}102flowers.tgz",), "md5:52808999861908f626f3c1f4e79d11fa"),
            Part(LABELS, urls=(URL + LABELS,), checksum="md5:e0620be6f572b9609742df49c70aed4d"),
        ]

    def items(self, split: str, paths: dict[str, Path]) -> Items:
        labels = read_labels(paths[LABELS])
        classes: dict[str, list[Item]] = {}
        for number, label in enumerate(labels.tolist(), start=1):
            classes.setdefault(str(label), []).append(Item(paths["jpg"] / f"image_{number:05}.jpg"))
        self.split.check_known(classes, f"label of {paths[LABELS]}")
        return {name: classes[name] for name in self.split.classes[split]}


def read_labels(file: Path) -> np.ndarray:
    """The label of each image, in the order of their numbers, whole numbers from 1."""
    try:
        labels = np.ravel(scipy.io.loadmat(file)["labels"])
    except Exception as error:  # scipy raises much for what is no MATLAB file.
        raise DataError(f"{file} cannot be read as a MATLAB file with labels ({error}). Get it again.") from error
    if not labels.size or not np.issubdtype(labels.dtype, np.integer):
        raise DataError(f"labels of {file} must be whole numbers, one for each image.")
    return labels
