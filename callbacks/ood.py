"""Accuracy and calibration out of distribution: on other data sets, and on corrupted images of the source."""

import itertools
import math
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import pytorch_lightning as pl
import torch
from matplotlib.figure import Figure

from callbacks import ood_figures
from callbacks.base import Measured, ProbeCallback, Stage
from callbacks.ood_scores import calibration_error, difference_of_sets, scores
from callbacks.ood_targets import (
    Targets,
    build_targets,
    check_targets,
    fitted,
    made_ready,
    split_in_training,
    with_names,
)
from callbacks.probing import on_device
from lightning_ntk.corruptions import SEVERITIES, corruption
from lightning_ntk.episode import Episode
from lightning_ntk.errors import ConfigError
from lightning_ntk.methods.base import MetaLearner, Predictor
from lightning_ntk.running.results import mean_and_ci95, paired_difference
from lightning_ntk.running.run import Run

DEFAULT_CORRUPTIONS = ("gaussian_noise", "impulse_noise", "defocus_blur", "contrast", "pixelate")
SOURCE = "ood/source"
DIGITS = 10  # classes of data=digits


class OutOfDistribution(ProbeCallback):
    """Adapts to tasks of other data sets, and predicts corrupted queries of the source's.

    Names: `ood/source/...`, `ood/<target>/...`, `ood/corrupted_<kind>/...` (over all severities) and
    `ood/corrupted_<kind>/severity_<s>/accuracy`. docs/CALLBACKS.md defines each. The support set is never corrupted:
    what is measured is a task learnt from clean examples and met in worse conditions.

    Args:
        targets: data sets, by their names in conf/data, or names with settings (see `ood_targets.build_target`) or
            with data modules; None is digits where the run classifies images of 1 or 3 channels in at most 10 ways.
            Their episodes are those of their validation split in training, where it can give them, else of their test
            split. A Trainer of one's own takes data modules alone, and None is no target there.
        corruptions: kinds of `lightning_ntk.corruptions`; None is five of them where the data are images.
        severities, fit_severities: from 1 to 5, at the test and in training.
        **cadence: see `ProbeCallback`.
    """

    name = "ood"

    def __init__(
        self,
        *,
        targets: Targets | None = None,
        corruptions: Sequence[str] | None = None,
        severities: Sequence[int] = SEVERITIES,
        fit_severities: Sequence[int] = (3,),
        fit_every: int = 1,
        fit_episodes: int = 2,
        test_episodes: int = 40,
    ) -> None:
        super().__init__(fit_every=fit_every, fit_episodes=fit_episodes, test_episodes=test_episodes)
        check_targets(targets)
        self.targets = targets
        self.kinds = corruptions
        self.severities = {"test": tuple(dict.fromkeys(severities)), "fit": tuple(dict.fromkeys(fit_severities))}
        if not severities or not fit_severities:
            raise ConfigError(
                "callbacks.ood.severities and callbacks.ood.fit_severities must name at least one severity each, 1 to "
                "5. To leave corruptions out, set callbacks.ood.corruptions=[]."
            )
        for kind in corruptions or DEFAULT_CORRUPTIONS:
            for severity in (*severities, *fit_severities):
                try:
                    corruption(kind, severity)
                except ConfigError as error:
                    raise ConfigError(f"callbacks.ood.corruptions, callbacks.ood.severities: {error}") from error
        self.data: dict[str, pl.LightningDataModule] = {}
        self.splits: dict[str, dict[str, str]] = {}
        self.eval_seed = 0
        self._has_begun = False

    def prepare(self, run: Run) -> None:
        super().prepare(run)
        targets = self.targets
        if targets is None:
            small = run.data.task_settings().get("ways", math.inf) <= DIGITS
            is_it = run.config.choices.data == "digits"
            visible = _classifies_images(run.method) and run.method.spec.input_shape[0] in (1, 3)
            targets = ["digits"] if visible and small and not is_it else []
        self._check(run.method, targets)
        self._begin(build_targets(targets, run))

    def setup(self, trainer: pl.Trainer, pl_module: MetaLearner, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self.eval_seed = trainer.datamodule.eval_seed
        if self._has_begun:
            return
        targets = with_names(self.targets or [])
        for name, given in targets:
            if not isinstance(given, pl.LightningDataModule):
                raise ConfigError(
                    f"callbacks.ood.targets.{name}: `lightning-ntk` builds data sets from names and settings, but a "
                    f"Trainer of your own needs the data modules themselves: targets={{'{name}': DATA}}."
                )
        self._check(pl_module, targets)
        self._begin({name: made_ready(name, data, pl_module) for name, data in targets})

    def _check(self, method: MetaLearner, targets: Sequence | Mapping) -> None:
        """Decide on the corruptions; raise `ConfigError` unless something can be measured."""
        if self.kinds and not _classifies_images(method):
            raise ConfigError(
                "callbacks.ood.corruptions are of images in classes, but the data are not: set corruptions=[], and "
                "callbacks.ood.targets to other data sets of the same shapes."
            )
        if self.kinds is None:
            self.kinds = DEFAULT_CORRUPTIONS if _classifies_images(method) else ()
        if not targets and not self.kinds:
            raise ConfigError(
                "callbacks.ood has nothing to measure: name data sets with tasks of the run's shapes, as "
                "callbacks.ood.targets={noisy: {_target_: my_data.NoisySines}}, or leave ood out of callbacks=."
            )

    def _begin(self, targets: dict[str, pl.LightningDataModule]) -> None:
        self.data, self._has_begun = targets, True
        in_training = {name: split_in_training(data) for name, data in targets.items()}
        self.splits = {"fit": in_training, "test": dict.fromkeys(targets, "test")}

    # ---- one task --------------------------------------------------------------------------------------------------

    def probe(self, method: MetaLearner, episode: Episode, stage: Stage) -> Measured:
        predictor = method.adapt(episode.support_x, episode.support_y)
        measured = scores(method, predictor, episode.query_x, episode.query_y, SOURCE)
        for kind in self.kinds or ():
            measured |= self._corrupted(method, predictor, episode, kind, stage)
        for name, data in self.data.items():
            drawn = on_device(method.trainer, data.draw(self.splits[stage][name], 0, int(episode.index)))
            task = fitted(drawn, method.spec.input_shape)
            adapted = method.adapt(task.support_x, task.support_y)
            measured |= scores(method, adapted, task.query_x, task.query_y, f"ood/{name}")
        return measured

    def _corrupted(
        self, method: MetaLearner, predictor: Predictor, episode: Episode, kind: str, stage: Stage
    ) -> Measured:
        """Scores of the queries under one kind of corruption: accuracy at each severity, the rest over all of them."""
        place = f"ood/corrupted_{kind}"
        measured, found = {}, []
        for severity in self.severities[stage]:
            # A seed of its own: the noise must not depend on which other corruptions are asked for.
            identity = f"{self.eval_seed}/{stage}/{int(episode.index)}/{kind}/{severity}"
            # On the CPU, so that every device gets the same noise.
            generator = torch.Generator().manual_seed(zlib.crc32(identity.encode()))
            corrupted = corruption(kind, severity)(episode.query_x.float(), generator).to(episode.query_x.dtype)
            found.append(scores(method, predictor, corrupted, episode.query_y, place))
            measured[f"{place}/severity_{severity}/accuracy"] = found[-1][f"{place}/accuracy"]
        for name in found[0]:
            values = [one[name] for one in found]
            is_list = isinstance(values[0], list)
            measured[name] = list(itertools.chain(*values)) if is_list else sum(values) / len(values)
        return measured

    # ---- all tasks -------------------------------------------------------------------------------------------------

    def summarise(self, episodes: dict[str, list[float]], stage: Stage) -> dict[str, float]:
        score, worse = ("accuracy", "drop") if f"{SOURCE}/accuracy" in episodes else ("mse", "rise")
        source = episodes[f"{SOURCE}/{score}"]
        metrics = {}
        for name, values in episodes.items():
            place, _, what = name.rpartition("/")
            metrics[name], half_width = mean_and_ci95(values)
            if what != score:
                continue
            metrics[f"{name}_ci95"] = half_width
            if place != SOURCE and "/severity_" not in place:
                # Accuracy falls and errors rise: positive is worse than on the source in both.
                better, other = (source, values) if worse == "drop" else (values, source)
                difference = paired_difference if place.startswith("ood/corrupted_") else difference_of_sets
                metrics[f"{place}/{worse}"], metrics[f"{place}/{worse}_ci95"] = difference(better, other)
        for name in [name for name in self.series if name.endswith("/confidence")]:
            place = name.removesuffix("/confidence")
            metrics[f"{place}/ece"] = calibration_error(self.series.pop(name), self.series.pop(f"{place}/right"))
        return metrics

    def result(self) -> dict[str, Any] | None:
        """Beside the per-episode scores: for each corruption, accuracy over severities (0 is the clean source)."""
        found = super().result()
        if found is None or f"{SOURCE}/accuracy" not in self.metrics:
            return found
        severities = [0, *self.severities["test"]]
        curves = {"severities": severities}
        for kind in self.kinds or ():
            places = [SOURCE, *(f"ood/corrupted_{kind}/severity_{severity}" for severity in severities[1:])]
            curves[f"corrupted_{kind}"] = [self.metrics[f"{place}/accuracy"] for place in places]
        return {**found, "series": curves}

    def figures(self) -> dict[str, Figure]:
        found = self.result()
        if not found or not self.kinds or not found["series"]:
            return {}
        curves = dict(found["series"])
        severities = curves.pop("severities")
        others = {name: self.metrics[f"ood/{name}/accuracy"] for name in self.data}
        return {"corruptions": ood_figures.over_severities(severities, curves, others)}


def _classifies_images(method: MetaLearner) -> bool:
    return method.spec.kind == "classification" and len(method.spec.input_shape) == 3
