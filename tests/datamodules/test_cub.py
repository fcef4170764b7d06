"""CUB-200-2011 in its original layout, with and without its boxes."""

import numpy as np
import pytest
import tiny_data
from PIL import Image

from datamodules import cub
from datamodules.cub import FOLDER, Cub
from lightning_ntk.errors import ConfigError, DataError

CLASSES = {
    "train": ["001.Black_footed_Albatross", "003.Sooty_Albatross"],
    "val": ["002.Laysan_Albatross", "006.Least_Auklet"],
    "test": ["004.Groove_billed_Ani"],
}
BOXES = {1: (3.0, 4.0, 20.0, 10.0), 2: (0.0, 0.0, 30.0, 24.0), 3: (5.5, 2.5, 11.0, 9.0)}


@pytest.fixture
def root(tmp_path):
    """Three images a class, not square; image k has the k-th box (from 1), or the third."""
    names = [f"{name}/{name[4:]}_{k:04}.jpg" for classes in CLASSES.values() for name in classes for k in range(3)]
    folder = tmp_path / "data" / FOLDER
    for name in names:
        tiny_data.save_image(folder / "images" / name, name, size=(30, 24))
    (folder / "images.txt").write_text("".join(f"{k} {name}\n" for k, name in enumerate(names, start=1)))
    boxes = (BOXES[min(k, 3)] for k in range(1, len(names) + 1))
    lines = (f"{k} {' '.join(map(str, box))}\n" for k, box in enumerate(boxes, start=1))
    (folder / "bounding_boxes.txt").write_text("".join(lines))
    tiny_data.write_split(tmp_path / "own.csv", **CLASSES)
    return tmp_path


def make(folder, **settings):
    own = str(folder / "own.csv")
    return Cub(
        **{
            "root": str(folder / "data"),
            "cache_dir": str(folder / "cache"),
            "split_file": own,
            "image_size": 16,
            **settings,
        }
    )


def test_birds_are_read_whole_or_cropped_to_their_boxes(root):
    whole, cropped = (make(root, crop=crop).class_splits() for crop in (False, True))
    for number, (x, y, width, height) in BOXES.items():
        name = f"001.Black_footed_Albatross/Black_footed_Albatross_{number - 1:04}.jpg"
        with Image.open(root / "data" / FOLDER / "images" / name) as image:
            resized = image.resize((16, 16), Image.Resampling.BILINEAR)
            box = image.crop((x, y, x + width, y + height)).resize((16, 16), Image.Resampling.BILINEAR)
        index = ("train", CLASSES["train"][0])
        assert np.array_equal(whole[index[0]][index[1]][number - 1], np.asarray(resized).transpose(2, 0, 1))
        assert np.array_equal(cropped[index[0]][index[1]][number - 1], np.asarray(box).transpose(2, 0, 1))
    assert whole["test"].digest != cropped["test"].digest


def test_the_choice_of_cropping_is_recorded_and_decides_the_tasks(root):
    names = [*CLASSES["train"], *CLASSES["val"]]
    ids = set()
    for crop in (False, True):
        tiny_data.write_split(root / "own.csv", train=names[:2], test=names[2:])
        data = make(root, crop=crop, ways=2, queries=1)
        data.prepare_data()
        data.setup()
        assert data.task_settings()["crop"] is crop
        ids.add(data.episode_ids())
    assert len(ids) == 2


def test_the_archive_gives_the_same(root, monkeypatch):
    monkeypatch.setattr(cub, "CHECKSUM", "")
    digest = make(root).class_splits()["test"].digest
    tiny_data.tarred(root / "data" / FOLDER, root / "data" / cub.ARCHIVE)
    assert make(root).class_splits()["test"].digest == digest


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("images.txt", "1 a.jpg extra\n", r"Line 1 of .*images\.txt must have 2 columns, but has 3"),
        (
            "images.txt",
            "1 003.Other/a.jpg\n",
            r"own\.csv names class '001\.Black_footed_Albatross', which is no class of",
        ),
        ("bounding_boxes.txt", "1 0 0 5 5\n", r"bounding_boxes\.txt has no box of four numbers for image 2"),
        ("bounding_boxes.txt", "1 0 0 5 five\n", r"bounding_boxes\.txt has no box of four numbers for image 1"),
        (
            "bounding_boxes.txt",
            None,
            r"bounding_boxes\.txt is missing, which cub needs\. Fetch (.|\n)*ROOT/CUB_200_2011",
        ),
        ("images.txt", None, r"images\.txt is missing, which cub needs\. Fetch (.|\n)*ROOT/CUB_200_2011"),
    ],
)
def test_bad_tables_are_named(root, file, text, message):
    path = root / "data" / FOLDER / file
    path.unlink() if text is None else path.write_text(text)
    with pytest.raises(DataError, match=message):
        make(root, crop=True).class_splits()


def test_missing_data_and_sizes_are_named(root):
    with pytest.raises(DataError, match=r"no CUB_200_2011 or CUB_200_2011\.tgz, (.|\n)*caltech(.|\n)*images\.txt"):
        make(root, root=str(root / "elsewhere")).class_splits()
    with pytest.raises(ConfigError, match=r"data\.image_size must be given: the images of cub differ in size"):
        make(root, image_size=None)
