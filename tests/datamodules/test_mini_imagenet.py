"""mini-ImageNet from the cache pickles and from images with lists."""

import csv
import pickle
import tarfile

import numpy as np
import pytest
import tiny_data

from datamodules import mini_imagenet
from datamodules.mini_imagenet import PICKLE_ARCHIVE, MiniImageNet
from lightning_ntk.errors import DataError

CLASSES = {"train": ["n01", "n02"], "val": ["n03"], "test": ["n04", "n05"]}
IMAGES = 3


def keys(split):
    return [(name, number) for name in CLASSES[split] for number in range(IMAGES)]


def content(split):
    """As the published pickles: pixels of all images, and the numbers of each class."""
    images = np.stack([tiny_data.pixels(*key, size=(84, 84)) for key in keys(split)])
    classes = {name: list(range(IMAGES * place, IMAGES * (place + 1))) for place, name in enumerate(CLASSES[split])}
    return {"image_data": images, "class_dict": classes}


def write_pickles(folder, validation="val"):
    folder.mkdir()
    for split in CLASSES:
        name = validation if split == "val" else split
        (folder / f"mini-imagenet-cache-{name}.pkl").write_bytes(pickle.dumps(content(split)))


def write_lists(folder):
    for split in CLASSES:
        rows = [(f"{name}{number:08}.jpg", name) for name, number in keys(split)]
        for (file, _), key in zip(rows, keys(split), strict=True):
            # PNG by content: without loss, and found by what it holds.
            tiny_data.save_image(folder / "images" / file, *key, kind="PNG", size=(84, 84))
        with (folder / f"{split}.csv").open("w", newline="") as target:
            csv.writer(target).writerows([("filename", "label"), *rows])


def make(tmp_path, folder="data", **settings):
    own = tiny_data.write_split(tmp_path / "own.csv", **CLASSES)
    return MiniImageNet(
        **{"root": str(tmp_path / folder), "cache_dir": str(tmp_path / "cache"), "split_file": own, **settings}
    )


def test_pickles_lists_and_the_archive_give_the_same(tmp_path, monkeypatch):
    write_lists(tmp_path / "listed")
    write_pickles(tmp_path / "pickled")
    write_pickles(tmp_path / "of_learn2learn", "validation")
    listed = make(tmp_path, "listed").class_splits()
    assert {split: list(classes) for split, classes in listed.items()} == CLASSES
    expected = np.stack([tiny_data.resized(tiny_data.pixels("n05", n, size=(84, 84)), 84) for n in range(IMAGES)])
    assert np.array_equal(listed["test"]["n05"], expected)
    for folder in ("pickled", "of_learn2learn"):
        splits = make(tmp_path, folder).class_splits()
        assert {split: classes.digest for split, classes in splits.items()} == {
            split: classes.digest for split, classes in listed.items()
        }
    monkeypatch.setattr(mini_imagenet, "PICKLE_CHECKSUM", "")
    (tmp_path / "packed").mkdir()
    with tarfile.open(tmp_path / "packed" / PICKLE_ARCHIVE, "w:gz") as target:
        for file in (tmp_path / "pickled").iterdir():
            target.add(file, file.name)
    assert make(tmp_path, "packed").class_splits()["test"].digest == listed["test"].digest


@pytest.mark.parametrize("missing", ["images", "train.csv", "test.csv"])
def test_what_is_missing_of_the_lists_is_named(tmp_path, missing):
    write_lists(tmp_path / "data")
    (tmp_path / "data" / missing).rename(tmp_path / "elsewhere")
    with pytest.raises(DataError, match=rf"data has no {missing}, which mini_imagenet needs"):
        make(tmp_path).class_splits()


def test_a_split_of_ones_own_may_mix_the_published_ones(tmp_path):
    write_pickles(tmp_path / "data")
    other = tiny_data.write_split(tmp_path / "other.csv", train=["n05", "n01"], test=["n03"])
    splits = make(tmp_path, split_file=other).class_splits()
    assert {split: list(classes) for split, classes in splits.items()} == {"train": ["n01", "n05"], "test": ["n03"]}
    assert np.array_equal(splits["train"]["n05"], make(tmp_path).class_splits()["test"]["n05"])


def test_a_malicious_pickle_is_an_error_and_runs_nothing(tmp_path):
    class Evil:
        def __reduce__(self):
            return open, (str(tmp_path / "owned"), "w")

    write_pickles(tmp_path / "data")
    (tmp_path / "data" / "mini-imagenet-cache-test.pkl").write_bytes(
        pickle.dumps({"image_data": Evil(), "class_dict": {}})
    )
    with pytest.raises(DataError, match=r"mini-imagenet-cache-test\.pkl cannot be read \(it asks for \w+\.open"):
        make(tmp_path).class_splits()
    assert not (tmp_path / "owned").exists()
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".lock"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"class_dict": None}, "class_dict of .* must map names to numbers"),
        ({"class_dict": {"n01": [0, 99], "n02": [1]}}, "class_dict of .* must map names to numbers .*out of bounds"),
        ({"class_dict": {"n01": [0]}}, r"own\.csv names class 'n02' for train, of which .*data has no images"),
        ({"image_data": np.zeros((6, 84, 84), np.uint8)}, "image_data of .* must be uint8"),
        ({"image_data": np.zeros((6, 84, 84, 3), np.float32)}, "image_data of .* must be uint8"),
    ],
)
def test_a_pickle_of_other_content_is_named(tmp_path, change, message):
    write_pickles(tmp_path / "data")
    (tmp_path / "data" / "mini-imagenet-cache-train.pkl").write_bytes(pickle.dumps(content("train") | change))
    with pytest.raises(DataError, match=message):
        make(tmp_path).class_splits()


def test_bad_lists_and_missing_images_are_named(tmp_path):
    write_lists(tmp_path / "data")
    (tmp_path / "data" / "images" / "n0400000001.jpg").unlink()
    with pytest.raises(DataError, match=r"n0400000001\.jpg is not there: the data set is not whole"):
        make(tmp_path).class_splits()
    (tmp_path / "data" / "train.csv").write_text("file,class\na,b\n")
    with pytest.raises(DataError, match=r'train\.csv must be a CSV file with the header "filename,label"'):
        make(tmp_path).class_splits()
    with pytest.raises(DataError, match=r"no mini-imagenet-cache-train\.pkl or (.|\n)*zenodo(.|\n)*ROOT/train\.csv"):
        make(tmp_path, "elsewhere").class_splits()
