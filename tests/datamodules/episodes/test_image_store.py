"""Images are held once: packed, gathered, rotated, and shared by worker processes and ranks."""

import os
import pickle
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from datamodules.episodes import image_store
from datamodules.episodes.image_store import ImageStore, check_images, gather
from datamodules.files import storage
from datamodules.from_arrays import FromArrays
from lightning_ntk.errors import DataError

REPOSITORY = Path(__file__).resolve().parents[3]


class Packed(dict):
    """Classes as views into one array."""

    def __init__(self, images, sizes):
        ends = np.cumsum([0, *sizes.values()])
        super().__init__((name, images[a:b]) for name, a, b in zip(sizes, ends, ends[1:], strict=False))
        self.images = images


def random_images(number, shape=(3, 4, 4)):
    return np.random.default_rng(0).integers(0, 256, (number, *shape), dtype=np.uint8)


@pytest.fixture
def mapped(tmp_path):
    """Nine random images in a .npy file, mapped into memory: behind a header, as np.load leaves it."""
    np.save(tmp_path / "images.npy", random_images(9, (3, 20, 20)))
    return np.load(tmp_path / "images.npy", mmap_mode="r")


def test_classes_are_packed_in_the_order_of_their_names():
    images = random_images(9)
    store = ImageStore({"b": images[:4], "c": torch.from_numpy(images[4:6]), "a": images[6:]})
    assert store.names == ["a", "b", "c"]
    assert (store.starts.tolist(), store.sizes.tolist()) == ([0, 3, 7], [3, 4, 2])
    assert np.array_equal(store.images.numpy(), np.concatenate([images[6:], images[:6]]))


def test_a_mapped_file_is_used_where_it_lies(mapped, monkeypatch):
    store = ImageStore(Packed(mapped, {"b": 4, "c": 2, "a": 3}))
    assert (store.names, store.starts.tolist()) == (["a", "b", "c"], [6, 0, 4])
    assert store.images.data_ptr() == mapped.ctypes.data
    monkeypatch.setattr(image_store, "AT_ONCE", 4)
    batches = list(store.some(100))
    assert [len(few) for few in batches] == [4, 4, 1], "never all of them at once"
    assert np.array_equal(torch.cat(batches).numpy(), np.concatenate([mapped[6:], mapped[:6]]))
    assert np.array_equal(torch.cat(list(store.some(3))).numpy(), np.concatenate([mapped[6:], mapped[:6]])[::3])


def test_a_mapped_file_is_mapped_again_by_who_unpickles_it(mapped):
    sent = pickle.dumps(ImageStore(Packed(mapped[2:], {"a": 3, "b": 4})))
    assert len(sent) < 2000 < mapped[2:].nbytes, "the images must not travel"
    assert np.array_equal(pickle.loads(sent).images.numpy(), mapped[2:])


def test_slices_of_another_array_are_refused(mapped):
    classes = Packed(mapped, {"a": 9})
    classes["a"] = np.array(mapped)
    with pytest.raises(DataError, match="slices of its `images`"):
        ImageStore(classes)


@pytest.mark.parametrize("size", [4, 5])
def test_gathering_and_turning_is_numpys(size):
    images = random_images(6, (2, size, size))
    numbers = torch.tensor([[0, 5, 3], [2, 2, 1]])
    plain = gather(torch.from_numpy(images), numbers)
    assert np.array_equal(plain.numpy(), images[numbers.numpy()])
    for turns in range(4):
        turned = gather(torch.from_numpy(images), numbers + 6 * turns, rotations=True)
        assert np.array_equal(turned.numpy(), np.rot90(images[numbers.numpy()], turns, axes=(3, 4)))


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.zeros((2, 3, 4, 4)), r"must be uint8 images .* is float64 of shape \(2, 3, 4, 4\)\. .* numpy\.rint\(255"),
        (torch.zeros((2, 3, 4, 4)), r"is torch\.float32 of shape \(2, 3, 4, 4\)\. Of numbers in \[0, 1\] make bytes"),
        (np.zeros((2, 3, 4, 4), int), r"is int64 of shape \(2, 3, 4, 4\)\. Of numbers from 0 to 255 make bytes"),
        (np.zeros((2, 4, 4), np.uint8), r"is uint8 of shape \(2, 4, 4\)\. A dimension is missing: .*images\[:, None\]"),
        (np.zeros(4, np.uint8), r"is uint8 of shape \(4,\)\. Give it these four dimensions"),
        (np.zeros((0, 3, 4, 4), np.uint8), "has no images"),
        (np.zeros((2, 1, 4, 4), np.uint8), r"has images \(1, 4, 4\), but others are \(3, 4, 4\)"),
        ([1, 2], r"is list\. Make an array of it: numpy\.stack"),
        (np.zeros((2, 8, 9, 3), np.uint8), r"channels last. Move them: images\.transpose\(0, 3, 1, 2\)"),
        (np.zeros((2, 8, 8, 4), np.uint8), r"is uint8 of shape \(2, 8, 8, 4\), which has the channels last"),
        (torch.zeros(2, 28, 28, 13, dtype=torch.uint8), "which has the channels last"),
    ],
)
def test_what_is_no_class_of_images_is_named(images, message):
    with pytest.raises(DataError, match=f"Class 'x' of the train split.*{message}"):
        check_images("train", "x", images, (3, 4, 4))


@pytest.mark.parametrize("shape", [(3, 4, 4), (3, 3, 1), (13, 8, 8), (8, 8, 8), (8, 8, 9), (13, 8, 5), (1, 1, 1)])
def test_images_of_any_shape_are_taken(shape):
    assert check_images("train", "x", np.ones((1, *shape), np.uint8), None) == shape


# ---- memory --------------------------------------------------------------------------------------------------------

RANK = """
import sys
import numpy as np
sys.path[:0] = {paths}
from test_image_store import Packed
from datamodules.images import ImageDataModule

class Data(ImageDataModule):
    def class_splits(self):
        images = np.load("images.npy", mmap_mode="r")
        return {{"train": Packed(images, {{f"c{{k}}": 16 for k in range(8)}}),
                 "test": {{f"t{{k}}": np.full((16, 3, 200, 200), k, np.uint8) for k in range(2)}}}}

if __name__ == "__main__":
    data = Data(ways=8, queries=15, eval_ways=2, tasks_per_step=1, steps_per_epoch=8, num_workers=2)
    data.setup()
    loader = data.train_dataloader()
    loader.multiprocessing_context = sys.argv[1]
    batches = iter(loader)
    for _ in range(2):  # One of each worker. Each episode holds all images.
        next(batches)
    data.draw("train", 0, 0)
    print(*(worker.pid for worker in batches._workers), flush=True)
    sys.stdin.read()
"""


def kilobytes(pid, mapping):
    """Resident and proportional size of a process's mappings of a file."""
    rss = pss = 0
    current = ""
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            current = line
        elif mapping in current and line.startswith(("Rss:", "Pss:")):
            rss, pss = (rss + int(line.split()[1]), pss) if line[0] == "R" else (rss, pss + int(line.split()[1]))
    return rss, pss


@pytest.mark.skipif(not os.path.exists("/proc/self/smaps"), reason="the system does not say what processes share")
def test_two_ranks_with_two_workers_each_hold_the_images_once(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (128, 3, 200, 200), dtype=np.uint8)
    np.save(tmp_path / "images.npy", images)
    (tmp_path / "rank.py").write_text(RANK.format(paths=[str(REPOSITORY), str(Path(__file__).parent)]))
    ranks = [
        subprocess.Popen(
            [sys.executable, "rank.py", start], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=tmp_path
        )
        for start in ("fork", "spawn")
    ]
    try:
        processes = [pid for rank in ranks for pid in (rank.pid, *map(int, rank.stdout.readline().split()))]
        assert len(processes) == 6
        sizes = [kilobytes(pid, "images.npy") for pid in processes]
    finally:
        for rank in ranks:
            rank.communicate("")
    once = images.nbytes / 1024
    assert all(rss > 0.5 * once for rss, _ in sizes), (
        "every process has read the images (the system may take pages back)"
    )
    assert sum(pss for _, pss in sizes) < 1.05 * once


SHARE = """
import sys
import numpy as np
import torch.multiprocessing
sys.path[:0] = {paths}
from datamodules.episodes import image_store
from datamodules.episodes.image_store import ImageStore

def touch(store, queue, done):
    queue.put(int(store.images.long().sum()))
    done.wait()

if __name__ == "__main__":
    store = ImageStore({{"a": np.random.default_rng(0).integers(0, 256, (40, 3, 200, 200), dtype=np.uint8)}})
    context = torch.multiprocessing.get_context("spawn")
    queue, done = context.SimpleQueue(), context.Event()
    processes = [context.Process(target=touch, args=(store, queue, done)) for _ in range(2)]
    for process in processes:
        process.start()
    totals = {{queue.get() for _ in processes}}
    assert totals == {{int(store.images.long().sum())}}
    print(*(process.pid for process in processes), flush=True)
    sys.stdin.read()
    done.set()
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/smaps"), reason="the system does not say what processes share")
def test_spawned_processes_share_images_that_came_as_a_dict(tmp_path):
    (tmp_path / "share.py").write_text(SHARE.format(paths=[str(REPOSITORY)]))
    command = [sys.executable, "share.py"]
    first = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=tmp_path)
    try:
        processes = [first.pid, *map(int, first.stdout.readline().split())]
        assert len(processes) == 3
        sizes = [kilobytes(pid, "/torch_") for pid in processes]
    finally:
        first.communicate("")
    once = 40 * 3 * 200 * 200 / 1024
    assert all(rss > 0.5 * once for rss, _ in sizes), (
        "every process has read the images (the system may take pages back)"
    )
    assert sum(pss for _, pss in sizes) < 1.05 * once


SHARING_RANK = """
import sys
from types import SimpleNamespace
import numpy as np
sys.path.insert(0, {path!r})
from datamodules.from_arrays import FromArrays

def anonymous():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon"))

rng = np.random.default_rng(0)
splits = {{"train": {{f"c{{k}}": rng.integers(0, 256, (16, 3, 256, 256), dtype=np.uint8) for k in range(8)}},
          "test": {{f"t{{k}}": rng.integers(0, 256, (16, 3, 256, 256), dtype=np.uint8) for k in range(2)}}}}
data = FromArrays(splits=splits, ways=8, queries=15, eval_ways=2)
data.setup()
task = data.draw("train", 0, 0)
before = anonymous()
data.trainer = SimpleNamespace(global_rank=int(sys.argv[1]), world_size=2)
for _ in range(2):
    data.setup("fit")
print(before - anonymous())
assert data.draw("train", 0, 0).query_x.equal(task.query_x)  # Reads all images.
print(data.episode_ids(), flush=True)
sys.stdin.read()
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/smaps"), reason="the system does not say what processes share")
def test_two_ranks_hold_images_that_came_as_a_dict_once(tmp_path):
    (tmp_path / "rank.py").write_text(SHARING_RANK.format(path=str(REPOSITORY)))
    ranks = [
        subprocess.Popen(
            [sys.executable, "rank.py", str(number)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=tmp_path,
            env={**os.environ, "LIGHTNING_NTK_CACHE": str(tmp_path / "cache")},
        )
        for number in range(2)
    ]
    try:
        freed, ids = zip(*((int(rank.stdout.readline()), rank.stdout.readline()) for rank in ranks), strict=True)
        sizes = [kilobytes(rank.pid, "images.npy") for rank in ranks]
    finally:
        for rank in ranks:
            rank.communicate("")
    once = 8 * 16 * 3 * 256 * 256 / 1024
    assert min(freed) > 0.9 * once, "the tensor is gone"
    assert all(rss > 0.5 * once for rss, _ in sizes), "each has read the images (the system may take pages back)"
    assert sum(pss for _, pss in sizes) < 1.05 * once
    assert ids[0] == ids[1] != "\n"
    folders = [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]
    assert [path.name for folder in folders for path in folder.iterdir()] == ["images.npy"], "the test images are few"


def test_a_shared_store_is_the_same_and_finds_its_file_again(tmp_path, monkeypatch):
    monkeypatch.setattr(image_store, "SHARED_FROM", 1000)
    images = random_images(9, (3, 20, 20))
    stores = [ImageStore({"b": images[:4], "a": images[4:]}) for _ in range(2)]
    expected = stores[0].images.clone()
    stores[0].share(tmp_path)
    (file,) = tmp_path.glob("images-*/images.npy")
    written = file.stat().st_mtime_ns
    os.utime(file, ns=(1, 1))
    stores[1].share(tmp_path)
    assert file.stat().st_mtime_ns == 1 != written, "not written again"
    for store in (*stores, pickle.loads(pickle.dumps(stores[0]))):
        assert store.images.equal(expected)
        assert store._file[0] == file
    stores[0].images.zero_()  # Goes to a copy of the page.
    assert stores[1].images.equal(expected)
    other = ImageStore({"a": images ^ 1})
    other.share(tmp_path)
    assert len(list(tmp_path.glob("images-*/images.npy"))) == 2
    few = ImageStore({"a": images[:, :, :4, :4]})
    few.share(tmp_path)
    assert few._file is None


def test_a_first_setup_that_knows_of_ranks_shares(tmp_path, monkeypatch):
    """A Trainer of one's own, which sets up once; or a process group that was made before."""
    monkeypatch.setattr(image_store, "SHARED_FROM", 1000)
    monkeypatch.setenv("LIGHTNING_NTK_CACHE", str(tmp_path))
    images = random_images(20, (3, 20, 20))
    splits = {
        "train": {"a": images[:5], "b": images[5:10]},
        "test": {"c": images[10:15], "d": images[15:]},
    }
    data = FromArrays(splits=splits, ways=2, shots=1, queries=2)
    data.trainer = SimpleNamespace(global_rank=1, world_size=2)
    data.setup("fit")
    assert len(list(tmp_path.glob("images-*/images.npy"))) == 2


@pytest.mark.parametrize("length", [0, 60, 5000])
def test_a_shared_file_that_was_cut_short_is_written_again(tmp_path, monkeypatch, length):
    monkeypatch.setattr(image_store, "SHARED_FROM", 1000)
    images = random_images(9, (3, 20, 20))
    ImageStore({"a": images}).share(tmp_path)
    (file,) = tmp_path.glob("images-*/images.npy")
    os.truncate(file, length)
    store = ImageStore({"a": images})
    store.share(tmp_path)
    assert store._file[0] == file
    assert np.array_equal(np.load(file), images)
    assert np.array_equal(store.images.numpy(), images)


def test_a_disk_that_cannot_be_written_costs_memory_and_no_more(tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(image_store, "SHARED_FROM", 1000)
    monkeypatch.setattr(np, "save", full)
    store = ImageStore({"a": random_images(9, (3, 20, 20))})
    with pytest.warns(UserWarning, match=r"No space left on device.*holds the images for itself.*LIGHTNING_NTK_CACHE"):
        store.share(tmp_path)
    assert np.array_equal(store.images.numpy(), random_images(9, (3, 20, 20)))
    assert [path.suffix for path in tmp_path.iterdir()] == [".lock"], "nothing stays of what was begun"


def test_without_locks_who_comes_second_takes_nothing_from_the_first(tmp_path, monkeypatch):
    """Another process writes the same images while this one is writing."""

    def unsupported(*_):
        raise OSError(38, "Function not implemented")

    plain = np.save
    others = []

    def save(file, images):
        plain(file, images)
        if not others:
            others.append(ImageStore({"a": random_images(9, (3, 20, 20))}))
            others[0].share(tmp_path)
            assert file.exists()

    monkeypatch.setattr(image_store, "SHARED_FROM", 1000)
    monkeypatch.setattr(storage.fcntl, "flock", unsupported)
    monkeypatch.setattr(np, "save", save)
    store = ImageStore({"a": random_images(9, (3, 20, 20))})
    store.share(tmp_path)
    assert store._file == others[0]._file
    assert store._file is not None
    assert len(list(tmp_path.iterdir())) == 2, "the file's folder and the lock"
    os.truncate(store._file[0], 60)
    damaged = ImageStore({"a": random_images(9, (3, 20, 20))})
    with pytest.warns(UserWarning, match="holds the images for itself"):
        damaged.share(tmp_path)  # Another may just be writing it: it is left alone.
    assert damaged._file is None


def test_another_person_can_map_what_the_umask_lets_them_though_the_lock_is_not_theirs(tmp_path, monkeypatch):
    monkeypatch.setattr(image_store, "SHARED_FROM", 1000)
    before = os.umask(0o027)
    try:
        ImageStore({"a": random_images(9, (3, 20, 20))}).share(tmp_path)
    finally:
        os.umask(before)
    (file,) = tmp_path.glob("images-*/images.npy")
    assert [path.stat().st_mode & 0o777 for path in (file.parent, file)] == [0o750, 0o640]
    monkeypatch.setattr(image_store, "locked", lambda file: pytest.fail("asked for the lock"))
    store = ImageStore({"a": random_images(9, (3, 20, 20))})
    store.share(tmp_path)
    assert store._file[0] == file
