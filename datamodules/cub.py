"""CUB-200-2011: 200 classes of birds (Wah et al. 2011), with or without cropping to the bird."""

from pathlib import Path
from typing import Any, ClassVar

from datamodules.files.cache import Items
from datamodules.files.decoding import Item
from datamodules.published import Part, PublishedImages
from lightning_ntk.errors import DataError

FOLDER = "CUB_200_2011"
ARCHIVE = f"{FOLDER}.tgz"
CHECKSUM = "md5:97eceeb196236b17998738112f37df78"


class Cub(PublishedImages):
    """A class is a bird's folder, "001.Black_footed_Albatross". The split is that of Chen et al. (2019), `cub`.

    Args:
        crop: cut each image to the bounding box that comes with it before resizing. Results of the two differ, so the
            choice is among a result's task settings.
        **rest: see `PublishedImages`.
    """

    name = "cub"
    source: ClassVar[str] = (
        f"Fetch {ARCHIVE} (1.1 GB) from https://www.vision.caltech.edu/datasets/cub_200_2011 and put it there"
    )
    tree: ClassVar[str] = f"""  ROOT/{FOLDER}/images.txt, bounding_boxes.txt, or ROOT/{ARCHIVE}
  ROOT/{FOLDER}/images/001.Black_footed_Albatross/*.jpg ..."""

    def __init__(self, *, crop: bool = False, image_size: int | None = 84, channels: int = 3, **rest: Any) -> None:
        super().__init__(image_size=image_size, channels=channels, **rest)
        self.crop = crop

    def parts(self) -> list[Part]:
        return [Part(FOLDER, ARCHIVE, checksum=CHECKSUM)]

    def settings(self) -> list[Any]:
        return [self.crop]

    def task_settings(self) -> dict[str, Any]:
        return super().task_settings() | {"crop": self.crop}

    def items(self, split: str, paths: dict[str, Path]) -> Items:
        folder = paths[FOLDER]
        files = {number: name for number, (name,) in _table(folder / "images.txt", 1).items()}
        boxes = _table(folder / "bounding_boxes.txt", 4) if self.crop else {}
        classes: dict[str, list[Item]] = {}
        for number, name in files.items():
            box = _corners(boxes.get(number), number, folder) if self.crop else None
            classes.setdefault(name.split("/")[0], []).append(Item(folder / "images" / name, box=box))
        self.split.check_known(classes, f"class of {folder / 'images.txt'}")
        return {name: classes[name] for name in self.split.classes[split]}


def _table(file: Path, columns: int) -> dict[str, list[str]]:
    """The lines of a file as number to columns, separated by spaces."""
    try:
        lines = [line.split() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise DataError(f"{file} cannot be read: {error}") from error
    for number, line in enumerate(lines, start=1):
        if len(line) != columns + 1:
            raise DataError(f"Line {number} of {file} must have {columns + 1} columns, but has {len(line)}.")
    return {number: rest for number, *rest in lines}


def _corners(box: list[str] | None, number: str, folder: Path) -> tuple[float, float, float, float]:
    """Left, top, right and bottom from a line of x, y, width and height."""
    try:
        x, y, width, height = map(float, box)
    except (TypeError, ValueError) as error:
        raise DataError(f"{folder / 'bounding_boxes.txt'} has no box of four numbers for image {number}.") from error
    return (x, y, x + width, y + height)
