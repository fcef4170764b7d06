"""Classification episodes from classes of images."""

import dataclasses
import hashlib
import weakref
from typing import ClassVar

import numpy as np
import pytest
import torch
from fake_trainer import trainer_of
from plain_trainer import plain_trainer
from pytorch_lightning.trainer.states import TrainerFn
from test_train import TINY, run

from datamodules.episodes.image_store import channel_statistics
from datamodules.from_arrays import FromArrays
from datamodules.images import ImageDataModule, content_hash
from lightning_ntk.episode import Episode
from lightning_ntk.errors import ConfigError, DataError
from lightning_ntk.methods.protonet import ProtoNet
from lightning_ntk.networks.mlp import MLP


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


@pytest.mark.parametrize("ask", [lambda d: d.spec, lambda d: d.batch("test", [0]), lambda d: d.draw("train", 0, 0)])
def test_data_that_are_not_set_up_say_so(ask):
    data = Numbered(ways=5, shots=2, queries=3)
    with pytest.raises(ConfigError, match=r"Numbered has read no images yet: call prepare_data.* and setup.* first"):
        ask(data)
    data.setup()
    ask(data)
    for of in (data.class_sizes, data.check_drawn, lambda split: data.batch(split, [0])):
        with pytest.raises(ConfigError, match="Numbered has no split 'valid', but train, val, test"):
            of("valid")


def test_who_writes_to_an_episode_changes_no_other():
    data = make()
    before, batch = data.draw("test", 0, 3), data.draw_batch("test", [(0, 3), (0, 4)])
    kept = {f.name: getattr(before, f.name).clone() for f in dataclasses.fields(Episode)}
    for written in (data.draw("test", 0, 3), batch):
        for tensor in (written.support_x, written.support_y, written.query_x, written.query_y):
            tensor.fill_(77)
    for task in (before, data.draw("test", 0, 3), next(iter(data.draw_batch("test", [(0, 3), (0, 4)])))):
        assert all(torch.equal(getattr(task, name), expected) for name, expected in kept.items())


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


def loaded(data, split="train", epoch=0):
    """All tasks of an epoch as the method sees them, by index."""
    loader = getattr(data, f"{split}_dataloader")()
    loader.sampler.set_epoch(epoch)
    batches = [data.on_after_batch_transfer(batch, 0) for batch in loader]
    return {int(task.index): task for batch in batches for task in batch}


def same(a, b):
    return all(torch.equal(getattr(a, f.name), getattr(b, f.name)) for f in dataclasses.fields(Episode))


@pytest.mark.parametrize("resident", ["host", "device"])
@pytest.mark.parametrize("rotate", [False, True])
@pytest.mark.parametrize("split", ["train", "test"])
def test_the_loaders_give_the_episodes_that_draw_gives(resident, rotate, split):
    data = make(resident=resident, rotate_train_classes=rotate, tasks_per_step=3, steps_per_epoch=4, test_episodes=7)
    tasks = loaded(data, split, epoch=2)
    assert len(tasks) == {"train": 12, "test": 7}[split]
    for index, task in tasks.items():
        alone = Episode.stack([data.draw(split, 2 if split == "train" else 0, index)])
        assert same(next(iter(data.on_after_batch_transfer(alone, 0))), task)


def test_with_images_on_the_device_the_loader_hands_out_numbers():
    data = make(resident="device", tasks_per_step=2)
    batch = next(iter(data.train_dataloader()))
    assert batch.support_x.dtype == torch.int64
    assert batch.support_x.shape == (2, 10)
    moved = batch.to("meta")
    assert (moved.split, moved.query_x.device.type) == ("train", "meta")


def test_each_step_of_varying_training_has_a_shape_of_its_own_within_the_ranges():
    settings = {"ways": 6, "eval_ways": 5, "vary_ways": [3, 6], "vary_shots": [1, 4], "tasks_per_step": 2}
    data = make(**settings, steps_per_epoch=40)
    loader = data.train_dataloader()
    shapes = []
    for batch in loader:
        ways = int(batch.support_y.max()) + 1
        counts = {tuple(torch.bincount(labels).tolist()) for labels in batch.support_y}
        assert len(counts) == 1, "the tasks of a step share their shape"
        (shots,) = counts
        assert len(set(shots)) == 1, "balanced"
        assert torch.equal(batch.query_y[0], torch.arange(ways).repeat_interleave(3))
        shapes.append((ways, shots[0]))
        for task in batch:
            assert len({(int(c), int(i)) for c, i in task.support_x[:, :, 0, 0]}) == ways * shots[0]
    assert {ways for ways, _ in shapes} == {3, 4, 5, 6}
    assert {shots for _, shots in shapes} == {1, 2, 3, 4}
    assert data.spec.outputs == 6
    assert data.draw("test", 0, 0).support_x.shape[0] == 5 * 2
    # Every rank agrees, and an epoch later it is another sequence.
    for rank in range(2):
        other = make(**settings, steps_per_epoch=40)
        other.trainer = trainer_of(rank, 2)
        assert [batch.support_y.shape[1] for batch in other.train_dataloader()] == [w * s for w, s in shapes]
    assert [data.task_shape("train", 1, 2 * step).ways for step in range(40)] != [ways for ways, _ in shapes]


def test_classes_of_an_unbalanced_task_have_shots_of_their_own():
    data = make(vary_shots=[1, 5], balanced=False, tasks_per_step=2, steps_per_epoch=30)
    seen = set()
    for batch in data.train_dataloader():
        counts = torch.bincount(batch.support_y[0], minlength=5).tolist()
        seen.add(tuple(counts))
        assert set(counts) <= {1, 2, 3, 4, 5}
        assert torch.equal(batch.support_y[0], batch.support_y[1])
        for task in batch:
            images = [(int(c), int(i)) for x in (task.support_x, task.query_x) for c, i in x[:, :, 0, 0]]
            assert len(set(images)) == len(images) == sum(counts) + 15
    assert len(seen) > 20


@pytest.mark.parametrize("method", ["meta_rkhs_ii", "meta_rkhs_i", "maml"])
def test_methods_train_on_varying_shapes(method):
    vary = ["data.ways=6", "data.eval_ways=5", "data.vary_ways=[2,6]", "data.vary_shots=[1,3]", "data.balanced=false"]
    sizes = ["data.queries=2", "data.augment=crop_flip", "data.resident=device", "network.filters=8", "steps=4"]
    result = run(*TINY, "data=glyphs", *vary, *sizes, f"method={method}")
    assert len(result.episodes["test/accuracy"]) == 5


def test_shots_outside_of_the_range_need_shots_of_the_evaluation():
    data = make(vary_shots=[3, 5], eval_shots=1)
    assert len(data.draw("test", 0, 0).support_x) == 5
    assert {len(data.draw("train", 0, 4 * step).support_x) for step in range(20)} == {15, 20, 25}


def test_a_survey_keeps_what_it_found_before_it_was_kept_from_going_on():
    class Broken(Numbered):
        found: ClassVar = ["Image 3 is damaged.", "Image 3 is damaged.", "Image 8 is damaged."]

        def class_splits(self):
            raise DataError("Image 3 is damaged, to begin with.")

        def unreadable(self):
            yield from self.found
            raise DataError("The disk is gone.")

    assert Broken().survey().findings == ["Image 3 is damaged.", "Image 8 is damaged.", "The disk is gone."]
    Broken.found = []
    assert Broken().survey().findings == ["Image 3 is damaged, to begin with."]


def test_classes_of_tensors_are_surveyed_as_arrays_are():
    arrays = Numbered().class_splits()
    tensors = {split: {name: torch.tensor(x) for name, x in classes.items()} for split, classes in arrays.items()}
    of_arrays, of_tensors = (FromArrays(splits=splits, queries=3).survey() for splits in (arrays, tensors))
    assert of_tensors == of_arrays
    assert len(of_tensors.rows) == 3


def test_splits_of_other_names_are_told_of_with_what_there_is():
    class Misnamed(Numbered):
        classes: ClassVar = {"train": range(0, 8), "valid": range(100, 106)}

    data = Misnamed(ways=5, shots=2, queries=3)
    lines = [
        "The data set has no classes in its test split, but in 'train', 'valid'; both train and test are needed.",
        "The data set has the split 'valid'; expected train, val, test. Did you mean 'val'?",
    ]
    assert data.survey().findings == lines
    with pytest.raises(DataError, match=lines[0]):
        data.setup()


@pytest.mark.filterwarnings("ignore:Total length of `list` across ranks is zero")  # Lightning's, of no validation.
def test_a_trainer_of_ones_own_trains_and_tests_without_a_validation_split():
    class Unvalidated(Numbered):
        classes: ClassVar = {"train": range(0, 8), "test": range(200, 206)}

    sizes = {"ways": 5, "shots": 2, "queries": 3, "tasks_per_step": 2, "steps_per_epoch": 2, "test_episodes": 4}
    data = Unvalidated(**sizes)
    data.setup()
    method, trainer = ProtoNet(MLP((2, 4, 4), 5), data.spec, lr=0.1), plain_trainer()
    with pytest.raises(ConfigError, match="Unvalidated has no split 'val', but train, test"):
        trainer.validate(method, datamodule=data)
    trainer.fit(method, datamodule=data)
    assert trainer.global_step == 2
    assert "test/accuracy" in trainer.test(method, datamodule=data, verbose=False)[0]


def test_a_batch_of_several_epochs_or_steps_is_refused():
    data = make(vary_shots=[1, 5], tasks_per_step=1)
    with pytest.raises(ValueError, match=r"of one step; but the keys are \[\(0, 0\)"):
        data.draw_batch("train", [(0, step) for step in range(6)])
    with pytest.raises(ValueError, match=r"A batch is of one epoch"):
        data.draw_batch("test", [(0, 0), (1, 0)])


def test_evaluation_can_have_another_shape():
    data = make(eval_ways=3, eval_shots=1, eval_queries=4)
    assert data.draw("train", 0, 0).support_x.shape[0] == 10
    assert data.draw("test", 0, 0).support_x.shape[0] == 3
    assert data.draw("test", 0, 0).query_x.shape[0] == 12
    assert data.spec.outputs == 5
    more = make(eval_ways=6)  # Whether a method can take them is the method's to say.
    assert more.draw("test", 0, 0).support_y.unique().tolist() == list(range(6))
    assert more.spec.outputs == 5


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
        ({"eval_ways": 7}, r"data\.eval_ways=7 .*val split has 6"),
        ({"ways": 1}, r"data\.ways must be a whole number of at least 2"),
        ({"eval_shots": 0}, r"data\.eval_shots"),
        ({"vary_shots": [3, 1]}, r"data\.vary_shots=\[3, 1\] is the wrong way round: write data\.vary_shots=\[1,3\]"),
        ({"vary_shots": [1]}, r"data\.vary_shots must be \[LEAST, MOST\]"),
        ({"vary_shots": [0, 2]}, r"data\.vary_shots .* at least 1"),
        ({"vary_shots": [1, 7]}, r"data\.vary_shots=\[1, 7\] and data\.queries=3 need 10"),
        ({"vary_ways": [2, 6]}, r"data\.vary_ways=\[2, 6\] must end at data\.ways=5: .*Set data\.ways=6"),
        ({"vary_ways": [2, 3]}, r"data\.vary_ways=\[2, 3\] must end at data\.ways=5: .*all must be trained"),
        (
            {"ways": 9, "eval_ways": 5, "vary_ways": [2, 9]},
            r"train split has 8\. Lower the second of data\.vary_ways to at most 8, and data\.ways with it",
        ),
        ({"vary_shots": [3, 5]}, r"data\.vary_shots=\[3, 5\] leaves out data\.shots=2, .*Set data\.eval_shots"),
        ({"vary_ways": [1, 5]}, r"data\.vary_ways .* at least 2"),
        ({"balanced": False}, r"data\.balanced=false needs data\.vary_shots"),
        ({"augment": "crop"}, r"data\.augment must be one of none, flip, crop_flip, but got 'crop'"),
        ({"resident": "gpu"}, r"data\.resident must be 'host' or 'device'"),
    ],
)
def test_tasks_the_data_cannot_give_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        make(**settings)


@pytest.mark.parametrize(
    ("classes", "settings", "message"),
    [
        ({"train": [0]}, {}, r"the train split has 1\. No episode can have fewer than 2: give it more classes\.$"),
        ({}, {"ways": 9, "eval_ways": 5, "vary_ways": [9, 9]}, r"Lower both of data\.vary_ways to at most 8, and data"),
        ({}, {"shots": 9, "queries": 9}, r"'class000' of the train split has 9\. Lower them to at most 9 together\.$"),
        ({}, {"first": 1}, r"'class0' of the test split has 1\. None can do with fewer than 2: give it more images,"),
    ],
)
def test_what_is_advised_can_be_done(classes, settings, message):
    class Few(Numbered):
        def class_splits(self):
            splits = super().class_splits()
            if first:
                splits["test"]["class0"] = np.full((first, 2, 4, 4), 77, dtype=np.uint8)
            return splits

    first = settings.pop("first", 0)
    Few.classes = {**Numbered.classes, **classes}
    with pytest.raises(ConfigError, match=message):
        Few(**{"ways": 5, "shots": 2, "queries": 3, **settings}).setup()


def test_episodes_do_not_depend_on_the_order_in_which_classes_come():
    class Reversed(Numbered):
        def class_splits(self):
            return {split: dict(reversed(classes.items())) for split, classes in super().class_splits().items()}

    Reversed.__name__ = "Numbered"
    other = Reversed(ways=5, shots=2, queries=3)
    other.setup()
    assert torch.equal(other.draw("test", 0, 0).query_x, make().draw("test", 0, 0).query_x)
    assert other.episode_ids() == make().episode_ids()


@pytest.mark.parametrize("how", ["name", "content", "one image"])
def test_a_class_in_two_splits_is_refused(how):
    class Leaky(Numbered):
        def class_splits(self):
            splits = super().class_splits()
            if how == "name":
                splits["test"]["class000"] = splits["test"].pop("class200")
            elif how == "content":
                splits["test"]["class200"] = splits["train"]["class000"]
            else:
                splits["test"]["class200"][4] = splits["train"]["class000"][7]
            return splits

    with pytest.raises(DataError, match=r"test split is also in the train split"):
        Leaky(ways=5, shots=2, queries=3).setup()
    if how == "name":
        return
    Leaky(ways=5, shots=2, queries=3, allow_shared_images=True).setup()


@pytest.mark.parametrize("stage", ["test", TrainerFn.TESTING])
def test_a_test_asks_nothing_of_the_other_splits(stage):
    class Small(Numbered):
        classes: ClassVar = {"train": range(3), "val": range(100, 102), "test": range(200, 206)}

    data = Small(ways=5, shots=2, queries=3)
    data.setup(stage)
    assert data.batch("test", [0]).support_x.shape == (1, 10, 2, 4, 4)
    data.setup(stage)
    for later, split in (("fit", "train"), (None, "train"), ("validate", "val")):
        with pytest.raises(ConfigError, match=rf"ways=5 classes are asked of an episode, but the {split} split has"):
            data.setup(later)
    with pytest.raises(ConfigError, match="but the test split has 6"):
        Small(ways=2, eval_ways=7, shots=2, queries=3).setup("test")


def test_images_of_other_shapes_are_named():
    class Uneven(Numbered):
        def class_splits(self):
            splits = super().class_splits()
            splits["test"]["class201"] = np.zeros((9, 2, 5, 4), dtype=np.uint8)
            return splits

    with pytest.raises(DataError, match=r"'class201' of the test split has images \(2, 5, 4\), but others are"):
        Uneven(ways=5, shots=2, queries=3).setup()


def test_images_with_the_channels_last_are_named():
    class Last(Numbered):
        def class_splits(self):
            return {
                split: {name: np.repeat(images[:, :1], 3, 1).transpose(0, 2, 3, 1) for name, images in classes.items()}
                for split, classes in super().class_splits().items()
            }

    with pytest.raises(DataError, match=r"uint8 of shape \(9, 4, 4, 3\), which has the channels last"):
        Last(ways=5, shots=2, queries=3).setup()


@pytest.mark.parametrize(("splits", "what"), [(None, "NoneType"), ({"train": [1]}, "list"), ([], "list")])
def test_class_splits_of_another_kind_are_named(splits, what):
    class Odd(Numbered):
        def class_splits(self):
            return splits

    with pytest.raises(DataError, match=rf"Odd\.class_splits must return .*, but there is a {what} in the place of a"):
        Odd(ways=5, shots=2, queries=3).setup()


def test_images_that_are_not_square_are_not_turned():
    class Wide(Numbered):
        def class_splits(self):
            splits = super().class_splits()
            return {s: {name: x[:, :, :3] for name, x in classes.items()} for s, classes in splits.items()}

    with pytest.raises(ConfigError, match=r"data\.rotate_train_classes=true needs square images, but these are 3x4"):
        Wide(ways=5, shots=2, queries=3, rotate_train_classes=True).setup()
    Wide(ways=5, shots=2, queries=3).setup()


def test_what_is_packed_is_let_go_of_class_by_class():
    gone = []

    class Fresh(Numbered):
        def class_splits(self):
            splits = super().class_splits()
            train = splits["train"] = dict(reversed(splits["train"].items()))  # A dict frees its values in its order.
            for name, images in train.items():
                weakref.finalize(images, gone.append, name)
            return splits

    Fresh(ways=5, shots=2, queries=3).setup()
    assert gone == [f"class{number:03}" for number in range(8)]
    kept = Numbered().class_splits()
    FromArrays(splits=kept, ways=5, shots=2, queries=3).setup()
    assert [len(classes) for classes in kept.values()] == [8, 6, 6], "a caller's own dicts stay as they are"


def test_packed_classes_have_the_identity_that_they_bring():
    plain = make().class_splits()["test"]
    packed = PackedDict(plain)
    assert content_hash(packed) != content_hash(plain)
    digest = hashlib.sha256()
    for name in sorted(plain):
        digest.update(name.encode() + plain[name].tobytes())
    packed.digest = digest.hexdigest()
    assert content_hash(packed) == content_hash(plain), "packed or not, the same images are the same episodes"


class PackedDict(dict):
    digest = "0" * 64
