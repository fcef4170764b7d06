"""`ProbeCallback`: what measures a method on fixed episodes while it trains, when it is tested, and alone.

A subclass says what to measure of one task. The rest is here: which episodes, on which rank, in what state, and where
the numbers go.
"""

import contextlib
import math
import numbers
import time
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import pytorch_lightning as pl
import torch
from matplotlib.figure import Figure
from pytorch_lightning.trainer.states import TrainerFn
from pytorch_lightning.utilities import rank_zero_warn
from torch import Tensor

from callbacks.probing import episode_seed, is_finite, on_device, undisturbed
from callbacks.timing import Timing
from lightning_ntk.episode import Episode
from lightning_ntk.errors import ConfigError, DivergenceError, check_at_least
from lightning_ntk.methods.base import MetaLearner, gather_by_index
from lightning_ntk.running import random_state
from lightning_ntk.running.results import mean_and_ci95
from lightning_ntk.running.run import Run
from lightning_ntk.tracking.loggers import log_media

Stage = Literal["fit", "test"]
SPLIT = {"fit": "val", "test": "test"}
# Numbers by metric of one episode; a list of them goes into `series` and is not averaged.
Measured = dict[str, float | list[float]]
# How numbers that are not finite end a computation.
NOT_FINITE = (FloatingPointError, OverflowError, DivergenceError, torch.linalg.LinAlgError)


class ProbeCallback(pl.Callback):
    """Measures a method on the first episodes of the validation split in training, and of the test split at the test.

    The episodes are those of `data.draw(split, 0, i)`, shared out over the ranks by i and gathered by i: every rank
    ends with the same numbers, whatever the number of ranks. A probe leaves training as it was: parameters, their
    gradients, buffers, modes and random generators. Data without a validation split are probed at the test alone.

    Args:
        fit_every: validations from one probe to the next; 0 never probes in training.
        fit_episodes, test_episodes: episodes of a probe; 0 leaves the stage out.

    Attributes:
        name: the key in conf/callbacks/NAME.yaml, and the prefix of the metrics.
        episodes: of the last probe, numbers by metric, ordered by episode and gathered over ranks. NaN where an
            episode's probe failed because of numbers that are not finite (reported as a warning).
        series: of the last probe, the lists that `probe` gave, by metric and ordered by episode.
        metrics: of the last probe, what was logged. `time/NAME` is the seconds of all probes in training so far.
        logged: names of the metrics of all probes so far.
        stage: of the last probe; None before one.
        step: finished training steps at the last probe.
        folder: the run folder, or the evaluation's; None outside `train` and `evaluate`.
    """

    name: ClassVar[str]

    def __init__(self, *, fit_every: int = 1, fit_episodes: int = 4, test_episodes: int = 40) -> None:
        if not hasattr(self, "name"):
            raise ConfigError(f'{type(self).__name__} needs a name for its metrics: name: ClassVar[str] = "...".')
        for key, value in (("fit_every", fit_every), ("fit_episodes", fit_episodes), ("test_episodes", test_episodes)):
            check_at_least(0, value, f"callbacks.{self.name}.{key}")
        self.fit_every = fit_every
        self.counts = {"fit": fit_episodes, "test": test_episodes}
        self.episodes: dict[str, list[float]] = {}
        self.series: dict[str, Any] = {}
        self.metrics: dict[str, float] = {}
        self.logged: set[str] = set()
        self.stage: Stage | None = None
        self.step = 0
        self.folder: Path | None = None
        self.seconds = {"fit": 0.0, "test": 0.0}
        self._validations = 0

    # ---- what a subclass provides ----------------------------------------------------------------------------------

    def probe(self, method: MetaLearner, episode: Episode, stage: Stage) -> Measured:
        """Measure one task `[n, ...]`: on the method's device, images in [0, 1], gradients enabled, modules in eval
        mode, the random generators seeded by the episode. Numbers by full metric name ("ntk/trace")."""
        raise NotImplementedError

    def summarise(self, episodes: dict[str, list[float]], stage: Stage) -> dict[str, float]:
        """From per-episode numbers to what is logged: by default the mean of each, and `<name>_ci95`."""
        metrics = {}
        for name, values in episodes.items():
            metrics[name], metrics[f"{name}_ci95"] = mean_and_ci95(values)
        return metrics

    def figures(self) -> dict[str, Figure]:
        """Drawn by rank 0 when training ends and after the test: figures/NAME/KEY.png in the run folder, and W&B."""
        return {}

    def prepare(self, run: Run) -> None:
        """Called once by `train` and `evaluate`, the method at its initial parameters, before anything is written.

        Raises:
            ConfigError: settings that cannot work with this method or these data.
        """
        self.folder = run.folder

    # ---- written once ----------------------------------------------------------------------------------------------

    def setup(self, trainer: pl.Trainer, pl_module: MetaLearner, stage: str) -> None:
        if trainer.datamodule is None:
            raise ConfigError(
                f"callbacks.{self.name} draws its episodes from the data module, but the Trainer was given loaders. "
                "Give it the data module itself, as trainer.fit(method, datamodule=data)."
            )

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: MetaLearner) -> None:
        if trainer.sanity_checking or trainer.state.fn != TrainerFn.FITTING:
            return
        self._validations += 1
        if self.fit_every and self.counts["fit"] and self._validations % self.fit_every == 0:
            self._measure(trainer, pl_module, "fit")

    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: MetaLearner) -> None:
        if self.counts["test"]:
            self._measure(trainer, pl_module, "test")
            self._write_figures(trainer)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: MetaLearner) -> None:
        if self.stage == "fit":
            self._write_figures(trainer)

    def state_dict(self) -> dict[str, Any]:
        return {"validations": self._validations, "fit_s": self.seconds["fit"]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._validations, self.seconds["fit"] = state["validations"], state["fit_s"]

    def result(self) -> dict[str, Any] | None:
        """What results.json keeps of the test's probe under `probes`: `episodes` and `series`; None without one."""
        return {"episodes": self.episodes, "series": self.series} if self.stage == "test" else None

    def _measure(self, trainer: pl.Trainer, method: MetaLearner, stage: Stage) -> None:
        """Probe all episodes, gather, summarise and log."""
        started = time.perf_counter()
        timing = next((c for c in trainer.callbacks if isinstance(c, Timing)), None)
        pause = timing.paused(method.device) if timing and stage == "fit" else contextlib.nullcontext()
        self.stage, self.step = stage, trainer.global_step
        with pause, random_state.kept(method.device):
            found, failures = self._probe_own_share(trainer, method, stage)
            found, failures = gather_by_index(found), gather_by_index(failures)
            self._order(found, sorted({*found, *failures}))
            self.metrics = self.summarise(self.episodes, stage) if self.episodes else {}
        if failures:
            self.metrics[f"{self.name}/failed_episodes"] = float(len(failures))
            index, reason = next(iter(failures.items()))
            rank_zero_warn(
                f"{self.name}: {len(failures)} of {self.counts[stage]} probe episodes could not be measured at step "
                f"{self.step}, their numbers being no longer finite. Episode {index}: {reason}"
            )
        self.logged |= self.metrics.keys()
        self.seconds[stage] += time.perf_counter() - started
        seconds = f"time/{self.name}" if stage == "fit" else f"time/{self.name}_test"
        for name, value in {**self.metrics, seconds: self.seconds[stage]}.items():
            # All ranks hold the same numbers, so nothing is left to synchronise.
            method.log(name, value, sync_dist=False)

    def _probe_own_share(
        self, trainer: pl.Trainer, method: MetaLearner, stage: Stage
    ) -> tuple[dict[int, Measured], dict[int, str]]:
        """This rank's episodes by index: their numbers, or why there are none."""
        found: dict[int, Measured] = {}
        failures: dict[int, str] = {}
        data, split = trainer.datamodule, SPLIT[stage]
        for index in range(trainer.global_rank, self.counts[stage], trainer.world_size):
            episode = on_device(trainer, data.draw(split, 0, index))
            try:
                # Each episode begins in the same state, so that it does not matter which rank has had which before.
                with undisturbed(method), trainer.precision_plugin.forward_context():
                    random_state.seed_all(episode_seed(data.eval_seed, split, index), method.device)
                    found[index] = self._checked(self.probe(method, episode, stage))
            except Exception as error:
                if not isinstance(error, NOT_FINITE) and is_finite(method):
                    raise
                failures[index] = f"{type(error).__name__}: {error}"
        return found, failures

    def _checked(self, measured: Measured) -> Measured:
        """What `probe` gave; raise `ConfigError` unless it is numbers, or lists of them, by name."""
        if not isinstance(measured, dict):
            raise ConfigError(f"{type(self).__name__}.probe must return numbers by name, but returned {measured!r}.")
        for name, value in measured.items():
            is_one = isinstance(value, np.ndarray | Tensor) and math.prod(value.shape) == 1
            is_number = isinstance(value, numbers.Real) or is_one
            if not (is_number or isinstance(value, list)):
                raise ConfigError(
                    f"{type(self).__name__}.probe must return a number or a list for {name}, but returned {value!r}."
                )
        return measured

    def _order(self, found: dict[int, Measured], indices: list[int]) -> None:
        """Numbers by episode to numbers by metric.

        Raises:
            ConfigError: the names are not the same for all episodes.
        """
        kinds = {i: {name: isinstance(value, list) for name, value in found[i].items()} for i in sorted(found)}
        first = next(iter(kinds), None)
        for index, kind in kinds.items():
            for name, _ in sorted(kind.items() ^ kinds[first].items()):
                how = "missing" if name not in kind else "of another type" if name in kinds[first] else "new"
                raise ConfigError(
                    f"{type(self).__name__}.probe must return the same names for every episode, but {name} is {how} in "
                    f"episode {index}, unlike episode {first}. Return math.nan, or [] of a list, where there is none."
                )
        self.episodes, self.series = {}, {}
        for name, is_list in kinds.get(first, {}).items():
            values = [found.get(index, {}).get(name, [] if is_list else math.nan) for index in indices]
            (self.series if is_list else self.episodes)[name] = values if is_list else [float(v) for v in values]

    def _write_figures(self, trainer: pl.Trainer) -> None:
        if not trainer.is_global_zero or self.folder is None:
            return
        for key, figure in self.figures().items():
            file = self.folder / "figures" / self.name / f"{key}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(file, dpi=120)
            log_media(trainer, {f"{self.name}/{key}": figure})
