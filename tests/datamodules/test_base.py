"""Episodes are pure functions of (seed, split, epoch, index): over ranks, workers, epochs and seeds."""

import dataclasses
import re
from types import SimpleNamespace

import pytest
import pytorch_lightning as pl
import torch
from fake_trainer import trainer_of

from datamodules.base import EpisodicDataModule, as_unit_floats
from datamodules.checks.drawn import check_episode
from datamodules.sinusoid import Sinusoid
from lightning_ntk.episode import Episode, TaskSpec
from lightning_ntk.errors import ConfigError, DataError
from lightning_ntk.methods.maml import MAML
from lightning_ntk.networks.mlp import MLP


def make(rank=0, world_size=1, **settings):
    data = Sinusoid(**{"tasks_per_step": 4, "steps_per_epoch": 3, "val_episodes": 5, "test_episodes": 7, **settings})
    data.trainer = trainer_of(rank, world_size)
    return data


def episodes(loader, epoch=0):
    """All tasks that a loader gives in an epoch, by index, and the indices of each batch."""
    loader.sampler.set_epoch(epoch)
    batches = list(loader)
    tasks = {int(task.index): task for batch in batches for task in batch}
    assert len(tasks) == sum(batch.tasks for batch in batches), "an index came twice"
    return tasks, [batch.index.tolist() for batch in batches]


def same(a: Episode, b: Episode) -> bool:
    return all(torch.equal(getattr(a, f.name), getattr(b, f.name)) for f in dataclasses.fields(Episode))


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_two_ranks_draw_together_what_one_draws(split):
    loader = f"{split}_dataloader"
    alone, alone_batches = episodes(getattr(make(), loader)())
    first, first_batches = episodes(getattr(make(0, 2), loader)())
    second, second_batches = episodes(getattr(make(1, 2), loader)())
    assert not first.keys() & second.keys()
    together = first | second
    assert together.keys() == alone.keys()
    assert all(same(together[index], alone[index]) for index in alone)
    if split == "train":  # Step by step, too: the global meta-batch is the same set of tasks.
        for whole, *parts in zip(alone_batches, first_batches, second_batches, strict=True):
            assert sorted([index for part in parts for index in part]) == whole


def test_workers_change_nothing():
    without, _ = episodes(make().train_dataloader())
    loader = make(num_workers=2).train_dataloader()
    for epoch in (0, 1):  # Persistent workers must follow the epoch as well.
        expected, _ = episodes(make().train_dataloader(), epoch)
        with_workers, _ = episodes(loader, epoch)
        assert all(same(with_workers[index], expected[index]) for index in expected)
    assert len(without) == 12


def test_epochs_differ_in_training_and_not_in_evaluation():
    data = make()
    train, again = episodes(data.train_dataloader(), 0)[0], episodes(data.train_dataloader(), 1)[0]
    assert not any(same(train[index], again[index]) for index in train)
    test, again = episodes(data.test_dataloader(), 0)[0], episodes(data.test_dataloader(), 1)[0]
    assert all(same(test[index], again[index]) for index in test)


def test_a_split_that_is_not_there_is_named():
    with pytest.raises(ConfigError, match="Sinusoid has no split 'valid', but train, val, test"):
        Sinusoid().batch("valid", [0])


def test_the_seed_changes_training_episodes_and_not_the_test_episodes():
    first, other = make(seed=0), make(seed=1)
    assert not same(first.draw("train", 0, 0), other.draw("train", 0, 0))
    assert same(first.draw("test", 0, 0), other.draw("test", 0, 0))
    assert not same(first.draw("test", 0, 0), make(eval_seed=1).draw("test", 0, 0))
    assert not same(first.draw("test", 0, 0), first.draw("val", 0, 0))


def test_the_identity_of_the_test_episodes_follows_what_decides_them():
    identity = make().episode_ids()
    assert identity == make(seed=5, tasks_per_step=8, num_workers=1, queries=7).episode_ids()
    others = [make(**s).episode_ids() for s in ({"shots": 5}, {"test_episodes": 8}, {"eval_seed": 1})]
    assert len({identity, *others}) == 4


def test_episodes_stack_iterate_and_move():
    tasks = [make().draw("test", 0, index) for index in range(3)]
    stacked = Episode.stack(tasks)
    assert stacked.tasks == 3
    assert stacked.support_x.shape == (3, 10, 1)
    assert all(same(a, b) for a, b in zip(stacked, tasks, strict=True))
    assert stacked.to("meta").query_y.device.type == "meta"


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"tasks_per_step": 0}, "data.tasks_per_step"),
        ({"test_episodes": 0}, "data.test_episodes"),
        ({"num_workers": -1}, "data.num_workers"),
        ({"eval_tasks_per_batch": 1.5}, "data.eval_tasks_per_batch"),
        ({"shots": 0}, "data.shots"),
        ({"eval_shots": 0}, "data.eval_shots"),
    ],
)
def test_bad_settings_name_their_key(settings, key):
    with pytest.raises(ConfigError, match=key):
        make(**settings)


class Blobs(EpisodicDataModule):
    """Vectors in three classes, with something changed."""

    spec = TaskSpec("classification", (4,), 3)

    def __init__(self, *, change=None, split="val", **loading):
        super().__init__(**loading)
        self.change, self.changed = change, split

    def task_settings(self):
        return {"data": "Blobs"}

    def draw(self, split, epoch, index):
        x, y = self.rng(split, epoch, index).normal(size=(6, 4)), torch.arange(6) % 3
        parts = {"support_x": torch.from_numpy(x[:3]), "support_y": y[:3]}
        parts |= {"query_x": torch.from_numpy(x[3:]), "query_y": y[3:]}
        if self.change is not None and split == self.changed:
            name, of = self.change
            parts[name] = of(parts[name])
        return Episode(**parts, index=torch.tensor(index))


BAD = [
    ("support_y", lambda y: y + 1, r"class numbers from 1 to 3 in its support_y.*from 0 to 2\. Number"),
    ("query_y", lambda y: y - 1, "class numbers from -1 to 1 in its query_y"),
    ("support_y", lambda y: y.int(), r"support_y of shape \(3,\), int64, but has \(3,\), torch\.int32"),
    ("query_y", lambda y: y[:, None], r"query_y of shape \(3,\), int64, but has \(3, 1\)"),
    ("query_x", lambda x: x / 0, "12 of 12 numbers in its query_x that are not finite"),
    ("support_x", lambda x: x[:, :3], r"support_x of shape \(3, 4\), floats \(images: uint8\), but has \(3, 3\)"),
    ("support_x", lambda x: x.long(), r"torch\.int64\. See `draw`"),
    ("query_x", lambda x: x[:0], r"query_x of shape \(1, 4\), .*, but has \(0, 4\)"),
    ("query_x", lambda x: x[0, 0], r"query_x of shape \(1, 4\), .*, but has \(\)"),
    ("query_x", lambda x: x.numpy(), "must be an Episode of tensors, but its query_x is ndarray"),
]


@pytest.mark.parametrize("split", ["train", "val", "test"])
@pytest.mark.parametrize(("part", "change", "message"), BAD)
def test_what_one_draws_is_looked_at_before_anything_takes_it(part, change, message, split):
    data = Blobs(change=(part, change), split=split)
    message = f"Episode 0 of the {split} split of Blobs .*{message}"
    for ask in (
        data.check_shared,
        lambda *_: data.batch(split, [3]),
        lambda *_: getattr(data, f"{split}_dataloader")(),
    ):
        with pytest.raises(DataError, match=message):
            ask(1)
    (finding,) = data.survey().findings
    assert re.match(message, finding)


def test_right_episodes_pass_and_floats_become_those_of_the_network():
    data = Blobs(tasks_per_step=2)
    assert data.survey().findings == []
    batch = data.batch("test", [0, 1])
    assert batch.support_x.dtype == batch.query_x.dtype == torch.float32
    assert batch.support_y.dtype == torch.int64
    (targets,) = {as_unit_floats(torch.zeros(2, 1, dtype=d), torch.float32).dtype for d in (torch.float64, torch.half)}
    assert targets == torch.float32
    data.trainer = trainer_of(0, 1, lightning_module=SimpleNamespace(dtype=torch.float64))
    tasks = Sinusoid().draw_batch("test", [(0, 0)])
    assert data.on_after_batch_transfer(tasks, 0).query_y.dtype == torch.float64


def test_more_ways_at_test_are_those_of_the_settings():
    data = Blobs(change=("query_y", lambda y: y + 2), split="test")
    data.task_settings = lambda: {"ways": 5}
    data.check_drawn("test")
    data.changed = "train"
    with pytest.raises(DataError, match="from 2 to 4 in its query_y, but in tasks of 3 ways"):
        data.check_drawn("train")


def test_training_on_the_same_episodes_again_is_refused():
    data = make()
    data.trainer.overfit_batches = 0.5
    for loader in (data.train_dataloader, data.val_dataloader):
        with pytest.raises(ConfigError, match=r"overfit_batches=0\.5.*limit_train_batches"):
            loader()


@pytest.mark.parametrize("settings", [{}, {"limit_val_batches": 0}, {"num_sanity_val_steps": 0}])
def test_a_trainer_that_would_is_told_so(settings):
    method = MAML(MLP((1,), 1, hidden=(4,)), Sinusoid().spec)
    with pytest.raises(ConfigError, match=r"overfit_batches=2 .*limit_train_batches"):
        pl.Trainer(max_epochs=1, accelerator="cpu", logger=False, overfit_batches=2, **settings).fit(method, Sinusoid())


def test_a_meta_batch_that_ranks_cannot_share_is_refused():
    with pytest.raises(ConfigError, match=r"data\.tasks_per_step=4.*trainer\.devices=3"):
        make(0, 3).train_dataloader()


@pytest.mark.parametrize(
    ("drawn", "message"),
    [
        (None, "Episode 0 must be an Episode, but `draw` returned NoneType"),
        ((1, 2), "Episode 0 must be an Episode, but `draw` returned tuple"),
        (Episode(*4 * (torch.zeros(2, 1),), 3), r"must have its number as index, an int64 tensor: torch\.tensor"),
        (Episode(*4 * (torch.zeros(2, 1),), torch.zeros(1).long()), "must have its number as index"),
    ],
)
def test_what_a_draw_returns_is_an_episode_with_its_number(drawn, message):
    with pytest.raises(DataError, match=message):
        check_episode(drawn, TaskSpec("regression", (1,), 1), 1, "Episode 0")
