"""Where metrics go: metrics.csv in the run folder always. Weights & Biases, beside it, is in wandb_run.py."""

import csv
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.loggers import Logger
from pytorch_lightning.utilities import rank_zero_only

from lightning_ntk.tracking.media import Media
from lightning_ntk.tracking.wandb_run import WandbRun

FIRST_COLUMNS = ("step", "epoch", "time/fit")


def log_media(trainer: pl.Trainer, media: Mapping[str, Media]) -> None:
    """Show figures, tables, histograms and lines in W&B, by name ("ntk/spectrum"), at the step reached so far.

    Callbacks call it on every rank: rank 0 alone logs. Without W&B nothing happens; a run's files are the caller's.
    """
    for logger in trainer.loggers:
        if isinstance(logger, WandbRun):
            logger.log_media(media, trainer.global_step)


class CsvMetrics(Logger):
    """One wide metrics.csv, flushed row by row, so that a run killed at any point leaves what it measured.

    Lightning's CSVLogger deletes the rows of an earlier start when a run is resumed; this one keeps those before
    the step it resumes from.

    Args:
        file: the CSV file.
        resume_step: rows from this step on are dropped (they will come again); None starts a new file.
    """

    def __init__(self, file: Path, resume_step: int | None = None) -> None:
        super().__init__()
        self.file = file
        self._rows: list[dict[str, Any]] = []
        if resume_step is not None and file.exists():
            # A machine that went down in the middle of a row can leave zeros, or anything, at the end.
            with file.open(newline="", encoding="utf-8", errors="replace") as lines:
                whole = csv.DictReader(line.replace("\0", "") for line in lines)
                self._rows = [row for row in whole if _is_complete(row, resume_step)]
        self._columns = list(self._rows[0]) if self._rows else list(FIRST_COLUMNS)
        self._written = False

    @property
    def name(self) -> str:
        return "metrics"

    @property
    def version(self) -> int:
        return 0

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """The run folder's config.yaml holds them."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        row = {"step": step, **metrics}
        self._rows.append(row)
        new = [name for name in row if name not in self._columns]
        if new or not self._written:
            self._columns += new
            self._rewrite()
        else:
            with self.file.open("a", newline="", encoding="utf-8") as target:
                csv.DictWriter(target, self._columns).writerow(row)

    def _rewrite(self) -> None:
        temporary = self.file.with_suffix(".tmp")
        with temporary.open("w", newline="", encoding="utf-8") as target:
            writer = csv.DictWriter(target, self._columns)
            writer.writeheader()
            writer.writerows(self._rows)
        os.replace(temporary, self.file)
        self._written = True


def _is_complete(row: dict[str, Any], resume_step: int) -> bool:
    """Whether a row was written whole (a kill can cut the last one) and was measured before a step."""
    step = row.get("step") or ""
    return None not in (*row, *row.values()) and step.isdecimal() and int(step) < resume_step
