"""What the names of metrics say: attacks and their strengths, and what is out of distribution.

The names are the dashboard's interface: `adversarial/<attack>/eps_<e>/accuracy` with e in steps of 1/255 (an l2 norm
where the attack says so), `adversarial_support/...` for an attacked support set, `adversarial/simba_pixel/accuracy` for
an attack without eps; `ood/<data set>/accuracy`, `ood/corrupted_<kind>/accuracy`.
"""

import math
import re
from collections.abc import Iterable, Mapping

CLEAN = "adversarial/clean/accuracy"
SOURCE = "ood/source/accuracy"
CONDITION_NUMBER = "ntk/condition_number"
EFFECTIVE_RANK = "ntk/effective_rank"

ROBUST = re.compile(
    r"adversarial(?P<support>_support)?/(?P<attack>[^/]+)/eps_(?P<eps>\d+(?:\.\d+)?(?:e[+-]?\d+)?)/accuracy"
)
WITHOUT_EPS = re.compile(r"adversarial/(?P<attack>[^/]+)/accuracy")
MASKING = re.compile(r"adversarial/masking/(?P<sign>[^/]+)(?<!_ci95)")
SHIFTED = re.compile(r"ood/(?P<corrupted>corrupted_)?(?P<target>[^/]+)/accuracy")
SEVERITY = re.compile(r"ood/corrupted_(?P<kind>[^/]+)/severity_(?P<severity>\d+)/accuracy")


def known(metrics: Mapping[str, float], name: str) -> float | None:
    """A metric's value, or None where it is missing or not a finite number."""
    value = metrics.get(name)
    return None if value is None or not math.isfinite(value) else value


def robust_names(names: Iterable[str]) -> dict[str, dict[float, str]]:
    """`{attack: {eps: metric name}}` of accuracies under attack, eps as written in the name and ascending."""
    found: dict[str, dict[float, str]] = {}
    for name in names:
        match = ROBUST.fullmatch(name)
        if match:
            attack = match["attack"] + (" on the support" if match["support"] else "")
            found.setdefault(attack, {})[float(match["eps"])] = name
    return {attack: dict(sorted(found[attack].items())) for attack in sorted(found, key=_weight)}


def names_without_eps(names: Iterable[str]) -> dict[str, str]:
    """`{attack: metric name}` of accuracies under attacks that have no eps."""
    matches = (WITHOUT_EPS.fullmatch(name) for name in sorted(names) if name != CLEAN)
    return {match["attack"]: match.string for match in matches if match}


def shifted_names(names: Iterable[str], *, corrupted: bool = False) -> dict[str, str]:
    """`{data set: metric name}` of accuracies out of distribution; of kinds of corruption where `corrupted`."""
    matches = (SHIFTED.fullmatch(name) for name in sorted(names) if name != SOURCE)
    return {match["target"]: match.string for match in matches if match and bool(match["corrupted"]) == corrupted}


def severity_names(names: Iterable[str]) -> dict[int, list[str]]:
    """`{severity: metric names}` of accuracies on corrupted images, one for each kind."""
    found: dict[int, list[str]] = {}
    for match in (SEVERITY.fullmatch(name) for name in sorted(names)):
        if match:
            found.setdefault(int(match["severity"]), []).append(match.string)
    return dict(sorted(found.items()))


def eps_text(attack: str, eps: float) -> str:
    """An eps as people write it: "8/255", or the number itself for an l2 norm."""
    return f"{eps:g}" if is_l2(attack) or eps == 0 else f"{eps:g}/255"


def is_l2(attack: str) -> bool:
    """Whether an attack's eps is an l2 norm, by its name."""
    return "l2" in attack.split()[0].split("_")


def _weight(attack: str) -> tuple[bool, bool, bool, bool, str]:
    """Sorts attacks: PGD in the l-infinity norm first; then others, the support's and noise, which is no attack."""
    return "noise" in attack, "support" in attack, not attack.startswith("pgd"), is_l2(attack), attack
