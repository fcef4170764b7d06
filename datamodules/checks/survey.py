"""What a data set holds, and what is wrong with it: behind `lightning-ntk data`."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from datamodules.checks.disjoint import repeated, shared_classes, shared_images, shared_within
from datamodules.episodes.image_store import Classes, check_images
from lightning_ntk.errors import DataError, nearest_name

SPLITS = ("train", "val", "test")


@dataclasses.dataclass
class Survey:
    """`rows`: a dict of plain values for each split. `findings`: what is wrong, `notes`: what is not, a line each."""

    rows: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    findings: list[str] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)


def missing_splits(splits: Mapping[str, Classes], trains: bool = True) -> Iterator[str]:
    """A line for each split that must be there and is not, or that is none.

    `trains`: whether there is anything to train on; a data set for testing alone needs no more than its test split.
    """
    for split in ("train", "test") if trains else ("test",):
        if split not in splits:
            needed = "both train and test are" if trains else "it is"
            there = f", but in {', '.join(map(repr, splits))}" if splits else ""
            yield f"The data set has no classes in its {split} split{there}; {needed} needed."
    for split in splits:
        if split not in SPLITS:
            near = nearest_name(str(split), SPLITS)
            yield f"The data set has the split {split!r}; expected {', '.join(SPLITS)}.{near}"


def survey_images(splits: Mapping[str, Classes], trains: bool = True, allow_shared_images: bool = False) -> Survey:
    """The table of the splits; as findings what they share, and classes that are no images."""
    survey = Survey(findings=list(missing_splits(splits, trains)))
    for split, classes in splits.items():
        wrong = list(_malformed(split, classes))
        survey.findings += wrong
        if classes and not wrong:
            survey.rows.append(_row(split, classes))
    if len(survey.rows) == len(splits):
        survey.findings += shared_classes(splits)
        shared = map(str, shared_images(splits))
        if allow_shared_images:
            survey.notes += (f"{line} (Allowed here, by data.allow_shared_images.)" for line in shared)
        else:
            survey.findings += shared
        survey.notes += _shared_within(splits)
        survey.notes += _repeated(splits)
        arrays = (np.asarray(images) for classes in splits.values() for images in classes.values())
        if survey.rows and not any(images.max() > 1 for images in arrays):
            survey.notes.append("No image has a value above 1: is it 0 to 255 that is meant? Then multiply by 255.")
    shapes = {(row["channels"], row["height"], row["width"]) for row in survey.rows}
    if len(shapes) > 1:
        survey.findings.append(f"The splits have images of different shapes: {', '.join(map(str, sorted(shapes)))}.")
    return survey


def _malformed(split: str, classes: Classes) -> Iterator[str]:
    shape = None
    for name, images in classes.items():
        try:
            shape = check_images(split, name, images, shape)
        except DataError as error:
            yield str(error)


def _shared_within(splits: Mapping[str, Classes]) -> Iterator[str]:
    """A line for each split with classes that share images: the two that share most."""
    for split, classes in splits.items():
        found = shared_within(split, classes)
        if found:
            others = f" {len(found) - 1} more pairs or groups of its classes share images." if len(found) > 1 else ""
            yield f"{max(found, key=lambda shared: shared.part())}{others}"


def _repeated(splits: Mapping[str, Classes]) -> Iterator[str]:
    """A line for each split with classes that hold images more than once: the class that holds most."""
    for split, classes in splits.items():
        found = repeated(classes)
        if found:
            name = max(found, key=lambda name: found[name])
            images = "1 image that is" if found[name] == 1 else f"{found[name]} images that are"
            others = f" Other classes of this split that have such: {len(found) - 1}." if len(found) > 1 else ""
            yield f"Class {name!r} of the {split} split has {images} there more than once.{others}"


def _row(split: str, classes: Classes) -> dict[str, Any]:
    sizes = {name: len(images) for name, images in classes.items()}
    smallest = min(sizes, key=lambda name: sizes[name])
    channels, height, width = next(iter(classes.values())).shape[1:]
    return {
        "split": split,
        "classes": len(sizes),
        "images": sum(sizes.values()),
        "height": int(height),
        "width": int(width),
        "channels": int(channels),
        "smallest class": smallest,
        "its images": sizes[smallest],
        "median": int(np.median(list(sizes.values()))),
        "largest": max(sizes.values()),
    }
