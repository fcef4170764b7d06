"""`ImageStore`: all images of a split in one block of memory, which workers and ranks share."""

import hashlib
import mmap
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from datamodules.files.storage import locked, replacing
from lightning_ntk.errors import DataError

# Bytes of images from which on ranks share a copy in a file.
SHARED_FROM = 2**24
# Images that are counted together for the statistics.
AT_ONCE = 64
# Class name to its images, uint8 [n, channels, height, width].
Classes = Mapping[str, np.ndarray]


class ImageStore:
    """The images of one split, uint8 `[N, channels, height, width]`, class after class.

    A plain dict of arrays is copied into one tensor, and emptied meanwhile, so that no image is held twice; classes
    that are views into one array, `classes.images` (a memory-mapped file), are used where they lie. Worker processes
    share either: forked ones by themselves, spawned ones because torch hands tensors over in shared memory and a mapped
    file is mapped again. Ranks, which are processes with tensors of their own, share what `share` has put into a file.

    Attributes:
        images: `[N, channels, height, width]`.
        names: of the classes, sorted: the episodes must not depend on the order in which a file system lists folders.
        starts, sizes: number of a class's first image, and how many it has: int64 `[classes]`.
    """

    def __init__(self, classes: Classes) -> None:
        self.names = sorted(classes)
        self.sizes = np.array([len(classes[name]) for name in self.names], dtype=np.int64)
        held = getattr(classes, "images", None)
        if held is None:
            self.starts = np.cumsum(self.sizes) - self.sizes
            shape = np.asarray(classes[self.names[0]]).shape[1:]
            self.images = torch.empty((int(self.sizes.sum()), *shape), dtype=torch.uint8)
            take = classes.pop if type(classes) is dict else classes.__getitem__
            for name, start, size in zip(self.names, self.starts, self.sizes, strict=True):
                self.images.numpy()[start : start + size] = take(name)
        else:
            self.starts = np.array([_position(classes[name], held) for name in self.names], dtype=np.int64)
            self.images = as_tensor(held)
        self._file = None if held is None else _place_in_file(held)

    def some(self, most: int) -> Iterator[Tensor]:
        """At most `most` images of the classes, evenly spaced over them, in batches of a few."""
        numbers = np.concatenate([start + np.arange(size) for start, size in zip(self.starts, self.sizes, strict=True)])
        for few in torch.from_numpy(numbers[:: -(-len(numbers) // most)]).split(AT_ONCE):
            yield gather(self.images, few)

    def share(self, folder: Path) -> None:
        """Hold the images in a file below `folder`, which every process with the same images maps, and not in a tensor.

        The file's name is a hash of its content: who comes second finds it. It stays, for the next start. Where it
        cannot be written there is a warning, and the images stay where they are. Few images stay there anyway.
        """
        if self._file is not None or self.images.nbytes < SHARED_FROM:
            return
        images = self.images.numpy()
        file = folder / f"images-{hashlib.sha256(images).hexdigest()[:20]}" / "images.npy"
        try:
            held = _mapped(file)
            if held is None:
                folder.mkdir(parents=True, exist_ok=True)
                with locked(folder / f"{file.parent.name}.lock") as alone:
                    held = _mapped(file)  # Another process may have written it meanwhile.
                    if held is None:
                        with replacing(file.parent, alone) as unfinished:
                            np.save(unfinished / file.name, images)
                        held = map_array(file)
        except (OSError, ValueError, EOFError) as error:
            warnings.warn(
                f"{folder} cannot be used: {getattr(error, 'strerror', None) or error}. Each process holds the images "
                "for itself. Make room there, or set LIGHTNING_NTK_CACHE to another folder.",
                stacklevel=2,
            )
            return
        self.images, self._file = as_tensor(held), _place_in_file(held)

    def __getstate__(self) -> dict[str, Any]:
        # A mapped file is not sent to a worker, but mapped there.
        return {**self.__dict__, "images": None} if self._file is not None else self.__dict__

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self._file is not None:
            path, offset, shape = self._file
            self.images = as_tensor(np.memmap(path, np.uint8, "r", offset, shape))


def map_array(file: Path) -> np.memmap:
    """The array of a .npy file, copy on write: torch wants arrays that may be written, and the file must stay."""
    try:
        return np.load(file, mmap_mode="c", allow_pickle=False)
    except OSError:  # A system that reserves memory for all that could be written may not have so much.
        return np.load(file, mmap_mode="r", allow_pickle=False)


def _mapped(file: Path) -> np.memmap | None:
    """The array of a .npy file; None where it is not there, or was cut short."""
    try:
        return map_array(file)
    except (FileNotFoundError, NotADirectoryError, ValueError, EOFError):
        return None


def as_tensor(array: np.ndarray) -> Tensor:
    """A tensor over the array's own memory, which nobody writes to."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(array)


def check_images(split: str, name: str, images: np.ndarray, shape: tuple[int, ...] | None) -> tuple[int, ...]:
    """The shape of one image; raise `DataError` unless it is uint8 of that shape, and there is one at least."""
    if not isinstance(name, str):
        raise DataError(f"A class of the {split} split is named {name!r}; class names must be text.")
    found = f"{images.dtype} of shape {tuple(images.shape)}" if hasattr(images, "dtype") else type(images).__name__
    if getattr(images, "dtype", None) not in (np.uint8, torch.uint8) or len(images.shape) != 4:
        raise DataError(
            f"Class {name!r} of the {split} split must be uint8 images [n, channels, height, width], but is {found}. "
            f"{_remedy(images)}"
        )
    channels, height, width = images.shape[1:]
    # Height and width are what is equal, and more than the channels.
    last = width in (1, 3) or channels == height > width
    if last and channels not in (1, 3):
        raise DataError(
            f"Class {name!r} of the {split} split must be uint8 images [n, channels, height, width], but is {found}, "
            "which has the channels last. Move them: images.transpose(0, 3, 1, 2)."
        )
    if not len(images):
        raise DataError(f"Class {name!r} of the {split} split has no images. Remove the class, or fill it.")
    if shape is not None and tuple(images.shape[1:]) != shape:
        raise DataError(
            f"Class {name!r} of the {split} split has images {tuple(images.shape[1:])}, but others are {shape}. Bring "
            "all of them to one size and one number of channels."
        )
    return tuple(images.shape[1:])


def _remedy(images: Any) -> str:
    """What makes images of something of another type or of other dimensions."""
    if not hasattr(images, "dtype"):
        return "Make an array of it: numpy.stack(images)."
    if len(images.shape) == 3:
        return "A dimension is missing: of grey images the channel, images[:, None]; of one image n, images[None]."
    if len(images.shape) != 4:
        return "Give it these four dimensions."
    if "float" in str(images.dtype):
        return "Of numbers in [0, 1] make bytes: numpy.rint(255 * numpy.asarray(images)).astype(numpy.uint8)."
    return "Of numbers from 0 to 255 make bytes: numpy.asarray(images).astype(numpy.uint8)."


def gather(images: Tensor, numbers: Tensor, *, rotations: bool = False, out: Tensor | None = None) -> Tensor:
    """The images `[..., channels, height, width]` of numbers `[...]`, on the images' device: one copy of each.

    With `rotations`, number `i + turns * N` is image i turned by `turns` times 90 degrees, as `np.rot90` does.
    They are written to `out`, flat, where it is given.
    """
    flat = numbers.reshape(-1)
    out = None if out is None else out.view(len(flat), *images.shape[1:])
    if not rotations:
        return torch.index_select(images, 0, flat, out=out).view(*numbers.shape, *images.shape[1:])
    upright = torch.arange(images.shape[2] * images.shape[3], device=images.device).view(images.shape[2:])
    turned = torch.stack([torch.rot90(upright, turns).reshape(-1) for turns in range(4)])
    chosen = images.index_select(0, flat % len(images))
    pixels = turned.index_select(0, torch.div(flat, len(images), rounding_mode="floor"))
    return rearrange(chosen, pixels, out).view(*numbers.shape, *images.shape[1:])


def rearrange(images: Tensor, pixels: Tensor, out: Tensor | None = None) -> Tensor:
    """Images `[n, channels, height, width]` whose pixel p is their old pixel `pixels[n, p]`, in every channel."""
    out = None if out is None else out.flatten(2)
    moved = torch.gather(images.flatten(2), 2, pixels[:, None].expand(-1, images.shape[1], -1), out=out)
    return moved.view(images.shape)


def channel_statistics(batches: Iterable[Tensor]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation of each channel over all pixels of batches of uint8 `[n, channels, h, w]`, in units of 255."""
    counts = sum(
        torch.stack([torch.bincount(channel.flatten(), minlength=256) for channel in images.unbind(1)])
        for images in batches
    )
    shares = counts.double() / counts[0].sum()
    levels = torch.arange(256, dtype=torch.float64) / 255
    mean = shares @ levels
    deviation = (shares @ levels.square() - mean.square()).clamp(min=1e-6).sqrt()
    return tuple(mean.tolist()), tuple(deviation.tolist())


def _position(part: np.ndarray, whole: np.ndarray) -> int:
    """Which image of `whole` the view `part` starts at."""
    position, rest = divmod(part.ctypes.data - whole.ctypes.data, whole.strides[0])
    if rest or not 0 <= position <= len(whole) - len(part) or part.strides != whole.strides:
        raise DataError("The arrays of a packed split must be slices of its `images`.")
    return position


def _place_in_file(array: np.ndarray) -> tuple[Path, int, tuple[int, ...]] | None:
    """File, offset in bytes and shape of a memory-mapped array; None for one in memory."""
    if not isinstance(array, np.memmap) or array.filename is None or not array.flags.c_contiguous:
        return None
    mapped = array
    while isinstance(mapped.base, np.ndarray):
        mapped = mapped.base
    if not isinstance(mapped.base, mmap.mmap):
        return None
    # The mapping begins at a multiple of the page, the array somewhere behind it.
    return Path(array.filename), array.ctypes.data - mapped.ctypes.data + mapped.offset, array.shape
