"""`EpisodicDataModule`: stateless episodes, sharded over ranks, the same for every method.

Episode i of a split is a pure function of (seed, split, epoch, i). A sampler hands out (epoch, i) keys, so loaders,
workers and ranks carry no state: the tasks do not depend on the number of workers or ranks, nor on a restart between
epochs.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.trainer.states import TrainerFn
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Sampler

from datamodules.checks.drawn import check_episode, check_settings
from datamodules.checks.survey import SPLITS, Survey
from lightning_ntk.episode import Episode, TaskSpec
from lightning_ntk.errors import ConfigError, DataError, check_at_least

# Test episodes by which data are known, unless they say otherwise.
HASHED_EPISODES = 4
# (epoch, index): the name of an episode within its split.
Key = tuple[int, int]


class EpisodicDataModule(pl.LightningDataModule):
    """Base of every data set. A subclass provides `spec`, `draw`, `task_settings` and, if it has data, `setup`.

    Args:
        tasks_per_step: T, the meta-batch over all ranks together.
        steps_per_epoch: training steps between two validations (`val_every` of the run).
        val_episodes, test_episodes: number of evaluation episodes.
        eval_tasks_per_batch: evaluation episodes per batch and rank.
        num_workers: loader processes per split; 0 draws in the main process.
        seed: of the training episodes.
        eval_seed: of the validation and test episodes. Apart from `seed`, so that runs of different training seeds
            are tested on the same episodes and can be compared in pairs.
    """

    # Of batches where no Trainer says otherwise; None: PyTorch's default.
    precision: torch.dtype | None = None

    def __init__(
        self,
        *,
        tasks_per_step: int = 4,
        steps_per_epoch: int = 50,
        val_episodes: int = 100,
        test_episodes: int = 600,
        eval_tasks_per_batch: int = 4,
        num_workers: int = 0,
        seed: int = 0,
        eval_seed: int = 0,
    ) -> None:
        super().__init__()
        counts = {
            "tasks_per_step": tasks_per_step,
            "steps_per_epoch": steps_per_epoch,
            "val_episodes": val_episodes,
            "test_episodes": test_episodes,
            "eval_tasks_per_batch": eval_tasks_per_batch,
        }
        for key, value in counts.items():
            check_at_least(1, value, f"data.{key}")
        check_at_least(0, num_workers, "data.num_workers")
        check_at_least(0, seed, "seed")
        check_at_least(0, eval_seed, "data.eval_seed")
        self.tasks_per_step = tasks_per_step
        self.steps_per_epoch = steps_per_epoch
        self.episodes = {"val": val_episodes, "test": test_episodes}
        self.eval_tasks_per_batch = eval_tasks_per_batch
        self.num_workers = num_workers
        self.seed = seed
        self.eval_seed = eval_seed
        self._looked_at: set[str] = set()

    # ---- what a data set provides ----------------------------------------------------------------------------------

    def setup(self, stage: str | None = None) -> None:
        """Load what episodes are drawn from. Called more than once; the later calls must cost nothing.

        Args:
            stage: what follows: "fit", "validate" or "test", as a Trainer says it, or None for anything. With "test"
                the test split alone must be able to give episodes; `spec` must be known after each.
        """

    @property
    def spec(self) -> TaskSpec:
        """What all tasks have in common; valid after `setup`."""
        raise NotImplementedError

    def draw(self, split: str, epoch: int, index: int) -> Episode:
        """Episode `index` of a split, on the CPU: a pure function of its arguments and the seeds (use `self.rng`)."""
        raise NotImplementedError

    def draw_batch(self, split: str, keys: Sequence[Key]) -> Episode:
        """The episodes of some keys, stacked, as a loader hands them out; override it where a batch is drawn faster."""
        return Episode.stack([self.draw(split, *key) for key in keys])

    def task_settings(self) -> dict[str, Any]:
        """Plain values that decide the test episodes, apart from the data's content: shown when runs differ."""
        raise NotImplementedError

    def content_hash(self) -> str:
        """Identifies the test split's content: by default by its first episodes; valid when they can be drawn."""
        digest = hashlib.sha256()
        for index in range(min(HASHED_EPISODES, self.episodes["test"])):
            task = self.draw("test", 0, index)
            for tensor in (task.support_x, task.support_y, task.query_x, task.query_y):
                values = rounded(tensor.double().numpy()) if tensor.is_floating_point() else tensor.long().numpy()
                digest.update(str(values.shape).encode() + values.tobytes())
        return digest.hexdigest()

    def has_split(self, split: str) -> bool:
        """Whether the data set has this split; only "val" may be missing."""
        return split in SPLITS

    def check_split(self, split: str) -> None:
        """Raise `ConfigError` unless the data set has this split."""
        if not self.has_split(split):
            there = ", ".join(filter(self.has_split, SPLITS))
            raise ConfigError(f"{type(self).__name__} has no split {split!r}, but {there}.")

    def survey(self) -> Survey:
        """What the data set holds and what is wrong with it, without `setup` having to succeed."""
        self.prepare_data()
        self.setup()
        survey = Survey()
        for split in filter(self.has_split, SPLITS):
            try:
                self.check_drawn(split)
            except DataError as error:
                survey.findings.append(str(error))
        survey.findings = list(dict.fromkeys(survey.findings))
        return survey

    # ---- written once ----------------------------------------------------------------------------------------------

    def rng(self, split: str, epoch: int, index: int) -> np.random.Generator:
        """The random generator of one episode."""
        seed = self.seed if split == "train" else self.eval_seed
        return np.random.default_rng([seed, SPLITS.index(split), epoch, index])

    def episode_ids(self) -> str:
        """SHA-256 that identifies the test episodes: equal for two runs exactly when their test tasks are the same."""
        identity = [self.episodes["test"], self.eval_seed, self.task_settings(), self.content_hash()]
        return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()

    def check_drawn(self, split: str) -> None:
        """Raise `DataError` unless the first episode of a split is one that methods take; it is looked at once.

        So are the settings, which are hashed and written only after a training.
        """
        if split not in self._looked_at:
            self.check_split(split)
            what = f"Episode 0 of the {split} split of {type(self).__name__}"
            trained, settings = self.spec.outputs, self.task_settings()
            check_settings(settings, type(self).__name__)
            tested = settings.get("ways", trained)  # Methods without a head take more.
            ways = {"train": trained, "val": max(trained, tested), "test": tested}[split]
            check_episode(self.draw(split, 0, 0), self.spec, ways, what)
            self._looked_at.add(split)

    def check_shared(self, processes: int, splits: Sequence[str] = SPLITS) -> None:
        """Raise `ConfigError` unless processes can share a step's tasks equally, and each has episodes to evaluate.

        The first episode of each split is looked at, too, by `check_drawn`.
        """
        if "train" in splits and self.tasks_per_step % processes:
            raise ConfigError(
                f"data.tasks_per_step={self.tasks_per_step} tasks cannot be shared equally by trainer.devices="
                f"{processes} processes. Make it a multiple of {processes}."
            )
        for split, episodes in self.episodes.items():
            if split in splits and self.has_split(split) and episodes < processes:
                raise ConfigError(
                    f"data.{split}_episodes={episodes} leaves some of trainer.devices={processes} processes without an "
                    f"episode. Make it at least {processes}."
                )
        for split in filter(self.has_split, splits):
            self.check_drawn(split)

    def batch(self, split: str, indices: Sequence[int], epoch: int = 0) -> Episode:
        """Episodes of a split as methods take them, stacked, without a trainer: on the CPU, images as floats in [0, 1].

        Of a test or a validation, `epoch` is 0. Valid after `setup`.
        """
        self.check_drawn(split)
        return self.on_after_batch_transfer(self.draw_batch(split, [(epoch, index) for index in indices]), 0)

    def train_dataloader(self) -> DataLoader:
        self._check_not_overfitted()
        rank, world_size = self._rank()
        self.check_shared(world_size, ["train"])
        sampler = EpisodeSampler(self.steps_per_epoch * self.tasks_per_step, rank, world_size, follow_epoch=True)
        if self.trainer is not None:
            # A run that is taken up asks its workers for the first episodes before Lightning sets the epoch.
            sampler.set_epoch(self.trainer.fit_loop.epoch_progress.current.processed)
        return self._loader("train", sampler, self.tasks_per_step // world_size)

    def val_dataloader(self) -> DataLoader | list[DataLoader]:
        self._check_not_overfitted()  # A sanity check comes before the first training loader.
        if self.trainer is not None and not self.has_split("val") and self.trainer.state.fn == TrainerFn.FITTING:
            return []  # A training goes without; who asks for a validation is told that there is none.
        return self._evaluation_loader("val")

    def test_dataloader(self) -> DataLoader:
        return self._evaluation_loader("test")

    def on_after_batch_transfer(self, batch: Episode, dataloader_idx: int) -> Episode:
        """Floats become as precise as the network; images arrive as uint8 and become floats in [0, 1]."""
        dtype = self.precision if self.trainer is None else self.trainer.lightning_module.dtype
        dtype = dtype or torch.get_default_dtype()
        parts = (batch.support_x, batch.support_y, batch.query_x, batch.query_y)
        return Episode(*(as_unit_floats(part, dtype) for part in parts), batch.index)

    def _check_not_overfitted(self) -> None:
        if self.trainer is not None and self.trainer.overfit_batches:
            raise ConfigError(
                f"overfit_batches={self.trainer.overfit_batches} would train on the same episodes again and again, but "
                "each epoch draws its own. Use limit_train_batches for less of an epoch."
            )

    def _evaluation_loader(self, split: str) -> DataLoader:
        sampler = EpisodeSampler(self.episodes[split], *self._rank(), follow_epoch=False)
        return self._loader(split, sampler, self.eval_tasks_per_batch)

    def _loader(self, split: str, sampler: Sampler, batch_size: int) -> DataLoader:
        self.check_drawn(split)
        return DataLoader(
            EpisodeDataset(self, split),
            batch_size=batch_size,
            sampler=sampler,
            collate_fn=as_it_is,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # Or else the loader would draw from the global one at each start.
        )

    def _rank(self) -> tuple[int, int]:
        """The trainer's; without one, those of the process group that Fabric or a program of one's own has made."""
        if self.trainer is not None:
            return self.trainer.global_rank, self.trainer.world_size
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            return torch.distributed.get_rank(), torch.distributed.get_world_size()
        return 0, 1


class EpisodeSampler(DistributedSampler[Key]):
    """Hands out the keys of rank r of W: indices r, r + W, r + 2W, ... below `episodes`, none of them twice.

    It is one of torch's distributed samplers by its type alone, which keeps a Trainer from sharing its keys out again.
    With `follow_epoch` the keys carry the current epoch, which Lightning sets through `set_epoch` before each epoch and
    after a restart; evaluation keeps to epoch 0, so that its episodes are always the same.
    """

    def __init__(self, episodes: int, rank: int, world_size: int, *, follow_epoch: bool) -> None:
        super().__init__(range(episodes), num_replicas=world_size, rank=rank, shuffle=False)
        self.indices = range(rank, episodes, world_size)
        self.follow_epoch = follow_epoch

    def set_epoch(self, epoch: int) -> None:
        if self.follow_epoch:
            self.epoch = epoch

    def __iter__(self) -> Iterator[Key]:
        return ((self.epoch, index) for index in self.indices)

    def __len__(self) -> int:
        return len(self.indices)


class EpisodeDataset(Dataset[Episode]):
    """The episodes of one split by key."""

    def __init__(self, data: EpisodicDataModule, split: str) -> None:
        self.data = data
        self.split = split

    def __getitem__(self, key: Key) -> Episode:
        return self.data.draw(self.split, *key)

    def __getitems__(self, keys: list[Key]) -> Episode:
        """A whole batch at once; the loader calls this."""
        return self.data.draw_batch(self.split, keys)

    def __getstate__(self) -> dict:
        # A worker started by spawning needs no trainer, and one cannot be pickled.
        data = object.__new__(type(self.data))
        data.__dict__ = {**self.data.__dict__, "trainer": None}
        return {"data": data, "split": self.split}


def as_it_is(batch: Episode) -> Episode:
    """The dataset gives whole batches: nothing is left to collate."""
    return batch


def as_unit_floats(x: Tensor, dtype: torch.dtype) -> Tensor:
    """uint8 images to floats in [0, 1], floats to the same type; class numbers as they are."""
    if x.dtype == torch.uint8:
        return x.to(dtype).div_(255)
    return x.to(dtype) if x.is_floating_point() else x


def rounded(values: np.ndarray) -> np.ndarray:
    """Floats to ten binary digits: equal in spite of the rounding of other machines and precisions."""
    mantissa, exponent = np.frexp(values)
    return np.ldexp(np.rint(mantissa * 2**10) / 2**10, exponent) + 0.0  # No -0.
