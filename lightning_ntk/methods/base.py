"""`MetaLearner`, the base class of every method.

A method adds `meta_loss(episodes)` and `adapt(support_x, support_y)`. Training, validation, testing, attacks and
out-of-distribution evaluation are written once, against these two.
"""

import contextlib
import math
import re
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from pytorch_lightning.utilities import rank_zero_warn
from torch import Tensor, nn

from lightning_ntk.episode import Episode, TaskSpec
from lightning_ntk.errors import ConfigError, DivergenceError, check_positive
from lightning_ntk.networks.base import couples_examples
from lightning_ntk.ntk.checks import check_is_allowed
from lightning_ntk.ntk.layers import plain_attention
from lightning_ntk.running.results import mean_and_ci95
from lightning_ntk.running.schedule import UNSCHEDULED

# Maps query inputs [m, *input_shape] to outputs [m, C]; differentiable in its input and needs nothing else.
Predictor = Callable[[Tensor], Tensor]

# What PyTorch says where a layer has no such derivative, or none of many tasks or directions at once.
LACKING = re.compile(
    r"Batching rule not implemented|do not yet support|(derivative|jvp).* is not implemented|forward AD|forward-mode AD"
)
# What recurrent layers end in; elsewhere it is a mistake about shapes.
LACKING_IN_RECURRENT = re.compile(r"match the broadcast shape")
RECURRENT = str(Path(nn.modules.rnn.__file__))
MODULE = str(Path(nn.modules.module.__file__))


class MetaLearner(pl.LightningModule):
    """Trains a network over tasks and adapts it to new ones.

    Args:
        network: maps inputs `[n, *input_shape]` to outputs `[n, C]`.
        spec: what the tasks have in common.
        lr: meta learning rate of Adam.

    After each validation or test loop, `self.scores` holds the per-episode scores of the whole loop, gathered over all
    ranks and ordered by episode index: `{"accuracy": [...]}` (regression: `{"mse": [...]}`).
    """

    # False where the method's training needs no steps (a reference point): `train` then goes straight to testing.
    meta_trains = True
    # True where the method solves with the network's kernel, which parameters of 16 bits would spoil.
    solves_kernels = False
    # True where a task may have any number of ways, whatever the network's outputs are: a method without a head.
    any_ways = False
    # True where the predictor of `adapt` passes gradients on to a support that asks for them (`requires_grad`).
    adapts_differentiably = False

    def __init__(self, network: nn.Module, spec: TaskSpec, *, lr: float = 1e-3) -> None:
        super().__init__()
        check_positive(lr, "method.lr")
        if spec.kind == "classification" and spec.outputs < 2:
            raise ConfigError(f"Expected a TaskSpec of at least 2 classes, but it has outputs={spec.outputs}.")
        self.network = network
        self.spec = spec
        self.lr = lr
        self.scores: dict[str, list[float]] = {}
        # How the last meta-loss and its gradient were reached, by name: `meta_loss` may fill it; `training_step` logs
        # it as `meta_gradient/NAME`.
        self.reached: dict[str, Tensor | float] = {}
        # What the checkpoint tells of the run: plain types, so that it loads without unpickling anything else.
        self.run: dict[str, Any] = {}
        # What the run had logged when it was taken up from a checkpoint.
        self.measured: dict[str, float] = {}
        self._collected: list[tuple[Tensor, dict[str, Tensor]]] = []

    # ---- what a method provides ------------------------------------------------------------------------------------

    def meta_loss(self, episodes: Episode) -> Tensor:
        """Scalar training objective, the mean over the T tasks of a stacked `Episode`."""
        if not self.meta_trains:
            raise ConfigError(f"{type(self).__name__} has no training: leave trainer.fit out, and test it at once.")
        raise NotImplementedError(f"{type(self).__name__} needs a method meta_loss(episodes).")

    def adapt(self, support_x: Tensor, support_y: Tensor) -> Predictor:
        """Adapt to one task, from support `[n, *input_shape]` and its targets, without changing `self`.

        Works inside `torch.no_grad()` and in evaluation loops. The returned predictor stays valid until the network's
        parameters change.
        """
        raise NotImplementedError(f"{type(self).__name__} needs a method adapt(support_x, support_y).")

    @property
    def loss(self) -> Callable[[Tensor, Tensor], Tensor]:
        """The loss of one task, from outputs `[n, C]` and targets, a mean over its examples: cross-entropy, or the mean
        squared error in regression."""
        return F.cross_entropy if self.spec.kind == "classification" else F.mse_loss

    def probabilities(self, outputs: Tensor) -> Tensor:
        """Class probabilities `[..., C]` of outputs `[..., C]` in classification: the softmax, for cross-entropy."""
        return outputs.softmax(-1)

    # ---- written once for all methods ------------------------------------------------------------------------------

    def predict(self, episodes: Episode) -> Tensor:
        """Adapt to each task and predict its queries: `[T, m, C]`. A functional method overrides this with a vmap."""
        return torch.stack([self.adapt(task.support_x, task.support_y)(task.query_x) for task in episodes])

    def score(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Per-task scores `[T]` of outputs `[T, m, C]`: accuracy in [0, 1], or the mean squared error in regression.

        NaN where an adaptation has left the finite numbers: the largest of such outputs means nothing.
        """
        if self.spec.kind == "classification":
            accuracy = (outputs.argmax(-1) == targets).double().mean(-1)
            return {"accuracy": accuracy.where(outputs.isfinite().all(-1).all(-1), math.nan)}
        return {"mse": (outputs.double() - targets.double()).square().mean((-2, -1))}

    @property
    def couples_queries(self) -> bool:
        """Whether what an adapted model says of a query depends on the queries beside it (batch statistics)."""
        return couples_examples(self.network)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=self.lr)

    def check_precision(self, precision: str | None, *, trains: bool) -> None:
        """Raise `ConfigError` where kernels would be made of rounded Jacobians, and where steps of training would be
        lost in rounding."""
        if self.solves_kernels and precision in ("bf16-true", "16-true"):
            raise ConfigError(
                f"trainer.precision={precision} rounds the parameters, and with them the kernel that "
                f"{type(self).__name__} solves with. Use {precision.replace('true', 'mixed')}, which leaves them "
                "whole, or 32-true."
            )
        if trains and self.meta_trains and precision == "16-true":
            raise ConfigError(
                "trainer.precision=16-true keeps the parameters and the optimiser's state in float16, where Adam's eps "
                "of 1e-8 is 0: training would end in NaN at its second step. Use 16-mixed (on a GPU) or bf16-true."
            )

    def setup(self, stage: str) -> None:
        self.check_precision(self.trainer.precision, trains=stage == "fit")  # Of a Trainer of one's own.

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["run"] = self.run
        checkpoint["lr"] = self.lr
        checkpoint["measured"] = self.measured | training_measurements(self.trainer)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.measured = checkpoint.get("measured", {})
        # Adam's moments go on; the learning rate beside them may be of another setting, or of a schedule's last step.
        for group in (group for state in checkpoint.get("optimizer_states", []) for group in state["param_groups"]):
            if "lr" in checkpoint:
                group["lr"] = group.get(UNSCHEDULED, group["lr"]) * (self.lr / checkpoint["lr"])
            else:  # Of an earlier version.
                group["lr"] = self.lr
            if UNSCHEDULED in group:
                group[UNSCHEDULED] = group["lr"]

    def training_step(self, episodes: Episode, batch_idx: int) -> Tensor:
        with self._differentiated():
            loss = self.meta_loss(episodes)
        if not isinstance(loss, Tensor) or loss.dim():
            what = f"a tensor {list(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise ConfigError(f"{type(self).__name__}.meta_loss must return a scalar tensor, but returned {what}.")
        of_all, reached = self._over_ranks(loss.detach())
        # Reading a value off a GPU waits for it, so there the check is made only where the loop waits anyway.
        every = self.trainer.log_every_n_steps or 50  # 0 never logs.
        if self.device.type == "cpu" or self.global_step % every == 0:
            self.check_finite(of_all)
        self.log("train/loss", of_all, batch_size=episodes.tasks, prog_bar=True)
        self.log_dict({f"meta_gradient/{name}": value for name, value in reached.items()}, batch_size=episodes.tasks)
        return loss

    def _over_ranks(self, loss: Tensor) -> tuple[Tensor, dict[str, Tensor | float]]:
        """The mean of the ranks' losses and the largest of what each has reached, by one exchange.

        Without the barrier of `sync_dist=True`, at which the host would wait.
        """
        if self.trainer.world_size == 1:
            return loss, self.reached
        own = torch.stack([torch.as_tensor(value).to(loss) for value in (loss, *self.reached.values())])
        of_each = [torch.empty_like(own) for _ in range(self.trainer.world_size)]
        torch.distributed.all_gather(of_each, own)
        losses, *reached = torch.stack(of_each).unbind(1)
        return losses.mean(), {name: values.amax() for name, values in zip(self.reached, reached, strict=True)}

    @contextlib.contextmanager
    def _differentiated(self) -> Iterator[None]:
        """What is computed here has derivatives of the second order, or an error that says what to change.

        A decomposition fails where numbers are not finite: a `DivergenceError`. What PyTorch cannot differentiate is a
        matter of the network: a `ConfigError`.
        """
        try:
            with plain_attention():
                yield
        except torch.linalg.LinAlgError as error:
            raise DivergenceError(
                f"A kernel could not be decomposed at step {self.global_step}: {error} Its numbers are no longer "
                f"finite. Lower method.lr (now {self.lr}) or, at method.t=inf, set method.ridge."
            ) from error
        except (NotImplementedError, RuntimeError) as error:
            frames = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
            if MODULE in frames:  # The network's doing, and not that of a method of one's own.
                check_is_allowed(self.network, error)
            in_recurrent = RECURRENT in frames and LACKING_IN_RECURRENT.search(str(error))
            if not (in_recurrent or LACKING.search(str(error))):
                raise
            raise ConfigError(
                f"network: {type(self).__name__} takes derivatives that PyTorch does not have of one of its layers "
                f"({str(error).strip().splitlines()[0]}). Use another layer, a method that takes fewer, such as "
                "fomaml, or one task at a time (method.tasks_per_chunk=1) with couples_examples = True on the network: "
                "recurrent layers do that, if slowly."
            ) from error

    def check_finite(self, loss: Tensor) -> None:
        """Raise `DivergenceError` when the training loss is no longer a finite number."""
        if not torch.isfinite(loss):
            inner = f" or method.inner_lr (now {self.inner_lr})" if hasattr(self, "inner_lr") else ""
            raise DivergenceError(
                f"The meta-loss became {loss.item()} at step {self.global_step}. Lower method.lr (now {self.lr})"
                f"{inner}, set trainer.gradient_clip_val=1, or start again from the last checkpoint with ckpt=."
            )

    def validation_step(self, episodes: Episode, batch_idx: int) -> None:
        self._collect(episodes)

    def test_step(self, episodes: Episode, batch_idx: int) -> None:
        self._collect(episodes)

    def on_validation_epoch_end(self) -> None:
        self._log_scores("val")

    def on_test_epoch_end(self) -> None:
        self._log_scores("test")

    def check_labels(self, y: Tensor) -> None:
        """Raise `ConfigError` for class numbers that the network has no output for."""
        if self.spec.kind == "regression" or self.any_ways:
            return
        known = (y >= 0) & (y < self.spec.outputs)
        if not bool(known.all()):
            raise ConfigError(
                f"Expected labels from 0 to {self.spec.outputs - 1}, one for each output of the network, but got "
                f"{int(y[~known][0])}. Number the classes of a task from 0, and test on no more ways than were trained."
            )

    def _collect(self, episodes: Episode) -> None:
        self.check_labels(episodes.support_y)
        self.check_labels(episodes.query_y)
        with self._differentiated():
            outputs = self.predict(episodes).detach()
            self._check_predictions(outputs, episodes.query_y)
            scores = self.score(outputs, episodes.query_y)
        self._collected.append((episodes.index, scores))

    def _check_predictions(self, outputs: Tensor, targets: Tensor) -> None:
        """Raise `ConfigError` unless predictors gave outputs `[T, m, C]`: others may be scored, to no purpose."""
        count = outputs.shape[-1:] if self.any_ways else (self.spec.outputs,)
        if outputs.dim() != 3 or outputs.shape != (*targets.shape[:2], *count):
            tasks, queries = targets.shape[:2]
            raise ConfigError(
                f"{type(self).__name__}.adapt must give predictors of outputs [queries, {self.spec.outputs}], but for "
                f"{tasks} tasks of {queries} queries they gave {list(outputs.shape)}."
            )

    def _log_scores(self, split: str) -> None:
        self.scores = self._gather_scores()
        expected = "accuracy" if self.spec.kind == "classification" else "mse"
        if self.scores and expected not in self.scores:
            raise ConfigError(
                f"{type(self).__name__}.score must give {expected!r}, beside what else it measures, but gave "
                f"{', '.join(map(repr, self.scores))}."
            )
        for name, values in self.scores.items():
            lost = sum(math.isnan(value) for value in values)
            if lost and name == "accuracy":  # An error that is NaN says so itself.
                rank_zero_warn(
                    f"{split}/{name} is NaN: the adaptation to {lost} of {len(values)} tasks has left the finite "
                    "numbers. Lower method.inner_lr, method.adapt_lr or method.alpha, or set method.ridge, as the "
                    "method has them."
                )
            mean, half_width = mean_and_ci95(values)
            # All ranks hold the same gathered scores, so nothing is left to synchronise.
            self.log(f"{split}/{name}", mean, prog_bar=True, sync_dist=False)
            self.log(f"{split}/{name}_ci95", half_width, sync_dist=False)

    def _gather_scores(self) -> dict[str, list[float]]:
        """Every rank's scores by episode index: each episode counted once, whatever the number of ranks."""
        local = {
            int(index): {name: float(values[task]) for name, values in scores.items()}
            for indices, scores in self._collected
            for task, index in enumerate(indices)
        }
        self._collected.clear()
        ordered = list(gather_by_index(local).values())
        return {name: [scores[name] for scores in ordered] for name in (ordered[0] if ordered else {})}


def gather_by_index(local: dict[int, Any]) -> dict[int, Any]:
    """Every rank's entries, in the order of their indices; the same on all ranks."""
    parts = [local]
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        parts = [{}] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(parts, local)
    merged = {index: value for part in parts for index, value in part.items()}
    return {index: merged[index] for index in sorted(merged)}


def measurements(trainer: pl.Trainer) -> dict[str, float]:
    """The metrics that have been logged, by the dashboard's names."""
    return {name: float(value) for name, value in trainer.callback_metrics.items() if "/" in name}


def training_measurements(trainer: pl.Trainer) -> dict[str, float]:
    """The metrics that training has logged, but for those of probes: their names are the test's in a result."""
    probed = {name for callback in trainer.callbacks for name in getattr(callback, "logged", ())}
    return {name: value for name, value in measurements(trainer).items() if name not in probed}
