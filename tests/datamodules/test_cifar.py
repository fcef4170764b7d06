"""CIFAR-FS and FC100 from CIFAR-100's Python archive."""

import pickle

import numpy as np
import pytest
import tiny_data

from datamodules import cifar, published
from datamodules.cifar import FC100, FOLDER, CifarFS
from datamodules.files.pickles import load_pickle
from lightning_ntk.errors import DataError

NAMES = ["apple", "aquarium_fish", "maple_tree", "lawn_mower", "whale"]


def rows(file, labels):
    """As CIFAR has it: a row is the red plane, then the green, then the blue one."""
    images = [tiny_data.pixels(file, number, size=(32, 32)) for number in range(len(labels))]
    return np.stack([image.transpose(2, 0, 1).reshape(-1) for image in images])


def write(root, protocol=2, **changes):
    folder = root / FOLDER
    folder.mkdir(parents=True)
    contents = {"meta": {"fine_label_names": NAMES, "coarse_label_names": ["fish", "trees"]}}
    for file, labels in (("train", [4, 0, 1, 2, 3, 0, 4]), ("test", [1, 0, 4])):
        contents[file] = {
            "data": rows(file, labels),
            "fine_labels": labels,
            "coarse_labels": labels,
            "filenames": ["x"],
        }
    for file, content in contents.items():
        (folder / file).write_bytes(pickle.dumps(content | changes.get(file, {}), protocol))


def make(tmp_path, kind=CifarFS, **settings):
    own = tiny_data.write_split(
        tmp_path / "own.csv", train=["apple", "whale"], val=["maple_tree"], test=["aquarium_fish"]
    )
    root, cache_dir = str(tmp_path / "data"), str(tmp_path / "cache")
    return kind(**{"root": root, "cache_dir": cache_dir, "split_file": own, **settings})


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_training_and_test_images_of_a_class_go_together(tmp_path, protocol):
    write(tmp_path / "data", protocol)
    splits = make(tmp_path).class_splits()
    assert {split: {name: len(x) for name, x in classes.items()} for split, classes in splits.items()} == {
        "train": {"apple": 3, "whale": 3},
        "val": {"maple_tree": 1},
        "test": {"aquarium_fish": 2},
    }
    whale = [tiny_data.pixels(*key, size=(32, 32)) for key in (("train", 0), ("train", 6), ("test", 2))]
    assert np.array_equal(splits["train"]["whale"], np.stack(whale).transpose(0, 3, 1, 2))


def test_the_archive_gives_the_same_and_the_two_splits_share_no_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(cifar, "CHECKSUM", "")
    write(tmp_path / "data")
    digest = make(tmp_path).class_splits()["train"].digest
    tiny_data.tarred(tmp_path / "data" / FOLDER, tmp_path / "data" / cifar.ARCHIVE)
    assert make(tmp_path).class_splits()["train"].digest == digest
    assert make(tmp_path, FC100).class_splits()["train"].digest == digest
    assert {path.name.split("-")[0] for path in (tmp_path / "cache").iterdir()} == {"cifarfs", "fc100"}
    assert make(tmp_path, image_size=16, channels=1).class_splits()["train"].images.shape == (6, 1, 16, 16)


def test_each_has_its_own_published_split():
    sizes = {
        kind: {split: len(names) for split, names in kind(root="x").split.classes.items()} for kind in (CifarFS, FC100)
    }
    assert sizes == {
        CifarFS: {"train": 64, "val": 16, "test": 20},
        FC100: {"train": 60, "val": 20, "test": 20},
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"meta": {"fine_label_names": ["apple"]}}, r"own\.csv names class 'whale', which is no fine label of .*meta"),
        ({"train": {"data": np.zeros((7, 3071), np.uint8)}}, r"data of .*train must be uint8 \[images, 3072\]"),
        ({"test": {"fine_labels": [0, 1, 5]}}, r"Image 2 of .*test has the label 5, but there are 5"),
    ],
)
def test_other_content_is_named(tmp_path, changes, message):
    write(tmp_path / "data", **changes)
    with pytest.raises(DataError, match=message):
        make(tmp_path).class_splits()


@pytest.mark.parametrize("inside", ["the archive", "the folder", "the files", "a download", "a resumed download"])
def test_a_root_named_like_the_part_is_the_part_or_holds_it(tmp_path, monkeypatch, inside):
    monkeypatch.setattr(cifar, "CHECKSUM", "")
    root = tmp_path / FOLDER
    write(tmp_path if inside == "the files" else tmp_path / "made")
    root.mkdir(exist_ok=True)
    if inside == "the archive":
        tiny_data.tarred(tmp_path / "made" / FOLDER, root / cifar.ARCHIVE)
    elif inside == "the folder":
        (tmp_path / "made" / FOLDER).rename(root / FOLDER)
    elif inside == "a resumed download":
        (root / f"{cifar.ARCHIVE}.part").touch()

    def fetch(urls, target, checksum):
        assert target == root / cifar.ARCHIVE
        tiny_data.tarred(tmp_path / "made" / FOLDER, target)

    monkeypatch.setattr(published, "download", fetch)
    splits = make(tmp_path, root=str(root), download="download" in inside).class_splits()
    assert {name: len(images) for name, images in splits["train"].items()} == {"apple": 3, "whale": 3}


@pytest.mark.parametrize("place", ["cifar_100", "cifar_fs", "fc100"])
@pytest.mark.parametrize("packed", [False, True])
def test_both_take_one_default_folder_and_find_their_old_ones(tmp_path, monkeypatch, place, packed):
    monkeypatch.setenv("LIGHTNING_NTK_DATA", str(tmp_path))
    assert {kind().root for kind in (CifarFS, FC100)} == {tmp_path / "cifar_100"}
    write(tmp_path / place)
    if packed:
        tiny_data.tarred(tmp_path / place / FOLDER, tmp_path / place / cifar.ARCHIVE)
    (tmp_path / "cifar_100").mkdir(exist_ok=True)  # Empty: it does not hide what lies elsewhere.
    assert {kind().root for kind in (CifarFS, FC100)} == {tmp_path / place}
    assert CifarFS(root="x").root.name == "x"


def test_each_file_is_unpickled_once_a_split(tmp_path, monkeypatch):
    write(tmp_path / "data")
    loaded = []
    monkeypatch.setattr(cifar, "load_pickle", lambda file: loaded.append(file.name) or load_pickle(file))
    make(tmp_path).class_splits()
    assert sorted(loaded) == sorted(3 * ["meta", "train", "test"])


def test_missing_entries_files_and_malicious_ones_are_named(tmp_path):
    write(tmp_path / "data")
    with pytest.raises(DataError, match=r"Class '\w+' of the published split cifar_fs is no fine label"):
        make(tmp_path, split_file=None).class_splits()
    (tmp_path / "data" / FOLDER / "test").write_bytes(b"cos\nsystem\n(S'touch owned'\ntR.")
    with pytest.raises(DataError, match=r"test cannot be read \(it asks for os\.system"):
        make(tmp_path).class_splits()
    (tmp_path / "data" / FOLDER / "meta").write_bytes(pickle.dumps({}))
    with pytest.raises(DataError, match=r"meta must hold a dict with fine_label_names"):
        make(tmp_path).class_splits()
    with pytest.raises(DataError, match=r"data\.download=true fetches cifar-100-python\.tar\.gz"):
        make(tmp_path, root=str(tmp_path / "elsewhere")).class_splits()
