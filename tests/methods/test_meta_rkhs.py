"""What is particular to Meta-RKHS-I and Meta-RKHS-II."""

import math

import pytest
import torch
from test_contract import make, tasks

from lightning_ntk.episode import TaskSpec
from lightning_ntk.errors import ConfigError, DivergenceError
from lightning_ntk.methods.meta_rkhs_i import MetaRKHSI
from lightning_ntk.methods.meta_rkhs_ii import MetaRKHSII
from lightning_ntk.networks.mlp import MLP

SPEC = TaskSpec("regression", (1,), 1)


def test_meta_rkhs_ii_regresses_on_shifted_one_hot_targets():
    targets = make("meta_rkhs_ii", "classification").regression_targets(torch.tensor([2, 0]))
    third = 1 / 3
    expected = torch.tensor([[-third, -third, 1 - third], [1 - third, -third, -third]])
    assert torch.allclose(targets, expected)


def test_meta_rkhs_ii_at_infinite_time_fits_the_support_set():
    method = MetaRKHSII(MLP((1,), 1).double(), SPEC, t=math.inf, ridge=1e-8)
    task = next(iter(tasks("regression")))
    x, y = task.support_x.double(), task.support_y.double()
    assert torch.allclose(method.adapt(x, y)(x), y, atol=1e-4)


@pytest.mark.parametrize("chunk", [1, 2, 3])
def test_tasks_per_chunk_changes_nothing_but_speed(chunk):
    episodes = tasks("classification", count=3)
    losses = []
    for size in (1, chunk):
        method = make("meta_rkhs_ii", "classification")
        method.tasks_per_chunk = size
        loss = method.meta_loss(episodes)
        loss.backward()
        losses.append((loss.item(), torch.cat([p.grad.flatten() for p in method.parameters()])))
    assert losses[0][0] == pytest.approx(losses[1][0], rel=1e-5)
    assert torch.allclose(losses[0][1], losses[1][1], atol=1e-4 * losses[0][1].abs().max())


def test_meta_rkhs_ii_solves_in_full_precision_under_autocast():
    episodes = tasks("classification")
    task = next(iter(episodes))
    method = make("meta_rkhs_ii", "classification")
    expected = method.meta_loss(episodes), method.adapt(task.support_x, task.support_y)(task.query_x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert method.network(task.query_x).dtype == torch.bfloat16
        assert torch.equal(method.meta_loss(episodes), expected[0])
        predictor = method.adapt(task.support_x, task.support_y)
    assert torch.equal(predictor(task.query_x), expected[1])


def test_an_energy_that_runs_away_stops_with_a_clear_error():
    method = make("meta_rkhs_i", "regression")
    method.energy, method.alpha = "literal", 1.0
    episodes = tasks("regression", count=4)
    optimizer = torch.optim.Adam(method.parameters(), lr=0.05)
    with pytest.raises(DivergenceError, match=r"unbounded below.*method\.energy=euler"):
        for _ in range(500):
            optimizer.zero_grad()
            loss = method.meta_loss(episodes)
            method.check_finite(loss)
            loss.backward()
            optimizer.step()


def test_a_loss_that_is_no_number_stops_every_method():
    with pytest.raises(DivergenceError, match=r"nan.*method\.lr"):
        make("meta_rkhs_ii", "regression").check_finite(torch.tensor(math.nan))


@pytest.mark.parametrize("energy", ["euler", "cross", "literal"])
def test_all_energies_train_downhill(energy):
    episodes = tasks("classification")
    method = make("meta_rkhs_i", "classification")
    method.energy, method.alpha = energy, 0.01
    optimizer = torch.optim.Adam(method.parameters(), lr=1e-3)
    values = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = method.meta_loss(episodes)
        loss.backward()
        optimizer.step()
        values.append(loss.item())
    assert values[-1] < values[0] - 0.05


@pytest.mark.parametrize(
    ("method", "settings", "key"),
    [
        (MetaRKHSI, {"energy": "eq4"}, "method.energy"),
        (MetaRKHSI, {"adaptation": "magic"}, "method.adaptation"),
        (MetaRKHSI, {"alpha": math.nan}, "method.alpha"),
        (MetaRKHSI, {"alpha": -1.0}, "method.alpha"),
        (MetaRKHSI, {"adapt_lr": 0.0}, "method.adapt_lr"),
        (MetaRKHSII, {"t": 0.0}, "method.t"),
        (MetaRKHSII, {"t": -3.0}, "method.t"),
        (MetaRKHSII, {"t": math.nan}, "method.t"),
        (MetaRKHSII, {"approximation": "pade"}, "method.approximation"),
        (MetaRKHSII, {"t": math.inf, "approximation": "pade11"}, "method.approximation"),
        (MetaRKHSII, {"ridge": -1e-3}, "method.ridge"),
        (MetaRKHSII, {"tasks_per_chunk": 0}, "method.tasks_per_chunk"),
    ],
)
def test_bad_settings_name_their_key(method, settings, key):
    with pytest.raises(ConfigError, match=key.replace(".", r"\.")):
        method(MLP((1,), 1), SPEC, **settings)
