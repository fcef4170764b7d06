"""Images of every kind that a torch dataset may give, as PIL images of 8 bits."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image

from datamodules.files.decoding import opaque

# Under which names an item that is a dict holds its image.
IMAGE_KEYS = ("image", "img", "x", "pixel_values")
# How far beyond [0, 1] resizing may leave numbers by rounding.
TOLERANCE = 1e-3


def image_of(item: Any) -> Any:
    """The image of an item."""
    if isinstance(item, Mapping):
        key = next((key for key in IMAGE_KEYS if key in item), None)
        if key is None:
            raise ValueError(f"it is a dict without {' or '.join(IMAGE_KEYS)}, but with {', '.join(map(str, item))}")
        return item[key]
    return item[0] if isinstance(item, tuple | list) and len(item) else item


def as_pil(image: Any) -> Image.Image:
    """A PIL image, array or tensor as a PIL image; `ValueError` says what is wrong with another thing."""
    if isinstance(image, Image.Image):
        if image.mode.startswith(("I", "F")):  # Pillow would clip it to white.
            raise ValueError(f"it has more than 8 bits a channel, mode {image.mode}; 8 are expected")
        is_grey = image.mode in ("1", "L", "LA", "La")
        return opaque(image).convert("L" if is_grey else "RGB")
    if isinstance(image, torch.Tensor):
        try:
            pixels = image.detach().cpu().numpy()
        except TypeError as error:
            raise ValueError(f"it is a tensor that numpy has no equal of ({error}): give it as float32") from error
        first = pixels.ndim == 3 and pixels.shape[0] in (1, 3, 4)
    elif isinstance(image, np.ndarray):
        pixels = image
        first = pixels.ndim == 3 and pixels.shape[-1] not in (1, 3, 4) and pixels.shape[0] in (1, 3, 4)
    else:
        raise ValueError(f"it is {describe(image)}; expected a PIL image, a numpy array or a tensor")
    if first:
        pixels = pixels.transpose(1, 2, 0)
    if pixels.ndim == 2:
        pixels = pixels[..., None]
    if pixels.ndim == 3 and pixels.shape[-1] == 4:  # Nothing says whether the fourth is alpha.
        raise ValueError(
            f"its shape {tuple(image.shape)} has 4 channels; 1 or 3 are expected of an array or tensor. For RGB and "
            "alpha give PIL images, or leave alpha out; for four bands write a class_splits of your own (docs/DATA.md)"
        )
    if pixels.ndim != 3 or pixels.shape[-1] not in (1, 3) or 0 in pixels.shape:
        raise ValueError(f"its shape {tuple(image.shape)} is none of an image with 1 or 3 channels")
    pixels = as_bytes(pixels)
    return Image.fromarray(np.ascontiguousarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels))


def as_bytes(pixels: np.ndarray) -> np.ndarray:
    """Pixels as uint8, from bytes, booleans, or numbers in [0, 1]."""
    if pixels.dtype == np.uint8:
        return pixels
    if pixels.dtype == bool:
        return pixels.astype(np.uint8) * 255
    low, high = pixels.min(), pixels.max()
    if np.issubdtype(pixels.dtype, np.floating):
        if not (low >= -TOLERANCE and high <= 1 + TOLERANCE):
            way = "Leave a normalisation out of its transform: data.normalize=true has the network do it"
            if low >= 0 and 10 < high <= 255:  # Normalised ones are not so large.
                way = "Divide them by 255, or give bytes (uint8)"
            raise ValueError(f"its values go from {low:.3g} to {high:.3g}; numbers in [0, 1] are expected. {way}")
        return np.rint(pixels.clip(0, 1) * 255).astype(np.uint8)
    if not (np.issubdtype(pixels.dtype, np.integer) and low >= 0 and high <= 255):
        raise ValueError(f"its values, {pixels.dtype} from {low} to {high}, are none of 8 bits")
    return pixels.astype(np.uint8)


def describe(thing: Any) -> str:
    """The type of a thing, or null."""
    return "null" if thing is None else type(thing).__name__
