"""`CachedImages`: images that are decoded once and read from the decoded cache afterwards."""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from datamodules.base import SPLITS
from datamodules.files.cache import Items, PackedClasses, cache_key, load_or_build, reading
from datamodules.files.decoding import Format, Item, decode
from datamodules.files.storage import cache_folder, locked, remove_leftovers, scratch, writing
from datamodules.images import ImageDataModule
from lightning_ntk.errors import ConfigError, DataError, check_at_least


class CachedImages(ImageDataModule):
    """A subclass says what its images are made from (`made_from`) and gives them to be decoded (`opened`).

    Args:
        image_size: side of the square that images are resized to, in pixels.
        channels: 3 (RGB) or 1 (grey).
        invert: 255 - value, for dark ink on white paper.
        cache_dir: where the decoded images are kept; None means $LIGHTNING_NTK_CACHE or the user's cache folder.
        **episodes: see `ImageDataModule`.
    """

    def __init__(
        self, *, image_size: int, channels: int, invert: bool = False, cache_dir: str | None = None, **episodes: Any
    ) -> None:
        super().__init__(**episodes)
        check_at_least(8, image_size, "data.image_size")
        if channels not in (1, 3):
            raise ConfigError(f"data.channels must be 1 (grey) or 3 (RGB), but got {channels}.")
        self.form = Format(image_size, channels, invert)
        self.cache_dir = cache_folder(cache_dir)
        self._packed: dict[str, PackedClasses] = {}

    # ---- what a data set provides ----------------------------------------------------------------------------------

    def made_from(self) -> list[Any]:
        """Plain values that decide the images, apart from their format: names, sizes and times of files, settings.

        Found at each start, so without reading what the files hold. Raises what there is to say about missing data.
        """
        raise NotImplementedError

    def opened(self, workspace: Path) -> AbstractContextManager[Callable[[str], Items]]:
        """A context that gives a function from a split to its images, by class; used when there is no cache yet.

        `workspace` is an empty folder, removed afterwards.
        """
        raise NotImplementedError

    def unreadable(self) -> Iterator[str]:
        """A line for each image that cannot be read, all splits looked through; nothing is cached."""
        name = f"survey-{type(self).__name__.lower()}"
        with writing(self.cache_dir, "data.cache_dir"), contextlib.ExitStack() as stack:
            self.cache_dir.mkdir(parents=True, exist_ok=True)
            if stack.enter_context(locked(self.cache_dir / f"{name}.lock")):
                remove_leftovers(self.cache_dir, name)
            workspace = stack.enter_context(scratch(self.cache_dir, name))
            open_split = reading(stack.enter_context, self.opened(workspace))
            for split in SPLITS:
                try:
                    items = reading(open_split, split)
                except DataError as error:
                    yield str(error)
                else:
                    yield from self.undecodable(item for own in items.values() for item in own)

    def undecodable(self, items: Iterable[Item]) -> Iterator[str]:
        """A line for each of these images that cannot be decoded."""
        for item in items:
            try:
                decode(item, self.form)
            except DataError as error:
                yield str(error)

    # ---- written once ----------------------------------------------------------------------------------------------

    def prepare_data(self) -> None:
        self.class_splits()

    def class_splits(self) -> dict[str, PackedClasses]:
        if not self._packed:
            name = type(self).__name__.lower()
            form = [self.form.size, self.form.channels, self.form.invert]
            key = cache_key(name, form, reading(self.made_from))
            self._packed = load_or_build(self.cache_dir / f"{name}-{key}", self.form, SPLITS, self.opened)
        return dict(self._packed)
