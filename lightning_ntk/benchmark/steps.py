"""Meta-steps: zero_grad, the meta-loss of T tasks, backward, one step of Adam; learn2learn's in its own way."""

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from lightning_ntk.benchmark.measure import Work
from lightning_ntk.benchmark.problem import Problem
from lightning_ntk.errors import MissingDependencyError
from lightning_ntk.methods.inner_loop import learn2learn_algorithm

INNER_STEPS = 5
INNER_LR = 0.1
# The seconds of a step do not depend on it, and every repetition starts from the same weights.
META_LR = 1e-3

RKHS_I, RKHS_II, RKHS_II_INF = "Meta-RKHS-I", "Meta-RKHS-II", "Meta-RKHS-II, t = inf"
MAML, FOMAML = "learn2learn MAML", "learn2learn FOMAML"
# On a CPU: on our network, which has images with their channels last, and not in the layout of learn2learn's examples.
LAST = {name: f"{name}, channels last" for name in (MAML, FOMAML)}
COMPILED = {name: f"{name}, compiled" for name in (RKHS_II, RKHS_I)}
PASS = "forward and backward, all images"


def make_step(name: str, problem: Problem, *, compile: bool = False) -> Work:
    """The meta-step of a method, by its name above, as a work on the problem's tasks. `compile` is for our own."""
    if name == PASS:
        return _work(name, problem, network := copy.deepcopy(problem.network), _plain_pass(network, problem))
    if name in LAST or name in LAST.values():
        try:
            algorithm = learn2learn_algorithm("MAML")
        except MissingDependencyError as error:
            return Work(name, absent=str(error))
        network = copy.deepcopy((problem.in_default_layout() if name in LAST else problem).network)
        learner = algorithm(network, lr=INNER_LR, first_order=name in (FOMAML, LAST[FOMAML]))
        return _work(name, problem, learner, _learn2learn_loss(learner, problem))
    # The ridge is for kernels without full rank, which have no t = inf; it changes no cost.
    settings = {"t": float("inf"), "ridge": 1e-6} if name == RKHS_II_INF else {}
    method = problem.method("meta_rkhs_i" if name == RKHS_I else "meta_rkhs_ii", compile=compile, **settings)

    def backward() -> None:
        method.meta_loss(problem.episodes).backward()

    return _work(name, problem, method, backward)


def _work(name: str, problem: Problem, module: nn.Module, backward: Callable[[], None]) -> Work:
    """A meta-step around a backward pass, which starts from the initial weights each time."""
    optimizer = torch.optim.Adam(module.parameters(), lr=META_LR)
    initial = [p.detach().clone() for p in module.parameters()]

    def step() -> None:
        optimizer.zero_grad()
        backward()
        optimizer.step()

    @torch.no_grad()
    def reset() -> None:
        for p, value in zip(module.parameters(), initial, strict=True):
            p.copy_(value)

    return Work(name, step, reset, tasks=problem.episodes.tasks)


def _learn2learn_loss(learner: nn.Module, problem: Problem) -> Callable[[], None]:
    """learn2learn's own example: task after task, clone, adapt, and backward through the query loss."""

    def backward() -> None:
        for task in problem.episodes:
            clone = learner.clone()
            for _ in range(INNER_STEPS):
                clone.adapt(F.cross_entropy(clone(task.support_x), task.support_y))
            loss = F.cross_entropy(clone(task.query_x), task.query_y)
            (loss / problem.episodes.tasks).backward()

    return backward


def _plain_pass(network: nn.Module, problem: Problem) -> Callable[[], None]:
    """One forward and one backward pass over support and query images together: the unit of cost."""
    episodes = problem.episodes
    x = torch.cat([episodes.support_x, episodes.query_x], dim=1).flatten(0, 1)
    y = torch.cat([episodes.support_y, episodes.query_y], dim=1).flatten()
    return lambda: F.cross_entropy(network(x), y).backward()
