"""Folders of images: both layouts, every image mode, and each kind of bad input."""

import csv
import io
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image

from datamodules import image_folder
from datamodules.files.any_image import as_pil
from datamodules.files.decoding import Format, Item, decode
from datamodules.files.storage import cache_folder
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
    lines = (REPOSITORY / "conf" / "splits" / "omniglot_small.csv").read_text().splitlines()
    rows = list(csv.DictReader(line for line in lines if not line.startswith("#")))
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


def test_paths_that_can_be_none_are_named_by_their_key():
    with pytest.raises(ConfigError, match=r"data\.root=~nobody-of-that-name/x: "):
        make("~nobody-of-that-name/x")
    with pytest.raises(ConfigError, match=r"data\.split_file must be a path, but got ''"):
        make("images", split_file="")
    with pytest.raises(ConfigError, match=r"data\.cache_dir=~nobody-of-that-name: "):
        cache_folder("~nobody-of-that-name")


def test_missing_split_folders_are_named(folders):
    (folders / "test").rename(folders / "tset")
    with pytest.raises(ConfigError, match="no folder test"):
        make(folders)


def spoil(file, how):
    """Put something that cannot be used in the place of an image."""
    whole = file.read_bytes()
    if how in ("16 bits", "floats"):
        deep = np.linspace(0, 60000, 100).reshape(10, 10).astype(np.uint16 if how == "16 bits" else np.float32)
        Image.fromarray(deep).save(file, "PNG" if how == "16 bits" else "TIFF")
    elif how == "too large":
        header = np.array([40, 10**6, 10**6, 1 + (24 << 16), 0, 0, 0, 0, 0, 0], dtype="<u4").tobytes()
        file.write_bytes(b"BM" + np.array([10**6, 0, 54], dtype="<u4").tobytes() + header)
    else:
        file.write_bytes({"empty": b"", "text": b"no image", "cut": whole[: len(whole) // 2]}[how])


@pytest.mark.parametrize("how", ["empty", "text", "cut", "too large", "16 bits", "floats"])
def test_an_unreadable_image_is_named(folders, how):
    spoil(folders / "val" / "val_1" / "2.png", how)
    with pytest.raises(DataError, match=r"val_1/2\.png cannot be read \(.+\)\. Replace or remove it"):
        make(folders)


def test_hidden_files_and_folders_are_passed_over(folders):
    before = make(folders).draw("test", 0, 0)
    for split in ("train", "test"):
        (folders / split / ".ipynb_checkpoints").mkdir()
    (folders / "test" / ".DS_Store").write_bytes(b"x")
    (folders / "test" / "test_0" / "._0.png").write_bytes(b"x")
    assert torch.equal(make(folders).draw("test", 0, 0).query_x, before.query_x)


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_split_without_classes_is_named(folders, split, tmp_path):
    (folders / split).rename(tmp_path / "away")
    (folders / split).mkdir()
    with pytest.raises(ConfigError, match=rf"images/{split} has no classes"):
        make(folders)
    other = {"train": "test", "test": "train"}[split]
    (tmp_path / "split.csv").write_text(f"split,class\n{other},{other}/{other}_0\n")
    with pytest.raises(ConfigError, match=rf"split\.csv has no classes to {split} on"):
        make(folders, split_file=str(tmp_path / "split.csv"))


def test_a_split_file_of_a_spreadsheet_is_read(folders, tmp_path):
    lines = [f"{split},{split}/{split}_{k}" for split in ("train", "val", "test") for k in range(3)]
    (tmp_path / "split.csv").write_text("\n".join(["split,class", *lines]), encoding="utf-8-sig")
    assert make(folders, split_file=str(tmp_path / "split.csv")).class_count("val") == 3


def test_an_empty_image_is_named(folders):
    (folders / "train" / "train_0" / "1.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"train_0/1\.png cannot be read"):
        make(folders)


def test_an_empty_class_is_named(folders):
    (folders / "test" / "nothing").mkdir()
    with pytest.raises(DataError, match="nothing is empty"):
        make(folders)
    for name in ("a.txt", "b.txt"):
        (folders / "test" / "nothing" / name).touch()
    with pytest.raises(DataError, match=r"nothing holds no images .* but files \(a\.txt, b\.txt\)\. Remove it"):
        make(folders)


def test_a_class_that_holds_folders_alone_is_told_so(folders):
    write_classes(folders / "test" / "birds", ["crane", "finch"])
    with pytest.raises(
        DataError, match=r"birds holds no images .* but folders \(crane, finch\)\. Put its images into it"
    ):
        make(folders)


@pytest.mark.parametrize(
    ("extension", "kind", "mode"),
    [(".jfif", "JPEG", "RGB"), (".pnm", "PPM", "RGB"), (".pbm", "PPM", "1"), (".JPEG", "JPEG", "RGB")],
)
def test_images_of_rarer_extensions_are_read(folders, extension, kind, mode):
    for file in (folders / "test").rglob("*.png"):
        Image.open(file).convert(mode).save(file.with_suffix(extension), kind)
        file.unlink()
    assert make(folders).class_sizes("test") == {f"test_{k}": 4 for k in range(3)}


def test_what_is_passed_over_is_counted(folders, tmp_path):
    def notes(**settings):
        return ImageFolder(root=str(folders), ways=2, queries=2, **settings).survey().notes

    assert notes() == []
    for file in ("train/train_0/a.HEIC", "test/test_1/b.heic", "test/test_1/notes.txt", "val/val_1/LICENSE"):
        (folders / file).touch()
    (folders / "test" / "test_1" / ".DS_Store").touch()
    write_classes(folders / "train" / "train_1", ["more", "most"])
    files, inner = notes()
    assert files.startswith(
        "Files passed over in class folders: 2 .heic, 1 .txt, 1 without extension. Images are .png,"
    )
    assert inner == "Folders passed over in class folders: 2, the first train/train_1/more."
    (folders / "test" / "test_2" / "0.png").write_bytes(b"")
    assert notes() == [files, inner], "though an image cannot be read"
    lines = ["train,train/train_1", "train,train/train_1/more", "test,train/train_1/most"]
    (tmp_path / "split.csv").write_text("\n".join(["split,class", *lines]))
    assert notes(split_file=str(tmp_path / "split.csv")) == [], "they are classes"


def test_files_beside_class_folders_are_told_of(folders):
    shutil.copy(folders / "train" / "train_0" / "0.png", folders / "train" / "lost.png")
    (folders / "test" / "notes.txt").touch()
    (folders / "val" / ".DS_Store").touch()
    (folders / "README").touch()
    (note,) = ImageFolder(root=str(folders), ways=2, queries=2).survey().notes
    assert note == f"Files beside class folders, of no class and passed over: 2, the first {Path('test/notes.txt')}."


@pytest.mark.parametrize("link", ["train/train_9", "val"])
def test_a_link_that_leads_nowhere_is_named(folders, link):
    if link == "val":
        (folders / "val").rename(folders / "other")
    (folders / link).symlink_to(folders / "gone")
    message = rf"{link} is a link to .*gone, which is not there\. Restore it, or remove the link"
    with pytest.raises(DataError, match=message):
        make(folders)
    (finding,) = ImageFolder(root=str(folders), ways=2, queries=2).survey().findings
    assert re.search(message, finding)


def oriented(orientation):
    """The bytes of a photograph whose camera noted how it was held."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    target = io.BytesIO()
    Image.fromarray(UPRIGHT).save(target, "JPEG", quality=95, exif=exif)
    return target.getvalue()


UPRIGHT = np.zeros((16, 16, 3), dtype=np.uint8)
UPRIGHT[:8, :8], UPRIGHT[:8, 8:], UPRIGHT[8:, :8] = 250, 170, 90


@pytest.mark.parametrize("cached_from", [1, 1000])
def test_photographs_are_turned_as_their_camera_noted(folders, tmp_path, monkeypatch, cached_from):
    monkeypatch.setattr(image_folder, "CACHED_FROM", cached_from)
    turns = {1: 0, 3: 2, 6: 3, 8: 1}
    (folders / "test" / "photographs").mkdir()
    for orientation in turns:
        (folders / "test" / "photographs" / f"{orientation}.jpg").write_bytes(oriented(orientation))
    Image.fromarray(UPRIGHT).save(folders / "test" / "photographs" / "damaged.png", exif=b"no EXIF at all")
    data = make(folders, image_size=16, cache_dir=str(tmp_path / "cache"))
    images = np.asarray(data.class_splits()["test"]["photographs"], dtype=int)
    for image, turn in zip(images, (*turns.values(), 0), strict=True):
        assert abs(image.transpose(1, 2, 0) - np.rot90(UPRIGHT, turn).astype(int)).max() < 20
    assert np.array_equal(decode(Item(oriented(6)), Format(16, 3)), images[0]), "published sets are read as they lie"


def test_a_class_shared_by_train_and_test_is_named(folders):
    (folders / "test" / "test_0").rename(folders / "test" / "train_0")
    with pytest.raises(DataError, match="'train_0' of the test split is also in the train split"):
        make(folders)


def test_a_split_file_naming_an_unknown_class_gets_the_nearest(folders, tmp_path):
    (tmp_path / "split.csv").write_text("split,class\ntrain,train/train_0\ntest,test/tset_1\n")
    with pytest.raises(DataError, match=r"'test/tset_1'.*Did you mean 'test/test_1'"):
        make(folders, split_file=str(tmp_path / "split.csv"))


@pytest.mark.parametrize(
    "text", ["", "a,b\n1,2\n", "split,class\ntrian,train/train_0\n", "split,class\ntrain\n", "split,class\ntrain,\n"]
)
def test_a_bad_split_file_is_named(folders, tmp_path, text):
    (tmp_path / "split.csv").write_text(text)
    with pytest.raises(ConfigError, match=r"data\.split_file=.*split\.csv"):
        make(folders, split_file=str(tmp_path / "split.csv"))
    with pytest.raises(ConfigError, match=r"data\.split_file=.*cannot be read"):
        make(folders, split_file=str(tmp_path / "missing.csv"))


def test_a_large_folder_goes_through_the_cache_and_gives_the_same_tasks(folders, monkeypatch, tmp_path):
    settings = {"cache_dir": str(tmp_path / "cache")}
    plain = make(folders, **settings)
    assert not (tmp_path / "cache").exists()
    monkeypatch.setattr(image_folder, "CACHED_FROM", 36)
    cached = make(folders, **settings)
    assert len(list((tmp_path / "cache").glob("imagefolder-*/train.npy"))) == 1
    assert cached.episode_ids() == plain.episode_ids()
    assert torch.equal(cached.draw("train", 3, 1).query_x, plain.draw("train", 3, 1).query_x)
    monkeypatch.setattr(image_folder, "CACHED_FROM", 37)
    make(folders, **{"cache_dir": str(tmp_path / "other")})
    assert not (tmp_path / "other").exists()


def test_a_cache_is_known_by_its_images_alone(folders, monkeypatch, tmp_path):
    monkeypatch.setattr(image_folder, "CACHED_FROM", 1)
    known = ImageFolder(root=str(folders)).made_from()
    place = folders / "train" / "train_0"
    (place / "notes.txt").write_text("a note")
    (place / "dangling.txt").symlink_to(tmp_path / "gone")
    (place / "loop").symlink_to(place)
    write_classes(place, ["more"])
    assert ImageFolder(root=str(folders)).made_from() == known
    assert make(folders, cache_dir=str(tmp_path / "cache")).class_sizes("train")["train_0"] == 4
    os.utime(place / "0.png", ns=(0, 0))
    assert ImageFolder(root=str(folders)).made_from() != known


@pytest.mark.parametrize("cached_from", [1, 1000])
def test_what_has_an_images_name_and_is_no_file_is_passed_over(folders, monkeypatch, tmp_path, cached_from):
    monkeypatch.setattr(image_folder, "CACHED_FROM", cached_from)
    os.mkfifo(folders / "train" / "train_0" / "pipe.png")
    (folders / "train" / "train_1" / "folder.png").mkdir()
    settings = {"root": str(folders), "cache_dir": str(tmp_path), "ways": 2, "queries": 2}
    data = ImageFolder(**settings)
    kinds, inner = data.survey().notes
    assert kinds.startswith("Files passed over in class folders: 1 .png that is no file.")
    assert inner == "Folders passed over in class folders: 1, the first train/train_1/folder.png."
    data.setup()
    assert set(data.class_sizes("train").values()) == {4}
    (folders / "train" / "train_0" / "gone.png").symlink_to(tmp_path / "gone")
    (finding,) = ImageFolder(**settings).survey().findings
    assert re.search(r"train_0/gone\.png is not there: .*a link to nothing", finding)


@pytest.mark.parametrize("cached_from", [1, 1000])
def test_class_names_may_have_any_letters_and_signs(tmp_path, monkeypatch, cached_from):
    monkeypatch.setattr(image_folder, "CACHED_FROM", cached_from)
    names = ["a, b", "été 字", "x=y[1]", "# no comment", "quote\"s'", "new\nline", "train"]
    write_classes(tmp_path / "all" / "train", names, seed=1)
    write_classes(tmp_path / "all" / "test", [f"{name}!" for name in names], seed=2)
    data = make(tmp_path / "all", cache_dir=str(tmp_path / "cache"))
    assert data.class_count("train") == data.class_count("test") == len(names)
    assert set(data.class_splits()["train"]) == set(names)
    with (tmp_path / "split.csv").open("w", newline="", encoding="utf-8") as target:
        rows = [("train", f"train/{name}") for name in names] + [("test", f"test/{name}!") for name in names]
        csv.writer(target).writerows([("split", "class"), *rows])
    split = make(tmp_path / "all", split_file=str(tmp_path / "split.csv"), cache_dir=str(tmp_path / "cache"))
    assert set(split.class_splits()["test"]) == {f"test/{name}!" for name in names}


def test_a_class_name_that_is_no_text_is_named(folders):
    os.mkdir(os.fsencode(folders / "train") + b"/caf\xe9")
    with pytest.raises(DataError, match=r"train/caf\ufffd has a name that is not UTF-8"):
        make(folders)


def test_a_link_to_nowhere_is_named(folders, monkeypatch, tmp_path):
    monkeypatch.setattr(image_folder, "CACHED_FROM", 1)
    (folders / "test" / "test_1" / "gone.png").symlink_to(folders / "nowhere")
    with pytest.raises(DataError, match=r"test_1/gone\.png cannot be read: No such file"):
        make(folders, cache_dir=str(tmp_path / "cache"))


def test_all_unreadable_images_are_found(folders, tmp_path):
    for file in ("train/train_1/0.png", "test/test_2/3.png"):
        (folders / file).write_bytes(b"")
    data = ImageFolder(root=str(folders), cache_dir=str(tmp_path / "cache"))
    found = list(data.unreadable())
    assert [line.split("/images/")[1].split(" ")[0] for line in found] == ["train/train_1/0.png", "test/test_2/3.png"]
    assert not (tmp_path / "cache").exists()


def test_two_variants_whose_files_look_alike_have_caches_of_their_own(folders, monkeypatch, tmp_path):
    monkeypatch.setattr(image_folder, "CACHED_FROM", 1)
    other = tmp_path / "noisy"
    for file in sorted(folders.rglob("*.png")):
        target = (other / file.relative_to(folders)).with_suffix(".bmp")
        target.parent.mkdir(parents=True, exist_ok=True)
        image = Image.open(file)
        image.save(file.with_suffix(".bmp"))
        Image.fromarray(255 - np.asarray(image)).save(target)
        file.unlink()
        for written in (file.with_suffix(".bmp"), target):
            os.utime(written, (1e9, 1e9))
    first, second = (make(root, cache_dir=str(tmp_path / "cache")) for root in (folders, other))
    assert len(list((tmp_path / "cache").glob("imagefolder-*/train.npy"))) == 2
    difference = (255 - first.draw("test", 0, 0).query_x.int()) - second.draw("test", 0, 0).query_x.int()
    assert difference.abs().max() <= 1, "resizing rounds"


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_what_is_transparent_is_white(tmp_path, mode):
    drawn = np.zeros((8, 8, 4), dtype=np.uint8)
    drawn[2:5, 2:5, 3] = 255  # A black square whose shape is in alpha alone.
    image = Image.fromarray(drawn).convert("LA" if mode == "LA" else "RGBA")
    if mode == "P":
        image = Image.fromarray(np.where(drawn[..., 3] == 255, 0, 1).astype(np.uint8), "P")
        image.putpalette([0, 0, 0, 0, 0, 0])
        image.info["transparency"] = 1
    image.save(tmp_path / "x.png")
    expected = np.where(drawn[..., 3] == 255, 0, 255)
    for channels in (1, 3):
        assert np.array_equal(decode(Item(tmp_path / "x.png"), Format(8, channels))[0], expected)
        assert np.array_equal(np.asarray(as_pil(Image.open(tmp_path / "x.png")).convert("L")), expected)


@pytest.mark.parametrize("name", ["validation", "valid", "Val", "dev"])
def test_a_misspelt_validation_folder_is_named(folders, name):
    (folders / "val").rename(folders / name)
    with pytest.raises(ConfigError, match=f"has the folder {name}, but validation is val"):
        make(folders)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody who may not read")
@pytest.mark.parametrize("place", [".", "train", "train/train_1"])
def test_a_folder_that_may_not_be_read_is_named(folders, place, monkeypatch):
    for path in (folders, *folders.parents):
        monkeypatch.chdir("/")
        path.chmod(path.stat().st_mode | 0o055)
    (folders / place).chmod(0)
    try:
        os.seteuid(65534)
        with pytest.raises(DataError, match=r"cannot be read: Permission denied"):
            make(folders)
    finally:
        os.seteuid(0)
        (folders / place).chmod(0o755)


def test_a_missing_class_is_named_though_another_lies_behind_a_link(folders, tmp_path):
    (tmp_path / "linked").symlink_to(folders / "train")
    (tmp_path / "split.csv").write_text("split,class\ntrain,linked/train_0\ntest,images/test/tset_1\n")
    with pytest.raises(DataError, match=r"names class 'images/test/tset_1'"):
        make(tmp_path, split_file=str(tmp_path / "split.csv"))


@pytest.mark.parametrize("away", [("train", "val"), ("train",)])
def test_a_root_without_train_is_a_data_set_to_test_on(folders, away):
    expected = make(folders).draw("test", 0, 0)
    for split in away:
        (folders / split).rename(folders.parent / split)
    data = make(folders)
    assert not data.has_split("train")
    assert torch.equal(data.draw("test", 0, 0).query_x, expected.query_x)
    (folders / "tarin").mkdir()  # Whoever has misspelt train wants to know.
    with pytest.raises(ConfigError, match=r"has no folder train\."):
        make(folders)
