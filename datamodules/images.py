"""`ImageDataModule`: few-shot classification episodes from images in classes."""

import hashlib
from typing import Any

import numpy as np
import torch

from datamodules.base import EpisodicDataModule, check_at_least
from lightning_ntk.episode import Episode, TaskSpec
from lightning_ntk.errors import ConfigError, DataError

# Class name to its images, uint8 [n, channels, height, width].
Classes = dict[str, np.ndarray]


class ImageDataModule(EpisodicDataModule):
    """A subclass says which images belong to which class, in `class_splits`; the rest is here.

    An episode draws `ways` classes without replacement, in random order (class k of the draw has label k), and from
    each of them `shots` support and `queries` query images, all distinct. Support and query are ordered by label.

    Args:
        ways, shots, queries: of a training episode; `queries` is per class.
        eval_ways, eval_shots, eval_queries: of a validation or test episode; None means as in training. `eval_ways` may
            not exceed `ways`, the number of outputs of the network.
        rotate_train_classes: each training class turned by 90, 180 and 270 degrees counts as three more classes, the
            custom on Omniglot (Santoro et al. 2016).
        normalize: give the network the training images' channel means and deviations to normalise by.
        **loading: see `EpisodicDataModule`.
    """

    def __init__(
        self,
        *,
        ways: int = 5,
        shots: int = 1,
        queries: int = 15,
        eval_ways: int | None = None,
        eval_shots: int | None = None,
        eval_queries: int | None = None,
        rotate_train_classes: bool = False,
        normalize: bool = False,
        **loading: Any,
    ) -> None:
        super().__init__(**loading)
        self.shape = {"train": (ways, shots, queries)}
        evaluation = tuple(
            own if other is None else other
            for own, other in zip(self.shape["train"], (eval_ways, eval_shots, eval_queries), strict=True)
        )
        self.shape["val"] = self.shape["test"] = evaluation
        for prefix, shape in (("", self.shape["train"]), ("eval_", evaluation)):
            for name, value, minimum in zip(("ways", "shots", "queries"), shape, (2, 1, 1), strict=True):
                check_at_least(minimum, value, f"data.{prefix}{name}")
        if evaluation[0] > ways:
            raise ConfigError(
                f"data.eval_ways={evaluation[0]} exceeds data.ways={ways}: the network has one output for each of the "
                f"{ways} ways it is trained on. Raise data.ways and train again, or lower data.eval_ways."
            )
        self.rotate_train_classes = rotate_train_classes
        self.normalize = normalize
        self._classes: dict[str, list[torch.Tensor]] = {}

    # ---- what a data set provides ----------------------------------------------------------------------------------

    def class_splits(self) -> dict[str, Classes]:
        """`{"train": {class: images}, "val": ..., "test": ...}`, images uint8 `[n, channels, h, w]`; "val" may lack."""
        raise NotImplementedError

    # ---- written once ----------------------------------------------------------------------------------------------

    def setup(self, stage: str | None = None) -> None:
        if self._classes:
            return
        splits = self.class_splits()
        for split in ("train", "test"):
            if not splits.get(split):
                raise DataError(f"The data set has no classes in its {split} split; both train and test are needed.")
        check_disjoint(splits)
        if self.rotate_train_classes:
            splits["train"] = with_rotations(splits["train"])
        for split, classes in splits.items():
            if classes:
                self._check_enough(split, classes)
        digest = hashlib.sha256()
        for name, images in sorted(splits["test"].items()):
            digest.update(name.encode())
            digest.update(np.ascontiguousarray(images).tobytes())
        self._content_hash = digest.hexdigest()
        # Sorted by name: the episodes must not depend on the order in which a file system lists folders.
        self._classes = {
            split: [torch.from_numpy(np.ascontiguousarray(images)) for _, images in sorted(classes.items())]
            for split, classes in splits.items()
        }

    @property
    def spec(self) -> TaskSpec:
        images = self._classes["train"]
        mean = std = None
        if self.normalize:
            mean, std = channel_statistics(images)
        return TaskSpec("classification", tuple(images[0].shape[1:]), self.shape["train"][0], mean, std)

    def has_split(self, split: str) -> bool:
        return bool(self._classes.get(split))

    def class_count(self, split: str) -> int:
        """Number of classes of a split, rotations counted; valid after `setup`."""
        return len(self._classes[split])

    def content_hash(self) -> str:
        return self._content_hash

    def task_settings(self) -> dict[str, Any]:
        ways, shots, queries = self.shape["test"]
        return {
            "data": type(self).__name__,
            "ways": ways,
            "shots": shots,
            "queries": queries,
            "test_episodes": self.episodes["test"],
            "eval_seed": self.eval_seed,
            "input_shape": list(self.spec.input_shape),
        }

    def draw(self, split: str, epoch: int, index: int) -> Episode:
        rng = self.rng(split, epoch, index)
        ways, shots, queries = self.shape[split]
        classes = self._classes[split]
        support, query = [], []
        for chosen in rng.choice(len(classes), ways, replace=False):
            images = classes[chosen]
            picked = torch.from_numpy(rng.choice(len(images), shots + queries, replace=False))
            support.append(images[picked[:shots]])
            query.append(images[picked[shots:]])
        labels = torch.arange(ways)
        return Episode(
            support_x=torch.cat(support),
            support_y=labels.repeat_interleave(shots),
            query_x=torch.cat(query),
            query_y=labels.repeat_interleave(queries),
            index=torch.tensor(index),
        )

    def _check_enough(self, split: str, classes: Classes) -> None:
        ways, shots, queries = self.shape[split]
        prefix = "data." if split == "train" else "data.eval_"
        if ways > len(classes):
            raise ConfigError(
                f"{prefix}ways={ways} classes are asked of an episode, but the {split} split has {len(classes)}. "
                f"Lower {prefix}ways to at most {len(classes)}."
            )
        smallest = min(classes, key=lambda name: len(classes[name]))
        if shots + queries > len(classes[smallest]):
            raise ConfigError(
                f"{prefix}shots={shots} and {prefix}queries={queries} need {shots + queries} images of a class, but "
                f"class {smallest!r} of the {split} split has {len(classes[smallest])}. Lower one of them."
            )


def check_disjoint(splits: dict[str, Classes]) -> None:
    """Raise `DataError` when two splits share a class, by its name or by all of its images."""
    seen: dict[str, tuple[str, str]] = {}
    for split, classes in splits.items():
        for name, images in classes.items():
            content = hashlib.sha256(np.ascontiguousarray(images).tobytes()).hexdigest()
            for identity in (f"name {name}", content):
                other_split, other_name = seen.setdefault(identity, (split, name))
                if other_split != split:
                    raise DataError(
                        f"Class {name!r} of the {split} split is also in the {other_split} split (as {other_name!r}): "
                        "few-shot classes must not be shared. Remove it from one of them."
                    )


def with_rotations(classes: Classes) -> Classes:
    """The classes, and each of them turned by 90, 180 and 270 degrees as a class of its own."""
    return {
        name if turns == 0 else f"{name}@{90 * turns}": np.rot90(images, turns, axes=(2, 3))
        for name, images in classes.items()
        for turns in range(4)
    }


def channel_statistics(images: list[torch.Tensor]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel over all pixels, for images in [0, 1]."""
    count = sum(x.shape[0] * x.shape[2] * x.shape[3] for x in images)
    first = sum(x.double().sum((0, 2, 3)) for x in images) / count / 255
    second = sum(x.double().square().sum((0, 2, 3)) for x in images) / count / 255**2
    deviation = (second - first.square()).clamp(min=1e-6).sqrt()
    return tuple(first.tolist()), tuple(deviation.tolist())
