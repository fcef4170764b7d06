"""Omniglot: 1623 handwritten characters of 50 alphabets, each drawn by 20 people (Lake et al. 2015)."""

from pathlib import Path
from typing import Any, ClassVar

from datamodules.files.cache import Items
from datamodules.files.decoding import Item, image_files
from datamodules.files.storage import visible
from datamodules.published import Part, PublishedImages

URL = "https://raw.githubusercontent.com/brendenlake/omniglot/master/python/"
CHECKSUMS = {
    "images_background": "md5:68d2efa1b9178cc56df9314c21c6e718",
    "images_evaluation": "md5:6b91aef0f799c5bb55b94e3f2daec811",
    "images_background_small1": "sha256:f38eb80f801274ac2b4dff5b24289016bfaba4a7d5bb50deebf27104ad6cb8a4",
    "images_background_small2": "sha256:3ccaa407515a8778e5d0861875af38b17e418f301ad5bb3b5a6b65d901a41c7f",
}
FULL = ("images_background", "images_evaluation")
SMALL = ("images_background_small1", "images_background_small2")


class Omniglot(PublishedImages):
    """A class is a character, `Alphabet/characterNN`.

    The split is that of Vinyals et al. (2016), `omniglot_vinyals`; `omniglot_lake` has unseen alphabets to test. Where
    the root holds the two small background sets alone, it is `omniglot_small`, which tests on Sanskrit and Tagalog.
    `rotate_train_classes` adds each training character's three rotations as classes (Santoro et al. 2016).

    Args:
        image_size: the drawings have 105 x 105 pixels; 28 is the custom.
        channels, invert: the drawings are black on white; inverted, ink = 255.
        **rest: see `PublishedImages`.
    """

    name = "omniglot"
    native_size = 105
    source: ClassVar[str] = "See https://github.com/brendenlake/omniglot"
    tree: ClassVar[
        str
    ] = """  ROOT/images_background/Alphabet_of_the_Magi/character01/0709_01.png ..., or ROOT/images_background.zip
  ROOT/images_evaluation/Angelic/character01/0965_01.png ..., or ROOT/images_evaluation.zip
or images_background_small1 and images_background_small2 in their place."""

    def __init__(self, *, image_size: int | None = 28, channels: int = 1, invert: bool = True, **rest: Any) -> None:
        super().__init__(image_size=image_size, channels=channels, invert=invert, **{"normalize": False, **rest})

    def parts(self) -> list[Part]:
        names = SMALL if self._is_small() else FULL
        return [Part(name, f"{name}.zip", (f"{URL}{name}.zip",), CHECKSUMS[name]) for name in names]

    def default_split(self) -> str:
        return "omniglot_small" if self._is_small() else "omniglot_vinyals"

    def items(self, split: str, paths: dict[str, Path]) -> Items:
        characters = {
            f"{alphabet.name}/{character.name}": character
            for path in reversed(paths.values())  # The small sets share two alphabets: the first set's are taken.
            for alphabet in visible(path)
            if alphabet.is_dir()
            for character in visible(alphabet)
        }
        self.split.check_known(characters, f"character of {self.root}")
        return {name: [Item(file) for file in image_files(characters[name])] for name in self.split.classes[split]}

    def _is_small(self) -> bool:
        def there(names: tuple[str, ...]) -> bool:
            return all(self.has(name) or self.has(f"{name}.zip") for name in names)

        return there(SMALL) and not there(FULL)
