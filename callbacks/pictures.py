"""Pictures of episodes: what a method was shown, what it said, how sure it was, and what an attack changes."""

import dataclasses
from typing import Any, ClassVar

import pytorch_lightning as pl
import torch
from matplotlib.figure import Figure
from torch import Tensor

from callbacks import pictures_figures
from callbacks.base import SPLIT, Measured, ProbeCallback, Stage
from callbacks.probing import check_outputs
from datamodules.base import as_unit_floats
from lightning_ntk.attacks.base import Attacked, check_episode
from lightning_ntk.attacks.suite import Suite, parse_size
from lightning_ntk.comparison.fit_figure import check_drawable
from lightning_ntk.episode import Episode
from lightning_ntk.errors import ConfigError, check_at_least
from lightning_ntk.methods.base import MetaLearner
from lightning_ntk.running.run import Run

KEY = "callbacks.pictures"
# Attacked queries that are shown of an episode.
ATTACKED = 4
# Lists that a probe gives, one for each episode; tensors made flat.
BEFORE, AFTER, PROBABILITIES = "pictures/before", "pictures/after", "pictures/probabilities"
CHOSEN, IMAGES, CHANGED = "pictures/chosen", "pictures/attacked_images", "pictures/attacked_probabilities"


class Pictures(ProbeCallback):
    """Draws figures/pictures/<stage>_episode_<i>.png, and the same in W&B. Measures nothing, logs its own time alone.

    In classification: the support; queries of each class, marked right or wrong, with the class probabilities
    (`MetaLearner.probabilities`) as bars; and queries that were right before PGD in the l-infinity norm changed them,
    with the change enlarged. In regression on one input: the fit before and after adaptation (Zhou et al. 2021,
    Figure 1), as <stage>_fits.png.

    Args:
        queries: shown of each class.
        eps: of the attack, in [0, 1] or as "8/255"; None draws none.
        steps: of the attack.
        **cadence: see `ProbeCallback`.

    Raises:
        ConfigError: a setting out of range; when the run is prepared, also data that are neither images nor curves.
    """

    name: ClassVar[str] = "pictures"

    def __init__(
        self,
        *,
        queries: int = 4,
        eps: float | str | None = "8/255",
        steps: int = 20,
        fit_every: int = 0,
        fit_episodes: int = 3,
        test_episodes: int = 3,
    ) -> None:
        super().__init__(fit_every=fit_every, fit_episodes=fit_episodes, test_episodes=test_episodes)
        check_at_least(1, queries, f"{KEY}.queries")
        self.queries = queries
        self.eps = None if eps is None else parse_size(eps, f"{KEY}.eps")
        self.suite = Suite(attacks=("pgd_linf",), linf_eps=() if eps is None else (self.eps,), steps=steps)
        try:
            self.suite.check(KEY)
        except ConfigError as error:
            raise ConfigError(str(error).replace(f"{KEY}.linf_eps", f"{KEY}.eps")) from error
        self.data: pl.LightningDataModule | None = None

    def prepare(self, run: Run) -> None:
        super().prepare(run)
        spec, name = run.method.spec, run.config.choices.data
        if spec.kind == "regression":
            check_drawable(spec, f"{KEY}: data={name}")
        elif len(spec.input_shape) != 3:
            raise ConfigError(
                f"{KEY} shows images, but data={name} has inputs of shape {spec.input_shape}. "
                "Leave pictures out of callbacks=[...]."
            )
        elif self.eps:
            check_episode(run.data.draw("test", 0, 0))

    def setup(self, trainer: pl.Trainer, pl_module: MetaLearner, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self.data = trainer.datamodule

    def probe(self, method: MetaLearner, episode: Episode, stage: Stage) -> Measured:
        predict = method.adapt(episode.support_x, episode.support_y)
        with torch.no_grad():
            outputs = predict(episode.query_x)
            check_outputs(outputs)
            if method.spec.kind == "regression":
                return {BEFORE: _flat(method.network(episode.query_x)), AFTER: _flat(outputs)}
            measured: Measured = {PROBABILITIES: _flat(method.probabilities(outputs.double()))}
        measured |= {CHOSEN: [], IMAGES: [], CHANGED: []}
        chosen = right_ones(outputs, episode.query_y)
        if self.eps and len(chosen):
            seed = int(torch.randint(2**31, ()))
            found = self._attacked(method.couples_queries, predict, episode, chosen, seed)
            check_outputs(found.outputs)
            measured |= {
                CHOSEN: _flat(chosen),
                IMAGES: _flat(found.images),
                CHANGED: _flat(method.probabilities(found.outputs.double())),
            }
        return measured

    def _attacked(self, coupled: bool, predict: Any, episode: Episode, chosen: Tensor, seed: int) -> Attacked:
        """The chosen queries under attack; the others with them only where the network couples its inputs."""
        suite = dataclasses.replace(self.suite, coupled=coupled)
        if not coupled:
            return suite.pgd_linf(self.eps, predict, episode.query_x[chosen], episode.query_y[chosen], seed)
        found = suite.pgd_linf(self.eps, predict, episode.query_x, episode.query_y, seed)
        return Attacked(found.images[chosen], found.outputs[chosen], found.queries[chosen])

    def figures(self) -> dict[str, Figure]:
        if not self.series or self.stage is None or self.data is None:
            return {}
        if BEFORE in self.series:
            return {f"{self.stage}_fits": self._fits()}
        drawn = {}
        for place, probabilities in enumerate(self.series[PROBABILITIES]):
            if probabilities:  # Empty where the probe failed.
                drawn[f"{self.stage}_episode_{place}"] = self._episode(place)
        return drawn

    def result(self) -> dict[str, Any] | None:
        """Nothing that results.json should keep."""
        return {"episodes": {}, "series": {}} if self.stage == "test" else None

    def _drawn(self, place: int) -> Episode:
        return self.data.draw(SPLIT[self.stage], 0, place).to("cpu")

    def _fits(self) -> Figure:
        episodes, before, after = [], [], []
        for place, values in enumerate(self.series[BEFORE]):
            if values:
                episodes.append(self._drawn(place))
                before.append(torch.tensor(values)[:, None])
                after.append(torch.tensor(self.series[AFTER][place])[:, None])
        return pictures_figures.fits(episodes, before, after)

    def _episode(self, place: int) -> Figure:
        episode = self._drawn(place)
        support, queries = (as_unit_floats(x, torch.float32) for x in (episode.support_x, episode.query_x))
        probabilities = torch.tensor(self.series[PROBABILITIES][place]).view(len(queries), -1)
        changed = None
        if self.series.get(CHOSEN) and self.series[CHOSEN][place]:
            chosen = torch.tensor(self.series[CHOSEN][place]).long()
            changed = pictures_figures.Changed(
                chosen,
                torch.tensor(self.series[IMAGES][place]).view(len(chosen), *queries.shape[1:]),
                torch.tensor(self.series[CHANGED][place]).view(len(chosen), -1),
                self.eps,
            )
        shown = Episode(support, episode.support_y, queries, episode.query_y, episode.index)
        return pictures_figures.episode(shown, probabilities, self.queries, changed)


def right_ones(outputs: Tensor, targets: Tensor) -> Tensor:
    """Indices of up to ATTACKED queries that are right, spread evenly over the classes: the k-th right one of each
    class comes before the k+1-th of any."""
    right = (outputs.argmax(-1) == targets).nonzero()[:, 0]
    of_class = targets[right]
    rank = torch.stack([(of_class[:k] == of_class[k]).sum() for k in range(len(right))]) if len(right) else right
    return right[torch.argsort(rank, stable=True)][:ATTACKED].sort().values


def _flat(values: Tensor) -> list[float]:
    return values.double().flatten().tolist()
