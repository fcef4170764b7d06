"""How well the network's neural tangent kernel is conditioned, and how far training has moved it."""

import math
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from matplotlib.figure import Figure
from torch import Tensor

from callbacks import ntk_figures
from callbacks.base import Measured, ProbeCallback, Stage
from callbacks.ntk_kernels import evenly, kernels, where_not_finite
from lightning_ntk.episode import Episode
from lightning_ntk.errors import ConfigError, DivergenceError
from lightning_ntk.methods.base import MetaLearner
from lightning_ntk.ntk import functional, spectrum
from lightning_ntk.ntk.params import Params
from lightning_ntk.ntk.precision import full_precision
from lightning_ntk.running.run import Run

# Points that stand for a spectrum where it is kept.
KEPT_EIGENVALUES = 50
# These vary over orders of magnitude between episodes: their logarithms are averaged.
GEOMETRIC = ("ntk/condition_number", "ntk/condition_number_ridge")
# Measured for other ends than logging.
KERNEL, EIGENVALUES, EIGENVALUES_AT_START = "ntk/kernel", "ntk/eigenvalues", "ntk/eigenvalues_at_start"


class NTK(ProbeCallback):
    """Measures the empirical kernel Theta(X, X) of the network on an episode's support, before adaptation.

    The kernel is the network's at the meta-parameters, so the numbers mean the same for every method; docs/CALLBACKS.md
    defines each. Where the network normalises by batch statistics, it is the kernel of those examples as one batch.

    Args:
        fit_examples, test_examples: support examples at most that the kernel is of, spread evenly over the support,
            which is ordered by class; None takes all. A network with batch statistics needs n C backward passes over n
            examples.
        kernel: "full" `[n C, n C]`, or "trace" `[n, n]`, the mean over the C outputs, as `method.kernel=trace` has it.
        ridge: added to the eigenvalues for `ntk/condition_number_ridge`; None takes the method's own (0 if it has
            none).
        by_layer: `ntk/layer/<name>/...` for each layer's part of the kernel as well.
        **cadence: see `ProbeCallback`.
    """

    name = "ntk"

    def __init__(
        self,
        *,
        fit_every: int = 1,
        fit_episodes: int = 2,
        test_episodes: int = 20,
        fit_examples: int | None = 10,
        test_examples: int | None = 25,
        kernel: str = "full",
        ridge: float | None = None,
        by_layer: bool = False,
    ) -> None:
        super().__init__(fit_every=fit_every, fit_episodes=fit_episodes, test_episodes=test_episodes)
        for key, value in (("fit_examples", fit_examples), ("test_examples", test_examples)):
            if value is not None and value < 1:
                raise ConfigError(f"callbacks.ntk.{key} must be at least 1, or null for all, but got {value}.")
        if kernel not in ("full", "trace"):
            raise ConfigError(f"callbacks.ntk.kernel must be 'full' or 'trace', but got {kernel!r}.")
        if ridge is not None and not (ridge >= 0 and math.isfinite(ridge)):
            raise ConfigError(f"callbacks.ntk.ridge must be zero or positive and finite, or null, but got {ridge}.")
        self.examples = {"fit": fit_examples, "test": test_examples}
        self.kernel = kernel
        self.ridge = ridge
        self.by_layer = by_layer
        self._initial: Params = {}
        self._of: MetaLearner | None = None  # Whose initial parameters those are.
        self._is_of_fit = False
        self._at_start: dict[tuple[Stage, int], Tensor] = {}
        # Kernels of the last probe in training, by episode.
        self._last: dict[int, Tensor] = {}
        self.steps: list[int] = []
        self.spectra: list[list[float]] = []

    def prepare(self, run: Run) -> None:
        super().prepare(run)
        self._keep_initial(run.method)

    def setup(self, trainer: pl.Trainer, pl_module: MetaLearner, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self._at_start.clear()  # A second test may be of other data.
        # Used without `train`: what the method starts from is all there is. Another one tested after a fit is what that
        # fit has left, loaded anew.
        if pl_module is not self._of and (stage == "fit" or not self._is_of_fit):
            self._keep_initial(pl_module)
            self._last, self.steps, self.spectra = {}, [], []
        self._is_of_fit |= stage == "fit"

    def probe(self, method: MetaLearner, episode: Episode, stage: Stage) -> Measured:
        x, y = evenly(episode.support_x, self.examples[stage]), evenly(episode.support_y, self.examples[stage])
        index = int(episode.index)
        _, params = functional(method.network)
        with full_precision(x.device.type):
            kernel, parts = kernels(method.network, params, x, self.kernel, self.by_layer)
            if not bool(torch.isfinite(kernel).all()):
                raise DivergenceError(where_not_finite(method.network, params, x))
            if (stage, index) not in self._at_start:
                # Kept as they were before the trainer chose a device and a precision.
                initial = {name: p.to(params[name]) for name, p in self._initial.items()}
                self._at_start[stage, index] = kernels(method.network, initial, x, self.kernel, False)[0]
        start, before = self._at_start[stage, index], self._last.get(index)
        if before is not None and before.shape != start.shape:
            before = None  # From before a restart with other examples or another kind of kernel.
        values = spectrum.spectrum(kernel)
        measured = self._numbers(method, values, kernel, targets_of(y, method.spec.outputs).cpu())
        measured["ntk/drift_from_start"] = spectrum.drift(kernel, start)
        if stage == "fit":
            measured["ntk/drift"] = spectrum.drift(kernel, start if before is None else before)
            measured[KERNEL] = kernel.flatten().tolist()
        for layer, part in parts.items():
            of_layer = spectrum.spectrum(part)
            measured[f"ntk/layer/{layer}/trace"] = float(of_layer.sum())
            measured[f"ntk/layer/{layer}/share"] = float(of_layer.sum() / values.sum())
            measured[f"ntk/layer/{layer}/effective_rank"] = spectrum.effective_rank(of_layer)
        measured[EIGENVALUES] = values.tolist()
        measured[EIGENVALUES_AT_START] = spectrum.spectrum(start).tolist()
        return measured

    def summarise(self, episodes: dict[str, list[float]], stage: Stage) -> dict[str, float]:
        if stage == "fit":
            self._remember()
        self.series.pop(KERNEL, None)
        metrics = {}
        for name, values in episodes.items():
            mean = sum(map(math.log, values) if name in GEOMETRIC else values) / len(values)
            metrics[name] = math.exp(mean) if name in GEOMETRIC else mean
        return metrics

    def figures(self) -> dict[str, Figure]:
        drawn = {}
        if self.stage == "test" and self.series:
            drawn["spectrum"] = ntk_figures.histogram(self.series[EIGENVALUES], self.series[EIGENVALUES_AT_START])
        if len(self.steps) > 1:
            drawn["spectrum_over_training"] = ntk_figures.over_training(self.steps, self.spectra)
        return drawn

    def result(self) -> dict[str, Any] | None:
        found = super().result()
        if found is None:
            return None
        series = {name: mean_spectrum(values) for name, values in self.series.items()}
        series |= {"steps": self.steps, "eigenvalues_over_training": self.spectra}
        return {**found, "series": series}

    def state_dict(self) -> dict[str, Any]:
        own = {"last": dict(self._last), "steps": list(self.steps), "spectra": list(self.spectra)}
        return super().state_dict() | own

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._last, self.steps, self.spectra = dict(state["last"]), list(state["steps"]), list(state["spectra"])

    # ---- the parts -------------------------------------------------------------------------------------------------

    def _keep_initial(self, method: MetaLearner) -> None:
        self._of = method
        self._initial = {name: p.detach().cpu().clone() for name, p in functional(method.network)[1].items()}

    def _numbers(self, method: MetaLearner, values: Tensor, kernel: Tensor, targets: Tensor) -> dict[str, float]:
        """What eigenvalues `[N]` and targets `[n, C]` tell of a kernel."""
        own = getattr(getattr(method, "how", None), "ridge", 0.0)
        ridge = own if self.ridge is None else self.ridge
        dtype = torch.float32 if method.dtype.itemsize < 8 else torch.float64
        n = targets.shape[0]
        of_pairs = kernel.view(n, -1, n, kernel.shape[0] // n).diagonal(dim1=1, dim2=3).sum(-1)
        return {
            "ntk/lambda_max": float(values[-1]),
            "ntk/lambda_min": float(values[0]),
            "ntk/condition_number": spectrum.condition_number(values, dtype=dtype),
            "ntk/condition_number_ridge": spectrum.condition_number(values, ridge=ridge, dtype=dtype),
            "ntk/effective_rank": spectrum.effective_rank(values),
            "ntk/trace": float(values.sum()),
            "ntk/alignment": spectrum.alignment(of_pairs, targets),
            "ntk/alignment_centred": spectrum.alignment(of_pairs, targets, centre=True),
            "ntk/negative_eigenvalues": float(spectrum.negative_eigenvalues(values)),
            "ntk/largest_step": spectrum.largest_step(values),
        }

    def _remember(self) -> None:
        """Keep what the next probe in training is compared with, and the spectrum for the curve over training."""
        measured = self.series.get(KERNEL, [])
        sides = {math.isqrt(len(flat)) for flat in measured if flat}
        if sides and any(len(kernel) not in sides for kernel in self._last.values()):
            # Restarted with kernels of another size: one curve cannot hold both, so that it begins anew.
            self._last, self.steps, self.spectra = {}, [], []
        for index, flat in enumerate(measured):
            if flat:
                side = math.isqrt(len(flat))
                self._last[index] = torch.tensor(flat, dtype=torch.float64).view(side, side)
        if any(measured):
            if not self.steps:
                self.steps, self.spectra = [0], [mean_spectrum(self.series[EIGENVALUES_AT_START])]
            self.steps.append(self.step)
            self.spectra.append(mean_spectrum(self.series[EIGENVALUES]))


def targets_of(y: Tensor, outputs: int) -> Tensor:
    """Targets `[n, C]` to align with. A method without a head may be tested with more ways than it was trained on."""
    ways = outputs if y.dtype.is_floating_point else max(outputs, int(y.max()) + 1)
    return spectrum.centred_targets(y, ways)


def mean_spectrum(spectra: list[list[float]]) -> list[float]:
    """The mean of spectra by rank, thinned to KEPT_EIGENVALUES points, largest and smallest among them."""
    mean = np.mean([values for values in spectra if values], axis=0)
    kept = np.unique(np.linspace(0, len(mean) - 1, min(len(mean), KEPT_EIGENVALUES)).round().astype(int))
    return mean[kept].tolist()
