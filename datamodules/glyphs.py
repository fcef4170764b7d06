"""Glyphs: a few-shot data set that is rendered instead of downloaded.

A class is a letter, an example is one font face of it under a small random affine map, 28x28 pixels, ink = 255: a
problem in the manner of Omniglot. The faces are the 12 DejaVu and 4 STIX text faces that come with matplotlib.
Training classes are Latin, Greek and Cyrillic letters, validation classes Georgian ones and test classes Armenian
ones, so validation and test see scripts that training never saw. Letters that look alike are one class, and a letter
that looks like one of an earlier split is dropped from the later one.

`python -m datamodules.glyphs` prints the class table and writes a picture of a few classes.
"""

import functools
import hashlib
import secrets
import sys
import unicodedata
import zipfile
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import PIL
from matplotlib.ft2font import FT2Font
from PIL import Image, ImageDraw, ImageFont

from datamodules.files.storage import cache_folder
from datamodules.images import Classes, ImageDataModule

FACES = tuple(
    f"{family}{style}.ttf"
    for family, styles in (
        ("DejaVuSans", ("", "-Bold", "-Oblique", "-BoldOblique")),
        ("DejaVuSansMono", ("", "-Bold", "-Oblique", "-BoldOblique")),
        ("DejaVuSerif", ("", "-Bold", "-Italic", "-BoldItalic")),
        ("STIXGeneral", ("", "Bol", "Italic", "BolIta")),
    )
    for style in styles
)
SCRIPTS = {"train": ("LATIN", "GREEK", "CYRILLIC"), "val": ("GEORGIAN",), "test": ("ARMENIAN",)}
LAST_CODE_POINT = 0x2DFF  # Past the Georgian supplement, the last block of these scripts but for extensions.
FEWEST_FACES = 12  # A letter needs that many faces to become a class.
MAPS_PER_FACE = 2  # Random affine maps of each face: 24 to 32 images a class.

SIZE = 28  # pixels
OVERSAMPLING = 4  # Glyphs are drawn and mapped at this multiple of the size, then averaged down.
FONT_SIZE = 18  # pixels at 28x28: an upright capital is about 13 pixels high.
ROTATION = 15.0  # degrees, each way
SHEAR = 0.2
SCALE = 0.2  # relative, each way
SHIFT = 2.5  # pixels at 28x28, each way

# Two letters look alike when their drawings, cropped and brought to one size, correlate more than this in one of the
# faces compared.
ALIKE = 0.92
FACES_COMPARED = ("DejaVuSans.ttf", "DejaVuSerif.ttf")

VERSION = 1  # Raise when the rendering changes: the cache is keyed by it.


class Glyphs(ImageDataModule):
    """See the module.

    Args:
        cache_dir: where the rendered images are kept; None means $LIGHTNING_NTK_CACHE or the user's cache folder.
        **episodes: see `ImageDataModule`.
    """

    def __init__(self, *, cache_dir: str | None = None, **episodes: Any) -> None:
        super().__init__(**episodes)
        self.cache_dir = cache_folder(cache_dir)
        self.cache_file = self.cache_dir / f"glyphs-{cache_key()}.npz"

    def prepare_data(self) -> None:
        if read_cache(self.cache_file) is None:
            write_cache(self.cache_file, render_splits())

    def class_splits(self) -> dict[str, Classes]:
        return read_cache(self.cache_file) or render_splits()


# ---- cache ---------------------------------------------------------------------------------------------------------


@functools.cache
def cache_key() -> str:
    """Identifies what the images depend on: this file's numbers, the fonts, and the rasteriser's version."""
    digest = hashlib.sha256()
    settings = (SIZE, OVERSAMPLING, FONT_SIZE, ROTATION, SHEAR, SCALE, SHIFT, ALIKE, FEWEST_FACES, MAPS_PER_FACE)
    digest.update(repr((VERSION, settings, PIL.__version__, unicodedata.unidata_version)).encode())
    for face in FACES:
        digest.update(font_path(face).read_bytes())
    return digest.hexdigest()[:16]


def read_cache(file: Path) -> dict[str, Classes] | None:
    """The cached splits, or None when there is no file or it is damaged."""
    try:
        with file.open("rb") as source, np.load(source, allow_pickle=False) as arrays:
            splits: dict[str, Classes] = {split: {} for split in SCRIPTS}
            for name in arrays.files:
                split, letter = name.split("-")
                splits[split][letter] = arrays[name]
            return splits
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile):
        return None


def write_cache(file: Path, splits: dict[str, Classes]) -> None:
    """Write beside the target and move into place: a reader never sees half a file, and two writers do not mix.

    A cache folder that cannot be written costs time, not correctness: rendering is then done in every process.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        unfinished = file.with_name(f"{file.name}.tmp-{secrets.token_hex(8)}")
        try:
            arrays = {f"{split}-{name}": x for split, classes in splits.items() for name, x in classes.items()}
            with unfinished.open("xb") as target:
                np.savez(target, **arrays)
            unfinished.replace(file)
        finally:
            unfinished.unlink(missing_ok=True)
    except OSError:
        return


# ---- rendering -----------------------------------------------------------------------------------------------------


def render_splits() -> dict[str, Classes]:
    """All images: `{split: {"U+0041": uint8 [images, 1, 28, 28]}}`. Takes some seconds."""
    letters = letters_of_splits()
    return {split: {f"U+{ord(c):04X}": render_class(c) for c in chosen} for split, chosen in letters.items()}


def letters_of_splits() -> dict[str, list[str]]:
    """The letters of each split: covered by enough faces, without canonical decomposition, one of each look-alike."""
    kept: list[str] = []
    splits: dict[str, list[str]] = {}
    for split, scripts in SCRIPTS.items():
        candidates = [c for script in scripts for c in letters_of_script(script)]
        splits[split] = drop_alike(candidates, kept)
        kept = kept + splits[split]
    return splits


def letters_of_script(script: str) -> list[str]:
    """Letters of a script, by their Unicode names, that decompose into nothing and that enough faces cover."""
    return [
        c
        for c in map(chr, range(LAST_CODE_POINT + 1))
        if unicodedata.category(c) in ("Lu", "Ll", "Lo")
        and unicodedata.name(c, "").split(" ")[0] == script
        and not unicodedata.decomposition(c)
        and len(faces_of(c)) >= FEWEST_FACES
    ]


def drop_alike(candidates: list[str], kept: list[str]) -> list[str]:
    """The candidates that look neither like a kept letter nor like an earlier candidate, in any face compared."""
    letters = kept + candidates
    drawings = np.stack([[template(c, face) for c in letters] for face in FACES_COMPARED])
    drawings = drawings.reshape(len(FACES_COMPARED), len(letters), -1)
    drawings = drawings - drawings.mean(-1, keepdims=True)
    drawings /= np.linalg.norm(drawings, axis=-1, keepdims=True)
    alike = (drawings @ drawings.transpose(0, 2, 1)).max(0) > ALIKE
    taken = list(range(len(kept)))
    for number in range(len(kept), len(letters)):
        if not alike[number, taken].any():
            taken.append(number)
    return [letters[number] for number in taken[len(kept) :]]


def template(letter: str, face: str) -> np.ndarray:
    """The letter cropped to its ink and brought to 24x24, aspect ratio kept, slightly blurred: for comparing shapes."""
    drawing = draw(letter, face)
    cropped = drawing.crop(drawing.getbbox())
    side = max(cropped.size)
    square = Image.new("L", (side, side))
    square.paste(cropped, ((side - cropped.width) // 2, (side - cropped.height) // 2))
    return np.asarray(square.resize((12, 12), Image.Resampling.BOX).resize((24, 24)), dtype=np.float64)


def render_class(letter: str) -> np.ndarray:
    """All images of a letter, uint8 `[images, 1, 28, 28]`; the random maps depend on the letter and face alone."""
    images = []
    for face in faces_of(letter):
        drawing = draw(letter, face)
        rng = np.random.default_rng([ord(letter), FACES.index(face)])
        for _ in range(MAPS_PER_FACE):
            images.append(np.asarray(distort(drawing, rng)))
    return np.stack(images)[:, None]


def draw(letter: str, face: str) -> Image.Image:
    """The letter in white on black at the oversampled size, its ink centred."""
    side = SIZE * OVERSAMPLING
    font = load_font(face)
    left, top, right, bottom = font.getbbox(letter)
    image = Image.new("L", (side, side))
    corner = ((side - right - left) / 2, (side - bottom - top) / 2)
    ImageDraw.Draw(image).text(corner, letter, fill=255, font=font)
    return image


def distort(drawing: Image.Image, rng: np.random.Generator) -> Image.Image:
    """A random rotation, shear, scale and shift about the centre, then averaging down to 28x28."""
    angle = np.deg2rad(rng.uniform(-ROTATION, ROTATION))
    shear = rng.uniform(-SHEAR, SHEAR)
    scale_x, scale_y = rng.uniform(1 - SCALE, 1 + SCALE, size=2)
    rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    # Pillow wants the map from the result's pixels back to the source's.
    inverse = np.linalg.inv(rotation @ np.array([[1.0, shear], [0.0, 1.0]]) @ np.diag([scale_x, scale_y]))
    centre = np.full(2, SIZE * OVERSAMPLING / 2)
    offset = centre - inverse @ (centre + OVERSAMPLING * rng.uniform(-SHIFT, SHIFT, size=2))
    coefficients = (*inverse[0], offset[0], *inverse[1], offset[1])
    moved = drawing.transform(drawing.size, Image.Transform.AFFINE, coefficients, Image.Resampling.BILINEAR)
    return moved.resize((SIZE, SIZE), Image.Resampling.BOX)


def font_path(face: str) -> Path:
    return Path(matplotlib.get_data_path()) / "fonts" / "ttf" / face


@functools.cache
def load_font(face: str) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(str(font_path(face)), FONT_SIZE * OVERSAMPLING)


@functools.cache
def covered(face: str) -> frozenset[int]:
    """Code points that a face has a drawing for."""
    return frozenset(FT2Font(str(font_path(face))).get_charmap())


@functools.cache
def faces_of(letter: str) -> tuple[str, ...]:
    return tuple(face for face in FACES if ord(letter) in covered(face))


def main() -> None:
    """Print the class table and write glyphs.png, the first classes of each split, one a row."""
    splits = render_splits()
    rows = []
    for split, classes in splits.items():
        scripts = ", ".join(script.capitalize() for script in SCRIPTS[split])
        images = sum(len(x) for x in classes.values())
        sys.stdout.write(f"{split:6} {len(classes):4} classes  {images:6} images  {scripts}\n")
        rows += [np.concatenate(list(x[:20, 0]), axis=1) for x in list(classes.values())[:: max(1, len(classes) // 8)]]
    Image.fromarray(255 - np.concatenate(rows)).save("glyphs.png")
    sys.stdout.write("glyphs.png\n")


if __name__ == "__main__":
    main()
