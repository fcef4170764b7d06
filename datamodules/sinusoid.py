"""Sine waves: the regression tasks of Finn et al. (2017)."""

import math
from typing import Any

import numpy as np
import torch

from datamodules.base import EpisodicDataModule, check_at_least
from lightning_ntk.episode import Episode, TaskSpec


class Sinusoid(EpisodicDataModule):
    """A task is y = A sin(x - b) with A from U[0.1, 5], b from U[0, pi], and x from U[-5, 5], drawn on the fly.

    Args:
        shots: support points of a task.
        queries: query points of a training task.
        eval_shots: support points in validation and test; None means as in training.
        eval_queries: query points in validation and test.
        **loading: see `EpisodicDataModule`.
    """

    def __init__(
        self,
        *,
        shots: int = 10,
        queries: int = 50,
        eval_shots: int | None = None,
        eval_queries: int = 100,
        **loading: Any,
    ) -> None:
        super().__init__(**loading)
        self.shape = {"train": (shots, queries)}
        self.shape["val"] = self.shape["test"] = (shots if eval_shots is None else eval_shots, eval_queries)
        for key, value in (("shots", shots), ("queries", queries), ("eval_queries", eval_queries)):
            check_at_least(1, value, f"data.{key}")
        check_at_least(1, self.shape["test"][0], "data.eval_shots")

    @property
    def spec(self) -> TaskSpec:
        return TaskSpec("regression", (1,), 1)

    def task_settings(self) -> dict[str, Any]:
        shots, queries = self.shape["test"]
        return {
            "data": type(self).__name__,
            "shots": shots,
            "queries": queries,
            "test_episodes": self.episodes["test"],
            "eval_seed": self.eval_seed,
        }

    def draw(self, split: str, epoch: int, index: int) -> Episode:
        rng = self.rng(split, epoch, index)
        shots, queries = self.shape[split]
        amplitude, phase = rng.uniform(0.1, 5.0), rng.uniform(0.0, math.pi)
        x = rng.uniform(-5.0, 5.0, size=(shots + queries, 1))
        x, y = (torch.from_numpy(a).to(torch.get_default_dtype()) for a in (x, amplitude * np.sin(x - phase)))
        return Episode(x[:shots], y[:shots], x[shots:], y[shots:], torch.tensor(index))
