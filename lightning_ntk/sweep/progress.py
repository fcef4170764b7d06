"""How far a job is: read from the metrics.csv that its training writes."""

import csv
import dataclasses
import math
from pathlib import Path

# The validation scores by which methods are tuned, and whether more is better.
SCORES = {"val/accuracy": True, "val/mse": False}


@dataclasses.dataclass(frozen=True)
class Progress:
    """What metrics.csv says so far.

    Attributes:
        step: the last meta-step that a row names.
        metric: the validation score's name, None as long as there is none.
        scores: the validation scores by step, in order; NaN for one of a run that left the finite numbers.
    """

    step: int = 0
    metric: str | None = None
    scores: tuple[tuple[int, float], ...] = ()

    @property
    def best(self) -> float | None:
        """The best validation score so far."""
        finite = [value for _, value in self.scores if math.isfinite(value)]
        if not finite or self.metric is None:
            return None
        return max(finite) if SCORES[self.metric] else min(finite)


def read_progress(folder: Path) -> Progress:
    """The progress of the run in a folder; that of a run that has not begun where there is nothing to read."""
    try:
        with (folder / "metrics.csv").open(newline="", encoding="utf-8") as lines:
            rows = list(csv.DictReader(lines))
    except (OSError, UnicodeDecodeError, csv.Error):
        return Progress()
    step, metric, scores = 0, None, {}
    for row in rows:
        try:
            step = int(row["step"])
            for name in SCORES:
                if row.get(name):
                    metric, scores[step] = name, float(row[name])
        except (KeyError, TypeError, ValueError):  # The last row may be half written.
            continue
    return Progress(step, metric, tuple(sorted(scores.items())))
