"""Reptile against loops over copies of the network, and against the energy that it is at one step."""

import copy

import pytest
import torch
from test_contract import in_double, make, tasks

from lightning_ntk.energy.meta_rkhs_i import literal
from lightning_ntk.episode import TaskSpec
from lightning_ntk.errors import ConfigError
from lightning_ntk.methods.reptile import Reptile
from lightning_ntk.networks.mlp import MLP
from lightning_ntk.ntk.network import functional

SPEC = TaskSpec("regression", (1,), 1)


def trained_copy(method, network, batches):
    """The network after a step on each batch, and the losses before the steps."""
    network, losses = copy.deepcopy(network), []
    if method.inner_optimizer == "adam":
        optimizer = torch.optim.Adam(network.parameters(), lr=method.inner_lr, betas=(0.0, 0.999))
    else:
        optimizer = torch.optim.SGD(network.parameters(), lr=method.inner_lr)
    for x, y in batches:
        optimizer.zero_grad()
        loss = method.loss(network(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return network, sum(losses) / len(losses)


def batches_of(method, task):
    x, y = torch.cat([task.support_x, task.query_x]), torch.cat([task.support_y, task.query_y])
    return [(x[0], y[0]) for x, y in method.minibatches(x[None], y[None])]


def outer_step(method, episodes):
    """A step of the method's own optimiser, as automatic optimisation makes it; the loss that is logged."""
    optimizer = method.configure_optimizers()
    loss = method.meta_loss(episodes)
    loss.backward()
    optimizer.step()
    return loss.item()


@pytest.mark.parametrize("batch_size", [None, 4])
@pytest.mark.parametrize("inner_optimizer", ["sgd", "adam"])
def test_the_batched_step_is_a_step_towards_the_mean_of_what_tasks_end_in(inner_optimizer, batch_size):
    method = make("reptile", "classification").double()
    method.inner_optimizer, method.batch_size, method.lr = inner_optimizer, batch_size, 0.3
    episodes, before = in_double(tasks("classification", count=3)), copy.deepcopy(method.network)
    loss = outer_step(method, episodes)
    ends = [trained_copy(method, before, batches_of(method, task)) for task in episodes]
    assert loss == pytest.approx(sum(end[1] for end in ends) / 3, rel=1e-10)
    for name, p in before.named_parameters():
        mean = torch.stack([dict(end[0].named_parameters())[name] for end in ends]).mean(0)
        expected = p + 0.3 * (mean - p)
        # Adam makes steps of the rounding in the gradient of a bias that batch statistics take away again.
        atol = 1e-8 if inner_optimizer == "adam" else 1e-11
        assert torch.allclose(dict(method.network.named_parameters())[name], expected, rtol=1e-9, atol=atol)


def test_the_serial_step_goes_from_task_to_task():
    method = make("reptile_serial", "classification").double()
    episodes, before = in_double(tasks("classification", count=3)), copy.deepcopy(method.network)
    here, losses = copy.deepcopy(before), []
    for task in episodes:
        end, loss = trained_copy(method, here, batches_of(method, task))
        losses.append(loss)
        with torch.no_grad():
            for p, q in zip(here.parameters(), end.parameters(), strict=True):
                p += 0.5 * (q - p)
    assert outer_step(method, episodes) == pytest.approx(sum(losses) / 3, rel=1e-10)
    for p, q in zip(method.network.parameters(), here.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=1e-9, atol=1e-11)


def test_one_step_on_all_examples_descends_the_energy_at_alpha_0():
    torch.manual_seed(0)
    method = Reptile(MLP((1,), 1).double(), SPEC, inner_lr=0.05, inner_optimizer="sgd", adapt_steps=1, batch_size=None)
    episodes = in_double(tasks("regression", count=3))
    network, params = functional(method.network)
    energies = [
        literal(
            network, params, torch.cat([t.support_x, t.query_x]), torch.cat([t.support_y, t.query_y]), method.loss, 0
        )
        for t in episodes
    ]
    energy = torch.stack(energies).mean()
    expected = torch.autograd.grad(energy, list(params.values()))
    loss = method.meta_loss(episodes)
    assert loss.item() == pytest.approx(energy.item(), rel=1e-12)
    for ours, theirs in zip(torch.autograd.grad(loss, list(params.values())), expected, strict=True):
        assert torch.allclose(ours, 0.05 * theirs, rtol=1e-9, atol=1e-13)


def test_minibatches_go_through_all_examples_before_any_comes_again():
    method = make("reptile", "regression")
    method.batch_size, method.adapt_steps = 4, 8
    x = torch.arange(14.0)[None, :, None].repeat(2, 1, 1)
    batches = method.minibatches(x, 2 * x)
    assert [b.shape[1] for b, _ in batches] == [4, 4, 3, 3] * 2
    assert all(torch.equal(2 * b, y) and torch.equal(b[0], b[1]) for b, y in batches)
    first = torch.cat([b[0, :, 0] for b, _ in batches[:4]])
    assert sorted(first.tolist()) == list(range(14))
    assert first.tolist() != list(range(14))
    again = method.minibatches(x, x)
    assert all(torch.equal(a[0], b[0]) for a, b in zip(batches, again, strict=True))


def test_adam_can_take_the_way_for_a_gradient():
    assert isinstance(make("reptile", "regression").configure_optimizers(), torch.optim.SGD)
    method = Reptile(MLP((1,), 1), SPEC, outer_optimizer="adam", lr=0.01)
    before = [p.clone() for p in method.network.parameters()]
    assert isinstance(method.configure_optimizers(), torch.optim.Adam)
    outer_step(method, tasks("regression"))
    moved = torch.cat([(p - q).flatten() for p, q in zip(method.network.parameters(), before, strict=True)]).abs()
    assert moved.max().item() == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"adapt_steps": 0}, r"method\.adapt_steps must be at least 1"),
        ({"inner_lr": -1.0}, r"method\.inner_lr"),
        ({"batch_size": 0}, r"method\.batch_size"),
        ({"inner_optimizer": "adamw"}, r"method\.inner_optimizer must be one of sgd, adam"),
        ({"outer_optimizer": "adagrad"}, r"method\.outer_optimizer"),
        ({"serial": True, "outer_optimizer": "adam"}, r"method\.serial.*method\.outer_optimizer=sgd"),
    ],
)
def test_bad_settings_name_their_key(settings, message):
    with pytest.raises(ConfigError, match=message):
        Reptile(MLP((1,), 1), SPEC, **settings)
