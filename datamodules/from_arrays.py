"""Images that are in memory already, as arrays: for notebooks and measurements."""

from collections.abc import Mapping
from typing import Any

from datamodules.images import Classes, ImageDataModule


class FromArrays(ImageDataModule):
    """`FromArrays(splits={"train": {"cat": cats, ...}, "test": {"owl": owls, ...}}, ways=5, shots=1)`.

    Args:
        splits: `{split: {class: uint8 [n, channels, h, w]}}`, as `class_splits` gives them.
        **episodes: see `ImageDataModule`.
    """

    def __init__(self, *, splits: Mapping[str, Classes], **episodes: Any) -> None:
        super().__init__(**episodes)
        self.splits = splits

    def class_splits(self) -> Mapping[str, Classes]:
        return self.splits

    def __getstate__(self) -> dict[str, Any]:
        # Episodes are drawn from the packed images alone.
        return {**super().__getstate__(), "splits": {}}
