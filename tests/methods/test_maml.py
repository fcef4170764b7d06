"""MAML, FOMAML, ANIL, Meta-SGD and the options of MAML++ against inner loops written out by hand."""

import sys

import pytest
import torch
import torch.nn.functional as F
from test_contract import in_double, make, tasks
from torch import nn
from torch.func import functional_call

from lightning_ntk.episode import TaskSpec
from lightning_ntk.errors import ConfigError, MissingDependencyError
from lightning_ntk.methods.anil import ANIL
from lightning_ntk.methods.maml import MAML
from lightning_ntk.methods.meta_sgd import MetaSGD
from lightning_ntk.networks.mlp import MLP


def by_hand(method, task, steps, *, first_order=False, adapted=lambda name: True, rate=None, weights=None):
    """The query loss after `steps` inner steps on the parameters whose name `adapted` accepts.

    Args:
        rate: step number and parameter name to the step size; None for `inner_lr`.
        weights: of the query loss after each step; None for the last one alone.
    """
    params = dict(method.network.named_parameters())
    fast = {name: p for name, p in params.items() if adapted(name)}
    rate = rate or (lambda step, name: method.inner_lr)

    def query_loss():
        return F.cross_entropy(functional_call(method.network, {**params, **fast}, (task.query_x,)), task.query_y)

    losses = []
    for step in range(steps):
        outputs = functional_call(method.network, {**params, **fast}, (task.support_x,))
        loss = F.cross_entropy(outputs, task.support_y)
        gradients = torch.autograd.grad(loss, list(fast.values()), create_graph=not first_order)
        fast = {name: p - rate(step, name) * g for (name, p), g in zip(fast.items(), gradients, strict=True)}
        losses.append(query_loss())
    return losses[-1] if weights is None else sum(w * loss for w, loss in zip(weights, losses, strict=True))


def assert_same(loss, expected, params):
    """The same loss, and the same gradient of it."""
    assert loss.item() == pytest.approx(expected.item(), rel=1e-10)
    gradients = (torch.autograd.grad(value, params) for value in (loss, expected))
    for ours, theirs in zip(*gradients, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-8, atol=1e-12)


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
    expected = sum(by_hand(method, task, 5, first_order=first_order, adapted=adapted) for task in episodes) / 2
    assert_same(method.meta_loss(episodes), expected, list(method.parameters()))


@pytest.mark.parametrize(("first_order", "steps"), [(False, 1), (False, 3), (True, 3)])
def test_meta_sgd_has_a_step_size_for_every_number(first_order, steps):
    method = make("meta_sgd", "classification").double()
    method.first_order, method.adapt_steps = first_order, steps
    with torch.no_grad():
        for sizes in method.step_sizes:
            sizes.mul_(torch.rand_like(sizes) + 0.5)
    sizes = dict(zip(dict(method.network.named_parameters()), method.step_sizes, strict=True))
    episodes = in_double(tasks("classification"))
    settings = {"first_order": first_order, "rate": lambda step, name: sizes[name]}
    expected = sum(by_hand(method, task, steps, **settings) for task in episodes) / 2
    assert_same(method.meta_loss(episodes), expected, list(method.parameters()))


@pytest.mark.parametrize(
    ("name", "adapted"), [("maml_plus_plus", lambda name: True), ("anil_plus_plus", lambda name: "head" in name)]
)
def test_maml_plus_plus_weighs_each_steps_loss_and_learns_each_steps_size(name, adapted, monkeypatch):
    method = make(name, "classification").double()
    monkeypatch.setattr(type(method), "global_step", 4)  # Of 10 until the last step stands alone.
    with torch.no_grad():
        method.inner_lrs += torch.linspace(0, 0.1, 5)
    early = 0.6 / 5
    weights = [early] * 4 + [1 - 4 * early]
    episodes = in_double(tasks("classification"))
    settings = {"adapted": adapted, "weights": weights, "rate": lambda step, name: method.inner_lrs[step]}
    expected = sum(by_hand(method, task, 5, **settings) for task in episodes) / 2
    assert_same(method.meta_loss(episodes), expected, list(method.parameters()))


def test_the_weights_of_the_steps_end_with_the_last_step_alone(monkeypatch):
    method = make("maml_plus_plus", "regression")
    seen = []
    for step in (0, 5, 10, 50):
        monkeypatch.setattr(MAML, "global_step", step)
        seen.append(method.step_weights())
        assert sum(seen[-1]) == pytest.approx(1)
    assert seen[0] == pytest.approx([0, 0.2, 0.2, 0.2, 0.2, 0.2])
    assert seen[1] == pytest.approx([0, 0.1, 0.1, 0.1, 0.1, 0.6])
    assert seen[2] == seen[3] == make("maml", "regression").step_weights() == [0, 0, 0, 0, 0, 1]


def test_steps_at_test_beyond_those_learned_take_the_last_size():
    method = make("maml_plus_plus", "regression")
    task = next(iter(tasks("regression")))
    outputs = []
    for change in (0.0, 0.05):
        with torch.no_grad():
            method.inner_lrs[-1] += change
        outputs.append([])
        for method.test_adapt_steps in (4, 5, 6):
            outputs[-1].append(method.adapt(task.support_x, task.support_y)(task.query_x))
    assert torch.equal(outputs[0][0], outputs[1][0])
    still = method.inner_loop(method.network, task.support_x, task.support_y, 5, True)(task.query_x)
    assert torch.equal(outputs[1][1], still)
    assert not any(torch.equal(outputs[0][k], outputs[1][k]) for k in (1, 2))


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
        ({"multi_step_loss": -1}, "method.multi_step_loss"),
        ({"learn_inner_lrs": True, "adapt_steps": 0}, "method.learn_inner_lrs"),
    ],
)
def test_bad_settings_name_their_key(settings, key):
    with pytest.raises(ConfigError, match=key):
        MAML(MLP((1,), 1), TaskSpec("regression", (1,), 1), **settings)


def test_anil_without_a_head_is_refused_with_the_alternative():
    network = nn.Sequential(nn.Linear(1, 4), nn.ReLU(), nn.Linear(4, 1))
    spec = TaskSpec("regression", (1,), 1)
    with pytest.raises(ConfigError, match=r"method=anil needs .*embed and head.*Sequential has no embed.*method=maml"):
        ANIL(network, spec)
    assert MAML(network, spec).meta_loss(tasks("regression")) > 0
    network.embed = network[:2]
    with pytest.raises(ConfigError, match=r"Sequential has no head"):
        ANIL(network, spec)


@pytest.mark.parametrize("method", [MAML, MetaSGD])
def test_without_learn2learn_the_error_says_how_to_install_it(method, monkeypatch):
    monkeypatch.setitem(sys.modules, "learn2learn.algorithms", None)
    with pytest.raises(MissingDependencyError, match="pip install learn2learn"):
        method(MLP((1,), 1), TaskSpec("regression", (1,), 1))
