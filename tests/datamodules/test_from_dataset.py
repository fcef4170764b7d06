"""Torch datasets as few-shot data: labels found unread, images of every kind, and each kind of bad input."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import ConcatDataset, Dataset, Subset, TensorDataset

from datamodules.files.any_image import as_pil, describe
from datamodules.from_dataset import FromDataset, read_labels, split_by_fractions
from lightning_ntk.errors import ConfigError, DataError


class Labelled(Dataset):
    """Eight classes of six 10x10 RGB images; reading one is counted."""

    def __init__(self, attribute="targets", convert=lambda pixels: pixels, labels=None):
        self.pixels = np.random.default_rng(0).integers(0, 256, (48, 10, 10, 3), dtype=np.uint8)
        self.convert = convert
        self.read = []
        setattr(self, attribute, [number % 8 for number in range(48)] if labels is None else labels)

    def __len__(self):
        return 48

    def __getitem__(self, number):
        self.read.append(number)
        return self.convert(self.pixels[number]), number % 8


def make(dataset, **settings):
    data = FromDataset(dataset=dataset, **{"ways": 2, "queries": 2, "fractions": [0.5, 0.25, 0.25], **settings})
    data.setup()
    return data


def test_classes_are_split_and_every_image_is_read_once():
    dataset = Labelled()
    data = make(dataset)
    assert {split: data.class_count(split) for split in ("train", "val", "test")} == {"train": 4, "val": 2, "test": 2}
    names = [name for split in ("train", "val", "test") for name in data.class_sizes(split)]
    assert sorted(names) == [str(label) for label in range(8)]
    assert sorted(dataset.read) == list(range(48))
    own = {image.tobytes() for label in data.class_sizes("test") for image in dataset.pixels[int(label) :: 8]}
    task = data.draw("test", 0, 0)
    assert task.support_x.shape == (2, 3, 10, 10)
    assert all(image.permute(1, 2, 0).contiguous().numpy().tobytes() in own for image in task.query_x)


PIXELS = np.random.default_rng(1).integers(0, 256, (10, 12, 3), dtype=np.uint8)
GREY = PIXELS[..., 0]


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (Image.fromarray(PIXELS), PIXELS),
        (Image.fromarray(PIXELS).convert("RGBA"), PIXELS),
        (Image.fromarray(GREY), GREY),
        (Image.fromarray(GREY).convert("P"), None),
        (PIXELS, PIXELS),
        (PIXELS.transpose(2, 0, 1), PIXELS),
        (GREY, GREY),
        (GREY[..., None], GREY),
        (GREY[None], GREY),
        (GREY > 127, (GREY > 127) * np.uint8(255)),
        (PIXELS / 255, PIXELS),
        (1.001 * (PIXELS / 255) - 0.0005, PIXELS),  # As resizing and rounding leave them.
        (PIXELS.astype(np.int64), PIXELS),
        (torch.from_numpy(PIXELS).permute(2, 0, 1), PIXELS),
        (torch.from_numpy(PIXELS).permute(2, 0, 1).float() / 255, PIXELS),
        (torch.from_numpy(GREY), GREY),
        (torch.from_numpy(GREY)[None].double() / 255, GREY),
    ],
)
def test_images_of_every_kind_are_read(image, expected):
    found = np.asarray(as_pil(image))
    assert found.shape[:2] == (10, 12)
    if expected is not None:
        assert np.array_equal(found, expected)


def test_a_shape_that_can_be_read_both_ways_is_read_as_its_kind_has_it():
    low = PIXELS[:3, :4]  # [3, 4, 3]
    assert np.array_equal(np.asarray(as_pil(low)), low)
    assert np.array_equal(np.asarray(as_pil(torch.from_numpy(low))), low.transpose(1, 2, 0))


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (PIXELS / 100, "its values go from 0 to 2.5.*data.normalize=true"),
        (PIXELS.astype(np.float32), r"its values go from 0 to 255; .* Divide them by 255, or give bytes \(uint8\)"),
        (PIXELS / 255 * 1.01, "its values go from 0 to 1.01;"),
        (PIXELS / 255 - 0.01, "its values go from -0.01 to 0.99;"),
        (torch.zeros(4, 10, 10), r"its shape \(4, 10, 10\) has 4 channels; 1 or 3 are expected .*PIL.*class_splits"),
        (np.zeros((4, 10, 10), np.uint8), r"its shape \(4, 10, 10\) has 4 channels"),
        (np.zeros((10, 10, 4), np.uint8), r"its shape \(10, 10, 4\) has 4 channels"),
        (torch.randn(3, 10, 10), "Leave a normalisation out"),
        (PIXELS.astype(np.int64) * 300, "are none of 8 bits"),
        (np.zeros((10, 10, 2), np.uint8), r"its shape \(10, 10, 2\) is none"),
        (np.zeros((1, 3, 10, 10), np.uint8), r"its shape \(1, 3, 10, 10\)"),
        (np.zeros((0, 10), np.uint8), r"its shape \(0, 10\)"),
        (np.full((10, 10), np.nan), "its values go from nan"),
        (Image.fromarray(np.zeros((4, 4), np.uint16)), "more than 8 bits"),
        (torch.zeros(3, 10, 10, dtype=torch.bfloat16), "numpy has no equal of .*BFloat16.*float32"),
        ("cat.png", "it is str; expected a PIL image"),
        ({"label": 3}, "it is a dict without image"),
    ],
)
def test_what_is_no_image_is_named_with_its_number(image, message):
    with pytest.raises(DataError, match=rf"Item \d+ of data\.dataset cannot be read: .*{message}"):
        make(Labelled(convert=lambda _: image)) if not isinstance(image, dict) else make(Dicts(image))


class Dicts(Labelled):
    def __init__(self, item):
        super().__init__("labels")
        self.item = item

    def __getitem__(self, number):
        return {key: self.pixels[number] if value is None else value for key, value in self.item.items()}


def test_items_may_be_dicts_and_images_are_resized_and_made_grey():
    data = make(Dicts({"image": None, "label": 0}), image_size=8, channels=1)
    assert data.spec.input_shape == (1, 8, 8)
    assert make(Dicts({"image": None}), image_size=16).spec.input_shape == (3, 16, 16)


def test_images_of_different_sizes_need_a_size():
    sizes = iter([10, 10, 12] * 100)
    with pytest.raises(DataError, match=r"Item \d+ of data\.dataset .* is \(3, 12, 12\), but item .*data\.image_size"):
        make(Labelled(convert=lambda pixels: np.resize(pixels, (next(sizes),) * 2 + (3,)) * 1))
    sizes = iter([10, 10, 12] * 100)
    assert make(
        Labelled(convert=lambda pixels: np.resize(pixels, (next(sizes),) * 2 + (3,))), image_size=8
    ).spec.input_shape == (3, 8, 8)


# ---- labels --------------------------------------------------------------------------------------------------------

LABELS = [3, 1, 2, 1, 3, 3]


class Bare:
    def __init__(self, **attributes):
        self.__dict__.update(attributes)

    def __len__(self):
        return len(LABELS)

    def __getitem__(self, number):
        raise AssertionError("an item was read")


@pytest.mark.parametrize(
    ("dataset", "attribute"),
    [
        (Bare(targets=LABELS), None),
        (Bare(targets=torch.tensor(LABELS)), None),
        (Bare(labels=np.array(LABELS, dtype=np.uint8)), None),
        (Bare(_labels=tuple(LABELS)), None),
        (Bare(samples=[(f"{k}.png", label) for k, label in enumerate(LABELS)]), None),
        (Bare(_samples=[[Path(f"{k}.png"), label] for k, label in enumerate(LABELS)]), None),
        (Bare(imgs=[(np.zeros((8, 8), np.uint8), label) for label in LABELS]), None),
        (Bare(targets=[[label] for label in LABELS]), None),
        (Bare(targets=np.array(LABELS)[:, None]), None),
        (Bare(kinds=LABELS, targets=["a"] * 6), "kinds"),
        (TensorDataset(torch.zeros(6, 3, 8, 8), torch.tensor(LABELS)), None),
        (Subset(Bare(targets=[9, *LABELS]), list(range(1, 7))), None),
        (Subset(Subset(Bare(targets=[9, *LABELS, 9]), list(range(7))), [1, 2, 3, 4, 5, 6]), None),
        (ConcatDataset([Subset(Bare(targets=LABELS), [0, 1]), Subset(Bare(labels=LABELS), [2, 3, 4, 5])]), None),
    ],
)
def test_labels_are_read_without_an_item(dataset, attribute):
    assert read_labels(dataset, attribute).tolist() == LABELS


@pytest.mark.parametrize(
    ("dataset", "attribute", "message"),
    [
        (Bare(), None, "Bare has no targets or labels .*Set data.labels"),
        (Bare(kinds=LABELS), "kind", "Bare has no kind .*Did you mean 'kinds'"),
        (Bare(targets=["a", "b"] * 3), None, "targets must hold one whole number an item, but holds <U1"),
        (Bare(targets=[0.5] * 6), None, "but holds float64"),
        (Bare(targets=[True] * 6), None, "but holds bool"),
        (Bare(targets=np.eye(6, dtype=int)), None, r"of shape \(6, 6\)"),
        (Bare(targets=[[1, 2]] * 6), None, r"one whole number an item, but holds int64 of shape \(6, 2\)"),
        (Bare(targets=[(1, 2)] * 6), "targets", r"but holds int64 of shape \(6, 2\)"),
        (Bare(targets=[[]] * 6), None, "targets cannot be read as labels"),
        (Bare(targets=[[1, 2], [3]] * 3, labels=LABELS), "labels2", "has no labels2"),
        (Bare(targets=object()), None, "targets must hold"),
    ],
)
def test_labels_that_are_not_there_or_no_numbers_are_named(dataset, attribute, message):
    with pytest.raises(ConfigError, match=message):
        read_labels(dataset, attribute)


@pytest.mark.parametrize("dataset", [Subset(Labelled(), []), Subset(Subset(Labelled(), [1]), [])])
def test_a_dataset_without_items_is_named(dataset):
    with pytest.raises(ConfigError, match=r"data\.dataset=Subset must have items to draw from, but is empty"):
        make(dataset)


def test_as_many_labels_as_items_are_needed():
    with pytest.raises(ConfigError, match=r"Labelled has 48 items but 3 labels.*data\.labels"):
        make(Labelled(labels=[0, 1, 2]))


def test_classes_have_the_names_of_the_dataset():
    dataset = Labelled()
    dataset.classes = [f"kind {k}" for k in range(8)]
    assert all(name.startswith("kind ") for name in make(Subset(dataset, range(48))).class_sizes("train"))
    dataset.classes = [("kind", str(k)) for k in range(8)]
    assert all(name.startswith("kind, ") for name in make(dataset).class_sizes("train"))
    dataset.classes = ["the same"] * 8
    assert set(make(dataset).class_sizes("train")) < {str(k) for k in range(8)}


def test_names_are_of_the_labels_that_are_found_first(tmp_path):
    dataset = Labelled()
    dataset.classes = [f"kind {k}" for k in range(8)]
    dataset.coarse = [label // 2 for label in dataset.targets]
    dataset.again = list(dataset.targets)
    file = tmp_path / "split.csv"
    file.write_text("split,class\ntrain,0\ntrain,1\ntest,2\ntest,3\n")
    data = make(dataset, labels="coarse", split_file=str(file))
    assert data.class_sizes("test") == {"2": 12, "3": 12}
    assert data.class_sizes("train") == {"0": 12, "1": 12}
    assert set(make(dataset, labels="again").class_sizes("train")) < set(dataset.classes)
    part = make(Subset(dataset, range(40)), labels="coarse", fractions=[0.5, 0, 0.5])
    assert set(part.class_sizes("train")) < set("0123")
    alone = Labelled("coarse")
    alone.classes = dataset.classes
    assert set(make(alone, labels="coarse").class_sizes("train")) < set("01234567")


def test_parts_put_together_must_agree_in_their_classes():
    first, second = Labelled(), Labelled()
    first.classes, second.classes = ([f"{letter}{k}" for k in range(8)] for letter in "ab")
    with pytest.raises(ConfigError, match="parts with different `classes`"):
        make(ConcatDataset([first, second]))
    second.classes = first.classes
    assert set(make(ConcatDataset([first, second])).class_sizes("train")) < set(first.classes)


@pytest.mark.parametrize("kind", [np.array, tuple, list])
def test_names_may_be_an_array(kind):
    first, second = Labelled(), Labelled()
    first.classes = kind([f"kind {k}" for k in range(8)])
    assert all(name.startswith("kind ") for name in make(first).class_sizes("train"))
    second.classes = list(first.classes)
    assert all(name.startswith("kind ") for name in make(ConcatDataset([first, second])).class_sizes("train"))
    second.classes = kind([f"other {k}" for k in range(8)])
    with pytest.raises(ConfigError, match="parts with different `classes`"):
        make(ConcatDataset([first, second]))


@pytest.mark.parametrize("index", [48, 1000, -49])
def test_a_part_of_items_that_are_not_there_is_named(index):
    with pytest.raises(DataError, match=rf"Subset with the index {index}, but the Labelled that it is of has 48 items"):
        make(Subset(Labelled(), [0, index, 5]))
    assert read_labels(Subset(Labelled(), [0, 47, -1])).tolist() == [0, 7, 7]


@pytest.mark.parametrize(
    ("convert", "noted"),
    [
        (lambda pixels: pixels % 2, True),
        (lambda pixels: (pixels % 2).astype(np.int64), True),
        (lambda pixels: pixels % 2 > 0, False),
        (lambda pixels: (pixels % 2).astype(np.float32), False),
        (lambda pixels: pixels % 3, False),
    ],
)
def test_bytes_of_0_and_1_are_told_of(convert, noted):
    notes = FromDataset(dataset=Labelled(convert=convert), ways=2, queries=2).survey().notes
    assert any("No image has a value above 1: is it 0 to 255 that is meant?" in note for note in notes) == noted


def test_grey_images_among_coloured_ones_need_channels():
    class Mixed(Labelled):
        def __getitem__(self, number):
            image, label = super().__getitem__(number)
            return (image[..., 0] if label == 3 else image), label

    for seed in range(3):
        with pytest.raises(DataError, match=r"is (grey, but item \d+ is RGB|RGB, but item \d+ is grey)\. Set"):
            make(Mixed(), split_seed=seed)
    assert make(Mixed(), channels=3).spec.input_shape[0] == 3


# ---- splits --------------------------------------------------------------------------------------------------------


def test_fractions_cut_the_classes_into_parts_that_the_seed_decides():
    names = [f"c{k}" for k in range(50)]
    splits = split_by_fractions(names, (0.64, 0.16, 0.2), 0)
    assert {split: len(part) for split, part in splits.items()} == {"train": 32, "val": 8, "test": 10}
    assert sorted(name for part in splits.values() for name in part) == sorted(names)
    assert splits["test"] != split_by_fractions(names, (0.64, 0.16, 0.2), 1)["test"]
    assert splits["test"] != sorted(splits["test"])
    assert set(split_by_fractions(names, (0.8, 0.0, 0.2), 0)) == {"train", "test"}
    with pytest.raises(ConfigError, match="has 2 classes: too few"):
        split_by_fractions(["a", "b"], (0.64, 0.16, 0.2), 0)


def test_a_split_file_names_the_classes(tmp_path):
    (tmp_path / "split.csv").write_text("split,class\ntrain,1\ntrain,2\ntest,5\ntest,7\n")
    data = make(Labelled(), split_file=str(tmp_path / "split.csv"))
    assert (set(data.class_sizes("train")), set(data.class_sizes("test"))) == ({"1", "2"}, {"5", "7"})
    (tmp_path / "split.csv").write_text("split,class\ntrain,1\ntest,75\n")
    with pytest.raises(DataError, match=r"names class '75', which is no class of data\.dataset"):
        make(Labelled(), split_file=str(tmp_path / "split.csv"))
    (tmp_path / "split.csv").write_text("split,class\nlearn,1\n")
    with pytest.raises(ConfigError, match=r"names the split 'learn'"):
        make(Labelled(), split_file=str(tmp_path / "split.csv"))
    (tmp_path / "split.csv").write_text("split,class\ntrain,1\ntest,1\n")
    with pytest.raises(ConfigError, match=r"names class '1' twice, for train and test"):
        make(Labelled(), split_file=str(tmp_path / "split.csv"))
    with pytest.raises(ConfigError, match=r"data\.split_file=.* cannot be read"):
        make(Labelled(), split_file="nowhere.csv")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"fractions": [0.5, 0.5]}, r"data\.fractions must be three numbers"),
        ({"fractions": [0.5, 0.1, 0.1]}, r"data\.fractions"),
        ({"fractions": [float("nan"), 0, 0.2]}, r"data\.fractions"),
        ({"fractions": [0.8, 0.2, 0.0]}, r"data\.fractions"),
        ({"channels": 4}, r"data\.channels"),
        ({"image_size": 4}, r"data\.image_size"),
        ({"split_seed": -1}, r"data\.split_seed"),
        ({"dataset": None}, r"data\.dataset must be a map-style dataset.*but is null"),
        ({"dataset": iter([])}, r"data\.dataset must be a map-style dataset"),
    ],
)
def test_bad_settings_name_their_key(settings, message):
    with pytest.raises(ConfigError, match=message):
        FromDataset(**{"dataset": Labelled(), **settings})


def test_every_image_that_cannot_be_read_is_listed():
    def broken(pixels):
        if pixels[0, 0, 0] % 4 == 0:
            raise OSError("broken file")
        return pixels

    dataset = Labelled(convert=broken)
    expected = [number for number in range(48) if dataset.pixels[number, 0, 0, 0] % 4 == 0]
    assert len(expected) > 3
    data = FromDataset(dataset=dataset)
    findings = data.survey().findings
    assert findings == [f"Item {number} of data.dataset cannot be read: broken file" for number in expected]


def test_a_dataset_is_not_sent_to_the_workers():
    data = make(Labelled())
    assert data.__getstate__()["dataset"] is None
    assert describe(data.dataset) == "Labelled"
