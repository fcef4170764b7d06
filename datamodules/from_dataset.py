"""Any map-style torch dataset with labels as few-shot data: `data=from_dataset data.dataset._target_=...`."""

import os
import sys
from collections.abc import Iterable, Iterator, Sequence, Sized
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.progress import track
from torch.utils.data import ConcatDataset, Subset, TensorDataset

from datamodules.base import SPLITS
from datamodules.episodes.counter import key_of, random_words, steps
from datamodules.files.any_image import as_pil, describe, image_of
from datamodules.files.splits import find_split_file, read_split
from datamodules.images import Classes, ImageDataModule
from lightning_ntk.errors import ConfigError, DataError, check_at_least, nearest_name

# Where datasets keep their labels: torchvision's, and many others. `samples` hold pairs of a path and a label.
LABELS = ("targets", "labels", "_labels", "samples", "_samples", "imgs", "y")
# What pairs with labels begin with: paths, text or images. Pairs of numbers are two labels each.
PAIRED = (str, os.PathLike, Image.Image, np.ndarray, torch.Tensor)
# What a dataset may raise on an image that it cannot read.
UNREADABLE = (OSError, ValueError, RuntimeError, SyntaxError, Image.DecompressionBombError)


class FromDataset(ImageDataModule):
    """The labels are read first, without touching an image; the classes are split, and their images decoded once.

    Args:
        dataset: has `__getitem__` and `__len__`. An item is an image, or a tuple that begins with one, or a dict with
            an "image". An image is a PIL image, a numpy array (`[h, w]`, `[h, w, channels]`) or a tensor (`[h, w]`,
            `[channels, h, w]`), of bytes or of numbers in [0, 1]. Its transform must neither be random nor normalise.
        labels: the dataset's attribute that holds its labels; None looks at those in `LABELS`.
        split_file: CSV with header `split,class`; a class is one of `dataset.classes` (a tuple joined by ", "), or a
            label: where there are no names, or `labels` are others than None finds. None splits by `fractions`.
        fractions: parts of the classes for training, validation and test; the second may be 0.
        split_seed: of the choice of classes for each part.
        image_size: side of the square that images are resized to, in pixels; None leaves them as they are.
        channels: 3 (RGB) or 1 (grey); None takes those of the images, which must then be of one kind.
        **episodes: see `ImageDataModule`.
    """

    def __init__(
        self,
        *,
        dataset: Any,
        labels: str | None = None,
        split_file: str | None = None,
        fractions: list[float] | tuple[float, ...] = (0.64, 0.16, 0.2),
        split_seed: int = 0,
        image_size: int | None = None,
        channels: int | None = None,
        **episodes: Any,
    ) -> None:
        super().__init__(**episodes)
        if not hasattr(dataset, "__getitem__") or not isinstance(dataset, Sized):
            raise ConfigError(
                f"data.dataset must be a map-style dataset, with __getitem__ and __len__, but is {describe(dataset)}. "
                "Name one: data.dataset._target_=torchvision.datasets.CIFAR100 +data.dataset.root=PATH"
            )
        check_fractions(fractions)
        check_at_least(0, split_seed, "data.split_seed")
        if image_size is not None:
            check_at_least(8, image_size, "data.image_size")
        if channels not in (None, 1, 3):
            raise ConfigError(f"data.channels must be 1 (grey) or 3 (RGB), or null, but got {channels}.")
        self.dataset = dataset
        self.labels = labels
        self.split_file = split_file
        self.fractions = tuple(fractions)
        self.split_seed = split_seed
        self.image_size = image_size
        self.channels = channels
        self._first: int | None = None  # The item whose channels were taken, where none were given.

    def class_splits(self) -> dict[str, Classes]:
        if not len(self.dataset):
            raise ConfigError(f"data.dataset={describe(self.dataset)} must have items to draw from, but is empty.")
        labels = read_labels(self.dataset, self.labels)
        if len(labels) != len(self.dataset):
            raise ConfigError(
                f"data.dataset={describe(self.dataset)} has {len(self.dataset)} items but {len(labels)} labels. Set "
                "data.labels to the attribute with one label an item."
            )
        named = self.labels is None or are_found_first(self.dataset, labels)
        members = name_classes(class_names(self.dataset) if named else None, labels)
        if self.split_file is not None:
            chosen = read_split(find_split_file(self.split_file))
            chosen.check_known(members, "class of data.dataset")
            splits = chosen.classes
        else:
            splits = split_by_fractions(list(members), self.fractions, self.split_seed)
        return {
            split: {name: self._decode(name, members[name]) for name in self._shown(split, names)}
            for split, names in splits.items()
        }

    def unreadable(self) -> Iterator[str]:
        for number in range(len(self.dataset)):
            try:
                self._read(number)
            except DataError as error:
                yield str(error)

    def __getstate__(self) -> dict[str, Any]:
        # Episodes are drawn from the decoded images alone.
        return {**super().__getstate__(), "dataset": None}

    def _shown(self, split: str, names: Iterable[str]) -> Iterable[str]:
        console = Console(stderr=True)
        return track(list(names), f"decoding {split}", console=console, transient=True, disable=not sys.stderr.isatty())

    def _decode(self, name: str, numbers: Sequence[int]) -> np.ndarray:
        images = [self._read(int(number)) for number in numbers]
        different = next((k for k, image in enumerate(images) if image.shape != images[0].shape), None)
        if different is not None:
            raise DataError(
                f"Item {numbers[different]} of data.dataset (class {name!r}) is {images[different].shape}, but item "
                f"{numbers[0]} is {images[0].shape}. Set data.image_size to bring all images to one size."
            )
        return np.stack(images)

    def _read(self, number: int) -> np.ndarray:
        """One image as uint8 `[channels, height, width]`."""
        try:
            image = as_pil(image_of(self.dataset[number]))
        except UNREADABLE as error:
            raise DataError(f"Item {number} of data.dataset cannot be read: {error}") from error
        channels = 1 if image.mode in ("1", "L") else 3
        if self.channels is None:
            self.channels, self._first = channels, number
        if self._first is not None and channels != self.channels:
            kinds = {1: "grey", 3: "RGB"}
            raise DataError(
                f"Item {number} of data.dataset is {kinds[channels]}, but item {self._first} is "
                f"{kinds[self.channels]}. Set data.channels=3 or data.channels=1 for all."
            )
        image = image.convert("L" if self.channels == 1 else "RGB")
        if self.image_size is not None and image.size != (self.image_size, self.image_size):
            image = image.resize((self.image_size, self.image_size), Image.Resampling.BILINEAR)
        pixels = np.asarray(image)
        return pixels[None] if self.channels == 1 else pixels.transpose(2, 0, 1)


def no_dataset(**arguments: Any) -> None:
    """What stands in conf/data/from_dataset.yaml until a dataset is named."""


def check_fractions(fractions: Sequence[float]) -> None:
    """Raise `ConfigError` unless they are three parts of 1, those of training and test above 0."""
    whole = len(fractions) == 3 and abs(sum(fractions) - 1) <= 1e-6  # False with NaN, too.
    if not whole or min(fractions) < 0 or not fractions[0] * fractions[2]:
        raise ConfigError(
            "data.fractions must be three numbers that sum to 1, for train, val and test; the second alone may be 0, "
            f"but got {list(fractions)}."
        )


# ---- labels and classes --------------------------------------------------------------------------------------------


def read_labels(dataset: Any, attribute: str | None = None) -> np.ndarray:
    """The label of each item, int64 `[N]`, without reading an item.

    Raises:
        ConfigError: they are not to be found, or are no whole numbers; the message names `data.labels`.
        DataError: a Subset is of items that are not there.
    """
    if isinstance(dataset, Subset):
        labels, indices = read_labels(dataset.dataset, attribute), np.asarray(dataset.indices, dtype=np.int64)
        outside = indices[(indices < -len(labels)) | (indices >= len(labels))]
        if len(outside):
            raise DataError(
                f"data.dataset is a Subset with the index {outside[0]}, but the {describe(dataset.dataset)} that it is "
                f"of has {len(labels)} items. Leave out indices beyond them."
            )
        return labels[indices]
    if isinstance(dataset, ConcatDataset):
        return np.concatenate([read_labels(part, attribute) for part in dataset.datasets])
    if isinstance(dataset, TensorDataset) and attribute is None:
        return whole_numbers(dataset.tensors[-1], "tensors[-1]")
    names = LABELS if attribute is None else (attribute,)
    name = next((name for name in names if getattr(dataset, name, None) is not None), None)
    if name is None:
        near = "" if attribute is None else nearest_name(attribute, vars(dataset))
        raise ConfigError(
            f"data.dataset={describe(dataset)} has no {' or '.join(names)} to read labels from.{near} Set "
            "data.labels to its attribute that holds one whole number an item."
        )
    return whole_numbers(getattr(dataset, name), name)


def whole_numbers(values: Any, name: str) -> np.ndarray:
    """Labels as int64 `[N]`, from numbers, or from pairs of a path, text or image and a number."""
    try:
        first = values[0] if isinstance(values, list | tuple) and len(values) else None
        if isinstance(first, list | tuple) and isinstance(first[0], PAIRED):
            values = [pair[-1] for pair in values]
        labels = np.asarray(values)
    except (ValueError, TypeError, IndexError, RuntimeError) as error:
        raise ConfigError(f"data.dataset's {name} cannot be read as labels: {error}. Set data.labels.") from error
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
        raise ConfigError(
            f"data.dataset's {name} must hold one whole number an item, but holds {labels.dtype} of shape "
            f"{labels.shape}. Set data.labels to the attribute that does."
        )
    return labels.astype(np.int64)


def are_found_first(dataset: Any, labels: np.ndarray) -> bool:
    """Whether labels are those that are read without an attribute's name: the ones that `dataset.classes` names."""
    try:
        return np.array_equal(read_labels(dataset), labels)
    except ConfigError:
        return False


def name_classes(names: list | None, labels: np.ndarray) -> dict[str, np.ndarray]:
    """The items of each class by its name: one of `names` where there is one for all labels, else the label."""
    present = np.unique(labels).tolist()
    fits = names is not None and present[0] >= 0 and present[-1] < len(names)
    known = [as_name(names[label]) for label in present] if fits else []
    if len(set(known)) != len(present):
        known = [str(label) for label in present]
    return {name: np.flatnonzero(labels == label) for name, label in zip(known, present, strict=True)}


def as_name(name: Any) -> str:
    """The name of a class; torchvision's ImageNet has a tuple of words for each."""
    return ", ".join(map(str, name)) if isinstance(name, tuple | list) else str(name)


def class_names(dataset: Any) -> list | None:
    """The list `classes` of a dataset, of a part of one, or of several put together, which must agree in it."""
    while isinstance(dataset, Subset):
        dataset = dataset.dataset
    if not isinstance(dataset, ConcatDataset):
        names = getattr(dataset, "classes", None)
        names = names.tolist() if hasattr(names, "tolist") else names  # Of numpy, torch and pandas.
        return list(names) if isinstance(names, list | tuple) else None
    first, *others = [class_names(part) for part in dataset.datasets]
    if any(other != first for other in others):
        raise ConfigError(
            "data.dataset is a ConcatDataset of parts with different `classes`, so that one label stands for different "
            "classes. Give the parts common labels, and no `classes` or the same."
        )
    return first


def split_by_fractions(names: Sequence[str], fractions: Sequence[float], seed: int) -> dict[str, list[str]]:
    """Classes in random order, cut by the fractions; a split of a fraction above 0 has one class at least."""
    order = np.argsort(random_words(np.array([key_of(seed)], dtype=np.uint64), steps(np.arange(len(names))))[0])
    counts = [max(1, round(fraction * len(names))) if fraction else 0 for fraction in fractions[1:]]
    ends = [len(names) - sum(counts), len(names) - counts[1], len(names)]
    if ends[0] < 1:
        raise ConfigError(f"data.dataset has {len(names)} classes: too few to train and test on different ones.")
    parts = [order[start:end] for start, end in zip([0, *ends], ends, strict=False)]
    return {split: [names[k] for k in part] for split, part in zip(SPLITS, parts, strict=True) if len(part)}
