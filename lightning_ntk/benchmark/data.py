"""Drawing episodes: ours beside learn2learn's transforms on the same arrays, and their share of a meta-step."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from omegaconf import OmegaConf

from lightning_ntk.benchmark import steps
from lightning_ntk.benchmark.measure import Report, Work, float32_and_threads, interleave
from lightning_ntk.benchmark.problem import make_problem
from lightning_ntk.benchmark.rows import Table, quotient, timed_rows
from lightning_ntk.benchmark.settings import Settings
from lightning_ntk.settings.building import instantiate

OURS = "ours, a loader's batches"
ALONE = "ours, one episode at a time"
FLOOR = "copying as many bytes"
INDICES = "ours, which images alone"
ON_GPU = "ours, gathered on the GPU"
FUSED = "learn2learn, fused transforms"
PLAIN = "learn2learn, plain transforms"
CLASSES, IMAGES = 64, 600
# Tasks of a batch, as in training; batches that are timed at once.
BATCH, BATCHES = 16, 8


class Arrays(dict):
    """Classes as views into one array, `images`: nothing is copied."""

    def __init__(self, classes: int, images: int, shape: tuple[int, int, int], seed: int) -> None:
        whole = (classes * images, *shape)
        self.images = np.random.default_rng(seed).integers(0, 256, whole, dtype=np.uint8)
        super().__init__((f"{k:03}", self.images[k * images : (k + 1) * images]) for k in range(classes))


def data_table(settings: Settings, report: Report) -> Table:
    """Episodes on one thread, in turns; then a meta-step of Meta-RKHS-II."""
    few = settings.quick
    each = settings.shots + settings.queries
    classes, images = (2 * settings.ways, 2 * each) if few else (CLASSES, max(IMAGES, each))
    arrays = Arrays(classes, images, settings.image_shape, settings.seed)
    works = [*our_works(settings, arrays), copying(arrays, settings.ways * each), *learn2learn_works(settings, arrays)]
    with float32_and_threads(1):
        timings = interleave(works, settings.repeats, settings.limit_s, settings.device, report)
    step = steps.make_step(steps.RKHS_II, make_problem(settings))
    timings |= interleave([step], settings.repeats, settings.limit_s, settings.device, report)
    rows = timed_rows([*works, step], timings, OURS)
    for row in rows:
        if row.seconds:
            rate = f"{1 / row.seconds:.3g} {'tasks' if row.work == step.name else 'episodes'} a second"
            row.note = "; ".join(filter(None, [rate, row.note]))
        row.ratio = row.ratio or quotient(row.seconds, rows[0].seconds)
    title = (
        f"Episodes of {settings.ways} ways, {settings.shots} shots, {settings.queries} queries of {images} images of "
        f"{classes} classes, {settings.image_size}x{settings.image_size}x{settings.channels}, one thread"
    )
    return Table("data", title, OURS, rows)


def our_works(settings: Settings, arrays: Arrays) -> list[Work]:
    """Our datamodule as training uses it, episode by episode, and without the images."""
    data = make_data(settings, arrays, resident="host")
    keys = [(0, index) for index in range(BATCH * BATCHES)]

    def one_at_a_time() -> None:
        for key in keys:
            data.draw("train", *key)

    def numbers() -> None:
        for start in range(0, len(keys), BATCH):
            data.draw_numbers("train", 0, range(start, start + BATCH))

    works = [Work(OURS, _through(data)), Work(ALONE, one_at_a_time), Work(INDICES, numbers)]
    if settings.device == "cuda":
        works.append(Work(ON_GPU, _through(make_data(settings, arrays, resident="device"), "cuda")))
    return [dataclasses.replace(work, tasks=len(keys)) for work in works]


def copying(arrays: Arrays, images: int) -> Work:
    """The floor: as many images as an episode has, from their place into one that has been written before, in order."""
    source = torch.from_numpy(arrays.images)
    target = torch.empty_like(source[:images])
    parts = source[: len(source) // images * images].split(images)[: BATCH * BATCHES]
    return Work(FLOOR, lambda: [target.copy_(part) for part in parts], tasks=len(parts))


def _through(data: Any, device: str = "cpu") -> Callable[[], None]:
    """An epoch of the training loader; on a GPU with the transfer and what is done there."""
    loader = data.train_dataloader()

    def run() -> None:
        for batch in loader:
            if device != "cpu":
                data.on_after_batch_transfer(batch.to(device, non_blocking=True), 0)

    return run


def make_data(settings: Settings, arrays: Arrays, **choices: Any) -> Any:
    """A datamodule over the arrays; Hydra finds the class by its name, as everywhere."""
    config = {
        "_target_": "datamodules.from_arrays.FromArrays",
        "ways": settings.ways,
        "shots": settings.shots,
        "queries": settings.queries,
        "tasks_per_step": BATCH,
        "steps_per_epoch": BATCHES,
        "seed": settings.seed,
        **choices,
    }
    each = settings.shots + settings.queries
    test = Arrays(settings.ways, each, settings.image_shape, settings.seed + 1)
    test = {f"test{name}": images for name, images in test.items()}
    data = instantiate(OmegaConf.create(config), "data", splits={"train": arrays, "test": test})
    data.setup()
    return data


def learn2learn_works(settings: Settings, arrays: Arrays) -> list[Work]:
    """learn2learn's TaskDataset over the same arrays; absent where it is not installed."""
    try:
        import learn2learn
        from learn2learn.data import transforms
    except ImportError as error:
        return [Work(name, absent=f"learn2learn cannot be imported: {error}") for name in (FUSED, PLAIN)]
    source = LabelledImages(arrays)
    each = settings.shots + settings.queries
    meta = learn2learn.data.MetaDataset(source, indices_to_labels=dict(enumerate(source.labels)))
    load = [transforms.LoadData(meta), transforms.RemapLabels(meta)]
    chosen = {
        FUSED: [transforms.FusedNWaysKShots(meta, n=settings.ways, k=each), *load],
        PLAIN: [transforms.NWays(meta, settings.ways), transforms.KShots(meta, each), *load],
    }
    works = []
    for name, steps_ in chosen.items():
        tasks = learn2learn.data.TaskDataset(meta, task_transforms=steps_, num_tasks=-1)
        episodes = BATCH if name == FUSED else 4  # The plain ones take some ten times longer.
        works.append(Work(name, _samples(tasks, episodes), tasks=episodes))
    return works


def _samples(tasks: Any, episodes: int) -> Callable[[], None]:
    def run() -> None:
        for _ in range(episodes):
            tasks.sample()

    return run


class LabelledImages(torch.utils.data.Dataset):
    """The arrays as a dataset of (image, label)."""

    def __init__(self, arrays: Arrays) -> None:
        self.images = torch.from_numpy(arrays.images)
        self.labels = [label for label, images in enumerate(arrays.values()) for _ in images]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, number: int) -> tuple[torch.Tensor, int]:
        return self.images[number], self.labels[number]
