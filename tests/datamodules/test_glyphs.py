"""The rendered letters: splits by script, no look-alikes across splits, a cache that survives damage."""

import os
import unicodedata

import numpy as np
import pytest

from datamodules import glyphs
from datamodules.glyphs import FACES, Glyphs, read_cache


@pytest.fixture(scope="module")
def data():
    module = Glyphs()
    module.prepare_data()
    module.setup()
    return module


def test_each_split_has_its_scripts_alone_and_enough_classes(data):
    splits = data.class_splits()
    for split, scripts in (("train", {"LATIN", "GREEK", "CYRILLIC"}), ("val", {"GEORGIAN"}), ("test", {"ARMENIAN"})):
        letters = [chr(int(name[2:], 16)) for name in splits[split]]
        assert {unicodedata.name(letter).split(" ")[0] for letter in letters} == scripts
    sizes = {split: len(classes) for split, classes in splits.items()}
    assert sizes["train"] > 300
    assert min(sizes["val"], sizes["test"]) >= 40  # 20-way tasks must be possible.


def test_images_are_ink_on_black_and_differ_within_a_class(data):
    for classes in data.class_splits().values():
        for name, images in classes.items():
            assert images.dtype == np.uint8
            assert images.shape[1:] == (1, 28, 28)
            assert len(images) >= 24
            assert images.max() > 150, name
            assert images[:, :, [0, -1]].mean() < 40, f"{name} is cut off at the border"
            assert len({image.tobytes() for image in images}) == len(images)


def test_no_test_letter_looks_like_a_training_letter():
    # Independent of the module's own comparison: the plain letters, cropped and scaled to fill 16x16, as bitmaps.
    def bitmap(letter):
        drawing = glyphs.draw(letter, "DejaVuSans.ttf")
        return np.asarray(drawing.crop(drawing.getbbox()).resize((16, 16))) > 127

    splits = glyphs.letters_of_splits()  # Not from the cache: it may be older than the code.
    train, test = (np.stack([bitmap(letter).ravel() for letter in splits[split]]) for split in ("train", "test"))
    assert (train[:, None] != test[None]).mean(-1).min() > 0.02
    # Without the dropping, Armenian letters would equal Latin ones.
    assert (bitmap("o") != bitmap("օ")).mean() < 0.02
    assert "օ" not in splits["test"]


def test_rendering_is_deterministic():
    assert np.array_equal(glyphs.render_class("Ж"), glyphs.render_class("Ж"))
    assert len(glyphs.render_class("Ж")) == len(FACES) * glyphs.MAPS_PER_FACE


def test_the_cache_is_written_read_and_repaired(tmp_path, monkeypatch):
    small = {"train": {"U+0041": np.ones((2, 1, 28, 28), np.uint8)}, "val": {}, "test": {}}
    calls = []
    monkeypatch.setattr(glyphs, "render_splits", lambda: calls.append(1) or small)
    module = Glyphs(cache_dir=str(tmp_path / "new"))
    before = os.umask(0o027)
    try:
        module.prepare_data()
    finally:
        os.umask(before)
    assert module.cache_file.stat().st_mode & 0o777 == 0o640, "others may share the folder"
    assert len(calls) == 1
    assert np.array_equal(module.class_splits()["train"]["U+0041"], small["train"]["U+0041"])
    module.prepare_data()
    assert len(calls) == 1, "the cache must be used"
    assert [path.suffix for path in (tmp_path / "new").iterdir()] == [".npz"], "no temporary file may stay"
    for damage in (b"", b"not a zip file", module.cache_file.read_bytes()[:200]):
        module.cache_file.write_bytes(damage)
        assert read_cache(module.cache_file) is None
        module.prepare_data()
        assert read_cache(module.cache_file) is not None
    assert len(calls) == 4


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    small = {"train": {"U+0041": np.ones((2, 1, 28, 28), np.uint8)}, "val": {}, "test": {}}
    monkeypatch.setattr(glyphs, "render_splits", lambda: small)
    module = Glyphs(cache_dir=str(tmp_path / "file" / "cache"))
    module.prepare_data()
    assert "U+0041" in module.class_splits()["train"]
