"""tiered-ImageNet: 608 classes of ImageNet, split by 34 categories (Ren et al. 2018), 84x84 pixels."""

import re
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from datamodules.files.cache import Items
from datamodules.files.decoding import Item
from datamodules.files.pickles import load_pickle
from datamodules.published import Part, PublishedImages
from lightning_ntk.errors import ConfigError, DataError

FOLDER = "tiered-imagenet"
ARCHIVE = f"{FOLDER}.tar"
CHECKSUM = "md5:e07e811b9f29362d159a9edd0d838c62"
WORDNET_ID = re.compile(r"n\d{8}")


class TieredImageNet(PublishedImages):
    """A class is a WordNet id where the release's synsets.txt and class_names.txt lie beside, else its words.

    Words that stand for two ids there ("crane") stay words, too. The pickles are the split, one pair for each of train,
    val and test. What they hold is compared with conf/splits/tiered_imagenet.csv: by numbers of classes and of images,
    and class by class where the ids are known. Decoding a split takes about as much memory as its pickle.

    Args:
        image_size: the images have 84 x 84 pixels.
        **rest: see `PublishedImages`.
    """

    name = "tiered_imagenet"
    native_size = 84
    source: ClassVar[str] = (
        f"ImageNet's terms bind whoever uses it, so fetch it yourself: {ARCHIVE} (12 GB) from "
        "https://github.com/renmengye/few-shot-ssl-public, or its files from https://zenodo.org/record/7978538 "
        "(learn2learn), without tiered-imagenet- in their names"
    )
    takes_split_file = False
    tree: ClassVar[str] = f"""  ROOT/{FOLDER}/train_images_png.pkl, train_labels.pkl, or ROOT/{ARCHIVE}
  ROOT/{FOLDER}/val_images_png.pkl, val_labels.pkl
  ROOT/{FOLDER}/test_images_png.pkl, test_labels.pkl
  ROOT/{FOLDER}/synsets.txt, class_names.txt (they may lack)"""

    def __init__(
        self, *, image_size: int | None = 84, channels: int = 3, split_file: str | None = None, **rest: Any
    ) -> None:
        if split_file is not None:
            raise ConfigError(
                f"data.split_file={split_file}: the pickles of tiered-ImageNet are its split, which cannot be changed "
                "here. Leave it out; for another split of the images, use data=image_folder."
            )
        super().__init__(image_size=image_size, channels=channels, **rest)

    def parts(self) -> list[Part]:
        return [Part(FOLDER, ARCHIVE, checksum=CHECKSUM)]

    def made_from(self) -> list[Any]:
        # Before hours of decoding, of which the last split would otherwise be told at the end.
        folder = self.locate(self.parts()[0])
        files = [f"{split}_{kind}.pkl" for split in self.split.classes for kind in ("labels", "images_png")]
        for file in (folder / name for name in files):
            if folder.is_dir() and not file.exists():
                raise self.missing(file)
        return super().made_from()

    def items(self, split: str, paths: dict[str, Path]) -> Items:
        file = paths[FOLDER] / f"{split}_labels.pkl"
        names, labels = self._labels(file)
        ids = read_ids(paths[FOLDER])
        self._check_classes(split, [ids.get(name, [name]) for name in names], file)
        # Two classes of ImageNet may have one name ("crane").
        names = [f"{name} ({n})" if names.count(name) > 1 else name for n, name in enumerate(names)]
        names = [ids[name][0] if len(ids.get(name, [])) == 1 else name for name in names]
        images_file = paths[FOLDER] / f"{split}_images_png.pkl"
        images = load_pickle(images_file)
        if len(images) != len(labels):
            raise DataError(f"{images_file} has {len(images)} images, but {file} has {len(labels)} labels.")
        found: dict[str, list[Item]] = {name: [] for name in names}
        for number, (label, image) in enumerate(zip(labels.tolist(), images, strict=True)):
            if not 0 <= label < len(names):
                raise DataError(f"Image {number} of {images_file} has the label {label}, but there are {len(names)}.")
            # Each is the bytes of a PNG file, as a uint8 array.
            encoded = np.ascontiguousarray(image).data.cast("B") if isinstance(image, np.ndarray) else image
            found[names[label]].append(Item(encoded, f"{number} of {images_file}"))
        return found

    def _labels(self, file: Path) -> tuple[list[str], np.ndarray]:
        """The names of the classes of a split, and the class of each image."""
        content = load_pickle(file)
        try:
            labels, names = np.asarray(content["label_specific"]), [str(name) for name in content["label_specific_str"]]
        except (KeyError, TypeError, IndexError) as error:
            raise DataError(
                f"Pickle {file} must hold a dict with label_specific and label_specific_str, as the original release."
            ) from error
        if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
            raise DataError(f"label_specific of {file} must be the number of each image's class.")
        return names, labels

    def _check_classes(self, split: str, candidates: list[list[str]], file: Path) -> None:
        """Raise `DataError` unless the classes are those of the split, as far as the ids that each may have say."""
        expected = self.split.classes[split]
        # Of several ids of one word, those that the split names.
        known = [set(own) & set(expected) or set(own) for own in candidates if WORDNET_ID.fullmatch(own[0])]
        certain = [min(own) for own in known if len(own) == 1]
        foreign = any(own.isdisjoint(expected) for own in known) or len(set(certain)) < len(certain)
        if len(candidates) != len(expected) or foreign:
            raise DataError(
                f"{file} has {len(candidates)} classes that are not the {len(expected)} {split} classes of "
                f"{self.split.file}: it is not the original release, or not of this split."
            )


def read_ids(folder: Path) -> dict[str, list[str]]:
    """The WordNet ids of each class's words, from the two lists of the release; empty without them."""
    try:
        words, ids = (
            (folder / name).read_text(encoding="utf-8").splitlines() for name in ("class_names.txt", "synsets.txt")
        )
    except FileNotFoundError:
        return {}
    except UnicodeDecodeError as error:
        raise DataError(f"class_names.txt or synsets.txt of {folder} cannot be read: {error}") from error
    found: dict[str, list[str]] = {}
    for word, name in zip(words, ids, strict=False):
        found.setdefault(word.strip(), []).append(name.strip())
    return found
