"""Accuracy under attack: of the adapted model's queries, and of a support set that was attacked before adapting."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, ClassVar

import pytorch_lightning as pl
import torch
from matplotlib.figure import Figure
from pytorch_lightning.utilities import rank_zero_warn
from torch import Tensor

from callbacks.adversarial_figure import NEVER, draw
from callbacks.base import Measured, ProbeCallback, Stage
from callbacks.probing import check_outputs
from lightning_ntk.attacks import art_adapter, masking
from lightning_ntk.attacks.base import (
    Attacked,
    Predictor,
    check_episode,
    check_eps,
    evaluate,
    in_parts,
    is_wrong,
)
from lightning_ntk.attacks.losses import attack_loss
from lightning_ntk.attacks.suite import LINF, NAMES, SIMBA, Suite, l2_name, linf_name, parse_size, parse_sizes
from lightning_ntk.attacks.white_box import input_gradient, l2_norms
from lightning_ntk.episode import Episode
from lightning_ntk.errors import ConfigError, check_at_least
from lightning_ntk.methods.base import MetaLearner
from lightning_ntk.ntk.memory import footprint
from lightning_ntk.ntk.network import functional
from lightning_ntk.ntk.precision import full_precision
from lightning_ntk.running.results import mean_and_ci95
from lightning_ntk.running.run import Run
from lightning_ntk.tracking.metric_names import CLEAN, is_l2

KEY = "callbacks.adversarial"
SUPPORT = "adversarial_support"
# Of queries that an episode may have none of: such an episode is left out of the mean.
OF_SOME = ("queries", "l2")


class Adversarial(ProbeCallback):
    """Attacks the queries of models adapted to clean support sets: the protocol of Zhou et al. (2021) and of Goldblum
    et al. (2020, "Adversarial Querying"). Images are in [0, 1]; docs/ROBUSTNESS.md states the threat models.

    Logs `adversarial/clean/accuracy` of the same episodes; `adversarial/<attack>/eps_<e>/accuracy`, with e in units of
    1/255 (l-infinity, noise) or of an image's l2 norm (pgd_l2); for SimBA `adversarial/simba_<basis>/accuracy`,
    `.../queries` (mean over the images that are right without attack; one that is never broken counts all of its
    queries) and `.../l2` (mean norm of the perturbations that broke one of them). `adversarial/masking/...` are the
    signs of `attacks.masking`, with a warning where there is one. `adversarial_support/pgd_linf/eps_<e>/accuracy` is
    the other threat model: the support images are attacked by PGD against the model adapted to the clean ones, and
    clean queries are answered by the model adapted to the attacked ones.
    `adversarial_support/through_adaptation/eps_<e>/accuracy` goes on from there with an attacker who knows the queries
    and sees through the adaptation.

    Args:
        attacks: at the test, some of fgsm, pgd_linf, pgd_l2, noise, simba_pixel, simba_dct. In training pgd_linf alone.
        linf_eps: of fgsm, pgd_linf and noise, and of the attack on the support: numbers in [0, 1], or "8/255".
        l2_eps: of pgd_l2.
        steps, step_size, loss: of PGD; see `attacks.white_box`. step_size: null takes 2/255 or, so that
            every start can cross the cube, 2.5 eps / steps where that is more.
        simba_step, simba_directions, simba_frequencies, simba_loss: see `attacks.simba`.
        support: whether the support is attacked, too (at the test).
        through_adaptation: whether it is also attacked by the gradient through the adaptation, see `attacks.support`:
            steps + 1 adaptations, each with its gradient, for each eps.
        fit_eps, fit_steps: of pgd_linf in training.
        art: attacks of the Adversarial Robustness Toolbox at the test, by a name for the metrics: `{square: {_target_:
            art.attacks.evasion.SquareAttack, eps: 8/255}}`.
        **probing: see `ProbeCallback`.

    Raises:
        ConfigError: a setting out of range; when the run is prepared, also regression, inputs that are no images, and
            what ART refuses.
    """

    name: ClassVar[str] = "adversarial"

    def __init__(
        self,
        *,
        attacks: Sequence[str] = NAMES,
        linf_eps: Sequence[float | str] = ("2/255", "4/255", "8/255", "16/255", "32/255"),
        l2_eps: Sequence[float | str] = (0.25, 0.5, 1.0, 2.0),
        steps: int = 20,
        step_size: float | str | None = None,
        loss: str = "margin",
        simba_step: float | str = 0.2,
        simba_directions: int = 100,
        simba_frequencies: float = 0.25,
        simba_loss: str = "log_odds",
        support: bool = True,
        through_adaptation: bool = False,
        fit_eps: float | str = "8/255",
        fit_steps: int = 5,
        art: dict[str, Any] | None = None,
        fit_every: int = 1,
        fit_episodes: int = 4,
        test_episodes: int = 20,
    ) -> None:
        super().__init__(fit_every=fit_every, fit_episodes=fit_episodes, test_episodes=test_episodes)
        self.suite = Suite(
            attacks=tuple(attacks),
            linf_eps=parse_sizes(linf_eps, f"{KEY}.linf_eps"),
            l2_eps=parse_sizes(l2_eps, f"{KEY}.l2_eps"),
            steps=steps,
            step_size=None if step_size is None else parse_size(step_size, f"{KEY}.step_size"),
            loss=loss,
            simba_step=parse_size(simba_step, f"{KEY}.simba_step"),
            simba_directions=simba_directions,
            simba_frequencies=simba_frequencies,
            simba_loss=simba_loss,
        )
        self.suite.check(KEY)
        self.support, self.through_adaptation = support, through_adaptation
        if through_adaptation and not support:
            raise ConfigError(f"{KEY}.through_adaptation=true goes on from the attack that {KEY}.support=true makes.")
        if not isinstance(art, dict | None):
            raise ConfigError(f"{KEY}.art must be attacks by name ({{square: {{_target_: ...}}}}), but got {art!r}.")
        self.art = {name: _with_numbers(settings, f"{KEY}.art.{name}") for name, settings in (art or {}).items()}
        for name in self.art.keys() & {*NAMES, "clean", "masking"}:
            raise ConfigError(f"{KEY}.art.{name}: the name belongs to another metric. Choose another one.")
        for name, settings in self.art.items():
            if settings.get("norm", 2) not in (2, "2", math.inf, "inf"):
                raise ConfigError(
                    f"{KEY}.art.{name}.norm must be 2 or inf, as tables have a unit of eps for these alone, but is "
                    f"{settings['norm']}."
                )
            if "eps" in settings:
                check_eps(settings["eps"], f"{KEY}.art.{name}.eps", most=math.inf if _is_l2(settings) else 1.0)
            if _is_l2(settings) and not is_l2(name):
                raise ConfigError(
                    f"{KEY}.art.{name} has norm=2, and tables tell the unit of eps by the name: call it {name}_l2."
                )
        if test_episodes and not (self.suite.named() or self.art or (support and self.suite.linf_eps)):
            raise ConfigError(
                f"{KEY} must have something to attack at the test, but has neither attacks with an eps, nor support "
                f"with one of linf_eps, nor art. Set one of these, {KEY}.test_episodes=0, or leave adversarial out."
            )
        eps = parse_size(fit_eps, f"{KEY}.fit_eps")
        check_eps(eps, f"{KEY}.fit_eps")
        check_at_least(1, fit_steps, f"{KEY}.fit_steps")
        self.fit_suite = dataclasses.replace(self.suite, attacks=("pgd_linf",), linf_eps=(eps,), steps=fit_steps)

    def prepare(self, run: Run) -> None:
        super().prepare(run)
        method, spec = run.method, run.method.spec
        if spec.kind != "classification" or len(spec.input_shape) != 3:
            what = "regression" if spec.kind == "regression" else f"inputs of shape {spec.input_shape}"
            raise ConfigError(
                f"{KEY} attacks classifiers of images, but data={run.config.choices.data} has {what}. Leave "
                "adversarial out of callbacks=[...]."
            )
        # Without a head, a method has as many outputs as the task that is attacked has ways.
        ways = run.data.task_settings().get("ways", spec.outputs) if method.any_ways else spec.outputs
        for name, loss in (("loss", self.suite.loss), ("simba_loss", self.suite.simba_loss)):
            if loss == "dlr" and ways < 3:
                which = "data.eval_ways" if method.any_ways else "data.ways"
                raise ConfigError(f"{KEY}.{name}=dlr needs three ways or more, but {which} is {ways}. Use margin.")
        if self.through_adaptation and not method.adapts_differentiably:
            raise ConfigError(
                f"{KEY}.through_adaptation needs gradients through the adaptation, which "
                f"method={run.config.choices.method} does not pass on. Leave it false."
            )
        check_precision(run.config.trainer.precision)
        check_episode(run.data.draw("test", 0, 0))
        if self.art and method.couples_queries:
            raise ConfigError(
                f"{KEY}.art: ART parts the queries into batches of its own, but this network normalises by the "
                "statistics of the batch. Use network.norm=group or none, or leave art out."
            )
        for name, settings in self.art.items():
            art_adapter.build(method.network, settings, spec.input_shape, ways, method.device, f"{KEY}.art.{name}")

    def setup(self, trainer: pl.Trainer, pl_module: MetaLearner, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        check_precision(trainer.precision)  # Of a Trainer of one's own; `prepare` has asked before anything is written.

    def probe(self, method: MetaLearner, episode: Episode, stage: Stage) -> Measured:
        # Attacked in the same arithmetic, all methods: shortened numbers hide small gains, and gradients with them.
        with full_precision(method.device.type):
            return self._attacked(method, episode, stage)

    def _attacked(self, method: MetaLearner, episode: Episode, stage: Stage) -> Measured:
        suite = dataclasses.replace(self.suite if stage == "test" else self.fit_suite, coupled=method.couples_queries)
        task = _Task(_adapt(method, episode.support_x, episode.support_y), episode.query_x, episode.query_y)
        # Seeded by the episode: alike on any rank, and the same start for every attack.
        seed = int(torch.randint(2**31, ()))
        outputs = evaluate(task.predict, task.x)
        check_outputs(outputs)
        measured: Measured = {CLEAN: task.accuracy(outputs)}
        if any(name not in (*SIMBA, "noise") for name in suite.attacks):
            gradient, _ = input_gradient(task.predict, task.x, task.y, attack_loss(suite.loss))
            measured["adversarial/masking/zero_gradients"] = masking.zero_gradients(gradient)
        for name, attack in suite.named().items():
            found = attack(task.predict, task.x, task.y, seed)
            measured[f"adversarial/{name}/accuracy"] = task.accuracy(found.outputs)
            if name in SIMBA:
                measured |= _of_simba(f"adversarial/{name}", suite, task, outputs, found, seed)
        if stage == "test":
            measured |= self._art(task, outputs.shape[-1], seed)
            if self.support:
                measured |= self._support_attacked(suite, method, episode, task, seed)
        return measured

    def _support_attacked(
        self, suite: Suite, method: MetaLearner, episode: Episode, task: "_Task", seed: int
    ) -> Measured:
        """Accuracy on clean queries after adapting to a support set that PGD changed: against the model adapted to the
        clean one, and then through the adaptation."""
        measured: Measured = {}
        for eps in suite.linf_eps:
            found = suite.pgd_linf(eps, task.predict, episode.support_x, episode.support_y, seed)
            misled = _adapt(method, found.images, episode.support_y)
            measured[f"{SUPPORT}/pgd_linf/{linf_name(eps)}/accuracy"] = task.accuracy(evaluate(misled, task.x))
            if self.through_adaptation:
                found = suite.pgd_through_adaptation(eps, method.adapt, episode, found.images)
                name = f"{SUPPORT}/through_adaptation/{linf_name(eps)}/accuracy"
                measured[name] = task.accuracy(found.outputs)
        return measured

    def _art(self, task: "_Task", outputs: int, seed: int) -> Measured:
        measured: Measured = {}
        for name, settings in self.art.items():
            generator = torch.Generator().manual_seed(seed)
            key = f"{KEY}.art.{name}"
            found = art_adapter.art_attack(
                task.predict, task.x, task.y, settings, outputs=outputs, generator=generator, key=key
            )
            eps = settings.get("eps")
            size = "" if eps is None else f"/{l2_name(eps) if _is_l2(settings) else linf_name(eps)}"
            measured[f"adversarial/{name}{size}/accuracy"] = task.accuracy(found.outputs)
            measured[f"adversarial/{name}{size}/queries"] = found.queries.double().mean().item()
        return measured

    def summarise(self, episodes: dict[str, list[float]], stage: Stage) -> dict[str, float]:
        metrics = super().summarise(episodes, stage)
        if stage == "fit":
            return metrics
        for name in (name for name in episodes if name.rpartition("/")[2] in OF_SOME):
            found = [value for value in episodes[name] if not math.isnan(value)]
            metrics[name], metrics[f"{name}_ci95"] = mean_and_ci95(found) if found else (math.nan, math.nan)
        curves = {
            name: {eps: episodes[f"adversarial/{name}/{linf_name(eps)}/accuracy"] for eps in self.suite.linf_eps}
            for name in LINF
            if name in self.suite.attacks
        }
        for name, value in masking.curve_signs(episodes[CLEAN], curves).items():
            metrics[f"adversarial/masking/{name}"] = value
        signs = {
            name.removeprefix("adversarial/masking/"): value
            for name, value in metrics.items()
            if name.startswith("adversarial/masking/") and not name.endswith("_ci95") and value > masking.TOLERANCE
        }
        if signs:
            rank_zero_warn(
                "adversarial: the gradients may be masked, and the accuracies under FGSM and PGD too high: "
                + ", ".join(f"{name} = {value:.3g}" for name, value in signs.items())
                + ". docs/ROBUSTNESS.md says what each sign means."
            )
        return metrics

    def figures(self) -> dict[str, Figure]:
        if self.stage != "test" or CLEAN not in self.episodes:
            return {}
        l2 = {"pgd_l2", *(name for name, settings in self.art.items() if _is_l2(settings))}
        return {"accuracy": draw(self.episodes, self.series, CLEAN, l2)}


def check_precision(precision: str | None) -> None:
    """Raise `ConfigError` where images would be as coarse as the attacks on them are small."""
    if str(precision).endswith("16-true"):
        raise ConfigError(
            f"{KEY}: with trainer.precision={precision} images are rounded to steps of about 1/255, the size "
            "of what an attack changes. Use bf16-mixed or 32-true, or leave adversarial out of callbacks=[...]."
        )


@dataclasses.dataclass(frozen=True)
class _Task:
    """An adapted model and its queries."""

    predict: Predictor
    x: Tensor
    y: Tensor

    def accuracy(self, outputs: Tensor) -> float:
        return (~is_wrong(outputs, self.y)).double().mean().item()


def _adapt(method: MetaLearner, x: Tensor, y: Tensor) -> Predictor:
    """The adapted model; where images do not depend on each other, it takes as many at once as is fast or fits."""
    at_once = None if method.couples_queries else footprint(*functional(method.network), x).pairs_at_once(x.device)
    return in_parts(method.adapt(x, y), at_once)


def _of_simba(prefix: str, suite: Suite, task: _Task, clean: Tensor, found: Attacked, seed: int) -> Measured:
    """What SimBA has to tell besides an accuracy; `broken_after` is the queries of each image, NEVER where it held."""
    broken = is_wrong(found.outputs, task.y)
    right = ~is_wrong(clean, task.y)
    lengths = l2_norms(found.images - task.x).flatten()
    return {
        f"{prefix}/queries": found.queries[right].double().mean().item(),
        f"{prefix}/l2": lengths[right & broken].double().mean().item(),
        f"{prefix}/broken_after": torch.where(broken, found.queries.double(), NEVER).tolist(),
        f"adversarial/masking/{prefix.rpartition('/')[2]}_wins": masking.black_box_wins(
            suite, task.predict, task.x, task.y, found, seed
        ),
    }


def _is_l2(settings: dict[str, Any]) -> bool:
    return settings.get("norm") in (2, "2")


def _with_numbers(settings: Any, key: str) -> dict[str, Any]:
    """ART's settings, with quotients such as eps="8/255" as numbers."""
    if not isinstance(settings, dict):
        raise ConfigError(f"{key} must be settings with a _target_, but got {settings!r}.")
    return {name: parse_size(v, f"{key}.{name}") if name in ("eps", "eps_step") else v for name, v in settings.items()}
