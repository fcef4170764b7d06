"""Every published data set trains from its YAML, and is fetched, checked and unpacked through the same few lines."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import tiny_data
from hydra.utils import get_class
from test_train import CHOICES, PUBLISHED, TINY

from datamodules import omniglot, published
from datamodules.omniglot import FULL, Omniglot
from datamodules.tiered_imagenet import TieredImageNet
from lightning_ntk import train
from lightning_ntk.errors import DataError
from lightning_ntk.running.results import read_results
from lightning_ntk.settings.config import compose_config, plain

SPLITS = ("train", "val", "test")
IMAGES = 3  # a class
CLASSES = {split: [f"{10 * place + k}" for k in range(2)] for place, split in enumerate(SPLITS)}
NAMES = [name for names in CLASSES.values() for name in names]
KEYS = [(name, number) for name in NAMES for number in range(IMAGES)]


def pixels(split, size):
    return [tiny_data.pixels(name, number, size=(size, size)) for name in CLASSES[split] for number in range(IMAGES)]


def write_omniglot(root):
    for name, number in KEYS:
        file = root / FULL[int(name) // 20] / "Greek" / name / f"{number}.png"
        tiny_data.save_image(file, name, number, size=(105, 105))
    (root / FULL[1] / "Angelic").mkdir()
    return {split: [f"Greek/{name}" for name in names] for split, names in CLASSES.items()}


def write_tiny_imagenet(root):
    for split, names in CLASSES.items():
        for name in names:
            for number in range(IMAGES):
                tiny_data.save_image(root / "tiny-imagenet-fewshot" / split / name / f"{number}.JPEG", name, number)
    return CLASSES


def write_mini_imagenet(root):
    root.mkdir()
    for split, names in CLASSES.items():
        numbers = {name: range(IMAGES * place, IMAGES * (place + 1)) for place, name in enumerate(names)}
        content = {"image_data": np.stack(pixels(split, 84)), "class_dict": {k: list(v) for k, v in numbers.items()}}
        (root / f"mini-imagenet-cache-{split}.pkl").write_bytes(pickle.dumps(content))
    return CLASSES


def write_tiered_imagenet(root):
    folder = root / "tiered-imagenet"
    folder.mkdir(parents=True)
    for split, names in CLASSES.items():
        labels = {"label_specific": np.repeat([0, 1], IMAGES), "label_specific_str": names}
        images = [np.frombuffer(tiny_data.encoded(n, k), np.uint8) for n in names for k in range(IMAGES)]
        (folder / f"{split}_labels.pkl").write_bytes(pickle.dumps(labels))
        (folder / f"{split}_images_png.pkl").write_bytes(pickle.dumps(images))
    return None  # The pickles are the split.


def write_cifar(root):
    folder = root / "cifar-100-python"
    folder.mkdir(parents=True)
    rows = np.concatenate([pixels(split, 32) for split in SPLITS]).transpose(0, 3, 1, 2).reshape(len(KEYS), -1)
    labels = [NAMES.index(name) for name, _ in KEYS]
    contents = {"meta": {"fine_label_names": NAMES}}
    for file, part in (("train", slice(0, None, 2)), ("test", slice(1, None, 2))):
        contents[file] = {"data": rows[part], "fine_labels": labels[part]}
    for file, content in contents.items():
        (folder / file).write_bytes(pickle.dumps(content))
    return CLASSES


def write_cub(root):
    folder = root / "CUB_200_2011"
    files = [f"{name}/{number}.jpg" for name, number in KEYS]
    for file, key in zip(files, KEYS, strict=True):
        tiny_data.save_image(folder / "images" / file, *key)
    (folder / "images.txt").write_text("".join(f"{k} {file}\n" for k, file in enumerate(files)))
    (folder / "bounding_boxes.txt").write_text("".join(f"{k} 1.0 2.0 8.0 9.0\n" for k in range(len(files))))
    return CLASSES


def write_vgg_flowers(root):
    for place, key in enumerate(KEYS, start=1):
        tiny_data.save_image(root / "jpg" / f"image_{place:05}.jpg", *key)
    scipy.io.savemat(root / "imagelabels.mat", {"labels": np.array([[int(name) for name, _ in KEYS]])})
    return CLASSES


WRITERS = {
    "omniglot": write_omniglot,
    "tiny_imagenet": write_tiny_imagenet,
    "mini_imagenet": write_mini_imagenet,
    "tiered_imagenet": write_tiered_imagenet,
    "cifar_fs": write_cifar,
    "fc100": write_cifar,
    "cub": write_cub,
    "vgg_flowers": write_vgg_flowers,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_data_set_trains_from_its_yaml(name, tmp_path, monkeypatch):
    classes = WRITERS[name](tmp_path / "data")
    if classes is None:
        monkeypatch.setattr(TieredImageNet, "_check_classes", lambda *_: None)
        monkeypatch.setattr(TieredImageNet, "split", own_split(tmp_path))
        split = []
    else:
        split = [f"data.split_file={tiny_data.write_split(tmp_path / 'own.csv', **classes)}"]
    extra = ["data.crop=true"] if name == "cub" else []
    sizes = ["data.image_size=16", "data.ways=2", "data.queries=2", "network.filters=4", "method=meta_rkhs_i"]
    where = [f"data.root={tmp_path / 'data'}", f"data.cache_dir={tmp_path / 'cache'}"]
    train.main([*TINY, f"data={name}", *where, *split, *sizes, *extra, "run_dir=run"])
    result = read_results(Path("run"))
    assert len(result.episodes["test/accuracy"]) == 5
    assert result.task["split"] == "own"
    assert result.task.get("crop") == (True if name == "cub" else None)


def own_split(tmp_path):
    tiny_data.write_split(tmp_path / "own.csv", **CLASSES)
    split = published.read_split(tmp_path / "own.csv")
    return property(lambda self: split)


def test_every_published_data_set_is_tested_here_and_offers_its_settings():
    assert set(PUBLISHED) == set(WRITERS) < set(CHOICES["data"])
    for name in PUBLISHED:
        assert {"root", "split_file", "image_size", "cache_dir"} <= compose_config(
            "train", [f"data={name}"]
        ).data.keys()


def test_what_is_missing_is_fetched_on_request_and_once(tmp_path, monkeypatch):
    classes = write_omniglot(tmp_path / "made")
    asked = []

    def fetch(urls, target, checksum):
        asked.append(urls[0].rpartition("/")[2])
        target.parent.mkdir(parents=True, exist_ok=True)
        tiny_data.zipped(tmp_path / "made" / target.stem, target)

    monkeypatch.setattr(published, "download", fetch)
    monkeypatch.setattr(omniglot, "CHECKSUMS", dict.fromkeys(FULL, ""))
    own = tiny_data.write_split(tmp_path / "own.csv", **classes)
    settings = {"root": str(tmp_path / "data"), "cache_dir": str(tmp_path / "cache"), "split_file": own}
    for _ in range(2):
        splits = Omniglot(download=True, **settings).class_splits()
        assert set(splits["test"]) == {"Greek/20", "Greek/21"}
        assert asked == ["images_background.zip", "images_evaluation.zip"]


def test_the_default_root_follows_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("LIGHTNING_NTK_DATA", str(tmp_path / "sets"))
    with pytest.raises(
        DataError, match=rf"data\.root={tmp_path}/sets/omniglot \(there is no such folder\) has no images"
    ):
        Omniglot().class_splits()


def test_an_archive_without_what_it_should_hold_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(omniglot, "CHECKSUMS", dict.fromkeys(FULL, ""))
    classes = write_omniglot(tmp_path / "data")
    (tmp_path / "data" / FULL[0]).rename(tmp_path / "data" / "other")
    tiny_data.zipped(tmp_path / "data" / "other", tmp_path / "data" / f"{FULL[0]}.zip")
    own = tiny_data.write_split(tmp_path / "own.csv", **classes)
    with pytest.raises(DataError, match=r"Archive .*images_background\.zip holds no images_background\. Expected:"):
        Omniglot(root=str(tmp_path / "data"), cache_dir=str(tmp_path / "cache"), split_file=own).class_splits()
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".lock"]


@pytest.mark.parametrize("name", PUBLISHED)
def test_defaults_in_python_are_those_of_conf(name, tmp_path):
    config = plain(compose_config("train", [f"data={name}"]).data)
    data = get_class(config["_target_"])(root=str(tmp_path))
    assert [data.normalize, data.allow_shared_images] == [config["normalize"], config["allow_shared_images"]]
    assert [data.form.size, data.form.channels] == [config["image_size"] or data.native_size, config["channels"]]
