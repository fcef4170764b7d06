"""The sine tasks follow the published formula and ranges."""

import math

import numpy as np
import torch

from datamodules.sinusoid import Sinusoid


def test_every_task_is_one_sine_wave_within_the_published_ranges():
    data = Sinusoid(shots=5, queries=20, eval_queries=30)
    amplitudes, phases = [], []
    for index in range(200):
        task = data.draw("train", 0, index)
        x = torch.cat([task.support_x, task.query_x]).double().squeeze(1)
        y = torch.cat([task.support_y, task.query_y]).double().squeeze(1)
        assert x.abs().max() <= 5
        # A sin(x - b) = (A cos b) sin x - (A sin b) cos x: a linear fit must be exact.
        design = torch.stack([torch.sin(x), -torch.cos(x)], dim=1)
        fit = torch.linalg.lstsq(design, y.unsqueeze(1)).solution.squeeze(1)
        assert torch.allclose(design @ fit, y, atol=1e-5)
        amplitudes.append(float(fit.norm()))
        phases.append(math.atan2(fit[1], fit[0]))
    assert 0.1 <= min(amplitudes) < 0.4
    assert 4.6 < max(amplitudes) <= 5.0
    assert -1e-5 <= min(phases) < 0.2
    assert 2.9 < max(phases) <= math.pi + 1e-5
    assert abs(np.mean(amplitudes) - 2.55) < 0.3


def test_shapes_follow_the_settings():
    data = Sinusoid(shots=5, queries=20, eval_shots=3, eval_queries=30)
    train, test = data.draw("train", 0, 0), data.draw("test", 0, 0)
    assert (train.support_x.shape, train.query_y.shape) == ((5, 1), (20, 1))
    assert (test.support_x.shape, test.query_y.shape) == ((3, 1), (30, 1))
    assert train.support_x.dtype == torch.float32
