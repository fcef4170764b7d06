"""How training scales: two processes beside one (DDP), and what a sweep adds to each of its jobs.

Both are measured on whole trainings, in processes of their own, on letters (28x28) with Meta-RKHS-II.
"""

import csv
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytorch_lightning as pl
import torch

from lightning_ntk.benchmark.measure import Report, Work, interleave
from lightning_ntk.benchmark.rows import Figure, Table, quotient, timed_rows
from lightning_ntk.benchmark.settings import Settings
from lightning_ntk.errors import LightningNTKError
from lightning_ntk.sweep.job import read_state
from lightning_ntk.sweep.process import job_environment

ONE, TWO = "a training, 1 process", "a training, 2 processes"
TO_FIRST_STEP = "a sweep's job, from the end of the one before to its first step"
IMPORTS = "the imports of a training"
PACKAGE = Path(__file__).resolve().parents[2]
TRAINING = ["data=glyphs", "method=meta_rkhs_ii", "network.norm=group", "logger=csv", "test=false"]
TRAINING += ["data.val_episodes=2", "trainer.enable_progress_bar=false"]
SMALL = ["data.ways=3", "data.queries=2", "network.filters=8"]
# (Tasks a step, shared by all processes; steps), and the same in the quick form.
SIZES = {False: (8, 24), True: (4, 6)}
JOBS = 3
# What a training of TRAINING imports, built or not.
MODULES = ("lightning_ntk.train", "callbacks.timing", "datamodules.glyphs", "lightning_ntk.methods.meta_rkhs_ii")
MODULES += ("lightning_ntk.networks.conv4",)
STARTED = "first_step"
TIMEOUT_S = 1800


class FirstStep(pl.Callback):
    """Notes the Unix time at which the first step begins, in the run folder."""

    def on_train_batch_start(self, trainer: pl.Trainer, *_: object) -> None:
        file = trainer.loggers[0].file.with_name(STARTED)
        if not file.exists():
            file.write_text(str(time.time()))


def ddp_table(settings: Settings, report: Report) -> Table:
    """Seconds an episode of two processes and of one, with one thread each and the same meta-batch."""
    words = _words(settings)
    tasks, steps = SIZES[settings.quick]
    words += [f"data.tasks_per_step={tasks}", f"steps={steps}", f"val_every={steps}", "callbacks=[timing,throughput]"]
    there = torch.cuda.device_count() if settings.device == "cuda" else os.cpu_count() or 1
    absent = "" if there > 1 else f"there is one {'GPU' if settings.device == 'cuda' else 'core'}"
    works = [
        Work(ONE, clock=lambda: _seconds_an_episode(words, 1)),
        Work(TWO, clock=lambda: _seconds_an_episode(words, 2), absent=absent),
    ]
    timings = interleave(works, settings.repeats, settings.limit_s, settings.device, report)
    rows = timed_rows(works, timings, ONE)
    for row in rows:
        row.note = row.note or f"{1 / row.seconds:.1f} episodes a second"
    title = f"One training by two processes, {tasks} tasks a step, {_problem(settings)}"
    return Table("scaling_ddp", title, ONE, rows)


def sweep_table(settings: Settings, report: Report) -> Table:
    """Seconds from the end of one job of a sweep to the first step of the next, and those of its imports alone."""
    words = [*_words(settings), "steps=1", "val_every=1", "data.tasks_per_step=1"]
    words += [f"+callbacks.first_step={{_target_: {FirstStep.__module__}.FirstStep}}"]
    works = [Work(TO_FIRST_STEP, clock=lambda: _seconds_to_first_step(words)), Work(IMPORTS, clock=_seconds_of_imports)]
    timings = interleave(works, settings.repeats, settings.limit_s, settings.device, report)
    rows = timed_rows(works, timings, IMPORTS)
    for row in rows:
        row.note = row.note or f"{row.seconds:.2f} s"
    return Table("scaling_sweep", f"A job of a sweep, one task and step, {_problem(settings)}", IMPORTS, rows)


def scaling_tables(settings: Settings, report: Report) -> Iterator[Table]:
    """Both."""
    yield ddp_table(settings, report)
    yield sweep_table(settings, report)


def ddp_figure(table: Table, goal: float | None) -> Figure:
    """Episodes a second of two processes over one."""
    value = quotient(table.row(ONE).seconds, table.row(TWO).seconds)
    return Figure("Episodes a second: 2 processes over 1", value, goal, more_is_better=True, note=table.row(TWO).note)


def sweep_figure(table: Table, goal: float | None) -> Figure:
    """What a sweep, composing and building add to a job."""
    job, imports = table.row(TO_FIRST_STEP).seconds, table.row(IMPORTS).seconds
    value = None if job is None or imports is None else job - imports
    return Figure("Seconds of a sweep's job before its first step, without imports", value, goal)


def _problem(settings: Settings) -> str:
    return f"Meta-RKHS-II on letters of 28x28, {3 if settings.quick else 5}-way 1-shot, group norm"


def _words(settings: Settings) -> list[str]:
    accelerator = {"cpu": "cpu", "cuda": "gpu"}[settings.device]
    return [*TRAINING, f"trainer.accelerator={accelerator}", *(SMALL if settings.quick else [])]


def _seconds_an_episode(words: Sequence[str], devices: int) -> float:
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        _call(["-m", "lightning_ntk.cli", "train", *words, f"trainer.devices={devices}", f"run_dir={run}"])
        with (run / "metrics.csv").open(newline="", encoding="utf-8") as lines:
            (rate,) = [row["time/episodes_per_s"] for row in csv.DictReader(lines) if row["time/episodes_per_s"]]
    return 1 / float(rate)


def _seconds_to_first_step(words: Sequence[str]) -> float:
    """The mean over the jobs of a sweep but for its first, which waits for nothing."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "sweep"
        _call(["-m", "lightning_ntk.cli", "sweep", *words, f"seed=range({JOBS})", "jobs=1", f"out={out}"])
        jobs = [out / f"seed={seed}" for seed in range(JOBS)]
        firsts = [float((job / STARTED).read_text()) for job in jobs]
        ended = [read_state(job).ended for job in jobs]
    return sum(first - before for first, before in zip(firsts[1:], ended[:-1], strict=True)) / (JOBS - 1)


def _seconds_of_imports() -> float:
    """From the start of a process until it has imported everything: a job's first step waits for no more of it."""
    started = time.time()
    return float(_call(["-c", f"import time, {', '.join(MODULES)}; print(time.time())"])) - started


def _call(arguments: Sequence[str]) -> str:
    """What Python prints, run with one thread a process, as no rank of anything."""
    path = os.pathsep.join([str(PACKAGE), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = job_environment(os.environ, {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"})
    command = [sys.executable, "-W", "ignore", *arguments]
    settings = {"env": environment, "stdin": subprocess.DEVNULL, "capture_output": True, "text": True}
    done = subprocess.run(command, **settings, check=False, timeout=TIMEOUT_S)
    if done.returncode:
        why = (done.stderr.strip().splitlines() or done.stdout.strip().splitlines() or ["?"])[-1]
        raise LightningNTKError(f"{' '.join(arguments[:3])} ended with status {done.returncode}: {why}")
    return done.stdout
