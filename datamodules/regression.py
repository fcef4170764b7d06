"""`RegressionDataModule`: families of functions y(x), drawn on the fly. A subclass writes one method, `sample_task`."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from datamodules.base import EpisodicDataModule
from lightning_ntk.episode import Episode, TaskSpec
from lightning_ntk.errors import DataError, check_at_least

# Inputs [n, inputs] to targets [n, outputs], both float64.
Function = Callable[[np.ndarray], np.ndarray]


class RegressionDataModule(EpisodicDataModule):
    """A task is a function that `sample_task` draws; its support and query inputs are uniform on a cube.

    Class attributes that a subclass may set: `inputs` and `outputs`, the dimensions of x and y, and `low` and `high`,
    the range of each coordinate of x.

    Args:
        shots: support points of a task.
        queries: query points of a training task.
        eval_shots: support points in validation and test; None means as in training.
        eval_queries: query points in validation and test.
        **loading: see `EpisodicDataModule`.
    """

    inputs = 1
    outputs = 1
    low, high = -5.0, 5.0

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

    def sample_task(self, rng: np.random.Generator) -> Function:
        """One task: a function from inputs `[n, inputs]` to targets `[n, outputs]`. All chance comes from `rng`."""
        raise NotImplementedError

    def family(self) -> dict[str, Any]:
        """Settings of the subclass's own, to be named in results and where runs differ."""
        return {}

    @property
    def spec(self) -> TaskSpec:
        return TaskSpec("regression", (self.inputs,), self.outputs)

    def task_settings(self) -> dict[str, Any]:
        shots, queries = self.shape["test"]
        return {
            "data": type(self).__name__,
            "shots": shots,
            "queries": queries,
            "test_episodes": self.episodes["test"],
            "eval_seed": self.eval_seed,
            **self.family(),
        }

    def draw(self, split: str, epoch: int, index: int) -> Episode:
        rng = self.rng(split, epoch, index)
        shots, queries = self.shape[split]
        function = self.sample_task(rng)
        x = rng.uniform(self.low, self.high, size=(shots + queries, self.inputs))
        y = np.asarray(function(x))
        if y.shape != (len(x), self.outputs):
            raise DataError(
                f"A task of {type(self).__name__} must map {x.shape} to {(len(x), self.outputs)}, but gave {y.shape}. "
                "See `inputs` and `outputs` of the class."
            )
        if np.iscomplexobj(y) or not np.isfinite(y).all():
            raise DataError(
                f"A task of {type(self).__name__} must give finite real numbers for x from {self.low} to {self.high}, "
                "but gave others. See `sample_task`, and `low` and `high`, of the class."
            )
        y = np.ascontiguousarray(y, dtype=np.float64)  # Torch knows no negative strides, nor all of numpy's types.
        x, y = (torch.from_numpy(a).to(torch.get_default_dtype()) for a in (x, y))
        return Episode(x[:shots], y[:shots], x[shots:], y[shots:], torch.tensor(index))
