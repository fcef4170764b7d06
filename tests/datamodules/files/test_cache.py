"""The decoded cache: made once, whole or not at all, by one process; damage and full disks."""

import contextlib
import errno
import hashlib
import json
import os
import pickle
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tiny_data
import torch

from datamodules.files import cache, storage
from datamodules.files.cache import INDEX, cache_key, load_or_build, read_cache
from datamodules.files.decoding import Format, Item, decode
from lightning_ntk.errors import DataError

REPOSITORY = Path(__file__).resolve().parents[3]
FORM = Format(8, 3)
SPLITS = ("train", "val", "test")


def items(split, classes=3, images=4):
    if split == "val":
        return {}
    return {
        f"{split} é{k}": [Item(tiny_data.encoded(split, k, n), f"{k}/{n}") for n in range(images)]
        for k in reversed(range(classes))
    }


@contextlib.contextmanager
def opened(workspace):
    assert not list(workspace.iterdir())
    (workspace / "unpacked").touch()
    yield items


def only_the_lock_is_left(folder):
    return sorted(path.name for path in folder.iterdir()) == ["data-1.lock"]


def test_what_is_read_back_is_what_was_decoded_and_nothing_else_stays(tmp_path):
    splits = load_or_build(tmp_path / "data-1", FORM, SPLITS, opened)
    assert set(splits) == {"train", "test"}
    whole = hashlib.sha256()
    for name, own in sorted(items("test").items()):
        expected = np.stack([tiny_data.resized(tiny_data.pixels("test", int(name[-1]), n), 8) for n in range(len(own))])
        assert np.array_equal(splits["test"][name], expected)
        whole.update(name.encode() + expected.tobytes())
    assert splits["test"].digest == whole.hexdigest()
    assert splits["test"].images.shape == (12, 3, 8, 8)
    assert {path.name for path in tmp_path.iterdir()} == {"data-1", "data-1.lock"}
    assert {path.name for path in (tmp_path / "data-1").iterdir()} == {"train.npy", "test.npy", INDEX}


def test_a_second_start_decodes_nothing_and_copies_nothing(tmp_path):
    load_or_build(tmp_path / "data-1", FORM, SPLITS, opened)
    splits = load_or_build(tmp_path / "data-1", FORM, SPLITS, lambda workspace: pytest.fail("decoded again"))
    images = splits["train"]["train é1"]
    assert np.shares_memory(images, splits["train"].images)
    torch.from_numpy(images)  # Without a warning that the array cannot be written.
    images[:] = 0  # Goes to a copy of the page, never to the file.
    assert load_or_build(tmp_path / "data-1", FORM, SPLITS, opened)["train"]["train é1"].any()


def test_an_older_cache_with_a_hash_of_each_class_is_read(tmp_path):
    load_or_build(tmp_path / "data-1", FORM, SPLITS, opened)
    index = json.loads((tmp_path / "data-1" / INDEX).read_text())
    for entry in index.values():
        entry["classes"] = [[*own, "0" * 64] for own in entry["classes"]]
    (tmp_path / "data-1" / INDEX).write_text(json.dumps(index))
    splits = load_or_build(tmp_path / "data-1", FORM, SPLITS, lambda workspace: pytest.fail("decoded again"))
    assert {name: len(images) for name, images in splits["test"].items()} == {f"test é{k}": 4 for k in range(3)}


def test_pickling_hands_over_the_file_and_not_the_images(tmp_path):
    splits = load_or_build(tmp_path / "data-1", FORM, SPLITS, lambda workspace: many())
    sent = pickle.dumps(splits["train"])
    assert len(sent) < 2000 < splits["train"].images.nbytes
    assert np.array_equal(pickle.loads(sent)["train é0"], splits["train"]["train é0"])


@contextlib.contextmanager
def many():
    yield lambda split: items(split, images=30)


def test_the_key_follows_what_it_is_made_from(tmp_path):
    (tmp_path / "a.png").write_bytes(b"1")
    before = cache_key("x", 8, storage.facts(tmp_path))
    assert cache_key("x", 8, storage.facts(tmp_path)) == before
    assert cache_key("x", 9, storage.facts(tmp_path)) != before
    (tmp_path / "a.png").write_bytes(b"12")
    size = cache_key("x", 8, storage.facts(tmp_path))
    os.utime(tmp_path / "a.png", ns=(1, 1))
    time_changed = cache_key("x", 8, storage.facts(tmp_path))
    (tmp_path / "a.png").rename(tmp_path / "b.png")
    renamed = cache_key("x", 8, storage.facts(tmp_path))
    (tmp_path / ".hidden").touch()
    assert len({before, size, time_changed, renamed}) == 4
    assert cache_key("x", 8, storage.facts(tmp_path)) == renamed


@pytest.mark.parametrize("damage", ["cut", "empty", "no index", "index", "a list", "nothing", "another dtype"])
def test_a_damaged_cache_is_made_again(tmp_path, damage):
    folder = tmp_path / "data-1"
    expected = load_or_build(folder, FORM, SPLITS, opened)["test"].digest
    array = folder / "test.npy"
    if damage == "no index":
        (folder / INDEX).unlink()
    elif damage == "index":
        (folder / INDEX).write_text((folder / INDEX).read_text()[:-10])
    elif damage in ("a list", "nothing"):
        (folder / INDEX).write_text("[]" if damage == "a list" else "{}")
    elif damage == "another dtype":
        np.save(array, np.zeros((12, 3, 8, 8), dtype=np.float32))
    else:
        array.write_bytes(array.read_bytes()[: -50 if damage == "cut" else 0])
    assert read_cache(folder) is None
    again = load_or_build(folder, FORM, SPLITS, opened)["test"]
    assert again.digest == expected == json.loads((folder / INDEX).read_text())["test"]["digest"]
    assert again.images.any()


def test_an_unreadable_image_leaves_nothing(tmp_path):
    @contextlib.contextmanager
    def spoilt(workspace):
        yield lambda split: {"a": [*items(split, 1)[f"{split} é0"], Item(b"no image", "the last one")]}

    with pytest.raises(DataError, match="Image the last one cannot be read"):
        load_or_build(tmp_path / "data-1", FORM, SPLITS, spoilt)
    assert only_the_lock_is_left(tmp_path)


def test_a_full_disk_is_one_error_that_names_the_setting(tmp_path, monkeypatch):
    plain = Path.open

    def full(path, mode="r", *rest, **more):
        return open("/dev/full", "wb") if path.suffix == ".npy" and "w" in mode else plain(path, mode, *rest, **more)

    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(DataError, match=r"cannot be written: No space left on device\. .*data\.cache_dir"):
        load_or_build(tmp_path / "data-1", FORM, SPLITS, opened)
    assert only_the_lock_is_left(tmp_path)


def test_too_little_room_is_found_before_decoding(tmp_path, monkeypatch):
    monkeypatch.setattr(storage.shutil, "disk_usage", lambda folder: type("Usage", (), {"free": 2303}))
    monkeypatch.setattr(cache, "write_split", lambda *_: pytest.fail("decoded"))
    with pytest.raises(DataError, match=r"has 2 kB free, but 2 kB are needed\. .*data\.cache_dir"):
        load_or_build(tmp_path / "data-1", FORM, SPLITS, opened)
    assert only_the_lock_is_left(tmp_path)


def test_a_read_only_disk_is_one_error_that_names_the_setting(tmp_path, monkeypatch):
    plain = Path.mkdir

    def read_only(path, *rest, **more):
        if ".tmp-" in path.name:
            raise OSError(errno.EROFS, "Read-only file system")
        plain(path, *rest, **more)

    monkeypatch.setattr(Path, "mkdir", read_only)
    with pytest.raises(DataError, match=r"cannot be written: Read-only file system\. .*data\.cache_dir"):
        load_or_build(tmp_path / "data-1", FORM, SPLITS, opened)
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"cannot be written: .*data\.cache_dir"):
        load_or_build(tmp_path / "file" / "data-1", FORM, SPLITS, opened)


def test_data_that_cannot_be_read_is_not_blamed_on_the_cache(tmp_path):
    @contextlib.contextmanager
    def unreadable(workspace):
        yield lambda split: (tmp_path / "missing.csv").read_text()

    with pytest.raises(DataError, match=r"missing\.csv cannot be read: No such file"):
        load_or_build(tmp_path / "data-1", FORM, SPLITS, unreadable)


TWO = """
import contextlib, pathlib, sys, time
from datamodules.files import cache
from datamodules.files.decoding import Format, Item
import tiny_data

folder, log, ready = map(pathlib.Path, sys.argv[1:])

@contextlib.contextmanager
def opened(workspace):
    with log.open("a") as lines:
        lines.write("built\\n")
    time.sleep(0.5)  # Whoever does not wait has every chance to build, too.
    yield lambda split: {"a": [Item(tiny_data.encoded(split, n)) for n in range(5)]}

log.with_name(log.name + str(__import__("os").getpid())).touch()
while not ready.exists():
    time.sleep(0.01)
print(cache.load_or_build(folder, Format(8, 3), ("train",), opened)["train"].digest)
"""


def test_of_two_processes_that_start_at_once_one_decodes_and_both_read(tmp_path):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "tests")])}
    (tmp_path / "caches").mkdir()
    (tmp_path / "caches" / "data-1.tmp-killed").mkdir()  # What a killed process left.
    command = [
        sys.executable,
        "-c",
        TWO,
        str(tmp_path / "caches" / "data-1"),
        str(tmp_path / "log"),
        str(tmp_path / "go"),
    ]
    processes = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True, cwd=tmp_path) for _ in range(2)
    ]
    while len(list(tmp_path.glob("log?*"))) < 2 and all(process.poll() is None for process in processes):
        time.sleep(0.02)
    (tmp_path / "go").touch()
    digests = [process.communicate(timeout=280)[0] for process in processes]
    assert digests[0] == digests[1] != ""
    assert (tmp_path / "log").read_text() == "built\n"
    assert {path.name for path in (tmp_path / "caches").iterdir()} == {"data-1", "data-1.lock"}


@pytest.fixture
def no_locks(monkeypatch):
    """A file system without locks."""

    def unsupported(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(storage.fcntl, "flock", unsupported)


@pytest.mark.parametrize("damaged", [False, True])
def test_without_locks_who_comes_second_takes_nothing_from_the_first(tmp_path, no_locks, damaged):
    """Another process makes the whole cache while this one is decoding."""
    folder = tmp_path / "data-1"
    found = []

    @contextlib.contextmanager
    def while_another_works(workspace):
        (workspace / "unpacked").touch()
        found.append(load_or_build(folder, FORM, SPLITS, opened)["test"].digest)
        assert (workspace / "unpacked").exists()
        if damaged:
            (folder / INDEX).write_text("{")
        yield items

    if damaged:
        with pytest.raises(DataError, match=r"data-1 cannot be read back\. Remove it"):
            load_or_build(folder, FORM, SPLITS, while_another_works)
    else:
        assert load_or_build(folder, FORM, SPLITS, while_another_works)["test"].digest == found[0]
    assert {path.name for path in tmp_path.iterdir()} == {"data-1", "data-1.lock"}


def test_another_person_can_read_what_the_umask_lets_them(tmp_path):
    before = os.umask(0o027)
    try:
        load_or_build(tmp_path / "data-1", FORM, SPLITS, opened)
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "data-1", *(tmp_path / "data-1").iterdir())}
    assert modes == {"data-1": 0o750, "train.npy": 0o640, "test.npy": 0o640, INDEX: 0o640}


@pytest.mark.parametrize("what", [errno.EACCES, errno.EIO, errno.ESTALE])
def test_a_cache_that_the_system_does_not_let_read_is_not_called_damaged(tmp_path, monkeypatch, what):
    load_or_build(tmp_path / "data-1", FORM, SPLITS, opened)

    def fail(file):
        raise OSError(what, os.strerror(what), str(file))

    monkeypatch.setattr(cache, "map_array", fail)
    with pytest.raises(DataError, match=rf"The cache .*data-1 cannot be read: {os.strerror(what)}\. .*data\.cache_dir"):
        load_or_build(tmp_path / "data-1", FORM, SPLITS, opened)
    assert (tmp_path / "data-1" / "test.npy").exists()


def test_as_many_threads_decode_as_the_process_has_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 5, 7}, raising=False)
    assert cache.cores() == 3


@pytest.mark.parametrize(("channels", "mode"), [(3, "RGB"), (1, "L")])
def test_every_kind_of_source_is_decoded_as_pillow_does(tmp_path, channels, mode):
    array = tiny_data.pixels("x")
    tiny_data.save_image(tmp_path / "x.png", "x")
    expected = tiny_data.resized(array, 8, mode)
    form = Format(8, channels)
    for source in (tmp_path / "x.png", tiny_data.encoded("x"), memoryview(tiny_data.encoded("x")), array):
        assert np.array_equal(decode(Item(source), form), expected)
    assert np.array_equal(decode(Item(array), Format(8, channels, invert=True)), 255 - expected)
    box = decode(Item(array, box=(2, 3, 10, 11)), form)
    assert np.array_equal(box, tiny_data.resized(array[3:11, 2:10], 8, mode))


READ_ALL = """
import pathlib, sys
from datamodules.files.cache import read_cache

def own_memory():
    (line,) = (x for x in pathlib.Path("/proc/self/status").read_text().splitlines() if x.startswith("RssAnon"))
    return int(line.split()[1]) * 1024

before = own_memory()
images = read_cache(pathlib.Path(sys.argv[1]))["train"].images
assert sum(int(image.max()) for image in images) > 200 * len(images)
print((own_memory() - before) / images.nbytes)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_reading_all_images_takes_no_memory_of_the_processs_own(tmp_path):
    """Pages of the file are the system's, and so shared by all processes that read them."""

    @contextlib.contextmanager
    def one_class(workspace):
        yield lambda split: {"a": [Item(tiny_data.pixels(n, size=(84, 84))) for n in range(600)]}

    load_or_build(tmp_path / "data-1", Format(84, 3), ("train",), one_class)
    # In a fresh process: this one's heap has room for a copy.
    command = [sys.executable, "-c", READ_ALL, str(tmp_path / "data-1")]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    read = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert float(read.stdout) < 0.25


@pytest.mark.slow
@pytest.mark.parametrize("form", ["pickles", "files"])
def test_the_second_start_on_60000_images_takes_less_than_two_seconds(tmp_path, form, capsys):
    """mini-ImageNet's size, 84 x 84 x 3: 1.3 GB of cache, and as much of pickles. `pytest -m slow -k 60000` says it."""
    from datamodules.mini_imagenet import MiniImageNet

    rng = np.random.default_rng(0)
    base = rng.integers(0, 256, (600, 84, 84, 3), dtype=np.uint8)
    counts = {"train": 64, "val": 16, "test": 20}
    tiny_data.write_split(tmp_path / "own.csv", **{s: [f"{s}{k}" for k in range(n)] for s, n in counts.items()})
    for split, classes in counts.items():
        names = [f"{split}{k}" for k in range(classes)]
        if form == "pickles":
            images = np.concatenate([base ^ np.uint8(k) for k in range(classes)])
            numbers = {name: list(range(600 * k, 600 * (k + 1))) for k, name in enumerate(names)}
            with (tmp_path / f"mini-imagenet-cache-{split}.pkl").open("wb") as target:
                pickle.dump({"image_data": images, "class_dict": numbers}, target, protocol=4)
            continue
        (tmp_path / "images").mkdir(exist_ok=True)
        lines = ["filename,label"]
        for name in names:
            image = tiny_data.encoded(name, kind="JPEG", size=(84, 84))
            for number in range(600):
                (tmp_path / "images" / f"{name}_{number}.jpg").write_bytes(image)
                lines.append(f"{name}_{number}.jpg,{name}")
        (tmp_path / f"{split}.csv").write_text("\n".join(lines))
    seconds = []
    for _ in range(2):
        start = time.perf_counter()
        data = MiniImageNet(root=str(tmp_path), cache_dir=str(tmp_path / "cache"), split_file=str(tmp_path / "own.csv"))
        splits = data.class_splits()
        seconds.append(time.perf_counter() - start)
    assert sum(len(classes.images) for classes in splits.values()) == 60000
    with capsys.disabled():
        sys.stdout.write(f"\n60000 images from {form}: first start {seconds[0]:.1f} s, second {seconds[1]:.3f} s\n")
    assert seconds[1] < 2
