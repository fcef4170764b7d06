"""Folders of images: both layouts, every image mode, and each kind of bad input."""

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from datamodules.image_folder import ImageFolder
from lightning_ntk.errors import ConfigError, DataError

REPOSITORY = Path(__file__).resolve().parents[2]


def write_classes(folder, names, images=4, size=(10, 12), seed=0):
    rng = np.random.default_rng([seed, len(names)])
    for name in names:
        (folder / name).mkdir(parents=True)
        for number in range(images):
            pixels = rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{number}.png")


@pytest.fixture
def folders(tmp_path):
    root = tmp_path / "images"
    for seed, split in enumerate(("train", "val", "test")):
        write_classes(root / split, [f"{split}_{k}" for k in range(3)], seed=seed)
    return root


def make(root, **settings):
    data = ImageFolder(root=str(root), **{"image_size": 8, "ways": 2, "shots": 1, "queries": 2, **settings})
    data.setup()
    return data


def test_split_folders_give_episodes_of_their_own_split(folders):
    data = make(folders)
    assert {split: data.class_count(split) for split in ("train", "val", "test")} == dict.fromkeys(
        ("train", "val", "test"), 3
    )
    task = data.draw("test", 0, 0)
    assert task.support_x.shape == (2, 3, 8, 8)
    assert data.spec.mean is None
    assert len(make(folders, normalize=True).spec.mean) == 3


def test_a_split_file_may_name_nested_classes(tmp_path):
    write_classes(tmp_path / "all", ["greek/alpha", "greek/beta", "latin/a", "latin/b"])
    (tmp_path / "split.csv").write_text(
        "split,class\ntrain,greek/alpha\ntrain,greek/beta\ntest,latin/a\ntest,latin/b\n"
    )
    data = make(tmp_path / "all", split_file=str(tmp_path / "split.csv"))
    assert data.class_count("train") == data.class_count("test") == 2
    assert not data.has_split("val")


def test_every_image_mode_is_read_and_inverted_on_request(tmp_path):
    root = tmp_path / "modes"
    for split in ("train", "test"):
        for k, mode in enumerate(("1", "L", "P", "RGBA", "CMYK", "RGB")):
            (root / split / f"{split}_{mode}").mkdir(parents=True)
            for number in range(3):
                grey = np.full((8, 8), 60 if split == "train" else 80, dtype=np.uint8)
                grey[:4] = 255
                grey[0, k] = number * 100
                suffix = "jpg" if mode == "CMYK" else "png"
                Image.fromarray(grey).convert("RGB").convert(mode).save(
                    root / split / f"{split}_{mode}" / f"{number}.{suffix}"
                )
    plain = make(root, channels=1, ways=6).draw("train", 0, 0)
    inverted = make(root, channels=1, ways=6, invert=True).draw("train", 0, 0)
    assert plain.support_x.shape == (6, 1, 8, 8)
    assert torch.equal(255 - plain.support_x, inverted.support_x)
    rows = make(root, channels=3, ways=6).draw("train", 0, 0).support_x[:, :, 2, :].float().mean()
    assert rows > 240, "the upper half is white in every mode"


def test_the_committed_omniglot_split_has_the_published_counts():
    with (REPOSITORY / "conf" / "splits" / "omniglot_small.csv").open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    classes = {split: {row["class"] for row in rows if row["split"] == split} for split in ("train", "test")}
    assert (len(classes["train"]), len(classes["test"])) == (183, 59)
    assert not classes["train"] & classes["test"]
    assert {name.split("/")[0] for name in classes["test"]} == {"Sanskrit", "Tagalog"}
    assert not {name.split("/")[0] for name in classes["train"]} & {"Sanskrit", "Tagalog"}


def test_a_missing_root_shows_the_expected_tree(tmp_path):
    with pytest.raises(ConfigError, match=r"data\.root=.*is not a folder(.|\n)*ROOT/train/CLASS"):
        make(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"data\.root is missing"):
        ImageFolder()


def test_missing_split_folders_are_named(folders):
    (folders / "test").rename(folders / "tset")
    with pytest.raises(ConfigError, match="no folder test"):
        make(folders)


def test_an_unreadable_image_is_named(folders):
    (folders / "val" / "val_1" / "2.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"val_1/2\.png cannot be read"):
        make(folders)


def test_an_empty_image_is_named(folders):
    (folders / "train" / "train_0" / "1.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"train_0/1\.png cannot be read"):
        make(folders)


def test_an_empty_class_is_named(folders):
    (folders / "test" / "nothing").mkdir()
    with pytest.raises(DataError, match="nothing holds no images"):
        make(folders)


def test_a_class_shared_by_train_and_test_is_named(folders):
    (folders / "test" / "test_0").rename(folders / "test" / "train_0")
    with pytest.raises(DataError, match="'train_0' of the test split is also in the train split"):
        make(folders)


def test_a_split_file_naming_an_unknown_class_gets_the_nearest(folders, tmp_path):
    (tmp_path / "split.csv").write_text("split,class\ntrain,train/train_0\ntest,test/tset_1\n")
    with pytest.raises(DataError, match=r"'test/tset_1'.*Did you mean 'test/test_1'"):
        make(folders, split_file=str(tmp_path / "split.csv"))


@pytest.mark.parametrize("text", ["", "a,b\n1,2\n", "split,class\ntrian,train/train_0\n"])
def test_a_bad_split_file_is_named(folders, tmp_path, text):
    (tmp_path / "split.csv").write_text(text)
    with pytest.raises(ConfigError, match=r"data\.split_file=.*split\.csv"):
        make(folders, split_file=str(tmp_path / "split.csv"))
    with pytest.raises(ConfigError, match=r"data\.split_file=.*cannot be read"):
        make(folders, split_file=str(tmp_path / "missing.csv"))
