"""Scores out of distribution: of one task's queries, and of all tasks together."""

import itertools
import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics.functional import mean_squared_error
from torchmetrics.functional.classification import multiclass_calibration_error

from callbacks.base import Measured
from callbacks.probing import check_outputs
from lightning_ntk.methods.base import MetaLearner, Predictor
from lightning_ntk.running.results import mean_and_ci95

BINS = 15  # of the expected calibration error


def scores(method: MetaLearner, predictor: Predictor, x: Tensor, y: Tensor, place: str) -> Measured:
    """Scores of one task's queries `[m, ...]`: the mean squared error in regression; else accuracy, Brier score, and
    for the calibration error each query's confidence and whether it was right.

    Raises:
        FloatingPointError: outputs that are not finite.
    """
    with torch.no_grad():
        outputs = predictor(x)
        check_outputs(outputs)
        found = {f"{place}/{name}": float(v) for name, v in method.score(outputs[None], y[None]).items()}
        if method.spec.kind == "regression":
            return found
        probabilities = method.probabilities(outputs.double())
        confidence, predicted = probabilities.max(-1)
        classes = outputs.shape[-1]
        # A mean over examples of the sum over classes (Brier 1950): from 0 to 2.
        brier = classes * mean_squared_error(probabilities, F.one_hot(y, classes).double())
        lists = {"confidence": confidence.tolist(), "right": (predicted == y).double().tolist()}
    return found | {f"{place}/brier": float(brier)} | {f"{place}/{name}": values for name, values in lists.items()}


def calibration_error(confidences: list[list[float]], right: list[list[float]]) -> float:
    """Expected calibration error (Guo et al. 2017) of all episodes' queries together, in BINS equal bins.

    Together, since few queries a bin make it large by chance. NaN where an episode is missing (its lists are empty).
    """
    if not all(confidences):
        return math.nan
    confidence, is_right = (
        torch.tensor(list(itertools.chain(*values)), dtype=torch.float64) for values in (confidences, right)
    )
    if not confidence.numel() or not bool(torch.isfinite(confidence).all()):
        return math.nan
    # torchmetrics works in float32 and gives a confidence of exactly 1 a bin of its own, after the last of BINS.
    confidence = confidence.float().clamp(max=1 - torch.finfo(torch.float32).eps / 2)
    # torchmetrics takes the largest probability as the confidence: the first of two here, class 0 being "right".
    two = torch.stack([confidence, torch.zeros_like(confidence)], dim=1)
    return float(multiclass_calibration_error(two, (1 - is_right).long(), num_classes=2, n_bins=BINS, norm="l1"))


def difference_of_sets(a: list[float], b: list[float]) -> tuple[float, float]:
    """Mean of a less mean of b over independent episodes, and the half-width of its 95 % interval."""
    (mean_a, half_a), (mean_b, half_b) = mean_and_ci95(a), mean_and_ci95(b)
    return mean_a - mean_b, math.hypot(half_a, half_b)
