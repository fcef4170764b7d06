"""VGG Flowers in its original layout: jpg/ or its archive, and a MATLAB file of labels."""

import numpy as np
import pytest
import scipy.io
import tiny_data
from PIL import Image

from datamodules.vgg_flowers import LABELS, VggFlowers
from lightning_ntk.errors import DataError

OF_IMAGE = [77, 77, 5, 102, 5, 77, 102]


@pytest.fixture
def root(tmp_path):
    for number in range(1, len(OF_IMAGE) + 1):
        tiny_data.save_image(tmp_path / "data" / "jpg" / f"image_{number:05}.jpg", number, size=(30, 24))
    scipy.io.savemat(tmp_path / "data" / LABELS, {"labels": np.array([OF_IMAGE], dtype=np.uint8)})
    tiny_data.write_split(tmp_path / "own.csv", train=["77"], val=["102"], test=["5"])
    return tmp_path


def make(root, **settings):
    own = str(root / "own.csv")
    settings = {
        "root": str(root / "data"),
        "cache_dir": str(root / "cache"),
        "split_file": own,
        "image_size": 16,
        **settings,
    }
    return VggFlowers(**settings)


def test_images_go_to_the_classes_of_the_labels(root):
    splits = make(root).class_splits()
    assert {split: {name: len(x) for name, x in classes.items()} for split, classes in splits.items()} == {
        "train": {"77": 3},
        "val": {"102": 2},
        "test": {"5": 2},
    }
    with Image.open(root / "data" / "jpg" / "image_00005.jpg") as image:
        expected = np.asarray(image.resize((16, 16), Image.Resampling.BILINEAR)).transpose(2, 0, 1)
    assert np.array_equal(splits["test"]["5"][1], expected)


def test_the_archive_gives_the_same_and_only_the_images_are_unpacked(root, monkeypatch):
    monkeypatch.setattr(VggFlowers, "parts", without_checksums(VggFlowers.parts))
    digest = make(root).class_splits()["train"].digest
    tiny_data.tarred(root / "data" / "jpg", root / "data" / "102flowers.tgz")
    assert make(root).class_splits()["train"].digest == digest


def without_checksums(parts):
    return lambda self: [type(part)(part.path, part.archive, part.urls) for part in parts(self)]


def test_bad_labels_missing_images_and_classes_are_named(root):
    with pytest.raises(DataError, match=r"Class '1' of the published split vgg_flowers is no label of"):
        make(root, split_file=None).class_splits()
    (root / "data" / "jpg" / "image_00003.jpg").unlink()
    with pytest.raises(DataError, match=r"image_00003\.jpg is not there"):
        make(root).class_splits()
    for content, message in (
        ({"other": [1]}, "labels"),
        ({"labels": np.array([[0.5]])}, "whole numbers"),
        (None, "MATLAB"),
    ):
        if content is None:
            (root / "data" / LABELS).write_bytes(b"no matlab file")
        else:
            scipy.io.savemat(root / "data" / LABELS, content)
        with pytest.raises(DataError, match=rf"imagelabels\.mat .*{message}"):
            make(root).class_splits()
    (root / "data" / LABELS).unlink()
    with pytest.raises(DataError, match=r"no imagelabels\.mat, .*data\.download=true fetches imagelabels\.mat"):
        make(root).class_splits()
