"""Pictures of kernels' spectra."""

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from lightning_ntk.comparison.figures import COLOURS

BINS = 30
# Eigenvalues below this part of the largest are rounding in float32: they share the lowest bin.
FLOOR = 1e-8


def histogram(now: Sequence[Sequence[float]], at_start: Sequence[Sequence[float]]) -> Figure:
    """Eigenvalues of all probe episodes, now and at initialisation, on a logarithmic axis."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    sets = [np.concatenate([np.asarray(v, dtype=float) for v in spectra if len(v)]) for spectra in (at_start, now)]
    largest = max(max(values.max() for values in sets), np.finfo(float).tiny)
    smallest = max(min(values.min() for values in sets), FLOOR * largest)
    bins = np.geomspace(smallest / 1.01, largest * 1.01, BINS + 1)
    for values, label, colour in zip(sets, ("at initialisation", "now"), ("0.6", COLOURS[0]), strict=True):
        axes.hist(np.maximum(values, smallest), bins=bins, label=label, color=colour, alpha=0.6)
    axes.set_xscale("log")
    axes.set_xlabel("eigenvalue of the kernel")
    axes.set_ylabel("eigenvalues, of all probe episodes")
    _finish(axes)
    return figure


def over_training(steps: Sequence[int], spectra: Sequence[Sequence[float]]) -> Figure:
    """Each eigenvalue by rank over meta-steps: the largest and the smallest in colour, those between in grey."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    values = np.asarray(spectra, dtype=float)
    shown = np.where(values > FLOOR * values.max(), values, np.nan)  # What is not drawn is rounding.
    axes.plot(steps, shown[:, 1:-1], color="0.75", linewidth=0.8)
    axes.plot(steps, shown[:, -1], color=COLOURS[1], linewidth=2, label="largest")
    axes.plot(steps, shown[:, 0], color=COLOURS[0], linewidth=2, label="smallest")
    axes.set_yscale("log")
    axes.set_xlabel("meta-steps")
    axes.set_ylabel("eigenvalue of the kernel, mean over episodes")
    _finish(axes)
    return figure


def _finish(axes) -> None:
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
