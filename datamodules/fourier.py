"""Random Fourier series: periodic functions, smoother or rougher as asked."""

from typing import Any

import numpy as np

from datamodules.regression import Function, RegressionDataModule
from lightning_ntk.errors import check_at_least, check_positive


class Fourier(RegressionDataModule):
    """A task is y = sum_k k^-decay (a_k cos(pi k x / 5) + b_k sin(pi k x / 5)), k = 1 .. terms, x from U[-5, 5].

    a and b are normal, with one variance for all, such that y has mean 0 and variance 1 over tasks at every x: a
    stationary Gaussian process of period 10.

    Args:
        terms: number of frequencies.
        decay: how fast the amplitudes fall with the frequency.
        **regression: see `RegressionDataModule`.
    """

    def __init__(self, *, terms: int = 5, decay: float = 1.0, **regression: Any) -> None:
        super().__init__(**regression)
        check_at_least(1, terms, "data.terms")
        check_positive(decay, "data.decay")
        self.terms = terms
        self.decay = decay

    def family(self) -> dict[str, Any]:
        return {"terms": self.terms, "decay": self.decay}

    def sample_task(self, rng: np.random.Generator) -> Function:
        frequencies = np.arange(1, self.terms + 1)
        amplitudes = frequencies**-self.decay
        amplitudes /= np.linalg.norm(amplitudes)
        a, b = rng.standard_normal((2, self.terms)) * amplitudes

        def series(x: np.ndarray) -> np.ndarray:
            angles = np.pi / self.high * x * frequencies  # [n, terms]
            return (np.cos(angles) @ a + np.sin(angles) @ b)[:, None]

        return series
