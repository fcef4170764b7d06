"""`ImageDataModule`: few-shot classification episodes from images in classes."""

import dataclasses
import functools
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from datamodules.base import SPLITS, EpisodicDataModule, Key
from datamodules.checks.disjoint import check_disjoint
from datamodules.checks.survey import Survey, missing_splits, survey_images
from datamodules.episodes.augment import (
    apply_colours,
    apply_moves,
    check_augment,
    check_jitter,
    draw_colours,
    draw_moves,
)
from datamodules.episodes.blocks import Blocks
from datamodules.episodes.counter import below, key_of, keys_of, random_words, steps
from datamodules.episodes.drawing import TaskShape, draw_images
from datamodules.episodes.image_store import Classes, ImageStore, channel_statistics, check_images, gather
from datamodules.files.storage import cache_folder
from lightning_ntk.episode import Episode, TaskSpec
from lightning_ntk.errors import ConfigError, DataError, check_at_least

__all__ = ["Classes", "ImageDataModule"]

# Part of the test episodes' identity: raised when the same settings and images come to give other episodes.
DRAWING = 2
# Channel statistics come from at most so many training images, evenly spaced: a start must stay fast.
STATISTICS_IMAGES = 4096


@dataclasses.dataclass(eq=False)
class UnfinishedEpisode(Episode):
    """A batch as a loader hands it out when the device has work to do on it, in `on_after_batch_transfer`.

    Attributes:
        support_x, query_x: uint8 images, or with data.resident=device their numbers, int64 `[T, n]` and `[T, m]`.
        split: whose images they are.
        moves: augmentation, int64 `[T, n + m, 3]`; None where there is none.
        colours: their factors, float `[T, n + m, 3]`; None where there are none.
    """

    split: str
    moves: Tensor | None
    colours: Tensor | None


class ImageDataModule(EpisodicDataModule):
    """A subclass says which images belong to which class, in `class_splits`; the rest is here.

    An episode draws `ways` classes without replacement, in random order (class k of the draw has label k), and from
    each of them `shots` support and `queries` query images, all distinct. Support and query are ordered by label.

    Args:
        ways, shots, queries: of a training episode; `queries` is per class, `ways` also the network's outputs.
        eval_ways, eval_shots, eval_queries: of a validation or test episode; None means as in training. More
            `eval_ways` than `ways` need a method without a head.
        vary_ways, vary_shots: `[least, most]`: each training step draws its ways and shots from there, the same for all
            of its tasks (in the manner of Meta-Dataset, Triantafillou et al. 2020); None means `ways` and `shots`. The
            most ways are `ways`; `shots` lie in the range, or `eval_shots` say what validation and test have.
        balanced: false: with `vary_shots`, each class of a training task has a number of shots of its own.
        rotate_train_classes: each training class turned by 90, 180 and 270 degrees counts as three more classes, the
            custom on Omniglot (Santoro et al. 2016).
        normalize: give the network the training images' channel means and deviations to normalise by.
        augment: of training images: "none", "flip" (left to right) or "crop_flip" (also shifted, up to a tenth).
        jitter: colours of training images: brightness, contrast and saturation are multiplied by factors that differ
            from 1 by at most this much; 0.4 is the custom (Chen et al. 2019).
        resident: where the images lie: "host", or "device": each GPU has a copy and gathers episodes from it.
        allow_shared_images: take data in which splits share images, instead of refusing them.
        **loading: see `EpisodicDataModule`.
    """

    # False for a data set that is for testing alone, without training classes.
    trains = True

    def __init__(
        self,
        *,
        ways: int = 5,
        shots: int = 1,
        queries: int = 15,
        eval_ways: int | None = None,
        eval_shots: int | None = None,
        eval_queries: int | None = None,
        vary_ways: list[int] | None = None,
        vary_shots: list[int] | None = None,
        balanced: bool = True,
        rotate_train_classes: bool = False,
        normalize: bool = False,
        augment: str = "none",
        jitter: float = 0.0,
        resident: str = "host",
        allow_shared_images: bool = False,
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
        self.vary_ways = check_range(vary_ways, 2, "data.vary_ways")
        self.vary_shots = check_range(vary_shots, 1, "data.vary_shots")
        if self.vary_ways is not None and self.vary_ways[1] != ways:
            raise ConfigError(
                f"data.vary_ways={list(self.vary_ways)} must end at data.ways={ways}: the network has one output for "
                f"each of data.ways, and all must be trained. Set data.ways={self.vary_ways[1]}, and data.eval_ways to "
                "the ways of validation and test."
            )
        if self.vary_shots is not None and eval_shots is None and not self.vary_shots[0] <= shots <= self.vary_shots[1]:
            raise ConfigError(
                f"data.vary_shots={list(self.vary_shots)} leaves out data.shots={shots}, which validation and test "
                "would have. Set data.eval_shots to the shots that they are to have."
            )
        if not balanced and self.vary_shots is None:
            raise ConfigError(
                "data.balanced=false needs data.vary_shots=[LEAST,MOST]: the shots that a class may have."
            )
        check_augment(augment)
        check_jitter(jitter)
        if resident not in ("host", "device"):
            raise ConfigError(f"data.resident must be 'host' or 'device', but got {resident!r}.")
        self.balanced = balanced
        self.rotate_train_classes = rotate_train_classes
        self.normalize = normalize
        self.augment = augment
        self.jitter = jitter
        self.resident = resident
        self.allow_shared_images = allow_shared_images
        self.cache_dir = cache_folder(None)
        self._surveyed: dict[str, Classes] = {}
        self._stores: dict[str, ImageStore] = {}
        self._on_device: dict[tuple[str, torch.device], Tensor] = {}
        self._blocks = Blocks()

    # ---- what a data set provides ----------------------------------------------------------------------------------

    def class_splits(self) -> Mapping[str, Classes]:
        """`{"train": {class: images}, "val": ..., "test": ...}`, images uint8 `[n, channels, h, w]`; "val" may lack.

        A split may also be a mapping to views into one memory-mapped array, its attribute `images`; then nothing is
        copied. With an attribute `digest` its content is not hashed again.
        """
        raise NotImplementedError(f"{type(self).__name__} needs a method class_splits: see docs/DATA.md.")

    def unreadable(self) -> Iterator[str]:
        """A line for each image that cannot be read; looked for when `class_splits` has failed on one."""
        return iter(())

    def passed_over(self) -> Iterator[str]:
        """A line for each kind of thing that lies among the images and is not read."""
        return iter(())

    # ---- written once ----------------------------------------------------------------------------------------------

    def setup(self, stage: str | None = None) -> None:
        if not self._stores:
            self._read_stores()
        for split in [split for split in drawn_from(stage) if split in self._stores]:
            for reason in self.lacking(split, self.class_sizes(split)):
                raise ConfigError(reason)
        if self._rank()[1] > 1:  # `lightning-ntk train` sets up before it knows of ranks; its Trainer does so again.
            for store in self._stores.values():
                store.share(self.cache_dir)

    def _read_stores(self) -> None:
        splits = self._read_splits()
        for finding in missing_splits(splits, self.trains):
            raise DataError(finding)
        shape = None
        for split, classes in splits.items():
            for name, images in classes.items():
                shape = check_images(split, name, images, shape)
        if self.rotate_train_classes and shape[1] != shape[2]:
            raise ConfigError(
                f"data.rotate_train_classes=true needs square images, but these are {shape[1]}x{shape[2]}. "
                "Set it to false."
            )
        if self.jitter and shape[0] not in (1, 3):
            raise ConfigError(
                f"data.jitter={self.jitter} needs images of 1 or 3 channels, but these have {shape[0]}. Set it to 0."
            )
        check_disjoint(splits, self.allow_shared_images)
        self._content_hash = content_hash(splits["test"])
        # What is packed is let go of at once.
        self._stores = {split: ImageStore(splits.pop(split)) for split in list(splits)}

    @functools.cached_property
    def spec(self) -> TaskSpec:
        store = self._store("train" if self.trains else "test")
        mean, std = channel_statistics(store.some(STATISTICS_IMAGES)) if self.normalize else (None, None)
        return TaskSpec("classification", tuple(store.images.shape[1:]), self.shape["train"][0], mean, std)

    def has_split(self, split: str) -> bool:
        return split in self._stores

    def check_split(self, split: str) -> None:
        """Raise `ConfigError` unless the data set has this split, and its images are read."""
        if not self._stores:
            raise ConfigError(f"{type(self).__name__} has read no images yet: call prepare_data() and setup() first.")
        super().check_split(split)

    def _store(self, split: str) -> ImageStore:
        self.check_split(split)
        return self._stores[split]

    def class_count(self, split: str) -> int:
        """Number of classes of a split, rotations counted; valid after `setup`."""
        return len(self._store(split).names) * (4 if self._rotates(split) else 1)

    def class_sizes(self, split: str) -> dict[str, int]:
        """Number of images of each class of a split, without rotations; valid after `setup`."""
        store = self._store(split)
        return dict(zip(store.names, store.sizes.tolist(), strict=True))

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

    def survey(self) -> Survey:
        try:
            self.prepare_data()
            splits = self._read_splits()
        except DataError as error:
            survey = Survey()
            try:
                for finding in self.unreadable():
                    survey.findings.append(finding)
                survey.notes += self.passed_over()
            except DataError as other:
                if survey.findings:  # Else it is what was met first.
                    survey.findings.append(str(other))
            survey.findings = list(dict.fromkeys(survey.findings)) or [str(error)]
            return survey
        survey = survey_images(splits, self.trains, self.allow_shared_images)
        survey.notes += self.passed_over()
        for split, classes in ((split, splits[split]) for split in SPLITS if split in splits):
            survey.findings += self.lacking(split, {name: len(images) for name, images in classes.items()})
        return survey

    def _read_splits(self) -> dict[str, Classes]:
        """The splits that have classes, read once for a survey and the setup that follows it."""
        if not self._surveyed:
            splits = self.class_splits()
            for value in [splits, *splits.values()] if isinstance(splits, Mapping) else [splits]:
                if not isinstance(value, Mapping):
                    raise DataError(
                        f"{type(self).__name__}.class_splits must return {{split: {{class: images}}}}, but there is a "
                        f"{type(value).__name__} in the place of a dict."
                    )
            # Plain dicts are emptied by the stores: those that a `class_splits` keeps for itself stay as they are.
            own = {split: dict(classes) if type(classes) is dict else classes for split, classes in splits.items()}
            self._surveyed = {split: classes for split, classes in own.items() if classes}
        return self._surveyed

    def task_shape(self, split: str, epoch: int, index: int) -> TaskShape:
        """Ways, shots and queries of an episode: in training those of its step, `index // tasks_per_step`."""
        ways, shots, queries = self.shape[split]
        if split != "train" or (self.vary_ways is None and self.vary_shots is None):
            return TaskShape((shots,) * ways, queries)
        key = keys_of(key_of(self.seed, len(SPLITS), epoch), np.array([index // self.tasks_per_step]))
        words = random_words(key, steps(np.arange(1 + ways)))[0]
        least, most = self.vary_ways or (ways, ways)
        ways = least + int(below(words[:1], np.uint64(most - least + 1))[0])
        least, most = self.vary_shots or (shots, shots)
        numbers = (least + below(words[1:], np.uint64(most - least + 1)).astype(int)).tolist()
        return TaskShape(tuple(numbers[:ways]) if not self.balanced else (numbers[0],) * ways, queries)

    def draw_numbers(self, split: str, epoch: int, indices: Sequence[int]) -> tuple[TaskShape, Tensor, Tensor]:
        """The images of T episodes of one shape by number: support int64 `[T, n]` and query `[T, m]`, see `gather`.

        A pure function of its arguments and the seeds; no image is touched.
        """
        store, shape = self._store(split), self.task_shape(split, epoch, indices[0])
        starts, sizes = store.starts, store.sizes
        if self._rotates(split):
            turns = len(store.images) * np.arange(4)[:, None]
            starts, sizes = (turns + starts).reshape(-1), np.tile(sizes, 4)
        seed = self.seed if split == "train" else self.eval_seed
        keys = keys_of(key_of(seed, SPLITS.index(split), epoch), np.asarray(indices))
        numbers = draw_images(keys, starts, sizes, shape.ways, shape.images_per_class)
        return shape, *shape.divide(numbers)

    def draw(self, split: str, epoch: int, index: int) -> Episode:
        shape, *numbers = self.draw_numbers(split, epoch, [index])
        support_x, query_x = (x[0] for x in self._gathered(split, *numbers))
        support_y, query_y = (labels.clone() for labels in shape.labels)
        return Episode(support_x, support_y, query_x, query_y, torch.tensor(index))

    def draw_batch(self, split: str, keys: Sequence[Key]) -> Episode:
        (epoch, *others), indices = {epoch for epoch, _ in keys}, [index for _, index in keys]
        if others or (split == "train" and len({self.task_shape(split, epoch, index) for index in indices}) > 1):
            raise ValueError(f"A batch is of one epoch and, in training, of one step; but the keys are {list(keys)}.")
        shape, support_x, query_x = self.draw_numbers(split, epoch, indices)
        moves = colours = None
        images = support_x.shape[1] + query_x.shape[1]
        if split == "train" and self.augment != "none":
            size = self.spec.input_shape[1:]
            moves = draw_moves(self.augment, self.seed, epoch, np.array(indices), images, size)
        if split == "train" and self.jitter:
            colours = draw_colours(self.jitter, self.seed, epoch, np.array(indices), images)
        if self.resident == "host":
            support_x, query_x = self._gathered(split, support_x, query_x)
        support_y, query_y = (labels.repeat(len(keys), 1) for labels in shape.labels)
        index = torch.tensor(indices)
        if moves is None and colours is None and self.resident == "host":
            return Episode(support_x, support_y, query_x, query_y, index)
        return UnfinishedEpisode(support_x, support_y, query_x, query_y, index, split, moves, colours)

    def on_after_batch_transfer(self, batch: Episode, dataloader_idx: int) -> Episode:
        """Gather and augment what the loader left to the device; then as for every data set."""
        if not isinstance(batch, UnfinishedEpisode):
            return super().on_after_batch_transfer(batch, dataloader_idx)
        support_x, query_x = batch.support_x, batch.query_x
        parts = [support_x.shape[1], query_x.shape[1]]
        if self.resident == "device":
            support_x, query_x = self._gathered(batch.split, support_x, query_x)
        if batch.moves is not None:
            of_support, of_query = batch.moves.split(parts, dim=1)
            support_x, query_x = apply_moves(support_x, of_support), apply_moves(query_x, of_query)
        episode = Episode(support_x, batch.support_y, query_x, batch.query_y, batch.index)
        episode = super().on_after_batch_transfer(episode, dataloader_idx)
        if batch.colours is not None:
            of_support, of_query = batch.colours.split(parts, dim=1)
            support_x, query_x = apply_colours(episode.support_x, of_support), apply_colours(episode.query_x, of_query)
            episode = dataclasses.replace(episode, support_x=support_x, query_x=query_x)
        return episode

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_on_device": {}}

    def _gathered(self, split: str, support: Tensor, query: Tensor) -> tuple[Tensor, Tensor]:
        """The images of numbers, on the numbers' device; a GPU's copy of the images is made when first needed."""
        images, numbers, block = self._stores[split].images, torch.cat([support.flatten(), query.flatten()]), None
        if numbers.device.type == "cpu":
            block = self._blocks.take(len(numbers) * images[0].numel())
        else:
            place = (split, numbers.device)
            if place not in self._on_device:
                self._on_device[place] = images.to(numbers.device)
            images = self._on_device[place]
        both = gather(images, numbers, rotations=self._rotates(split), out=block)
        support_x, query_x = both.split([support.numel(), query.numel()])
        return support_x.unflatten(0, support.shape), query_x.unflatten(0, query.shape)

    def _rotates(self, split: str) -> bool:
        return self.rotate_train_classes and split == "train"

    def lacking(self, split: str, sizes: Mapping[str, int]) -> Iterator[str]:
        """A line for each reason why classes of these sizes cannot give the tasks that are asked of a split."""
        ways, shots, queries = self.shape[split]
        prefix = "data." if split == "train" else "data.eval_"
        asked = f"{prefix}shots={shots}"
        if split == "train" and self.vary_shots is not None:
            shots, asked = self.vary_shots[1], f"data.vary_shots={list(self.vary_shots)}"
        count = len(sizes) * (4 if self._rotates(split) else 1)
        if ways > count:
            lower = f"Lower {prefix}ways to at most {count}."
            if count < 2:
                lower = "No episode can have fewer than 2: give it more classes."
            elif split == "train" and self.vary_ways is not None:
                which = "the second" if self.vary_ways[0] <= count else "both"
                lower = f"Lower {which} of data.vary_ways to at most {count}, and data.ways with it."
            yield f"{prefix}ways={ways} classes are asked of an episode, but the {split} split has {count}. {lower}"
        for name in sorted(sizes, key=lambda name: (sizes[name], name)):
            if shots + queries > sizes[name]:
                lower = f"Lower them to at most {sizes[name]} together."
                if sizes[name] < 2:
                    lower = "None can do with fewer than 2: give it more images, or leave the class out."
                yield (
                    f"{asked} and {prefix}queries={queries} need {shots + queries} images of a class, but class "
                    f"{name!r} of the {split} split has {sizes[name]}. {lower}"
                )


def drawn_from(stage: str | None) -> Sequence[str]:
    """The splits that must give tasks in a stage; a training is refused for what its test would lack, too."""
    return {"validate": ("val",), "test": ("test",)}.get(stage, SPLITS)


def check_range(range_: Sequence[int] | None, minimum: int, key: str) -> tuple[int, int] | None:
    """The range as a pair; raise `ConfigError` unless it is None or `[least, most]` from the minimum on."""
    if range_ is None:
        return None
    if len(range_) != 2:
        raise ConfigError(f"{key} must be [LEAST, MOST], two whole numbers, but got {list(range_)}.")
    for value in range_:
        check_at_least(minimum, value, f"{key} (each of the two)")
    if range_[0] > range_[1]:
        raise ConfigError(f"{key}={list(range_)} is the wrong way round: write {key}=[{range_[1]},{range_[0]}].")
    return range_[0], range_[1]


def content_hash(classes: Classes) -> str:
    """SHA-256 over the classes' names and images, which packed classes bring as `digest`, and the way of drawing."""
    known = getattr(classes, "digest", None)
    if known is None:
        digest = hashlib.sha256()
        for name in sorted(classes):
            digest.update(name.encode())
            digest.update(np.ascontiguousarray(classes[name]).tobytes())
        known = digest.hexdigest()
    return hashlib.sha256(f"drawing {DRAWING} {known}".encode()).hexdigest()
