"""MAML, FOMAML and ANIL against inner loops written out by hand."""

import sys

import pytest
import torch
import torch.nn.functional as F
from test_contract import in_double, make, tasks
from torch.func import functional_call

from lightning_ntk.episode import TaskSpec
from lightning_ntk.errors import ConfigError, MissingDependencyError
from lightning_ntk.methods.maml import MAML
from lightning_ntk.networks.mlp import MLP


def by_hand(method, task, steps, *, first_order, adapted):
    """The query loss after `steps` inner steps on the parameters whose name `adapted` accepts."""
    params = dict(method.network.named_parameters())
    fast = {name: p for name, p in params.items() if adapted(name)}
    for _ in range(steps):
        outputs = functional_call(method.network, {**params, **fast}, (task.support_x,))
        loss = F.cross_entropy(outputs, task.support_y)
        gradients = torch.autograd.grad(loss, list(fast.values()), create_graph=not first_order)
        fast = {name: p - method.inner_lr * g for (name, p), g in zip(fast.items(), gradients, strict=True)}
    return F.cross_entropy(functional_call(method.network, {**params, **fast}, (task.query_x,)), task.query_y)


@pytest.mark.parametrize(
    ("name", "first_order", "adapted"),
    [
        ("maml", False, lambda name: True),
        ("fomaml", True, lambda name: True),
        ("anil", False, lambda name: name.startswith("head")),
    ],
)
def test_loss_and_meta_gradient_equal_a_hand_written_inner_loop(name, first_order, adapted):
    method = make(name, "classification").double()
    episodes = in_double(tasks("classification"))
    loss = method.meta_loss(episodes)
    gradients = torch.autograd.grad(loss, list(method.parameters()))
    expected = sum(by_hand(method, task, 5, first_order=first_order, adapted=adapted) for task in episodes) / 2
    expected_gradients = torch.autograd.grad(expected, list(method.parameters()))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-10)
    for ours, theirs in zip(gradients, expected_gradients, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-8, atol=1e-12)


def test_second_order_differs_from_first_order():
    episodes = tasks("classification")
    gradients = []
    for name in ("maml", "fomaml"):
        method = make(name, "classification")
        gradients.append(
            torch.cat([g.flatten() for g in torch.autograd.grad(method.meta_loss(episodes), list(method.parameters()))])
        )
    assert (gradients[0] - gradients[1]).norm() > 0.01 * gradients[0].norm()


def test_anil_adapts_the_head_alone():
    method = make("anil", "classification")
    task = next(iter(tasks("classification")))
    x = task.query_x
    predictor = method.adapt(task.support_x, task.support_y)
    features = method.network.embed(x)
    # Whatever the adapted head is, predictions must be a linear function of the meta-learned features.
    design = torch.cat([features, torch.ones(len(x), 1)], dim=1).double()
    fit = torch.linalg.lstsq(design, predictor(x).detach().double(), driver="gelsd").solution
    assert torch.allclose(design @ fit, predictor(x).detach().double(), atol=1e-4)
    assert not torch.allclose(predictor(x), method.network(x), atol=1e-2)


def test_test_steps_are_a_setting_of_their_own():
    spec = TaskSpec("regression", (1,), 1)
    network = MLP((1,), 1)
    task = next(iter(tasks("regression")))
    still = MAML(network, spec, test_adapt_steps=0).adapt(task.support_x, task.support_y)(task.query_x)
    assert torch.equal(still, network(task.query_x))


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"inner_lr": 0.0}, "method.inner_lr"),
        ({"inner_lr": float("nan")}, "method.inner_lr"),
        ({"adapt_steps": -1}, "method.adapt_steps"),
        ({"test_adapt_steps": -1}, "method.test_adapt_steps"),
        ({"lr": 0.0}, "method.lr"),
    ],
)
def test_bad_settings_name_their_key(settings, key):
    with pytest.raises(ConfigError, match=key):
        MAML(MLP((1,), 1), TaskSpec("regression", (1,), 1), **settings)


def test_without_learn2learn_the_error_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "learn2learn.algorithms", None)
    with pytest.raises(MissingDependencyError, match="pip install learn2learn"):
        MAML(MLP((1,), 1), TaskSpec("regression", (1,), 1))
