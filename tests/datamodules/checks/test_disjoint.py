"""Classes of different splits share no name and no image; every way of sharing is found."""

import numpy as np
import pytest

from datamodules.checks.disjoint import check_disjoint, repeated, shared_classes, shared_images, shared_within
from lightning_ntk.errors import DataError


def make_splits(shape=(3, 8, 8), images=6):
    rng = np.random.default_rng(0)
    return {
        split: {f"{split}{k}": rng.integers(0, 256, (images, *shape), dtype=np.uint8) for k in range(3)}
        for split in ("train", "val", "test")
    }


def test_disjoint_splits_pass_and_repetitions_within_a_split_are_no_matter():
    splits = make_splits()
    splits["train"]["train1"][2] = splits["train"]["train0"][1]
    check_disjoint(splits)
    assert shared_images(splits) == []


def test_a_name_in_two_splits_is_found():
    splits = make_splits()
    splits["test"]["train0"] = splits["test"].pop("test0")
    assert list(shared_classes(splits)) == ["Class 'train0' of the test split is also in the train split."]
    with pytest.raises(DataError, match="'train0' of the test split is also in the train split"):
        check_disjoint(splits, allow_shared_images=True)


@pytest.mark.parametrize("shared", [1, 3, 6])
def test_any_number_of_shared_images_is_found_and_counted(shared):
    splits = make_splits()
    splits["test"]["test2"][:shared] = splits["train"]["train0"][6 - shared :]
    (pair,) = shared_images(splits)
    assert (pair.first, pair.second) == (("train", "train0"), ("test", "test2"))
    assert (pair.images, pair.of) == (shared, (6, 6))
    with pytest.raises(DataError, match=rf"'test2' of the test split .* as 'train0': {shared} of its 6 images"):
        check_disjoint(splits)
    check_disjoint(splits, allow_shared_images=True)


def test_every_pair_of_classes_is_listed():
    splits = make_splits()
    splits["val"]["val0"][0] = splits["train"]["train0"][0]
    splits["test"]["test1"][3:5] = splits["train"]["train0"][0]
    found = {(pair.first[1], pair.second[1]): pair.images for pair in shared_images(splits)}
    assert found == {("train0", "val0"): 1, ("train0", "test1"): 2, ("val0", "test1"): 2}
    with pytest.raises(DataError, match="2 more pairs or groups of classes"):
        check_disjoint(splits)


def test_an_image_of_very_many_classes_is_told_of_once():
    rng = np.random.default_rng(0)

    def classes(split, number):
        images = rng.integers(0, 256, (number, 3, 1, 4, 4), dtype=np.uint8)
        images[:, 0] = 0
        return {f"{split}{k}": own for k, own in enumerate(images)}

    splits = {"train": classes("train", 3000), "test": classes("test", 1000)}
    splits["test"]["test7"][1] = splits["train"]["train5"][1]
    lines = [
        "1 image is in 4000 classes of train and test: in 'train0', 'train1' and others, up to 'test999' of the test "
        "split.",
        "Class 'test7' of the test split is also in the train split, as 'train5': 1 of its 3 images are there.",
    ]
    assert list(map(str, shared_images(splits))) == lines
    with pytest.raises(DataError, match=f"{lines[0]} 1 more pairs or groups of classes share images"):
        check_disjoint(splits)
    (within,) = shared_within("test", splits["test"])
    assert (within.images, len(within.classes)) == (1, 1000)
    for images in splits["train"].values():
        images[1:] = [[[[1]]], [[[2]]]]
    assert [str(crowd)[:44] for crowd in shared_within("train", splits["train"])] == [
        "3 images are each in 3000 classes of train: "
    ]


def test_images_that_a_class_holds_more_than_once_are_counted():
    train = make_splits()["train"]
    assert repeated(train) == {}
    train["train2"][3] = train["train0"][0]  # Of another class.
    train["train0"][4:] = train["train0"][1]
    train["train1"][:4] = train["train1"][[2, 3, 2, 3]]
    train["train2"][0] = train["train2"][1]
    train["train2"][0, 0, 0, 0] ^= 1
    assert repeated(train) == {"train0": 1, "train1": 2}


def test_images_that_differ_in_one_pixel_are_different():
    splits = make_splits((1, 40, 40))
    splits["test"]["test0"][0] = splits["train"]["train0"][0]
    splits["test"]["test0"][0, 0, 0, 0] ^= 1
    assert shared_images(splits) == []


def test_blank_surroundings_do_not_hide_or_fake_anything():
    # Nearly all pixels of drawings are equal: what is looked at first says little here.
    splits = make_splits((1, 28, 28))
    for number, images in enumerate(x for classes in splits.values() for x in classes.values()):
        images[:] = 0
        for k, image in enumerate(images):
            image[0, 2, number], image[0, 3, k] = 200, 100
    assert shared_images(splits) == []
    splits["test"]["test0"][4] = splits["val"]["val1"][5]
    assert [pair.images for pair in shared_images(splits)] == [1]


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 2, 2), (3, 1, 5)])
def test_images_smaller_than_what_is_looked_at_first(shape):
    splits = {
        split: {name: np.array(values, dtype=np.uint8).reshape(-1, 1, 1, 1) * np.ones((1, *shape), dtype=np.uint8)}
        for split, name, values in (("train", "a", [1, 2]), ("test", "b", [3, 2]))
    }
    assert [pair.images for pair in shared_images(splits)] == [1]
