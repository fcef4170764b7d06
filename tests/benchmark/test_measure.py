"""Taking turns, ratios, and counted operations."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.func import grad, jvp, vmap

from lightning_ntk.benchmark import measure
from lightning_ntk.benchmark.counting import count
from lightning_ntk.benchmark.measure import Timing, Work, float32_and_threads, interleave, ratio
from lightning_ntk.benchmark.rows import Figure, timed_rows


def clocked(name, seconds, calls, **kwargs):
    def clock():
        calls.append(name)
        return seconds

    return Work(name, clock=clock, **kwargs)


def test_works_take_turns_and_start_in_turn():
    calls = []
    works = [clocked(name, 1.0, calls) for name in "abc"]
    timings = interleave(works, 3, 100.0, "cpu", lambda text: None)
    assert "".join(calls) == "abc" + "abc" + "bca" + "cab", "a warm-up, then rounds"
    assert all(timing.seconds == [1.0] * 3 for timing in timings.values())


def test_a_slow_work_runs_less_often_but_once():
    calls = []
    works = [clocked("fast", 1.0, calls), clocked("slow", 40.0, calls), clocked("slowest", 1e3, calls)]
    timings = interleave(works, 5, 90.0, "cpu", lambda text: None)
    assert [len(timing.seconds) for timing in timings.values()] == [5, 2, 1]


def test_works_may_take_for_ever():
    timings = interleave([clocked("a", 1.0, [])], 2, math.inf, "cpu", lambda text: None)
    assert timings["a"].seconds == [1.0, 1.0]


def test_seconds_are_of_one_task_and_reset_comes_before_each_run(monkeypatch):
    events = []
    work = Work("w", lambda: events.append("run"), lambda: events.append("reset"))
    interleave([work], 2, 60.0, "cpu", lambda text: None)
    assert events == ["reset", "run"] * 3
    timings = interleave([clocked("four", 2.0, [], tasks=4)], 2, 60.0, "cpu", lambda text: None)
    assert timings["four"].median == 0.5
    clock = iter([0.0, 0.0, 1.0, 1.0, 10.0, 12.0])  # Around the warm-up and within it, and the repetition.
    monkeypatch.setattr(measure, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    timings = interleave([Work("four", lambda: None, tasks=4)], 1, 60.0, "cpu", lambda text: None)
    assert timings["four"].seconds == [0.5]


def test_the_time_that_a_work_takes_counts_whatever_it_reports(monkeypatch):
    clock = iter(range(0, 1000, 30))  # A work that ends 30 s after it has begun, and reports a second.
    monkeypatch.setattr(measure, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    timings = interleave([clocked("partly", 1.0, [])], 5, 60.0, "cpu", lambda text: None)
    assert timings["partly"].seconds == [1.0, 1.0]


def test_a_work_that_fails_later_keeps_its_rounds_and_the_others_go_on():
    calls = []

    def fail_at_last():
        calls.append(0)
        if len(calls) == 3:
            raise RuntimeError("the other process has died")
        return 1.0

    works = [Work("dies", clock=fail_at_last), clocked("fine", 1.0, [])]
    timings = interleave(works, 4, 60.0, "cpu", lambda text: None)
    assert timings["dies"].seconds == [1.0]
    assert timings["dies"].note == "failed in round 2: RuntimeError: the other process has died"
    assert timings["fine"].seconds == [1.0] * 4


def test_what_fails_or_is_absent_becomes_a_note():
    def fail():
        raise RuntimeError("not enough memory\nby far")

    works = [Work("absent", absent="run `make peers`"), Work("fails", fail), clocked("fine", 1.0, [])]
    timings = interleave(works, 2, 60.0, "cpu", lambda text: None)
    rows = timed_rows(works, timings, "fails")
    assert [row.note for row in rows] == [
        "not measured: run `make peers`",
        "not measured: RuntimeError: not enough memory",
        "",
    ]
    assert [row.seconds for row in rows] == [None, None, 1.0]
    assert all(row.ratio is None for row in rows)

    def bug():
        raise TypeError("a bug is not a note")

    with pytest.raises(TypeError):
        interleave([Work("bug", bug)], 1, 60.0, "cpu", lambda text: None)


def test_the_ratio_is_of_medians_with_quartiles_over_the_rounds():
    a, b = Timing([2.0, 4.0, 100.0]), Timing([1.0, 1.0, 50.0])
    assert ratio(a, b) == (4.0, 2.0, 3.0)
    assert ratio(Timing([3.0]), Timing([2.0, 4.0])) == (1.0, 1.5, 1.5)
    assert ratio(Timing(), b) is None


def test_threads_and_tf32_are_as_before_afterwards():
    before = torch.get_num_threads(), torch.backends.cudnn.allow_tf32
    with float32_and_threads(before[0] + 1):
        assert torch.get_num_threads() == before[0] + 1
        assert not torch.backends.cudnn.allow_tf32
    assert (torch.get_num_threads(), torch.backends.cudnn.allow_tf32) == before


# A convolution of 3 images, 2 channels to 4, 3x3 taps, at 8x8 places.
X, W, FORWARD = (3, 2, 8, 8), (4, 2, 3, 3), 2 * 3 * 64 * 4 * 2 * 9


def convolve(x, w):
    return F.conv2d(x, w, padding=1)


def test_operations_are_counted_by_hand():
    a, b = torch.ones(5, 7), torch.ones(7, 3)
    found = count(lambda: a @ b)
    assert found.flop == 2 * 5 * 7 * 3
    assert found.bytes == 4 * (35 + 21 + 15)
    assert count(lambda: convolve(torch.ones(X), torch.ones(W))).flop == FORWARD
    assert count(lambda: a.T.unsqueeze(0)).bytes == 0, "views move nothing"
    assert count(lambda: torch.ones(1).expand(100) + 1).bytes == 4 * (1 + 1 + 100), "an expanded number is one number"


def test_backward_passes_cost_a_forward_pass_for_each_gradient():
    x, w = torch.ones(X), torch.ones(W, requires_grad=True)
    assert count(lambda: convolve(x, w).sum().backward()).flop == 2 * FORWARD
    x.requires_grad_(True)
    found = count(lambda: convolve(x, w).sum().backward())
    assert found.flop == 3 * FORWARD
    assert found.by_kind == {"aten.convolution": FORWARD, "aten.convolution_backward": 2 * FORWARD}


def test_groups_are_not_counted_again_in_the_gradient():
    x, w = torch.ones(3, 4, 8, 8), torch.ones(8, 2, 3, 3, requires_grad=True)
    forward = 2 * 3 * 64 * 8 * 2 * 9
    assert count(lambda: F.conv2d(x, w, padding=1, groups=2).sum().backward()).flop == 2 * forward


def test_convolutions_are_seen_through_transforms_and_custom_functions():
    x, w = torch.ones(X), torch.ones(W)
    # The value, and one tangent for each operand: torch convolves that of the image, which is zero, all the same.
    assert count(lambda: jvp(lambda w: convolve(x, w), (w,), (w,))).flop == 3 * FORWARD
    many = torch.ones(5, *W)
    assert count(lambda: vmap(lambda w: convolve(x, w))(many)).flop == 5 * FORWARD
    assert count(lambda: vmap(grad(lambda w: convolve(x, w).sum()))(many)).flop == 2 * 5 * FORWARD

    class Custom(torch.autograd.Function):
        @staticmethod
        def forward(ctx, w):
            return convolve(x, w)

        @staticmethod
        def backward(ctx, upstream):
            return torch.nn.grad.conv2d_weight(x, W, upstream, padding=1)

    leaf = w.clone().requires_grad_(True)
    assert count(lambda: Custom.apply(leaf).sum().backward()).flop == 2 * FORWARD


def test_a_figure_is_reached_from_its_side():
    assert Figure("f", 0.9, 1.0).reached
    assert not Figure("f", 1.1, 1.0).reached
    assert Figure("f", 9.0, 8.0, more_is_better=True).reached
    assert Figure("f", None, 1.0).reached is None
    assert Figure("f", math.pi).reached is None
