"""The committed splits: disjoint, of the published sizes, and refused when changed."""

import collections
import re

import pytest

from datamodules.files.splits import find_split_file, read_split
from lightning_ntk.errors import ConfigError, DataError
from lightning_ntk.settings.config import conf_folder

# Classes and images of each split, as the papers give them.
PUBLISHED = {
    "omniglot_vinyals": ((1028, 172, 423), (20560, 3440, 8460)),
    "omniglot_lake": ((883, 81, 659), (17660, 1620, 13180)),
    "mini_imagenet": ((64, 16, 20), (38400, 9600, 12000)),
    "tiered_imagenet": ((351, 97, 160), (448695, 124261, 206209)),
    "cifar_fs": ((64, 16, 20), (38400, 9600, 12000)),
    "fc100": ((60, 20, 20), (36000, 12000, 12000)),
    "cub": ((100, 50, 50), (5885, 2950, 2953)),
    "vgg_flowers": ((71, 15, 16), (5655, 1109, 1425)),
    "tiny_imagenet": ((64, 16, 20), (12800, 1600, 3000)),
    "omniglot_small": ((183, 0, 59), None),
    "omniglot_small_val": ((183, 17, 42), None),
}


def of_split(name, column):
    """`{split: set of a column's values}`, read in the plainest way."""
    lines = [line for line in find_split_file(name).read_text().splitlines() if not line.startswith("#")]
    place = lines[0].split(",").index(column)
    values = collections.defaultdict(set)
    for line in lines[1:]:
        values[line.split(",")[0]].add(line.split(",")[place])
    return values


@pytest.mark.parametrize("again", ["a b/", "./a b", "a b", "x/../a b"])
def test_one_folder_by_two_names_is_named_twice(again, tmp_path):
    file = tmp_path / "split.csv"
    file.write_text(f"split,class\ntrain,a b\ntrain,{again}\ntest,c\n")
    with pytest.raises(ConfigError, match=r"names class 'a b' twice, for train and train"):
        read_split(file)
    file.write_text(f"split,class\ntrain,{again}\ntest,./c//d/\n")
    assert read_split(file).classes == {"train": ["a b"], "test": ["c/d"]}


def test_every_committed_split_is_tested_here():
    assert {file.stem for file in (conf_folder() / "splits").glob("*.csv")} == set(PUBLISHED)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_committed_split_is_disjoint_and_has_the_published_counts(name):
    counts, images = PUBLISHED[name]
    split = read_split(find_split_file(name))
    classes = of_split(name, "class")
    assert tuple(len(classes[key]) for key in ("train", "val", "test")) == counts
    assert {key: set(names) for key, names in split.classes.items()} == {
        key: names for key, names in classes.items() if names
    }
    assert len(set().union(*classes.values())) == sum(counts)
    assert split.images == ({} if images is None else dict(zip(("train", "val", "test"), images, strict=True)))
    header = find_split_file(name).read_text().split("split,class")[0]
    assert re.search(r"# source: (.|\n)*# classes: (.|\n)*# sha256 of the lines below: [0-9a-f]{64}\n$", header)


@pytest.mark.parametrize(
    ("name", "column", "groups"), [("fc100", "superclass", (12, 4, 4)), ("tiered_imagenet", "category", (20, 6, 8))]
)
def test_splits_by_category_share_none(name, column, groups):
    found = of_split(name, column)
    assert tuple(len(found[key]) for key in ("train", "val", "test")) == groups
    assert len(set().union(*found.values())) == sum(groups)


def test_fc100_and_cifar_fs_know_the_same_hundred_classes_in_the_same_twenty_superclasses():
    rows = [
        {tuple(line.split(",")[1:]) for line in find_split_file(name).read_text().splitlines() if line[0] != "#"}
        for name in ("fc100", "cifar_fs")
    ]
    assert rows[0] == rows[1]
    assert len(rows[0]) == 101  # With the header.
    assert set(collections.Counter(group for name, group in rows[0] if name != "class").values()) == {5}


def test_the_alphabets_of_lake_are_unseen_in_test_and_validation():
    alphabets = {
        key: {name.split("/")[0] for name in names} for key, names in of_split("omniglot_lake", "class").items()
    }
    assert {key: len(names) for key, names in alphabets.items()} == {"train": 25, "val": 5, "test": 20}
    assert len(set().union(*alphabets.values())) == 50


def test_the_rule_of_the_birds():
    # Chen et al. (2019): of classes numbered from 0, the even ones train, and every fourth from 1 validates.
    for split, names in of_split("cub", "class").items():
        assert {(int(name[:3]) - 1) % 4 for name in names} == {"train": {0, 2}, "val": {1}, "test": {3}}[split]


def test_a_split_that_was_changed_is_refused(tmp_path):
    text = find_split_file("mini_imagenet").read_text()
    (tmp_path / "x.csv").write_text(text.replace("train,n01532829", "test,n01532829"))
    with pytest.raises(ConfigError, match=r"x\.csv does not have the SHA-256 that it states.*without the sha256 line"):
        read_split(tmp_path / "x.csv")
    without = "\n".join(line for line in text.splitlines() if "sha256" not in line and "n01558993" not in line)
    (tmp_path / "x.csv").write_text(without)
    with pytest.raises(ConfigError, match=r"x\.csv has 63 train classes, not 64"):
        read_split(tmp_path / "x.csv")
    (tmp_path / "x.csv").write_bytes(text.replace("\n", "\r\n").encode())  # As a checkout on Windows has it.
    assert len(read_split(tmp_path / "x.csv").classes["train"]) == 64


def test_a_misspelt_name_of_a_split_gets_the_nearest():
    with pytest.raises(ConfigError, match=r"omniglot_lak cannot be read: .*Did you mean 'omniglot_lake'"):
        read_split(find_split_file("omniglot_lak"))


def test_a_class_named_twice_is_refused(tmp_path):
    (tmp_path / "x.csv").write_text("split,class\ntrain,a\ntest,b\nval,a\n")
    with pytest.raises(ConfigError, match=r"x\.csv names class 'a' twice, for train and val"):
        read_split(tmp_path / "x.csv")


@pytest.mark.parametrize(("written", "there"), [("cafe\u0301", "caf\u00e9"), ("caf\u00e9", "cafe\u0301")])
def test_a_class_whose_accents_are_other_code_points_is_told_of(written, there, tmp_path):
    (tmp_path / "x.csv").write_text(f"split,class\ntest,{written}\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"no class of X\. One of the same look is there, with its accents in other"):
        read_split(tmp_path / "x.csv").check_known(["cafe", there], "class of X")


def test_unknown_classes_and_wrong_counts_are_named(tmp_path):
    (tmp_path / "x.csv").write_text('# images: test 3\nsplit,class\ntrain,"odd, name é"\ntest,b\n', encoding="utf-8")
    split = read_split(tmp_path / "x.csv")
    split.check_known(["odd, name é", "b", "c"], "class of X")
    with pytest.raises(DataError, match=r"x\.csv names class 'b', which is no class of X\. Did you mean 'bb'"):
        split.check_known(["odd, name é", "bb"], "class of X")
    split.check_images("train", 7, "X")
    split.check_images("test", 3, "X")
    with pytest.raises(DataError, match=r"X has 2 images of the classes that x names for test, but 3 are published"):
        split.check_images("test", 2, "X")
