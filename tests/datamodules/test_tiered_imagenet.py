"""tiered-ImageNet from pickles in the layout of the original release."""

import pickle
import tarfile

import numpy as np
import pytest
import tiny_data

from datamodules import tiered_imagenet
from datamodules.files.splits import read_split
from datamodules.tiered_imagenet import FOLDER, TieredImageNet
from lightning_ntk.errors import ConfigError, DataError

CLASSES = {"train": ["crane", "house finch, linnet", "crane"], "val": ["x"], "test": ["y", "z"]}
LABELS = {"train": [0, 2, 1, 0, 2], "val": [0, 0], "test": [1, 0, 1]}


def write(root, **changes):
    (root / FOLDER).mkdir(parents=True)
    for split, names in CLASSES.items():
        labels = {
            "label_specific": np.array(LABELS[split]),
            "label_general": np.zeros(len(LABELS[split]), int),
            "label_specific_str": names,
            "label_general_str": ["thing"],
        }
        # OpenCV's encoded images are columns of bytes; some releases have rows.
        images = [
            np.frombuffer(tiny_data.encoded(split, k, size=(84, 84)), np.uint8).reshape((-1, 1) if k % 2 else -1)
            for k in range(len(LABELS[split]))
        ]
        (root / FOLDER / f"{split}_labels.pkl").write_bytes(pickle.dumps(labels | changes.get(split, {}), 2))
        (root / FOLDER / f"{split}_images_png.pkl").write_bytes(pickle.dumps(changes.get(f"{split}_images", images), 2))


@pytest.fixture
def make(tmp_path, monkeypatch):
    """A data set of three, one and two classes, whose split file says so."""

    def made(**settings):
        rows = {
            split: [f"n{k:08}" for k in range(10 * place, 10 * place + count)]
            for place, (split, count) in enumerate((("train", 3), ("val", 1), ("test", 2)))
        }
        tiny_data.write_split(tmp_path / "own.csv", **rows)
        monkeypatch.setattr(TieredImageNet, "split", property(lambda self: read_split(tmp_path / "own.csv")))
        return TieredImageNet(**{"root": str(tmp_path / "data"), "cache_dir": str(tmp_path / "cache"), **settings})

    return made


def test_the_pickles_are_read_and_classes_of_one_name_kept_apart(tmp_path, make, monkeypatch):
    write(tmp_path / "data")
    splits = make().class_splits()
    assert {split: {name: len(x) for name, x in classes.items()} for split, classes in splits.items()} == {
        "train": {"crane (0)": 2, "crane (2)": 2, "house finch, linnet": 1},
        "val": {"x": 2},
        "test": {"y": 1, "z": 2},
    }
    expected = [tiny_data.pixels("test", k, size=(84, 84)).transpose(2, 0, 1) for k in (0, 2)]
    assert np.array_equal(splits["test"]["z"], expected)
    with tarfile.open(tmp_path / "data" / tiered_imagenet.ARCHIVE, "w") as target:
        target.add(tmp_path / "data" / FOLDER, FOLDER)
    tiny_data.remove(tmp_path / "data" / FOLDER)
    monkeypatch.setattr(tiered_imagenet, "CHECKSUM", "")
    assert make().class_splits()["test"].digest == splits["test"].digest


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"test": {"label_specific_str": ["y"]}}, r"test_labels\.pkl has 1 classes that are not the 2 test classes"),
        (
            {"test": {"label_specific_str": ["n00000020", "n00000099"]}},
            r"has 2 classes that are not the 2 test",
        ),
        ({"val": {"label_specific": np.array([0, 3])}}, r"Image 1 of .*val_images_png\.pkl has the label 3"),
        ({"val": {"label_specific": np.array([0.0, 0.0])}}, r"label_specific of .*val_labels\.pkl must be the number"),
        ({"val": {"label_specific_str": None}}, r"val_labels\.pkl must hold a dict with label_specific"),
        ({"val_images": []}, r"val_images_png\.pkl has 0 images, but .* has 2 labels"),
        ({"val_images": [np.zeros(5, np.uint8), "text"]}, r"Image 0 of .*val_images_png\.pkl cannot be read"),
    ],
)
def test_other_content_is_named(tmp_path, make, changes, message):
    write(tmp_path / "data", **changes)
    with pytest.raises(DataError, match=message):
        make().class_splits()


def test_wordnet_ids_as_names_pass_when_they_are_the_splits(tmp_path, make):
    write(tmp_path / "data", test={"label_specific_str": ["n00000021", "n00000020"]})
    assert set(make().class_splits()["test"]) == {"n00000020", "n00000021"}


def test_the_lists_of_the_release_give_the_ids(tmp_path, make):
    write(tmp_path / "data")
    folder = tmp_path / "data" / FOLDER
    (folder / "class_names.txt").write_text("z\nhouse finch, linnet\ny\ncrane\ncrane\n")
    (folder / "synsets.txt").write_text("n00000020\nn00000001\nn00000021\nn00000000\nn00000002\n")
    splits = make().class_splits()
    assert {name: len(images) for name, images in splits["test"].items()} == {"n00000020": 2, "n00000021": 1}
    assert set(splits["train"]) == {"crane (0)", "crane (2)", "n00000001"}, "which is which, the lists do not say"
    (folder / "synsets.txt").write_text("n00000020\nn00000001\nn00000029\n")
    with pytest.raises(DataError, match=r"test_labels\.pkl has 2 classes that are not the 2 test"):
        make().class_splits()


def test_of_two_ids_of_one_word_the_splits_is_meant_and_the_others_are_compared(tmp_path, make):
    write(tmp_path / "data", test={"label_specific_str": ["crane", "z"]})
    folder = tmp_path / "data" / FOLDER
    lists = {"z": "n00000020", "house finch, linnet": "n00000001", "crane": "n00000099"}
    (folder / "class_names.txt").write_text("\n".join([*lists, "crane"]))
    (folder / "synsets.txt").write_text("\n".join([*lists.values(), "n00000021"]))
    with pytest.raises(DataError, match=r"train_labels\.pkl has 3 classes that are not the 3 train"):
        make().class_splits()  # Both cranes are in train there, and in none of the list's.
    (folder / "train_labels.pkl").write_bytes(
        pickle.dumps({"label_specific": np.array(LABELS["train"]), "label_specific_str": ["a", "b", "c"]})
    )
    assert set(make().class_splits()["test"]) == {"crane", "n00000020"}
    (folder / "synsets.txt").write_text("\n".join(["n00000098", "n00000001", "n00000099", "n00000021"]))
    with pytest.raises(DataError, match=r"test_labels\.pkl has 2 classes that are not the 2 test"):
        make().class_splits()  # z is another, though crane's id is not certain.
    write_twice = {"label_specific": np.array(LABELS["test"]), "label_specific_str": ["n00000020", "n00000020"]}
    (folder / "test_labels.pkl").write_bytes(pickle.dumps(write_twice))
    with pytest.raises(DataError, match=r"test_labels\.pkl has 2 classes that are not the 2 test"):
        make().class_splits()


def test_the_archive_is_found_in_a_root_of_its_folders_name(tmp_path, make, monkeypatch):
    monkeypatch.setattr(tiered_imagenet, "CHECKSUM", "")
    write(tmp_path / "data")
    digest = make().class_splits()["test"].digest
    (tmp_path / FOLDER).mkdir()
    tiny_data.tarred(tmp_path / "data" / FOLDER, tmp_path / FOLDER / tiered_imagenet.ARCHIVE)
    assert make(root=str(tmp_path / FOLDER)).class_splits()["test"].digest == digest


def test_a_survey_finds_what_is_wrong_in_every_split_and_leaves_nothing(tmp_path, make):
    write(tmp_path / "data", train_images=[b"", *[tiny_data.encoded(k, size=(84, 84)) for k in range(3)], b"x"])
    (tmp_path / "data" / FOLDER / "val_labels.pkl").unlink()
    (tmp_path / "data" / FOLDER / "test_labels.pkl").write_bytes(b"")
    leftover = tmp_path / "cache" / "survey-tieredimagenet.tmp-killed"
    leftover.mkdir(parents=True)
    lines = make().survey().findings
    expected = ["Image 0 of ", "Image 4 of ", "val_labels.pkl is missing", "test_labels.pkl cannot be read"]
    assert len(lines) == 4
    assert all(part in line for part, line in zip(expected, lines, strict=True))
    assert all(path.suffix == ".lock" for path in (tmp_path / "cache").iterdir())


def test_a_missing_pickle_of_the_last_split_is_told_before_anything_is_decoded(tmp_path, make, monkeypatch):
    write(tmp_path / "data")
    (tmp_path / "data" / FOLDER / "test_images_png.pkl").unlink()
    monkeypatch.delattr("datamodules.tiered_imagenet.load_pickle")
    with pytest.raises(DataError, match=r"test_images_png\.pkl is missing"):
        make().class_splits()


def test_missing_pickles_and_another_split_are_named(tmp_path, make):
    with pytest.raises(DataError, match=r"no tiered-imagenet or tiered-imagenet\.tar, (.|\n)*few-shot-ssl-public"):
        make().class_splits()
    write(tmp_path / "data")
    (tmp_path / "data" / FOLDER / "val_labels.pkl").unlink()
    with pytest.raises(
        DataError, match=r"val_labels\.pkl is missing, which (.|\n)*zenodo(.|\n)*ROOT/tiered-imagenet/val_images"
    ):
        make().class_splits()
    with pytest.raises(ConfigError, match=r"data\.split_file=x\.csv: the pickles .* are its split"):
        TieredImageNet(split_file="x.csv")
