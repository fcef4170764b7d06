"""Sine waves: the regression tasks of Finn et al. (2017)."""

import math

import numpy as np

from datamodules.regression import Function, RegressionDataModule


class Sinusoid(RegressionDataModule):
    """A task is y = A sin(x - b) with A from U[0.1, 5], b from U[0, pi], and x from U[-5, 5], drawn on the fly."""

    def sample_task(self, rng: np.random.Generator) -> Function:
        amplitude, phase = rng.uniform(0.1, 5.0), rng.uniform(0.0, math.pi)
        return lambda x: amplitude * np.sin(x - phase)
