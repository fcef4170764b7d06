"""Which attacks with which settings: names as they stand in metrics, to functions of a predictor and its queries."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_ntk.attacks.base import Attacked, Predictor, check_eps
from lightning_ntk.attacks.losses import attack_loss
from lightning_ntk.attacks.noise import gaussian_noise
from lightning_ntk.attacks.simba import BASES, simba
from lightning_ntk.attacks.support import Adapt, pgd_through_adaptation
from lightning_ntk.attacks.white_box import fgsm, pgd_l2, pgd_linf
from lightning_ntk.episode import Episode
from lightning_ntk.errors import ConfigError, check_at_least, nearest_name

SIMBA = tuple(f"simba_{basis}" for basis in BASES)
LINF = ("fgsm", "pgd_linf", "noise")
NAMES = ("fgsm", "pgd_linf", "pgd_l2", "noise", *SIMBA)

# Predictor, images [m, channels, height, width], labels [m] and the seed of its generator.
Attack = Callable[[Predictor, Tensor, Tensor, int], Attacked]


@dataclasses.dataclass(frozen=True)
class Suite:
    """Settings of all attacks; see the functions of `attacks.white_box`, `attacks.simba` and `attacks.noise`.

    Attributes:
        attacks: some of NAMES.
        linf_eps: of fgsm, pgd_linf and noise. l2_eps: of pgd_l2.
        steps: of PGD. step_size: of pgd_linf and of the attack through the adaptation; None: `white_box.linf_step`.
        loss: of FGSM and PGD. simba_loss: of SimBA, to which the true class's probability is "log_odds".
        simba_step, simba_directions, simba_frequencies: SimBA's `step`, `directions` and `frequencies`.
        coupled: whether a predictor's outputs depend on the rest of the batch.
    """

    attacks: Sequence[str] = NAMES
    linf_eps: Sequence[float] = ()
    l2_eps: Sequence[float] = ()
    steps: int = 20
    step_size: float | None = None
    loss: str = "margin"
    simba_step: float = 0.2
    simba_directions: int = 100
    simba_frequencies: float = 0.25
    simba_loss: str = "log_odds"
    coupled: bool = False

    def check(self, prefix: str) -> None:
        """Raise `ConfigError`, naming PREFIX.key, for a setting out of range."""
        for name in self.attacks:
            if name not in NAMES:
                near = nearest_name(name, NAMES)
                raise ConfigError(f"{prefix}.attacks={name} does not exist.{near} Choices: {', '.join(NAMES)}.")
        for eps in self.linf_eps:
            check_eps(eps, f"{prefix}.linf_eps")
        for eps in self.l2_eps:
            check_eps(eps, f"{prefix}.l2_eps", most=math.inf)
        check_at_least(1, self.steps, f"{prefix}.steps")
        check_at_least(1, self.simba_directions, f"{prefix}.simba_directions")
        for key in ("step_size", "simba_step", "simba_frequencies"):
            if (value := getattr(self, key)) is None:
                continue
            check_eps(value, f"{prefix}.{key}")
            if value == 0:
                raise ConfigError(f"{prefix}.{key} must be above 0.")
        attack_loss(self.loss, f"{prefix}.loss")
        attack_loss(self.simba_loss, f"{prefix}.simba_loss")

    def named(self) -> dict[str, Attack]:
        """The attacks by the names of their metrics: "pgd_linf/eps_8", "pgd_l2/eps_0.5", "simba_pixel"."""
        found: dict[str, Attack] = {}
        for name in self.attacks:
            if name in LINF:
                found |= {f"{name}/{linf_name(eps)}": functools.partial(self._linf, name, eps) for eps in self.linf_eps}
            elif name == "pgd_l2":
                found |= {f"{name}/{l2_name(eps)}": functools.partial(self.pgd_l2, eps) for eps in self.l2_eps}
            else:
                found[name] = functools.partial(self._simba, name.removeprefix("simba_"))
        return found

    def pgd_linf(self, eps: float, predict: Predictor, x: Tensor, y: Tensor, seed: int) -> Attacked:
        """PGD with these settings."""
        return pgd_linf(predict, x, y, eps, step_size=self.step_size, **self._pgd(seed))

    def pgd_l2(self, eps: float | Tensor, predict: Predictor, x: Tensor, y: Tensor, seed: int) -> Attacked:
        """PGD with these settings; eps may be a tensor, one for each image."""
        return pgd_l2(predict, x, y, eps, **self._pgd(seed))

    def pgd_through_adaptation(self, eps: float, adapt: Adapt, episode: Episode, start: Tensor) -> Attacked:
        """PGD on a task's support, seen through the adaptation, from where another attack has left it."""
        task = (episode.support_x, episode.support_y, episode.query_x, episode.query_y)
        return pgd_through_adaptation(adapt, *task, eps, steps=self.steps, step_size=self.step_size, start=start)

    def _pgd(self, seed: int) -> dict[str, Any]:
        keep = "task" if self.coupled else "image"
        return {"steps": self.steps, "loss": self.loss, "keep": keep, "generator": _seeded(seed)}

    def _linf(self, name: str, eps: float, predict: Predictor, x: Tensor, y: Tensor, seed: int) -> Attacked:
        if name == "fgsm":
            return fgsm(predict, x, y, eps, loss=self.loss)
        if name == "noise":
            return gaussian_noise(predict, x, y, eps, generator=_seeded(seed))
        return self.pgd_linf(eps, predict, x, y, seed)

    def _simba(self, basis: str, predict: Predictor, x: Tensor, y: Tensor, seed: int) -> Attacked:
        return simba(
            predict,
            x,
            y,
            basis=basis,
            step=self.simba_step,
            directions=self.simba_directions,
            frequencies=self.simba_frequencies,
            loss=self.simba_loss,
            coupled=self.coupled,
            generator=_seeded(seed),
        )


def linf_name(eps: float) -> str:
    """eps in units of 1/255, as it stands in metrics: "eps_8"."""
    return f"eps_{255 * eps:.4g}"


def l2_name(eps: float) -> str:
    """eps in units of images in [0, 1]: "eps_0.5"."""
    return f"eps_{eps:.4g}"


def parse_sizes(values: Iterable[float | str], key: str) -> tuple[float, ...]:
    """Numbers, or quotients of numbers as text ("8/255"), in rising order and each once.

    Raises:
        ConfigError: anything else; the message names the key.
    """
    return tuple(sorted({parse_size(value, key) for value in values}))


def parse_size(value: float | str, key: str) -> float:
    """A number, or a quotient of two as text; see `parse_sizes`."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    above, slash, below = str(value).partition("/")
    try:
        return float(above) / (float(below) if slash else 1.0)
    except (ValueError, ZeroDivisionError):
        raise ConfigError(f"{key} takes numbers or quotients such as 8/255, but got {value!r}.") from None


def _seeded(seed: int) -> torch.Generator:
    # On the CPU: an attack then starts alike on every device.
    return torch.Generator().manual_seed(seed)
