"""Where metrics go: metrics.csv in the run folder always, Weights & Biases beside it."""

import csv
import importlib.util
import os
import uuid
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from pytorch_lightning.loggers import Logger, WandbLogger
from pytorch_lightning.utilities import rank_zero_only

from lightning_ntk.errors import ConfigError

FIRST_COLUMNS = ("step", "epoch", "time/fit")


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
            with file.open(newline="", encoding="utf-8") as lines:
                self._rows = [row for row in csv.DictReader(lines) if _is_complete(row, resume_step)]
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
    return None not in row.values() and row["step"].isdigit() and int(row["step"]) < resume_step


def check_wandb(settings: DictConfig | None) -> None:
    """Raise `ConfigError` when the W&B logger that the settings ask for cannot be made."""
    if settings is None:
        return
    if importlib.util.find_spec("wandb") is None:
        raise ConfigError("logger=wandb needs the wandb package: pip install wandb, or use logger=csv.")
    if settings.mode not in ("offline", "online"):
        raise ConfigError(f"logger.wandb.mode must be 'offline' or 'online', but got {settings.mode!r}.")


def wandb_logger(settings: DictConfig, folder: Path, *, method: str, data: str, seed: int) -> WandbLogger:
    """The W&B logger of a run; its W&B run starts with the first metric and is kept in the run folder.

    A resumed run goes on under the same W&B id.
    """
    import wandb

    os.environ.setdefault("WANDB_SILENT", "true")
    id_file = folder / "wandb_id"
    if not id_file.exists():
        id_file.write_text(uuid.uuid4().hex[:12], encoding="utf-8")
    logger = WandbLogger(
        project=settings.project,
        entity=settings.entity,
        offline=settings.mode == "offline",
        save_dir=folder,
        id=id_file.read_text(encoding="utf-8"),
        resume="allow" if settings.mode == "online" else None,
        name=folder.name,
        group=method,
        tags=[method, data, f"seed{seed}"],
        log_model=False,
        settings=wandb.Settings(console="off", silent=True),
    )
    # Lightning hands wandb.init a setting that W&B has given up and warns of at every start.
    logger._wandb_init.pop("anonymous", None)
    return logger
