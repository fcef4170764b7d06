"""Augmentation: what a move does, where it comes from, and that only training sees it."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fake_trainer import trainer_of

from datamodules.episodes.augment import PADDING, apply_colours, apply_moves, draw_colours, draw_moves
from datamodules.images import ImageDataModule
from lightning_ntk.episode import Episode
from lightning_ntk.errors import ConfigError


class Noise(ImageDataModule):
    def class_splits(self):
        rng = np.random.default_rng(0)
        return {
            split: {f"{split}{k}": rng.integers(0, 256, (6, 3, 20, 20), dtype=np.uint8) for k in range(4)}
            for split in ("train", "val", "test")
        }


def make(rank=0, world_size=1, **settings):
    sizes = {"ways": 3, "queries": 2, "tasks_per_step": 4, "steps_per_epoch": 2, "test_episodes": 4}
    data = Noise(**{**sizes, "augment": "crop_flip", **settings})
    data.setup()
    module = SimpleNamespace(dtype=torch.float32)
    data.trainer = trainer_of(rank, world_size, lightning_module=module)
    return data


def finished(data, split="train", epoch=0):
    """The tasks of an epoch as the method sees them, by index."""
    loader = getattr(data, f"{split}_dataloader")()
    loader.sampler.set_epoch(epoch)
    batches = [data.on_after_batch_transfer(batch, 0) for batch in loader]
    assert all(type(batch) is Episode for batch in batches)
    return {int(task.index): task for batch in batches for task in batch}


class Grey(Noise):
    def class_splits(self):
        return {split: {name: x[:, :1] for name, x in own.items()} for split, own in super().class_splits().items()}


class Pairs(Noise):
    def class_splits(self):
        return {split: {name: x[:, :2] for name, x in own.items()} for split, own in super().class_splits().items()}


def same(a, b):
    return all(torch.equal(getattr(a, f.name), getattr(b, f.name)) for f in dataclasses.fields(Episode))


@pytest.mark.parametrize("size", [(9, 9), (6, 11)])
def test_moves_are_a_padded_crop_and_a_flip(size):
    images = torch.randint(0, 256, (2, 5, 3, *size), dtype=torch.uint8)
    moves = torch.tensor([[[0, 0, 0], [1, 0, 0], [0, 2, -1], [1, -2, 1], [0, 1, 3]]]).expand(2, -1, -1)
    moved = apply_moves(images, moves)
    for task in range(2):
        for number, (flip, down, right) in enumerate(moves[task].tolist()):
            pixels = images[task, number].numpy()
            padded = np.pad(pixels, ((0, 0), (3, 3), (3, 3)), mode="reflect")
            expected = padded[:, 3 + down : 3 + down + size[0], 3 + right : 3 + right + size[1]]
            expected = expected[:, :, ::-1] if flip else expected
            assert np.array_equal(moved[task, number].numpy(), expected)


def test_moves_fill_their_range_and_no_more():
    moves = draw_moves("crop_flip", 0, 0, np.arange(50), 40, (84, 32)).reshape(-1, 3)
    assert [sorted(set(column.tolist())) for column in moves.T] == [
        [0, 1],
        list(range(-8, 9)),
        list(range(-3, 4)),
    ]
    assert (int(PADDING * 84), int(PADDING * 32)) == (8, 3)
    flips = draw_moves("flip", 0, 0, np.arange(50), 40, (84, 84)).reshape(-1, 3)
    assert set(flips[:, 1:].flatten().tolist()) == {0}
    assert abs(float(flips[:, 0].double().mean()) - 0.5) < 0.05
    # Images of one task, tasks and epochs move independently.
    by_task = draw_moves("crop_flip", 0, 0, np.arange(2), 40, (84, 84))
    assert len({tuple(move) for move in by_task[0].tolist()}) > 30
    assert not torch.equal(by_task[0], by_task[1])
    assert not torch.equal(by_task, draw_moves("crop_flip", 0, 1, np.arange(2), 40, (84, 84)))
    assert not torch.equal(by_task, draw_moves("crop_flip", 1, 0, np.arange(2), 40, (84, 84)))


@pytest.mark.parametrize("resident", ["host", "device"])
def test_training_images_are_moved_and_test_images_are_not(resident):
    data, plain = make(resident=resident), make(augment="none")
    moved, unmoved = finished(data), finished(plain)
    for index, task in moved.items():
        assert not torch.equal(task.support_x, unmoved[index].support_x)
        assert torch.equal(task.query_y, unmoved[index].query_y)
        moves = draw_moves("crop_flip", 0, 0, np.array([index]), 9, (20, 20))[0]
        assert torch.equal(task.support_x, apply_moves(unmoved[index].support_x, moves[:3]))
        assert torch.equal(task.query_x, apply_moves(unmoved[index].query_x, moves[3:]))
    for split in ("val", "test"):
        tasks, expected = finished(data, split), finished(plain, split)
        assert all(same(tasks[index], expected[index]) for index in expected)


def test_two_ranks_see_what_one_sees_and_global_chance_is_left_alone():
    torch.manual_seed(0)
    np.random.seed(0)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    alone = finished(make(), epoch=3)
    together = finished(make(0, 2), epoch=3) | finished(make(1, 2), epoch=3)
    assert together.keys() == alone.keys()
    assert all(same(together[index], alone[index]) for index in alone)
    assert not same(finished(make(), epoch=4)[0], alone[0])
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])


def test_an_unknown_augmentation_gets_the_nearest():
    with pytest.raises(ConfigError, match=r"data\.augment must be one of none, flip, crop_flip.*Did you mean 'flip'"):
        make(augment="flipp")


# ---- colours -------------------------------------------------------------------------------------------------------


def by_hand(image, brightness, contrast, saturation):
    """What torchvision documents of adjust_brightness, _contrast and _saturation, for one image [channels, h, w]."""

    def blend(one, other, share):
        return np.clip(share * one + (1 - share) * other, 0, 1)

    def grey(x):
        return x[0] if len(x) == 1 else 0.2989 * x[0] + 0.587 * x[1] + 0.114 * x[2]

    image = blend(image, 0, brightness)
    image = blend(image, grey(image).mean(), contrast)
    return image if len(image) == 1 else blend(image, grey(image), saturation)


@pytest.mark.parametrize("channels", [1, 3])
def test_colours_change_by_torchvisions_formulas(channels):
    images = torch.rand(2, 5, channels, 6, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    factors, before = draw_colours(0.8, 0, 0, np.arange(2), 5), images.clone()
    changed = apply_colours(images, factors)
    for image, own, found in zip(images.flatten(0, 1), factors.flatten(0, 1), changed.flatten(0, 1), strict=True):
        np.testing.assert_allclose(found.numpy(), by_hand(image.numpy(), *own.double().tolist()), atol=1e-14)
    assert (changed == 1).any(), "cut off above"
    assert torch.equal(images, before), "what is given stays as it is"
    assert torch.equal(apply_colours(images, torch.ones(2, 5, 3)), images)
    assert apply_colours(images.float(), factors).dtype == torch.float32


@pytest.mark.parametrize("channels", [1, 3])
def test_torchvision_itself_agrees(channels):
    adjust = pytest.importorskip("torchvision.transforms.v2.functional")
    images = torch.rand(8, channels, 6, 7, generator=torch.Generator().manual_seed(1))
    factors = draw_colours(0.8, 1, 0, np.arange(1), 8)[0]
    for image, own, found in zip(images, factors.tolist(), apply_colours(images, factors), strict=True):
        expected = adjust.adjust_contrast(adjust.adjust_brightness(image, own[0]), own[1])
        if channels == 3:
            expected = adjust.adjust_saturation(expected, own[2])
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


def test_factors_fill_their_range_and_differ():
    factors = draw_colours(0.4, 0, 0, np.arange(50), 40)
    assert (factors.dtype, factors.shape) == (torch.float32, (50, 40, 3))
    for column in factors.reshape(-1, 3).double().T:
        assert 0.6 <= float(column.min()) < 0.61
        assert 1.39 < float(column.max()) <= 1.4
        assert abs(float(column.mean()) - 1) < 0.02
    assert abs(float(torch.corrcoef(factors.reshape(-1, 3).double().T)[0, 1])) < 0.1
    assert len(factors.flatten().unique()) > 5990
    for other in (draw_colours(0.4, 1, 0, np.arange(50), 40), draw_colours(0.4, 0, 1, np.arange(50), 40)):
        assert not torch.isclose(factors, other).all(-1).any()
    moves = draw_moves("flip", 0, 0, np.arange(50), 40, (84, 84))[..., 0].double()
    assert abs(float(torch.corrcoef(torch.stack([moves, factors[..., 0].double()]).flatten(1))[0, 1])) < 0.1


@pytest.mark.parametrize("resident", ["host", "device"])
@pytest.mark.parametrize("augment", ["none", "crop_flip"])
def test_training_images_are_coloured_after_they_are_moved_and_test_images_are_not(resident, augment):
    plain = finished(make(augment=augment))
    coloured = make(augment=augment, jitter=0.4, resident=resident)
    for index, task in finished(coloured).items():
        factors = draw_colours(0.4, 0, 0, np.array([index]), 9)[0]
        assert torch.equal(task.support_x, apply_colours(plain[index].support_x, factors[:3]))
        assert torch.equal(task.query_x, apply_colours(plain[index].query_x, factors[3:]))
        assert not torch.equal(task.query_x, plain[index].query_x)
    for split in ("val", "test"):
        tasks, expected = finished(coloured, split), finished(make(augment="none"), split)
        assert all(same(tasks[index], expected[index]) for index in expected)


def test_colours_are_the_same_on_two_ranks():
    alone = finished(make(jitter=0.4), epoch=3)
    together = finished(make(0, 2, jitter=0.4), epoch=3) | finished(make(1, 2, jitter=0.4), epoch=3)
    assert all(same(together[index], alone[index]) for index in alone)


@pytest.mark.parametrize("jitter", [-0.1, 1.5, True, "0.4"])
def test_a_jitter_out_of_range_is_refused(jitter):
    with pytest.raises(ConfigError, match=r"data\.jitter must be a number from 0 \(none\) to 1"):
        make(jitter=jitter)


def test_colours_need_one_or_three_channels():
    settings = {"ways": 3, "queries": 2}
    with pytest.raises(ConfigError, match=r"data\.jitter=0\.2 needs images of 1 or 3 channels, but these have 2"):
        Pairs(jitter=0.2, **settings).setup()
    Grey(jitter=0.2, **settings).setup()
