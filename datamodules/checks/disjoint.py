"""Images that splits or classes share: unseen classes must be unseen, and no image of theirs have been trained on."""

import dataclasses
import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping

import numpy as np

from datamodules.episodes.image_store import Classes
from lightning_ntk.errors import DataError

# Bytes of an image that are looked at before it is hashed: so many runs of eight, spread over it.
_RUNS = 4
# An image of more classes is told of once, by a `Crowd`: the pairs of classes are as many as their number's square.
MOST_PAIRED = 16


@dataclasses.dataclass(frozen=True)
class Shared:
    """Images that two classes have in common: so many of the second's; and how many each of the two has."""

    first: tuple[str, str]  # split, class
    second: tuple[str, str]
    images: int
    of: tuple[int, int]

    def part(self) -> float:
        """How much of the smaller class is shared."""
        return self.images / min(self.of)

    def __str__(self) -> str:
        (first, first_class), (second, second_class) = self.first, self.second
        if first == second:
            return (
                f"Class {second_class!r} of the {second} split is also there as {first_class!r}: {self.images} of its "
                f"{self.of[1]} images are the same."
            )
        return (
            f"Class {second_class!r} of the {second} split is also in the {first} split, as {first_class!r}: "
            f"{self.images} of its {self.of[1]} images are there."
        )


@dataclasses.dataclass(frozen=True)
class Crowd:
    """So many images, each of which all of these many classes, by split and name, have in common."""

    classes: tuple[tuple[str, str], ...]
    images: int

    def part(self) -> float:
        """Above any that `Shared` gives."""
        return len(self.classes)

    def __str__(self) -> str:
        splits = " and ".join(dict.fromkeys(split for split, _ in self.classes))
        what = "1 image is" if self.images == 1 else f"{self.images} images are each"
        (_, first), (_, second), *_, (split, last) = self.classes
        return (
            f"{what} in {len(self.classes)} classes of {splits}: in {first!r}, {second!r} and others, up to {last!r} "
            f"of the {split} split."
        )


def check_disjoint(splits: Mapping[str, Classes], allow_shared_images: bool = False) -> None:
    """Raise `DataError` when two splits share a class, by its name, or an image."""
    for finding in shared_classes(splits):
        raise DataError(f"{finding} Few-shot classes must not be shared: remove it from one of them.")
    found = [] if allow_shared_images else shared_images(splits)
    if found:
        worst = max(found, key=lambda shared: shared.part())
        others = f" {len(found) - 1} more pairs or groups of classes share images." if len(found) > 1 else ""
        raise DataError(
            f"{worst}{others} Few-shot classes must not be shared: remove them from one split "
            "(`lightning-ntk data` lists them), or set data.allow_shared_images=true."
        )


def shared_classes(splits: Mapping[str, Classes]) -> Iterator[str]:
    """A line for each class whose name is in two splits."""
    owner: dict[str, str] = {}
    for split, classes in splits.items():
        for name in classes:
            if owner.setdefault(name, split) != split:
                yield f"Class {name!r} of the {split} split is also in the {owner[name]} split."


def shared_images(splits: Mapping[str, Classes]) -> list[Shared | Crowd]:
    """Pairs (or crowds) of classes of different splits with equal images: every one, by SHA-256 of all bytes.

    Only images that agree with one of another split in a few bytes are hashed, so that a memory-mapped data set is not
    read through at each start.
    """
    samples = {split: np.unique(_flat_samples(classes)) for split, classes in splits.items() if classes}
    suspects = {}
    for split, own in samples.items():
        others = [np.intersect1d(own, sample) for other, sample in samples.items() if other != split]
        suspects[split] = np.unique(np.concatenate([own[:0], *others]))
    return _pairs(splits, suspects, within=False)


def shared_within(split: str, classes: Classes) -> list[Shared | Crowd]:
    """Pairs (or crowds) of classes of one split with equal images, found as in `shared_images`."""
    samples = np.concatenate([np.unique(_samples(np.asarray(images))) for images in classes.values()])
    known, counts = np.unique(samples, return_counts=True)
    return _pairs({split: classes}, {split: known[counts > 1]}, within=True)


def repeated(classes: Classes) -> dict[str, int]:
    """How many images each class holds more than once, where it does: a task's support and query may share them."""
    found = {}
    for name, images in classes.items():
        known, counts = np.unique(_samples(np.asarray(images)), return_counts=True)
        times = Counter(_digest(image) for _, image in _suspected({name: images}, known[counts > 1]))
        number = sum(count > 1 for count in times.values())
        if number:
            found[name] = number
    return found


def _pairs(splits: Mapping[str, Classes], suspects: Mapping[str, np.ndarray], *, within: bool) -> list[Shared | Crowd]:
    """Pairs or crowds of classes, of one split or of different ones, with equal images, of those suspected."""
    places: dict[bytes, dict[tuple[str, str], int]] = {}
    for split, known in suspects.items():
        for name, image in _suspected(splits[split], known):
            where = places.setdefault(_digest(image), {})
            where[split, name] = where.get((split, name), 0) + 1
    pairs: dict[tuple, int] = {}
    crowds: Counter[tuple] = Counter()
    for where in places.values():
        owners = tuple(where)
        if len(owners) > MOST_PAIRED:
            crowds[owners] += within or len({split for split, _ in owners}) > 1
            continue
        for k, first in enumerate(owners):
            for second in owners[k + 1 :]:
                if (first[0] == second[0]) == within:
                    pairs[first, second] = pairs.get((first, second), 0) + where[second]
    return [Crowd(owners, images) for owners, images in crowds.items() if images] + [
        Shared(first, second, images, (len(splits[first[0]][first[1]]), len(splits[second[0]][second[1]])))
        for (first, second), images in pairs.items()
    ]


def _suspected(classes: Classes, known: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    if not len(known):
        return
    for name, images in classes.items():
        images = np.asarray(images)
        for number in np.flatnonzero(np.isin(_samples(images), known)):
            yield name, images[number]


def _digest(image: np.ndarray) -> bytes:
    return hashlib.sha256(image.tobytes()).digest()


def _flat_samples(classes: Classes) -> np.ndarray:
    return np.concatenate([_samples(np.asarray(images)) for images in classes.values()])


def _samples(images: np.ndarray) -> np.ndarray:
    """Eight bytes (uint64) of each image: equal for equal images."""
    flat = images.reshape(len(images), -1)
    size = flat.shape[1]
    starts = np.linspace(size // 4, 3 * size // 4, _RUNS).astype(int)
    at = np.minimum(starts[:, None] + np.arange(8), size - 1)
    runs = np.ascontiguousarray(flat[:, at.reshape(-1)]).view(np.uint64)
    return np.bitwise_xor.reduce(runs * np.array([1, 3, 5, 7], dtype=np.uint64), axis=1)
