"""Timings and memory: validation is not training, warm-up is left out, and a restart goes on counting."""

import math
import time
from types import SimpleNamespace

import pytest
import torch

from callbacks.timing import Timing, peak_memory_mib, reset_peak_memory


def steps(timing, seconds, trainer=None):
    module = SimpleNamespace(log=lambda *a: None, device=torch.device("cpu"))
    for duration in seconds:
        time.sleep(duration)
        timing.on_train_batch_end(trainer, module, None, None, 0)


def test_fit_time_is_that_of_the_steps_without_validation():
    timing = Timing()
    timing.on_train_epoch_start(None, None)
    steps(timing, [0.01] * 3)
    time.sleep(0.2)  # Validation.
    timing.on_validation_end(None, None)
    steps(timing, [0.01] * 3)
    assert 0.06 <= timing.fit_s < 0.2
    assert 0.01 <= timing.meta_step_s < 0.05


def test_the_median_leaves_warm_up_out():
    timing = Timing()
    assert math.isnan(timing.meta_step_s)
    timing.steps_s = [9.0, 9.0, 9.0, 1.0, 2.0, 3.0]
    assert timing.meta_step_s == 2.0
    timing.steps_s = [9.0, 5.0]
    assert timing.meta_step_s == 7.0


def test_a_restart_goes_on_counting():
    timing = Timing()
    timing.on_train_epoch_start(None, None)
    steps(timing, [0.01] * 4)
    again = Timing()
    again.load_state_dict(timing.state_dict())
    assert (again.fit_s, again.meta_step_s) == (timing.fit_s, timing.meta_step_s)
    again.on_train_epoch_start(None, None)
    steps(again, [0.01])
    assert again.fit_s > timing.fit_s
    assert len(timing.steps_s) == 4, "the state must be a copy"


def test_peak_memory_sees_an_allocation_that_is_gone():
    cpu = torch.device("cpu")
    reset_peak_memory(cpu)
    before = peak_memory_mib(cpu)
    block = torch.ones(60 * 2**20 // 4)
    del block
    assert peak_memory_mib(cpu) - before == pytest.approx(60, abs=15)
