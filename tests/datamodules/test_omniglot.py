"""Omniglot in its original layout: unpacked, zipped, the small sets, both splits, and what can be wrong."""

import numpy as np
import pytest
import tiny_data

from datamodules import omniglot
from datamodules.files.splits import find_split_file, read_split
from datamodules.omniglot import FULL, SMALL, Omniglot
from lightning_ntk.errors import ConfigError, DataError

ALPHABETS = {
    "images_background": ["Greek", "Japanese_(katakana)"],
    "images_evaluation": ["Angelic"],
    "images_background_small1": ["Greek", "Korean"],
    "images_background_small2": ["Greek", "Sanskrit"],
}

TEST = ["Angelic/character01", "Angelic/character02"]


def write_alphabets(root, names, characters=2, drawings=3):
    for name in names:
        for alphabet in ALPHABETS[name]:
            for character in range(1, characters + 1):
                for drawing in range(1, drawings + 1):
                    file = root / name / alphabet / f"character{character:02}" / f"{character:04}_{drawing:02}.png"
                    key = (name, alphabet, character, drawing)
                    tiny_data.save_image(file, *key, size=(105, 105), channels=3)


def split_file(tmp_path, **classes):
    classes = classes or {
        "train": ["Greek/character01", "Greek/character02", "Japanese_(katakana)/character01"],
        "val": ["Japanese_(katakana)/character02"],
        "test": TEST,
    }
    return tiny_data.write_split(tmp_path / "own.csv", **classes)


def make(tmp_path, **settings):
    settings = {
        "root": str(tmp_path / "data"),
        "cache_dir": str(tmp_path / "cache"),
        "ways": 2,
        "queries": 2,
        **settings,
    }
    return Omniglot(**settings)


def test_characters_are_read_inverted_and_resized(tmp_path):
    write_alphabets(tmp_path / "data", FULL)
    data = make(tmp_path, split_file=split_file(tmp_path))
    splits = data.class_splits()
    assert {split: sorted(classes) for split, classes in splits.items()} == {
        split: sorted(names) for split, names in data.split.classes.items()
    }
    drawn = tiny_data.pixels("images_evaluation", "Angelic", 2, 3, size=(105, 105))
    assert np.array_equal(splits["test"]["Angelic/character02"][2], 255 - tiny_data.resized(drawn, 28, "L"))
    native = make(tmp_path, split_file=split_file(tmp_path), image_size=None, invert=False).class_splits()
    assert np.array_equal(native["test"]["Angelic/character02"][2], tiny_data.resized(drawn, 105, "L"))


def test_zipped_or_not_the_images_and_tasks_are_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(omniglot, "CHECKSUMS", dict.fromkeys(FULL, ""))
    write_alphabets(tmp_path / "data", FULL)
    digests = []
    for _ in range(2):
        names = {"train": ["Greek/character01", "Japanese_(katakana)/character02"], "test": TEST}
        data = make(tmp_path, split_file=split_file(tmp_path, **names), rotate_train_classes=True, queries=1)
        data.prepare_data()
        data.setup()
        assert data.class_count("train") == 8
        assert data.class_count("test") == 2
        assert data.task_settings()["split"] == "own"
        digests.append((data.class_splits()["test"].digest, data.episode_ids()))
        for name in FULL:
            if (tmp_path / "data" / name).exists():
                tiny_data.zipped(tmp_path / "data" / name, tmp_path / "data" / f"{name}.zip")
    assert digests[0] == digests[1]
    assert not list((tmp_path / "cache").glob("*.tmp-*")), "what was unpacked must go"


def test_the_two_small_sets_alone_take_their_own_split_and_overlap(tmp_path):
    write_alphabets(tmp_path / "data", SMALL)
    data = make(tmp_path)
    assert data.default_split() == "omniglot_small"
    assert {part.path for part in data.parts()} == set(SMALL)
    classes = {"train": ["Greek/character01", "Korean/character01"], "test": ["Sanskrit/character01"]}
    splits = make(tmp_path, split_file=split_file(tmp_path, **classes)).class_splits()
    first = tiny_data.pixels("images_background_small1", "Greek", 1, 1, size=(105, 105))
    assert np.array_equal(splits["train"]["Greek/character01"][0], 255 - tiny_data.resized(first, 28, "L"))
    write_alphabets(tmp_path / "data", FULL)
    assert make(tmp_path).default_split() == "omniglot_vinyals"


def test_the_small_split_fits_the_committed_one():
    names = read_split(find_split_file("omniglot_small")).classes
    assert set(names["test"]) <= {f"{a}/character{k:02}" for a in ("Sanskrit", "Tagalog") for k in range(1, 43)}


def test_an_archive_with_another_checksum_is_named(tmp_path):
    write_alphabets(tmp_path / "data", FULL)
    tiny_data.zipped(tmp_path / "data" / FULL[0], tmp_path / "data" / f"{FULL[0]}.zip")
    with pytest.raises(
        DataError, match=r"images_background\.zip has the checksum md5:\w+, but the published file has md5:68d2"
    ):
        make(tmp_path, split_file=split_file(tmp_path)).class_splits()
    assert not list((tmp_path / "cache").glob("omniglot-*[!k]"))


def test_a_truncated_archive_leaves_no_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(omniglot, "CHECKSUMS", dict.fromkeys(FULL, ""))
    write_alphabets(tmp_path / "data", FULL)
    archive = tiny_data.zipped(tmp_path / "data" / FULL[0], tmp_path / "data" / f"{FULL[0]}.zip")
    archive.write_bytes(archive.read_bytes()[:5000])
    with pytest.raises(DataError, match=r"Archive .*images_background\.zip is truncated or damaged"):
        make(tmp_path, split_file=split_file(tmp_path)).class_splits()
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".lock"]


def test_missing_data_shows_the_tree_and_the_way_to_get_it(tmp_path):
    with pytest.raises(
        DataError, match=r"no images_background or (.|\n)*data\.download=true fetches(.|\n)*ROOT/images_evaluation"
    ):
        make(tmp_path).prepare_data()


def test_missing_drawings_and_characters_are_named(tmp_path):
    write_alphabets(tmp_path / "data", FULL)
    with pytest.raises(DataError, match=r"Class .* of the published split omniglot_vinyals is no character of"):
        make(tmp_path).class_splits()
    own = split_file(tmp_path)
    text = "# images: train 10\n" + (tmp_path / "own.csv").read_text()
    (tmp_path / "own.csv").write_text(text)
    with pytest.raises(
        DataError, match=r"data has 9 images of the classes that own names for train, but 10 are published"
    ):
        make(tmp_path, split_file=own).class_splits()
    (tmp_path / "data" / FULL[1] / "Angelic" / "character02" / "0002_01.png").write_bytes(b"no image")
    split_file(tmp_path)
    with pytest.raises(DataError, match=r"Angelic/character02/0002_01\.png cannot be read"):
        make(tmp_path, split_file=own).class_splits()
    with pytest.raises(ConfigError, match=r"data\.channels must be 1"):
        make(tmp_path, channels=2)
