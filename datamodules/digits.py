"""Digits: scikit-learn's 1797 real handwritten digits (UCI, Alpaydin and Kaynak 1998), as a data set to test on.

Ten classes of 174 to 183 images, 8x8 pixels with 17 levels of grey, resized; ink is 1 on paper of 0, as in glyphs. All
of them are the test split: there is nothing to train on.
"""

from typing import Any

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

from datamodules.images import Classes, ImageDataModule
from lightning_ntk.errors import ConfigError, check_at_least

INK_LEVELS = 16


class Digits(ImageDataModule):
    """See the module.

    Args:
        image_size: pixels a side that the 8x8 pixels are resized to (bilinear).
        channels: 1, or 3 alike.
        **episodes: see `ImageDataModule`.
    """

    trains = False

    def __init__(self, *, image_size: int = 28, channels: int = 1, **episodes: Any) -> None:
        super().__init__(**episodes)
        check_at_least(1, image_size, "data.image_size")
        if channels not in (1, 3):
            raise ConfigError(f"data.channels must be 1 (grey) or 3 (RGB), but got {channels!r}.")
        self.image_size = image_size
        self.channels = channels

    def class_splits(self) -> dict[str, Classes]:
        digits = load_digits()
        grey = (digits.images * (255 / INK_LEVELS)).round().astype(np.uint8)
        size = (self.image_size, self.image_size)
        images = np.stack([np.asarray(Image.fromarray(x).resize(size, Image.Resampling.BILINEAR)) for x in grey])
        images = np.repeat(images[:, None], self.channels, axis=1)
        return {"test": {str(k): images[digits.target == k] for k in range(10)}}
