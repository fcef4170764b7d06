"""What attacks cost: PGD in passes of the model, and SimBA on many images at once beside one at a time."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_ntk.attacks.base import Predictor, evaluate, in_parts
from lightning_ntk.attacks.simba import simba
from lightning_ntk.attacks.white_box import pgd_linf
from lightning_ntk.benchmark.counting import count_all
from lightning_ntk.benchmark.measure import Report, Work, interleave
from lightning_ntk.benchmark.problem import Problem, make_problem
from lightning_ntk.benchmark.rows import Figure, Table, quotient, timed_rows
from lightning_ntk.benchmark.settings import Settings
from lightning_ntk.ntk.memory import footprint
from lightning_ntk.ntk.network import functional

PASS = "forward and backward to the input, all queries"
PGD_PLAIN, PGD_LINEAR = "PGD-20, plain model", "PGD-20, linearised model (Meta-RKHS-II)"
TOGETHER, ONE_BY_ONE = "SimBA, all queries at once", "SimBA, one query at a time"
KINDS = ("plain model", "linearised model")
EPS = 8 / 255
DIRECTIONS = 10


def attacks_table(settings: Settings, report: Report) -> Table:
    """Attacks on the queries of one task; the unit is one pass of the plain model for the gradient in its input."""
    problem = make_problem(settings, tasks=1)
    task = next(iter(problem.episodes))
    x, y = task.query_x, task.query_y
    # One step of plain descent is an ordinary network; Meta-RKHS-II's is the network linearised.
    names = (("from_scratch", {"adapt_steps": 1}), ("meta_rkhs_ii", {}))
    predictors = (problem.method(name, **more).adapt(task.support_x, task.support_y) for name, more in names)
    # As the callback does it: no more images at once than is fast or fits.
    at_once = footprint(*functional(problem.network), x).pairs_at_once(x.device)
    plain, linear = (in_parts(predict, at_once) for predict in predictors)
    works = [
        Work(PASS, lambda: _pass(plain, x, y)),
        Work(PGD_PLAIN, lambda: _pgd(plain, x, y)),
        Work(PGD_LINEAR, lambda: _pgd(linear, x, y)),
    ]
    for kind, predict in zip(KINDS, (plain, linear), strict=True):
        together, one_by_one = _simba(problem, predict, x)
        works += [Work(f"{TOGETHER}, {kind}", together), Work(f"{ONE_BY_ONE}, {kind}", one_by_one)]
    timings = interleave(works, settings.repeats, settings.limit_s, settings.device, report)
    title = f"Attacks on {len(x)} queries of one task; SimBA tries {DIRECTIONS} pixels"
    # One at a time asks the same queries, and counting slows its many calls most.
    counts = count_all([work for work in works if not work.name.startswith(ONE_BY_ONE)], report)
    return Table("attacks", title, PASS, timed_rows(works, timings, PASS, counts))


def attacks_figures(table: Table, goals: dict[str, float]) -> list[Figure]:
    """PGD's cost in passes, and how much faster SimBA is on all queries at once."""

    def seconds(work: str) -> float | None:
        return table.row(work).seconds

    found = []
    for work, key in ((PGD_PLAIN, "pgd_plain"), (PGD_LINEAR, "pgd_linear")):
        value = quotient(seconds(work), seconds(PASS))
        found.append(Figure(f"{work}, in passes", value, goals.get(key), note=table.row(work).note))
    for kind in KINDS:
        value = quotient(seconds(f"{ONE_BY_ONE}, {kind}"), seconds(f"{TOGETHER}, {kind}"))
        what = f"SimBA at once over one at a time, {kind}"
        found.append(Figure(what, value, goals.get("simba"), more_is_better=True))
    return found


def _pass(predict: Predictor, x: Tensor, y: Tensor) -> None:
    leaf = x.clone().requires_grad_()
    torch.autograd.grad(F.cross_entropy(predict(leaf), y), leaf)


def _pgd(predict: Predictor, x: Tensor, y: Tensor) -> None:
    pgd_linf(predict, x, y, EPS, generator=torch.Generator().manual_seed(0))


def _simba(problem: Problem, predict: Predictor, x: Tensor) -> tuple[Callable[[], object], Callable[[], object]]:
    """The same attack on all images at once and one by one: the same directions, so the same queries."""
    y = evaluate(predict, x).argmax(-1)  # So that every image is attacked.
    generator = torch.Generator().manual_seed(0)
    order = torch.rand(len(x), x[0].numel(), generator=generator).argsort(-1)[:, :DIRECTIONS]

    def one_by_one() -> None:
        for i in range(len(x)):
            simba(predict, x[i : i + 1], y[i : i + 1], order=order[i : i + 1])

    return lambda: simba(predict, x, y, order=order), one_by_one
