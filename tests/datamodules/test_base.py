"""Episodes are pure functions of (seed, split, epoch, index): over ranks, workers, epochs and seeds."""

import dataclasses

import pytest
import torch
from fake_trainer import trainer_of

from datamodules.sinusoid import Sinusoid
from lightning_ntk.episode import Episode
from lightning_ntk.errors import ConfigError


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


def test_training_on_the_same_episodes_again_is_refused():
    data = make()
    data.trainer.overfit_batches = 0.5
    with pytest.raises(ConfigError, match=r"overfit_batches=0\.5.*limit_train_batches"):
        data.train_dataloader()


def test_a_meta_batch_that_ranks_cannot_share_is_refused():
    with pytest.raises(ConfigError, match=r"data\.tasks_per_step=4.*trainer\.devices=3"):
        make(0, 3).train_dataloader()
