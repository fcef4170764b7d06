"""From an image on disk, in an archive or in memory to uint8 pixels of the size and channels asked for."""

import io
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from datamodules.files.storage import visible
from lightning_ntk.errors import DataError

NETPBM = (".ppm", ".pgm", ".pbm", ".pnm")
EXTENSIONS = (".png", ".jpg", ".jpeg", ".jfif", ".bmp", ".gif", ".webp", ".tif", ".tiff", *NETPBM)


@dataclass(frozen=True)
class Item:
    """One image of a data set.

    Args:
        source: a file; the bytes of a file; or pixels, uint8 `[height, width]` or `[height, width, 3]`.
        name: what errors call it, where the source is no file.
        box: what to crop to before resizing: left, top, right, bottom in pixels.
        upright: turn it as its EXIF orientation says, which cameras note instead of turning the pixels.
    """

    source: Path | bytes | memoryview | np.ndarray
    name: str = ""
    box: tuple[float, float, float, float] | None = None
    upright: bool = False


@dataclass(frozen=True)
class Format:
    """What images become: uint8 `[channels, size, size]`; `invert` turns dark ink on white into ink = 255."""

    size: int
    channels: int
    invert: bool = False

    @property
    def shape(self) -> tuple[int, int, int]:
        return (self.channels, self.size, self.size)


def decode(item: Item, form: Format) -> np.ndarray:
    """One image as uint8 `[channels, size, size]`: whatever its size and mode; the aspect ratio is not kept.

    Raises:
        DataError: it cannot be read, or is grey of more than 8 bits.
    """
    try:
        if isinstance(item.source, np.ndarray):
            return to_pixels(Image.fromarray(item.source), item, form)
        encoded = item.source if isinstance(item.source, Path) else io.BytesIO(item.source)
        with Image.open(encoded) as image:
            return to_pixels(image, item, form)
    except FileNotFoundError as error:
        raise DataError(
            f"Image {item.source} is not there: the data set is not whole, or the name is a link to nothing. Put it "
            "back, or remove what names it."
        ) from error
    except (OSError, ValueError, TypeError, SyntaxError, Image.DecompressionBombError) as error:
        name = item.source if isinstance(item.source, Path) else item.name
        raise DataError(f"Image {name} cannot be read ({error}). Replace or remove it.") from error


def to_pixels(image: Image.Image, item: Item, form: Format) -> np.ndarray:
    """Crop, convert and resize one image."""
    if image.mode.startswith(("I", "F")):  # Pillow would clip it to white.
        raise ValueError(f"it has more than 8 bits a channel, mode {image.mode}; 8 are expected")
    if item.upright:
        image = turned_upright(image)
    converted = opaque(image).convert("RGB" if form.channels == 3 else "L")  # A palette goes through RGB.
    if item.box is not None:
        converted = converted.crop(item.box)
    if converted.size != (form.size, form.size):
        converted = converted.resize((form.size, form.size), Image.Resampling.BILINEAR)
    pixels = np.asarray(converted)
    pixels = pixels[None] if form.channels == 1 else pixels.transpose(2, 0, 1)
    return 255 - pixels if form.invert else pixels


def turned_upright(image: Image.Image) -> Image.Image:
    """The image turned as its EXIF orientation says; as it is, where it has none or its EXIF is damaged."""
    image.load()  # Damaged pixels are an error.
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # Damaged EXIF can raise anything.
        return image


def opaque(image: Image.Image) -> Image.Image:
    """The image on white, where parts of it are transparent: drawings often are black with their shape in alpha."""
    if image.mode not in ("RGBA", "LA", "PA", "RGBa", "La") and "transparency" not in image.info:
        return image
    drawn = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", drawn.size, "white"), drawn).convert("RGB")


def is_image(entry: Path | os.DirEntry) -> bool:
    """Whether a name is an image's, and no folder or pipe has it; of a link to nothing, decoding says what it is."""
    return entry.name.lower().endswith(EXTENSIONS) and (entry.is_file() or not os.path.exists(entry))


def image_files(folder: Path) -> list[Path]:
    """The images of a class folder, sorted; hidden files and things of other kinds are passed over.

    Raises:
        DataError: there are none.
    """
    with os.scandir(folder) as entries:  # Its entries know what is a file: a start looks through all of them.
        files = sorted(entry.path for entry in entries if is_image(entry) and not entry.name.startswith("."))
    if not files:
        others = sorted(visible(folder))
        if not others:
            raise DataError(f"Class folder {folder} is empty, hidden files apart. Remove it, or put images into it.")
        inner = [path.name for path in others if path.is_dir()]
        names = inner or [path.name for path in others]
        found = f" but {'folders' if inner else 'files'} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
        way = "Put its images into it directly, not into folders below" if inner else "Remove it or fill it"
        raise DataError(f"Class folder {folder} holds no images ({', '.join(EXTENSIONS)}){found}. {way}.")
    return list(map(Path, files))
