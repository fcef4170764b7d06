"""Timings and memory: validation is not training, warm-up is left out, and a restart goes on counting."""

import math
import mmap
from types import SimpleNamespace

import pytest
import torch

from callbacks import timing as timing_module
from callbacks.timing import Timing, peak_memory_mib, reset_peak_memory


class Clock:
    """A time that passes only when told to."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def perf_counter(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(timing_module, "time", clock)
    return clock


def steps(timing, clock, seconds, trainer=None):
    module = SimpleNamespace(log=lambda *a: None, device=torch.device("cpu"))
    for duration in seconds:
        clock.sleep(duration)
        timing.on_train_batch_end(trainer, module, None, None, 0)


def test_fit_time_is_that_of_the_steps_without_validation(clock):
    timing = Timing()
    timing.on_train_epoch_start(None, None)
    steps(timing, clock, [0.01] * 3)
    clock.sleep(5)  # Validation.
    timing.on_validation_end(None, None)
    steps(timing, clock, [0.01] * 3)
    assert timing.fit_s == pytest.approx(0.06)
    assert timing.meta_step_s == pytest.approx(0.01)


def test_the_median_leaves_warm_up_out():
    timing = Timing()
    assert math.isnan(timing.meta_step_s)
    timing.steps_s = [9.0, 9.0, 9.0, 1.0, 2.0, 3.0]
    assert timing.meta_step_s == 2.0
    timing.steps_s = [9.0, 5.0]
    assert timing.meta_step_s == 7.0


def test_a_restart_goes_on_counting(clock):
    timing = Timing()
    timing.on_train_epoch_start(None, None)
    steps(timing, clock, [0.01] * 4)
    again = Timing()
    again.load_state_dict(timing.state_dict())
    assert (again.fit_s, again.meta_step_s) == (timing.fit_s, timing.meta_step_s)
    again.on_train_epoch_start(None, None)
    steps(again, clock, [0.01])
    assert again.fit_s == pytest.approx(0.05)
    assert len(timing.steps_s) == 4, "the state must be a copy"


def test_another_method_begins_anew_and_the_same_goes_on(clock):
    timing, first, second = Timing(), object(), object()
    timing.setup(None, first, "fit")
    timing.on_train_epoch_start(None, None)
    steps(timing, clock, [0.01] * 4)
    timing.peak_mib = 7.0
    timing.setup(None, first, "test")
    assert (timing.fit_s, timing.peak_mib, len(timing.steps_s)) == (pytest.approx(0.04), 7.0, 4)
    timing.setup(None, second, "test")
    assert len(timing.steps_s) == 4, "what was trained, loaded anew"
    timing.setup(None, second, "fit")
    assert (timing.fit_s, timing.peak_mib, timing.steps_s) == (0.0, 0.0, [])


def hold(mib):
    """Take memory from the system and give it back: torch's would come from what the heap has kept."""
    with mmap.mmap(-1, mib * 2**20) as block:
        for start in range(0, len(block), mmap.PAGESIZE):
            block[start] = 1


def test_peak_memory_sees_an_allocation_that_is_gone():
    cpu = torch.device("cpu")
    reset_peak_memory(cpu)
    before = peak_memory_mib(cpu)
    hold(200)
    # The system may take back some of the rest meanwhile.
    assert 100 < peak_memory_mib(cpu) - before < 250


def test_what_is_paused_counts_neither_in_time_nor_in_the_peak(clock):
    cpu = torch.device("cpu")
    timing = Timing()
    timing.on_train_epoch_start(None, None)
    reset_peak_memory(cpu)
    before = peak_memory_mib(cpu)
    with timing.paused(cpu):
        clock.sleep(5)
        hold(200)
    steps(timing, clock, [0.01])
    timing.on_fit_end(None, SimpleNamespace(device=cpu))
    assert timing.fit_s == pytest.approx(0.01)
    assert timing.peak_mib - before < 30
    with timing.paused(cpu):
        pass
    assert timing.peak_mib >= before, "what training took before a pause is kept"
