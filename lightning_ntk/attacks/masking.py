"""Signs that an attack fails for want of a useful gradient, rather than because the model is robust.

After Athalye et al. (2018, "Obfuscated gradients give a false sense of security") and Carlini et al. (2019, "On
evaluating adversarial robustness"). Each sign is a number that is 0 or less where nothing is wrong.
"""

import itertools
import math
from collections.abc import Mapping, Sequence

from torch import Tensor

from lightning_ntk.attacks.base import Attacked, Predictor, is_wrong
from lightning_ntk.attacks.suite import Suite
from lightning_ntk.attacks.white_box import l2_norms
from lightning_ntk.running.results import paired_difference

# Shares of the queries up to which a sign is no sign: PGD, too, ends in local maxima.
TOLERANCE = 0.05
# From this l-infinity size on, accuracy that has not fallen at all is a sign.
LARGE_LINF = 8 / 255


def zero_gradients(gradient: Tensor) -> float:
    """The share of images `[m, channels, height, width]` whose input gradient is exactly 0."""
    return (gradient.flatten(1) == 0).all(1).double().mean().item()


def black_box_wins(suite: Suite, predict: Predictor, x: Tensor, y: Tensor, found: Attacked, seed: int) -> float:
    """The share of images that a black box attack broke and that PGD, given the same l2 norm for each, does not break.

    Gradients know more than outputs, so this should be near 0. Costs one PGD.
    """
    eps = l2_norms(found.images - x).flatten()
    white = suite.pgd_l2(eps, predict, x, y, seed)
    broke, breaks = (is_wrong(attacked.outputs, y) for attacked in (found, white))
    return (broke & ~breaks).double().mean().item()


def curve_signs(clean: Sequence[float], curves: Mapping[str, Mapping[float, Sequence[float]]]) -> dict[str, float]:
    """Signs in accuracies by episode: the clean ones, and those by attack and eps, as far as the attacks are there.

    `rise_with_eps`: the largest rise of pgd_linf's accuracy from one eps to the next. `single_step_wins`: its largest
    excess over fgsm's. `noise_wins`: over noise's. All three are means over episodes less the half-width of their 95 %
    interval. `no_fall`: 1 where the largest eps, of 8/255 or more, takes nothing from the clean accuracy; else 0.
    """
    pgd = dict(sorted(curves.get("pgd_linf", {}).items()))
    signs = {}
    if pgd:
        steps = [clean, *pgd.values()]
        signs["rise_with_eps"] = max(_surely(b, a) for a, b in itertools.pairwise(steps))
        largest = max(pgd)
        signs["no_fall"] = float(largest >= LARGE_LINF and math.fsum(pgd[largest]) >= math.fsum(clean) > 0)
    for name, sign in (("fgsm", "single_step_wins"), ("noise", "noise_wins")):
        common = pgd.keys() & curves.get(name, {}).keys()
        if common:
            signs[sign] = max(_surely(pgd[eps], curves[name][eps]) for eps in common)
    return signs


def _surely(larger: Sequence[float], smaller: Sequence[float]) -> float:
    """The lower end of the 95 % interval of a mean difference over the same episodes."""
    pairs = [(a, b) for a, b in zip(larger, smaller, strict=True) if not (math.isnan(a) or math.isnan(b))]
    if not pairs:
        return math.nan
    mean, half_width = paired_difference(*map(list, zip(*pairs, strict=True)))
    return mean - half_width
