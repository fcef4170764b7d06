"""Classification episodes from classes of images."""

from typing import ClassVar

import numpy as np
import pytest
import torch

from datamodules.images import ImageDataModule, channel_statistics
from lightning_ntk.episode import Episode
from lightning_ntk.errors import ConfigError, DataError


class Numbered(ImageDataModule):
    """Classes whose pixels say which class and which image they are: channel 0 the class, channel 1 the image."""

    classes: ClassVar = {"train": range(0, 8), "val": range(100, 106), "test": range(200, 206)}

    def class_splits(self):
        return {
            split: {
                f"class{number:03}": np.stack(
                    [np.full((2, 4, 4), [[[number]], [[i]]], dtype=np.uint8) for i in range(9)]
                )
                for number in numbers
            }
            for split, numbers in self.classes.items()
        }


def make(**settings):
    data = Numbered(**{"ways": 5, "shots": 2, "queries": 3, **settings})
    data.setup()
    return data


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_an_episode_holds_what_it_should(split):
    data = make()
    orders = set()
    for index in range(30):
        task = data.draw(split, 0, index)
        assert task.support_x.shape == (10, 2, 4, 4)
        assert task.support_x.dtype == torch.uint8
        assert task.support_y.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
        assert task.query_y.tolist() == [label for label in range(5) for _ in range(3)]
        classes = task.support_x[:, 0, 0, 0].tolist()
        assert classes[::2] == classes[1::2] == task.query_x[::3, 0, 0, 0].tolist()
        assert len(set(classes)) == 5
        assert set(classes) <= set(Numbered.classes[split])
        support, query = (
            {(c, i) for c, i in zip(x[:, 0, 0, 0].tolist(), x[:, 1, 0, 0].tolist(), strict=True)}
            for x in (task.support_x, task.query_x)
        )
        assert (len(support), len(query)) == (10, 15)
        assert not support & query
        orders.add(tuple(classes))
    assert len(orders) > 25, "classes must come in random order"
    assert any(list(order) != sorted(order) for order in orders)


def test_evaluation_can_have_another_shape():
    data = make(eval_ways=3, eval_shots=1, eval_queries=4)
    assert data.draw("train", 0, 0).support_x.shape[0] == 10
    assert data.draw("test", 0, 0).support_x.shape[0] == 3
    assert data.draw("test", 0, 0).query_x.shape[0] == 12
    assert data.spec.outputs == 5


def test_images_become_unit_floats_after_the_transfer():
    task = Episode.stack([make().draw("test", 0, 0)])
    moved = make().on_after_batch_transfer(task, 0)
    assert moved.support_x.dtype == torch.float32
    assert torch.equal(moved.query_x, task.query_x.float() / 255)
    assert 0 < moved.query_x.max() <= 1


def test_rotations_are_classes_of_their_own_in_training_only():
    class Asymmetric(Numbered):
        def class_splits(self):
            splits = super().class_splits()
            for classes in splits.values():
                for images in classes.values():
                    images[:, :, 0, 0] = 255
            return splits

    data = Asymmetric(ways=5, shots=2, queries=3, rotate_train_classes=True)
    data.setup()
    assert (data.class_count("train"), data.class_count("test")) == (32, 6)
    task = data.draw("train", 0, 1)
    corners = [[image[0, i, j].item() == 255 for i, j in ((0, 0), (0, 3), (3, 0), (3, 3))] for image in task.support_x]
    assert all(sum(corner) == 1 for corner in corners)
    assert len({tuple(corner) for corner in corners}) > 1
    assert all(a == b for a, b in zip(corners[::2], corners[1::2], strict=True)), "one class, one rotation"


def test_normalisation_statistics_come_from_the_training_images():
    torch.manual_seed(0)
    images = [torch.randint(0, 256, (3, 2, 5, 5), dtype=torch.uint8) for _ in range(4)]
    mean, std = channel_statistics(images)
    pixels = torch.cat(images).double() / 255
    assert mean == pytest.approx(pixels.mean((0, 2, 3)).tolist())
    assert std == pytest.approx(pixels.std((0, 2, 3), correction=0).tolist())
    assert make().spec.mean is None
    assert make(normalize=True).spec.mean[0] == pytest.approx(3.5 / 255)


def test_the_content_of_the_test_images_is_part_of_the_episodes_identity():
    class Other(Numbered):
        def class_splits(self):
            splits = super().class_splits()
            splits["test"]["class203"][0, 0, 0, 0] ^= 1
            return splits

    Other.__name__ = "Numbered"
    other = Other(ways=5, shots=2, queries=3)
    other.setup()
    assert other.task_settings() == make().task_settings()
    assert other.episode_ids() != make().episode_ids()
    assert make(seed=3).episode_ids() == make().episode_ids()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ways": 9}, r"data\.ways=9 .*train split has 8"),
        ({"ways": 7}, r"data\.eval_ways=7 .*val split has 6"),
        ({"shots": 7}, r"data\.shots=7 and data\.queries=3 need 10 .*class000.* has 9"),
        ({"eval_queries": 8}, r"data\.eval_shots=2 and data\.eval_queries=8"),
        ({"eval_ways": 6}, r"data\.eval_ways=6 exceeds data\.ways=5"),
        ({"ways": 1}, r"data\.ways must be a whole number of at least 2"),
        ({"eval_shots": 0}, r"data\.eval_shots"),
    ],
)
def test_tasks_the_data_cannot_give_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        make(**settings)


@pytest.mark.parametrize("how", ["name", "content"])
def test_a_class_in_two_splits_is_refused(how):
    class Leaky(Numbered):
        def class_splits(self):
            splits = super().class_splits()
            if how == "name":
                splits["test"]["class000"] = splits["test"].pop("class200")
            else:
                splits["test"]["class200"] = splits["train"]["class000"]
            return splits

    with pytest.raises(DataError, match=r"test split is also in the train split"):
        Leaky(ways=5, shots=2, queries=3).setup()
