"""Small data sets in the layouts that the published ones have; every image differs from every other."""

import io
import tarfile
import zipfile
import zlib
from pathlib import Path

import numpy as np
from PIL import Image


def pixels(*key, size=(10, 12), channels=3):
    """Random pixels, uint8 `[height, width, channels]`, that depend on the key alone."""
    seed = [zlib.crc32(part.encode()) if isinstance(part, str) else part for part in key]
    return np.random.default_rng(seed).integers(0, 256, (size[1], size[0], channels), dtype=np.uint8)


def encoded(*key, kind="PNG", **shape):
    """The bytes of an image file of these pixels."""
    target = io.BytesIO()
    Image.fromarray(pixels(*key, **shape)).save(target, kind)
    return target.getvalue()


def save_image(file, *key, kind=None, **shape):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(encoded(*key, kind=kind or {".png": "PNG"}.get(file.suffix, "JPEG"), **shape))


def write_split(file, **classes):
    """A split file: `write_split(file, train=["a"], test=["b"])`."""
    rows = [f"{split},{name}" for split, names in classes.items() for name in names]
    file.write_text("\n".join(["split,class", *rows]) + "\n", encoding="utf-8")
    return str(file)


def zipped(folder, archive):
    """The folder as a .zip with its own name at the top; the folder goes."""
    with zipfile.ZipFile(archive, "w") as target:
        for path in sorted(folder.rglob("*")):
            target.write(path, path.relative_to(folder.parent))
    remove(folder)
    return archive


def tarred(folder, archive):
    """The folder as a .tar.gz with its own name at the top; the folder goes."""
    with tarfile.open(archive, "w:gz") as target:
        target.add(folder, folder.name)
    remove(folder)
    return archive


def remove(folder: Path):
    for path in sorted(folder.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    folder.rmdir()


def resized(array, size, mode="RGB"):
    """What Pillow makes of pixels: the plain way to what a loader must give, `[channels, size, size]`."""
    image = Image.fromarray(array).convert(mode)
    if image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.BILINEAR)
    array = np.asarray(image)
    return array[None] if mode == "L" else array.transpose(2, 0, 1)
