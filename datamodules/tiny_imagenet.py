"""Tiny-ImageNet as a few-shot benchmark: 100 of its 200 classes, 64x64 pixels."""

from pathlib import Path
from typing import Any, ClassVar

from datamodules.files.cache import Items
from datamodules.files.decoding import Item, image_files
from datamodules.files.storage import visible
from datamodules.published import Part, PublishedImages

FOLDER = "tiny-imagenet-fewshot"


class TinyImageNet(PublishedImages):
    """A class is a WordNet id. The split is that of the folders, `tiny_imagenet`.

    Args:
        image_size: the images have 64 x 64 pixels.
        **rest: see `PublishedImages`.
    """

    name = "tiny_imagenet"
    native_size = 64
    source: ClassVar[str] = (
        f"Arrange images of Tiny-ImageNet (http://cs231n.stanford.edu/tiny-imagenet-200.zip) as below, or put "
        f"{FOLDER}.tar.gz there"
    )
    tree: ClassVar[str] = f"""  ROOT/{FOLDER}/train/n01641577/*.JPEG ..., or ROOT/{FOLDER}.tar.gz
  ROOT/{FOLDER}/val/..., ROOT/{FOLDER}/test/..."""

    def __init__(self, *, image_size: int | None = None, channels: int = 3, **rest: Any) -> None:
        super().__init__(image_size=image_size, channels=channels, **rest)

    def parts(self) -> list[Part]:
        return [Part(FOLDER, f"{FOLDER}.tar.gz")]

    def items(self, split: str, paths: dict[str, Path]) -> Items:
        classes = {
            folder.name: folder
            for part in visible(paths[FOLDER])
            if part.is_dir()
            for folder in visible(part)
            if folder.is_dir()
        }
        self.split.check_known(classes, f"class of {self.root}")
        return {name: [Item(file) for file in image_files(classes[name])] for name in self.split.classes[split]}
