"""Tiny-ImageNet's few-shot layout: a .tar.gz, its folder, or the folder around it."""

import os

import numpy as np
import pytest
import tiny_data
from PIL import Image

from datamodules.tiny_imagenet import FOLDER, TinyImageNet
from lightning_ntk.errors import DataError

CLASSES = {"train": ["n01", "n02"], "val": ["n03"], "test": ["n04", "n05"]}


@pytest.fixture
def root(tmp_path):
    for split, names in CLASSES.items():
        for name in names:
            for number in range(3):
                tiny_data.save_image(
                    tmp_path / "data" / FOLDER / split / name / f"{name}_{number}.JPEG", name, number, size=(64, 64)
                )
    (tmp_path / "data" / FOLDER / "classes.tsv").write_text("split\twnid\tname\n")
    tiny_data.write_split(tmp_path / "own.csv", **CLASSES)
    return tmp_path


def make(root, folder="data", **settings):
    return TinyImageNet(
        **{
            "root": str(root / folder),
            "cache_dir": str(root / "cache"),
            "split_file": str(root / "own.csv"),
            **settings,
        }
    )


def test_the_folder_the_folder_around_it_and_the_archive_give_the_same(root):
    splits = make(root).class_splits()
    assert {split: list(classes) for split, classes in splits.items()} == CLASSES
    assert splits["train"].images.shape == (6, 3, 64, 64)
    with Image.open(root / "data" / FOLDER / "test" / "n04" / "n04_1.JPEG") as image:
        assert np.array_equal(splits["test"]["n04"][1], np.asarray(image).transpose(2, 0, 1))
    inner = make(root, f"data/{FOLDER}", cache_dir=str(root / "cache2")).class_splits()
    tiny_data.tarred(root / "data" / FOLDER, root / "data" / f"{FOLDER}.tar.gz")
    packed = make(root).class_splits()
    assert splits["test"].digest == inner["test"].digest == packed["test"].digest
    assert make(root, image_size=32, channels=1).class_splits()["val"]["n03"].shape == (3, 1, 32, 32)


def test_the_second_start_reads_no_archive(root, monkeypatch):
    archive = tiny_data.tarred(root / "data" / FOLDER, root / "data" / f"{FOLDER}.tar.gz")
    first = make(root).class_splits()
    times = archive.stat()
    archive.write_bytes(b"x" * times.st_size)  # Unreadable, and to all appearances the same.
    os.utime(archive, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert np.array_equal(make(root).class_splits()["test"].images, first["test"].images)


def test_what_is_missing_or_spoilt_is_named(root):
    with pytest.raises(DataError, match=r"Class 'n\d+' of the published split tiny_imagenet is no class of"):
        make(root, split_file=None).class_splits()
    (root / "data" / FOLDER / "test" / "n05" / "n05_1.JPEG").write_bytes(b"")
    with pytest.raises(DataError, match=r"n05_1\.JPEG cannot be read"):
        make(root).class_splits()
    for file in (root / "data" / FOLDER / "val" / "n03").iterdir():
        file.unlink()
    with pytest.raises(DataError, match=r"n03 is empty"):
        make(root).class_splits()
    with pytest.raises(DataError, match=rf"has no {FOLDER} or (.|\n)*Expected:\n  ROOT/{FOLDER}/train"):
        make(root, "elsewhere").class_splits()
    assert [path.suffix for path in (root / "cache").iterdir() if path.suffix != ".lock"] == []
