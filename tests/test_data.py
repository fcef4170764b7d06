"""`lightning-ntk data`: what it prints, what it finds, what it writes."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from PIL import Image
from torch.utils.data import Dataset

from datamodules.base import EpisodicDataModule
from lightning_ntk import cli
from lightning_ntk.episode import Episode, TaskSpec
from lightning_ntk.episode_picture import draw_episodes
from lightning_ntk.settings.config import conf_folder, groups

FOLDER = ["data=image_folder", "data.root=images", "data.image_size=16", "data.ways=3", "data.queries=4"]


@pytest.fixture
def images():
    """Three splits of three classes of six images; train has a fourth."""
    rng = np.random.default_rng(0)
    for split, classes in (("train", 4), ("val", 3), ("test", 3)):
        for k in range(classes):
            folder = Path("images") / split / f"{split}_{k}"
            folder.mkdir(parents=True)
            for number in range(6):
                Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    return Path("images")


def colours(file):
    return set(map(tuple, np.asarray(Image.open(file).convert("RGB")).reshape(-1, 3).tolist()))


def survey(capsys, *words, status=0):
    assert cli.main(["data", *words, "out=seen"]) == status
    output = capsys.readouterr()
    content = json.loads(Path("seen/data.json").read_text())
    shown = output.out
    assert all(line.encode(errors="replace").decode() in shown for line in content["findings"] + content["notes"])
    return content, output


def test_the_table_and_the_picture(images, capsys):
    content, output = survey(capsys, *FOLDER)
    assert content["findings"] == []
    assert [(row["split"], row["classes"], row["images"]) for row in content["splits"]] == [
        ("train", 4, 24),
        ("val", 3, 18),
        ("test", 3, 18),
    ]
    assert {(row["height"], row["width"], row["channels"], row["its images"]) for row in content["splits"]} == {
        (16, 16, 3, 6)
    }
    assert "train_0" in output.out
    assert len(colours("seen/episodes.png")) > 5000, "images of random pixels are there"


@pytest.mark.parametrize(("shots", "queries"), [(1, 2), (1, 15), (8, 15)])
def test_a_picture_has_no_empty_bands_and_says_what_it_leaves_out(tmp_path, shots, queries, monkeypatch):
    rng = np.random.default_rng(0)

    def of(each):
        images = torch.from_numpy(rng.integers(0, 200, (5 * each, 1, 12, 12), dtype=np.uint8))
        return images, torch.arange(5).repeat_interleave(each)

    titles = []
    plain = Axes.set_title
    monkeypatch.setattr(Axes, "set_title", lambda axis, text, **how: (titles.append(text), plain(axis, text, **how)))
    episode = Episode(*of(shots), *of(queries), torch.tensor(0))
    draw_episodes(tmp_path / "episodes.png", [(f"test, episode {k}", episode) for k in range(3)])
    pixels = np.asarray(Image.open(tmp_path / "episodes.png").convert("L"))
    blank = "".join("." if row.min() == 255 else "x" for row in pixels)
    assert max(map(len, blank.split("x"))) < 30
    assert len(pixels) < 3 * 110 * 4.2, "an image is at most 0.7 inches high"
    left_out = ", up to 5 and 10 of a class shown" if queries > 10 else ""
    assert titles[2] == f"test, episode 2: {5 * shots} support, {5 * queries} query{left_out}"


@pytest.mark.parametrize("data", ["sinusoid", "fourier"])
def test_functions_are_drawn(data, capsys):
    content, _ = survey(capsys, f"data={data}")
    assert content == {"data": data, "splits": [], "findings": [], "notes": []}
    assert {(31, 119, 180), (255, 127, 14)} <= colours("seen/episodes.png"), "queries and support points"


@pytest.mark.parametrize("shape", [(4,), (1,), (2, 3), (2, 5, 5)])
@pytest.mark.parametrize("kind", ["classification", "regression"])
def test_vectors_and_what_else_is_no_image_are_points(shape, kind, tmp_path):
    torch.manual_seed(0)
    y = torch.arange(3).repeat(4) if kind == "classification" else torch.randn(12, 2)
    episode = Episode(torch.randn(12, *shape), y, torch.randn(12, *shape), y, torch.tensor(0))
    draw_episodes(tmp_path / "episodes.png", [("test, episode 0", episode)])
    found = colours(tmp_path / "episodes.png")
    of_classes = {(31, 119, 180), (255, 127, 14), (44, 160, 44)}
    assert of_classes <= found if kind == "classification" else {(31, 119, 180), (255, 127, 14)} <= found


def test_images_of_floats_look_like_those_of_bytes(tmp_path):
    x, y = torch.randint(0, 256, (6, 3, 8, 8), dtype=torch.uint8), torch.arange(3).repeat(2)
    for name, images in (("bytes", x), ("floats", x / 255 + 1e-4)):
        draw_episodes(tmp_path / f"{name}.png", [("it", Episode(images, y, images, y, torch.tensor(0)))])
    assert (tmp_path / "bytes.png").read_bytes() == (tmp_path / "floats.png").read_bytes()


class Blobs(EpisodicDataModule):
    spec = TaskSpec("classification", (4,), 3)

    def __init__(self, *, first=0):
        super().__init__()
        self.first = first

    def task_settings(self):
        return {"data": "Blobs"}

    def draw(self, split, epoch, index):
        x, y = torch.from_numpy(self.rng(split, epoch, index).normal(size=(12, 4))), torch.arange(12) % 3 + self.first
        return Episode(x[:6], y[:6], x[6:], y[6:], torch.tensor(index))


def test_a_data_set_of_vectors_has_a_picture_and_what_is_wrong_with_it_a_line(capsys, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    (tmp_path / "conf" / "data").mkdir(parents=True)
    (tmp_path / "conf" / "data" / "blobs.yaml").write_text("# Mine.\n_target_: test_data.Blobs\nfirst: 0\n")
    words = ["--config-dir", str(tmp_path / "conf"), "data=blobs"]
    content, _ = survey(capsys, *words)
    assert content == {"data": "blobs", "splits": [], "findings": [], "notes": []}
    assert Path("seen/episodes.png").exists()
    content, _ = survey(capsys, *words, "data.first=1", status=2)
    assert [line.partition(" of Blobs ")[0] for line in content["findings"]] == [
        f"Episode 0 of the {split} split" for split in ("train", "val", "test")
    ]
    assert not Path("seen/episodes.png").exists()


def test_images_that_splits_share_are_found_and_the_picture_is_drawn(images, capsys):
    for number in (1, 3):
        shutil.copy(images / "train" / "train_2" / f"{number}.png", images / "test" / "test_1" / f"{number}.png")
    content, output = survey(capsys, *FOLDER, status=2)
    assert content["findings"] == [
        "Class 'test_1' of the test split is also in the train split, as 'train_2': 2 of its 6 images are there."
    ]
    assert output.err == "lightning-ntk: 1 thing is wrong with data=image_folder, listed above.\n"
    assert Path("seen/episodes.png").exists()
    allowed, output = survey(capsys, *FOLDER, "data.allow_shared_images=true")
    note = f"{content['findings'][0]} (Allowed here, by data.allow_shared_images.)"
    assert (allowed["findings"], allowed["notes"]) == ([], [note])
    assert f"Not wrong, but to be known:\n{note}\n" in output.out


def test_classes_of_a_split_that_are_the_same_are_told_of(images, capsys):
    (images / "train" / "train_9").symlink_to(Path("train_2"))
    shutil.copy(images / "train" / "train_2" / "1.png", images / "train" / "train_0" / "1.png")
    for number in (2, 5):
        shutil.copy(images / "test" / "test_0" / f"{number}.png", images / "test" / "test_2" / f"{number}.png")
    content, _ = survey(capsys, *FOLDER)
    assert content["notes"] == [
        "Class 'train_9' of the train split is also there as 'train_2': 6 of its 6 images are the same. 2 more pairs "
        "or groups of its classes share images.",
        "Class 'test_2' of the test split is also there as 'test_0': 2 of its 6 images are the same.",
    ]


def test_images_that_a_class_holds_twice_are_told_of(images, capsys):
    for number in (2, 5):
        shutil.copy(images / "val" / "val_0" / "1.png", images / "val" / "val_0" / f"{number}.png")
    for name, pairs in (("train_1", ((0, 1),)), ("train_3", ((0, 1), (2, 3)))):
        for first, second in pairs:
            shutil.copy(images / "train" / name / f"{first}.png", images / "train" / name / f"{second}.png")
    content, _ = survey(capsys, *FOLDER)
    assert content["notes"] == [
        "Class 'train_3' of the train split has 2 images that are there more than once. Other classes of this split "
        "that have such: 1.",
        "Class 'val_0' of the val split has 1 image that is there more than once.",
    ]


def test_files_that_are_passed_over_are_told_of(images, capsys):
    for name in ("a.heic", "b.heic", "c.txt"):
        (images / "val" / "val_1" / name).touch()
    content, output = survey(capsys, *FOLDER)
    assert content["notes"][0].startswith("Files passed over in class folders: 2 .heic, 1 .txt. ")
    assert "Not wrong, but to be known:\nFiles passed over" in output.out


def test_classes_too_small_for_the_task_have_a_line_each(images, capsys):
    for split, name in (("train", "train_1"), ("train", "train_3"), ("test", "test_2")):
        (images / split / name / "5.png").unlink()
    content, output = survey(capsys, *FOLDER, "data.shots=2", status=2)
    lines = [line.partition("class ")[2].partition(" of")[0] for line in content["findings"]]
    assert lines == ["'train_1'", "'train_3'", "'test_2'"]
    assert "3 things are wrong" in output.err
    assert not Path("seen/episodes.png").exists(), "there is no such episode"
    content, _ = survey(capsys, *FOLDER, "data.ways=5", "data.eval_ways=3", status=2)
    assert "data.ways=5 classes are asked of an episode, but the train split has 4" in content["findings"][0]


def test_a_long_list_is_cut_on_the_screen_and_whole_in_the_file(images, capsys, monkeypatch):
    monkeypatch.setattr("lightning_ntk.data.MOST_LINES", 2)
    assert cli.main(["data", *FOLDER, "data.shots=3", "out=seen"]) == 2
    output = capsys.readouterr().out
    assert output.count("need 7 images of a class") == 2
    assert "... and 8 more, in data.json" in output
    assert len(json.loads(Path("seen/data.json").read_text())["findings"]) == 10


def test_an_unreadable_image_is_a_line(images, capsys):
    (images / "val" / "val_1" / "2.png").write_bytes(b"no image")
    content, _ = survey(capsys, *FOLDER, status=2)
    assert len(content["findings"]) == 1
    assert "val_1/2.png cannot be read" in content["findings"][0]
    (images / "train" / "empty").mkdir()
    os.rename(images / "val" / "val_1" / "2.png", os.fsencode(images / "val" / "val_1") + b"/\xe9.png")
    content, _ = survey(capsys, *FOLDER, "data.cache_dir=/dev/null/x", status=2)
    first, second = content["findings"]
    assert "Class folder images/train/empty is empty, hidden files apart. Remove it" in first
    assert "val_1/?.png cannot be read" in second.encode(errors="replace").decode()


class Broken(Dataset):
    targets = tuple(range(6)) * 8

    def __len__(self):
        return 48

    def __getitem__(self, number):
        if number in (5, 17):
            raise OSError("cut short")
        return np.full((8, 8), number * 5, dtype=np.uint8), number % 6


def test_every_unreadable_item_of_a_dataset_is_a_line(capsys, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    content, _ = survey(capsys, "data=from_dataset", "data.dataset._target_=test_data.Broken", status=2)
    assert content["findings"] == [f"Item {k} of data.dataset cannot be read: cut short" for k in (5, 17)]


def Missing():
    raise OSError("no such folder")


def test_help_lists_the_data_sets_and_bad_words_are_one_line(capsys, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    assert cli.main(["data", "--help"]) == 0
    text = capsys.readouterr().out
    assert all(choice in text for choice in groups([conf_folder()])["data"])
    for words, message in (
        (["data=glyph"], "Did you mean 'glyphs'"),
        (["data.wayz=3"], "Did you mean 'data.ways'"),
        (["--outt"], "no option --outt"),
        (["data=image_folder"], "data.root is missing"),
        (["data=from_dataset"], "data.dataset must be a map-style dataset, with __getitem__ and __len__, but is null"),
        (["data=from_dataset", "data.dataset._target_=torch.nope"], "Error locating target 'torch.nope'"),
        (["data=from_dataset", "data.dataset._target_=test_data.Missing"], ": data.dataset: Error in call to target"),
        (["data=from_dataset", "data.dataset._target_=test_data.Missing"], "no such folder"),
        (["data=sinusoid", "out=file/folder"], "out=file/folder cannot be written"),
        (["data=sinusoid", "out="], "out must be a path, but got ''"),
    ):
        Path("file").touch()
        assert cli.main(["data", *words]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.startswith("lightning-ntk: ")
        assert error.count("\n") == 1 or "data.root" in message
    assert cli.main(["data", "data=sinusoid", "--cfg"]) == 0
    assert "datamodules.sinusoid.Sinusoid" in capsys.readouterr().out


def test_a_reader_who_has_gone_is_no_folder_that_cannot_be_written(capsys, monkeypatch):
    monkeypatch.setattr("lightning_ntk.data.write_picture", lambda *_: False)
    read, write = os.pipe()
    os.close(read)
    with open(write, "w", buffering=1) as unread:
        monkeypatch.setattr("sys.stdout", unread)
        assert cli.main(["data", "data=sinusoid", "out=seen"]) == 1
    assert capsys.readouterr().err == ""
    assert Path("seen/data.json").exists()


def test_data_for_testing_alone_have_one_split(capsys):
    content, _ = survey(capsys, "data=digits")
    assert content["findings"] == []
    assert [(row["split"], row["classes"], row["images"]) for row in content["splits"]] == [("test", 10, 1797)]
    assert Path("seen/episodes.png").exists()
