"""iMAML against the exact solution of a quadratic task, against a dense Hessian, and in bounded memory."""

import math

import pytest
import torch
from test_contract import in_double, make, tasks
from torch import nn
from torch.func import functional_call, hessian

from lightning_ntk.episode import Episode, TaskSpec
from lightning_ntk.errors import ConfigError
from lightning_ntk.methods.imaml import IMAML, conjugate_gradient
from lightning_ntk.networks.mlp import MLP
from lightning_ntk.ntk.network import functional

STRENGTH = 0.7


def quadratic(count=2):
    """A linear model of 3 inputs and an offset, solved to the end, and tasks for it."""
    torch.manual_seed(0)
    network = MLP((3,), 1, hidden=[]).double()
    method = IMAML(
        network,
        TaskSpec("regression", (3,), 1),
        regularization=STRENGTH,
        inner_lr=0.15,
        adapt_steps=250,
        cg_steps=4,
        damping=0.0,
    )
    x, y = torch.randn(count, 12, 3).double(), torch.randn(count, 12, 1).double()
    return method, Episode(x[:, :5], y[:, :5], x[:, 5:], y[:, 5:], torch.arange(count))


def solution(task, theta):
    """argmin of mean (A phi - y)^2 + STRENGTH / 2 |phi - theta|^2, and its query loss: dense algebra on theta [4]."""
    design, query = (torch.cat([x, torch.ones(len(x), 1)], dim=1) for x in (task.support_x, task.query_x))
    curvature = 2 * design.T @ design / len(design)
    eye = torch.eye(4, dtype=torch.float64)
    phi = torch.linalg.solve(curvature + STRENGTH * eye, 2 * design.T @ task.support_y / 5 + STRENGTH * theta[:, None])
    loss = (query @ phi - task.query_y).square().mean()
    slope = 2 * query.T @ (query @ phi - task.query_y) / len(query)
    implicit = torch.linalg.solve(eye + curvature / STRENGTH, slope)
    return phi[:, 0], loss, implicit[:, 0]


def as_vector(method):
    return torch.cat([method.network.head.weight[0], method.network.head.bias]).detach()


def test_the_meta_gradient_of_a_quadratic_task_is_the_exact_one():
    method, episodes = quadratic()
    theta = as_vector(method).requires_grad_()
    solved = [solution(task, theta) for task in episodes]
    loss = method.meta_loss(episodes)
    found = torch.autograd.grad(loss, [method.network.head.weight, method.network.head.bias])
    found = torch.cat([g.flatten() for g in found])
    assert loss.item() == pytest.approx(sum(s[1].item() for s in solved) / 2, rel=1e-9)
    assert torch.allclose(found, sum(s[2] for s in solved) / 2, rtol=1e-7)
    # The same by differentiating the closed-form solution, which knows nothing of implicit functions.
    (direct,) = torch.autograd.grad(sum(s[1] for s in solved) / 2, theta)
    assert torch.allclose(found, direct, rtol=1e-7)
    assert method.reached["cg_residual"] < 1e-10


def test_the_adapted_parameters_solve_the_regularised_task():
    method, episodes = quadratic()
    phi = method.solve(episodes.support_x, episodes.support_y, 250)
    for task, weight, bias in zip(episodes, phi["head.weight"], phi["head.bias"], strict=True):
        assert torch.allclose(torch.cat([weight[0], bias]), solution(task, as_vector(method))[0], rtol=1e-8)


def test_steps_of_conjugate_gradient_are_reported_by_what_they_leave():
    method, episodes = quadratic()
    method.adapt_steps, left = 10, []
    for method.cg_steps in (1, 2, 4):
        method.meta_loss(episodes)
        left.append(method.reached["cg_residual"].item())
    assert 1e-3 < left[0] < 2
    assert left[0] > left[1] > left[2]
    assert left[2] < 1e-10, "as many steps as parameters solve the system"


@pytest.mark.parametrize("damping", [0.0, 10.0])
def test_the_meta_gradient_of_a_network_is_that_of_its_dense_hessian(damping):
    torch.manual_seed(0)
    method = make("imaml", "regression").double()
    method.network = MLP((1,), 1, hidden=[6]).double()
    method.regularization, method.cg_steps, method.damping = 4.0, 40, damping
    episodes = in_double(tasks("regression"))
    _, theta = functional(method.network)
    phi = method.solve(episodes.support_x, episodes.support_y, method.adapt_steps)
    expected = 0
    for number, task in enumerate(episodes):
        flat = torch.cat([p[number].flatten() for p in phi.values()])

        def loss_at(vector, x, y):
            pieces = vector.split([p.numel() for p in theta.values()])
            params = {name: piece.view_as(p) for (name, p), piece in zip(theta.items(), pieces, strict=True)}
            return method.loss(functional_call(method.network, params, (x,)), y)

        curvature = hessian(loss_at)(flat, task.support_x, task.support_y)
        system = torch.eye(len(flat), dtype=torch.float64) + curvature / (method.regularization + damping)
        assert torch.linalg.eigvalsh(system)[0] > 0.2
        slope = torch.func.grad(loss_at)(flat, task.query_x, task.query_y)
        expected = expected + torch.linalg.solve(system, slope) / 2
    found = torch.autograd.grad(method.meta_loss(episodes), list(theta.values()))
    assert torch.allclose(torch.cat([g.flatten() for g in found]), expected, rtol=1e-6, atol=1e-10)


def test_conjugate_gradient_solves_and_stops_where_it_cannot():
    torch.manual_seed(0)
    root = torch.randn(6, 6).double()
    good = root @ root.T + torch.eye(6).double()
    indefinite = torch.diag(torch.tensor([-1.0, -2.0, -3.0, -4.0, -5.0, -6.0]).double())
    # Side by side: one that can be solved, one that cannot, one that is solved from the start, one of zeros.
    matrices = torch.stack([good, indefinite, torch.eye(6).double(), good])
    target = torch.randn(4, 6).double()
    target[3] = 0
    found, residual = conjugate_gradient(lambda v: (matrices @ v[..., None])[..., 0], target, 6)
    assert torch.allclose(found[0], torch.linalg.solve(good, target[0]), rtol=1e-9)
    assert residual[0] < 1e-10
    assert torch.equal(found[1], target[1]), "no step along a direction of negative curvature"
    assert residual[1] > 1
    assert torch.equal(found[2:], target[2:])
    assert residual[2:].tolist() == [0, 0]


class Alive:
    """Bytes that autograd holds for backward passes: now, and at most."""

    def __init__(self):
        self.now = self.most = 0

    def pack(self, tensor):
        return Saved(self, tensor)


class Saved:
    def __init__(self, alive, tensor):
        self.alive, self.tensor = alive, tensor
        self.size = tensor.numel() * tensor.element_size()
        alive.now += self.size
        alive.most = max(alive.most, alive.now)

    def __del__(self):
        self.alive.now -= self.size


class WithMore(nn.Module):
    """A network with a layer that nothing uses."""

    def __init__(self):
        super().__init__()
        self.used, self.unused = MLP((3,), 1, hidden=[4]), nn.Linear(3, 1)

    def forward(self, x):
        return self.used(x)


def test_parameters_that_nothing_uses_change_nothing():
    torch.manual_seed(0)
    network, spec = WithMore().double(), TaskSpec("regression", (3,), 1)
    episodes = quadratic()[1]
    loss = IMAML(network, spec).meta_loss(episodes)
    loss.backward()
    assert not network.unused.weight.grad.any()
    found = [p.grad.clone() for p in network.used.parameters()]
    network.used.zero_grad()
    IMAML(network.used, spec).meta_loss(episodes).backward()
    for g, p in zip(found, network.used.parameters(), strict=True):
        assert torch.allclose(g, p.grad, rtol=1e-8)
        assert g.any()


@pytest.mark.parametrize(("name", "bounded"), [("imaml", True), ("reptile", True), ("maml", False)])
def test_the_memory_for_backward_passes_does_not_grow_with_the_inner_steps(name, bounded):
    most = []
    for steps in (2, 20):
        method, alive = make(name, "classification"), Alive()
        method.adapt_steps = steps
        with torch.autograd.graph.saved_tensors_hooks(alive.pack, lambda saved: saved.tensor):
            method.meta_loss(tasks("classification")).backward()
        most.append(alive.most)
    assert most[0] > 10_000
    assert (most[1] < 1.1 * most[0]) == bounded


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"regularization": 0.0}, r"method\.regularization"),
        ({"regularization": math.inf}, r"method\.regularization"),
        ({"damping": -1.0}, r"method\.damping"),
        ({"cg_steps": 0}, r"method\.cg_steps"),
        ({"inner_lr": 0.0}, r"method\.inner_lr"),
        ({"adapt_steps": -1}, r"method\.adapt_steps"),
    ],
)
def test_bad_settings_name_their_key(settings, message):
    with pytest.raises(ConfigError, match=message):
        IMAML(MLP((1,), 1), TaskSpec("regression", (1,), 1), **settings)
