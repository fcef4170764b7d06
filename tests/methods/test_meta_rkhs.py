"""What is particular to Meta-RKHS-I and Meta-RKHS-II."""

import contextlib
import dataclasses
import math

import pytest
import torch
from reference import dense_jacobian
from test_contract import in_double, make, tasks
from torch import nn

from lightning_ntk.episode import Episode, TaskSpec
from lightning_ntk.errors import ConfigError, DivergenceError
from lightning_ntk.methods.meta_rkhs_i import MetaRKHSI
from lightning_ntk.methods.meta_rkhs_ii import MetaRKHSII
from lightning_ntk.methods.reptile import Reptile
from lightning_ntk.networks.conv4 import Conv4
from lightning_ntk.networks.mlp import MLP
from lightning_ntk.networks.normalisation import BatchStatistics
from lightning_ntk.ntk import layers
from lightning_ntk.ntk.network import functional

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
        method.planner.given = (size, None)
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


def test_steps_of_no_length_leave_the_plain_loss_and_its_gradient():
    episodes = in_double(tasks("regression"))
    method = MetaRKHSI(MLP((1,), 1).double(), SPEC, alpha=0.0, euler_steps=5)
    loss = method.meta_loss(episodes)
    plain = sum(method.loss(method.network(t.query_x), t.query_y) for t in episodes) / episodes.tasks
    parameters = list(method.parameters())
    assert loss.item() == pytest.approx(plain.item(), rel=1e-12)
    for g, e in zip(torch.autograd.grad(loss, parameters), torch.autograd.grad(plain, parameters), strict=True):
        assert torch.allclose(g, e, rtol=1e-10)


def test_euler_steps_that_are_too_long_say_so():
    method = MetaRKHSI(MLP((1,), 1).double(), SPEC, alpha=1e6, euler_steps=100)
    with pytest.raises(DivergenceError, match=r"method\.alpha.*method\.step_cap"):
        method.meta_loss(in_double(tasks("regression")))
    method.step_cap = 0.4
    assert torch.isfinite(method.meta_loss(in_double(tasks("regression"))))


def test_a_loss_that_is_no_number_stops_every_method():
    with pytest.raises(DivergenceError, match=r"nan.*method\.lr"):
        make("meta_rkhs_ii", "regression").check_finite(torch.tensor(math.nan))


@pytest.mark.parametrize("energy", ["euler", "cross", "literal"])
def test_all_energies_train_downhill(energy):
    episodes = tasks("classification")
    method = make("meta_rkhs_i", "classification")
    method.energy, method.alpha, method.euler_steps = energy, 0.01, 1
    optimizer = torch.optim.Adam(method.parameters(), lr=1e-3)
    values = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = method.meta_loss(episodes)
        loss.backward()
        optimizer.step()
        values.append(loss.item())
    assert values[-1] < values[0] - 0.05


@pytest.mark.parametrize("energy", ["euler", "cross", "literal"])
def test_the_direct_energies_keep_no_graph(energy):
    # What a chunk has passed is freed before the next, and nothing is left to compute outside of full precision.
    method = MetaRKHSI(MLP((1,), 1).double(), SPEC, energy=energy, alpha=0.1, euler_steps=1, tasks_per_chunk=1)
    episodes = in_double(tasks("regression", count=3))
    loss = method.meta_loss(episodes)
    nodes = [node for node, _ in loss.grad_fn.next_functions if node is not None]
    assert {type(node).__name__ for node in nodes} == {"AccumulateGrad"}
    network, params = functional(method.network)
    energies = [
        method._task_energy(network, params, t.support_x, t.support_y, t.query_x, t.query_y, None) for t in episodes
    ]
    assert loss.item() == pytest.approx(torch.stack(energies).mean().item(), rel=1e-10)
    expected = torch.autograd.grad(torch.stack(energies).mean(), list(params.values()))
    for g, e in zip(torch.autograd.grad(loss, list(params.values())), expected, strict=True):
        assert torch.allclose(g, e, rtol=1e-8)


@pytest.mark.parametrize(
    ("settings", "solves"),
    [
        ({}, True),
        ({"euler_steps": 1}, False),
        ({"energy": "cross"}, False),
        ({"energy": "cross", "adaptation": "euler"}, True),
    ],
)
def test_meta_rkhs_i_says_whether_it_solves_with_a_kernel(settings, solves):
    assert MetaRKHSI(MLP((1,), 1), SPEC, **settings).solves_kernels is solves


@pytest.mark.parametrize("energy", ["euler", "cross", "literal"])
def test_meta_rkhs_i_is_the_same_for_tasks_one_by_one_and_at_once(energy):
    episodes = in_double(tasks("classification", count=3))
    found = []
    for chunk in (1, 2, 3):
        torch.manual_seed(0)
        network = Conv4((1, 32, 32), 3, filters=8).double()
        spec = TaskSpec("classification", (1, 32, 32), 3)
        # The cap is at work: the step alone would be a hundred times as long.
        method = MetaRKHSI(network, spec, energy=energy, alpha=10.0, euler_steps=3, step_cap=0.2, tasks_per_chunk=chunk)
        loss = method.meta_loss(episodes)
        loss.backward()
        found.append((loss.item(), torch.cat([p.grad.flatten() for p in method.parameters()])))
    for loss, gradient in found[1:]:
        assert loss == pytest.approx(found[0][0], rel=1e-9)
        # Up to what the truncation of the support part leaves out, which depends on the tasks beside.
        assert torch.allclose(gradient, found[0][1], atol=1e-6 * found[0][1].abs().max().item())


@pytest.mark.parametrize("steps", [1, 4])
def test_the_cap_keeps_each_step_below_what_the_tasks_kernel_allows(steps):
    task = next(iter(in_double(tasks("regression"))))
    x, y = task.support_x, task.support_y
    method = MetaRKHSI(MLP((1,), 1).double(), SPEC, alpha=5.0, euler_steps=steps, step_cap=0.25)
    network, params = functional(method.network)
    jacobian = dense_jacobian(network, params, x)
    largest = torch.linalg.eigvalsh(jacobian @ jacobian.T)[-1].item()
    capped = method._alpha(network, params, x, y, steps).item()
    assert capped / steps == pytest.approx(0.25 * 2 * len(x) / largest, rel=1e-3)
    method.alpha = 0.5 * capped
    assert method._alpha(network, params, x, y, steps).item() == pytest.approx(method.alpha)
    # The mean squared error curves by 2: a quarter of 2 n / lambda_max lowers the loss in every direction.
    method.alpha = 5.0
    before = method.loss(method.network(x), y)
    assert method.loss(method.adapt(x, y)(x), y) < before
    method.step_cap = None
    assert method.loss(method.adapt(x, y)(x), y) > before


def test_the_cap_is_by_the_kernel_of_what_cross_entropy_sees():
    task = next(iter(in_double(tasks("classification"))))
    spec = TaskSpec("classification", (1, 32, 32), 3)
    torch.manual_seed(0)
    method = MetaRKHSI(Conv4((1, 32, 32), 3, filters=8, norm="none").double(), spec, alpha=1e9, step_cap=0.25)
    network, params = functional(method.network)
    jacobian = dense_jacobian(network, params, task.support_x).unflatten(0, (-1, 3))
    both = jacobian.flatten(0, 1), (jacobian - jacobian.mean(1, keepdim=True)).flatten(0, 1)
    largest = [torch.linalg.eigvalsh(j @ j.T)[-1].item() for j in both]
    assert largest[1] < 0.97 * largest[0], "the mean of the outputs matters here"
    capped = method._alpha(network, params, task.support_x, task.support_y, 1).item()
    assert capped == pytest.approx(0.25 * 2 * len(task.support_x) / largest[1], rel=1e-2)


def test_meta_rkhs_i_adapts_as_its_energy_trains_for(monkeypatch):
    adaptations = {energy: MetaRKHSI(MLP((1,), 1), SPEC, energy=energy).adaptation for energy in ("euler", "literal")}
    assert adaptations == {"euler": "euler", "literal": "gradient_descent"}
    # The energy is the query loss of what `adapt` gives.
    episodes = in_double(tasks("regression"))
    method = MetaRKHSI(MLP((1,), 1).double(), SPEC, alpha=0.2, euler_steps=3)
    for by_kernel in (True, False):
        monkeypatch.setattr(method, "_by_kernel", lambda examples, answer=by_kernel: answer)
        losses = [method.loss(method.adapt(t.support_x, t.support_y)(t.query_x), t.query_y).item() for t in episodes]
        for way in (True, False):
            monkeypatch.setattr(method, "_by_kernel", lambda examples, answer=way: answer)
            assert method.meta_loss(episodes).item() == pytest.approx(sum(losses) / len(losses), rel=1e-10)


@pytest.mark.parametrize(
    ("norm", "examples", "steps", "by_kernel"),
    [
        ("group", 25, 10, True),  # Four backward passes: cross-entropy does not see the mean of 5 outputs.
        ("batch", 5, 10, True),  # 20 passes over the 5 examples, against 10 steps of about 9.
        ("batch", 25, 10, False),  # 100 passes over the 25, four for each example of five outputs.
        ("batch", 25, 12, True),
        ("batch", 5, 1, False),
    ],
)
def test_the_kernel_is_built_where_it_costs_less_than_the_steps(norm, examples, steps, by_kernel):
    spec = TaskSpec("classification", (1, 28, 28), 5)
    method = MetaRKHSI(Conv4((1, 28, 28), 5, filters=8, norm=norm), spec, euler_steps=steps)
    assert method._by_kernel(examples) == by_kernel


@pytest.mark.parametrize(
    ("method", "settings", "key"),
    [
        (MetaRKHSI, {"energy": "eq4"}, "method.energy"),
        (MetaRKHSI, {"adaptation": "magic"}, "method.adaptation"),
        (MetaRKHSI, {"alpha": math.nan}, "method.alpha"),
        (MetaRKHSI, {"alpha": -1.0}, "method.alpha"),
        (MetaRKHSI, {"adapt_lr": 0.0}, "method.adapt_lr"),
        (MetaRKHSI, {"euler_steps": 0}, "method.euler_steps"),
        (MetaRKHSI, {"step_cap": 0.0}, "method.step_cap"),
        (MetaRKHSI, {"step_cap": math.inf}, "method.step_cap"),
        (MetaRKHSII, {"t": 0.0}, "method.t"),
        (MetaRKHSII, {"t": -3.0}, "method.t"),
        (MetaRKHSII, {"t": math.nan}, "method.t"),
        (MetaRKHSII, {"approximation": "pade"}, "method.approximation"),
        (MetaRKHSII, {"t": math.inf, "approximation": "pade11"}, "method.approximation"),
        (MetaRKHSII, {"ridge": -1e-3}, "method.ridge"),
        (MetaRKHSII, {"tasks_per_chunk": 0}, "method.tasks_per_chunk"),
        (MetaRKHSII, {"pairs_at_once": 0}, "method.pairs_at_once"),
        (MetaRKHSII, {"rank_tolerance": math.nan}, "method.rank_tolerance"),
        (MetaRKHSII, {"rank_tolerance": -1.0}, "method.rank_tolerance"),
        (MetaRKHSII, {"kernel": "diagonal"}, "method.kernel"),
        (MetaRKHSI, {"tasks_per_chunk": 0}, "method.tasks_per_chunk"),
    ],
)
def test_bad_settings_name_their_key(method, settings, key):
    with pytest.raises(ConfigError, match=key.replace(".", r"\.")):
        method(MLP((1,), 1), SPEC, **settings)


@pytest.mark.parametrize("kernel", ["full", "trace"])
def test_at_infinite_time_repeated_examples_of_other_labels_may_come_in_any_order(kernel):
    torch.manual_seed(0)
    spec = TaskSpec("classification", (1, 16, 16), 3)
    network = Conv4((1, 16, 16), 3, filters=16, norm="group" if kernel == "trace" else "batch")
    method = MetaRKHSII(network, spec, t=math.inf, kernel=kernel)
    images, queries = torch.rand(5, 1, 16, 16), torch.rand(4, 1, 16, 16)
    x, y = torch.cat([images, images[:2]]), torch.tensor([0, 1, 2, 0, 1, 0, 2])
    order = torch.tensor([6, 2, 0, 5, 1, 4, 3])
    expected = method.adapt(x, y)(queries)
    assert (method.adapt(x[order], y[order])(queries) - expected).abs().max() < 0.01 * expected.abs().max()


def test_the_trace_kernel_needs_examples_that_do_not_depend_on_each_other():
    spec = TaskSpec("classification", (1, 28, 28), 5)
    with pytest.raises(ConfigError, match=r"method\.kernel=trace.*network\.norm=group"):
        MetaRKHSII(Conv4((1, 28, 28), 5, norm="batch"), spec, kernel="trace")
    MetaRKHSII(Conv4((1, 28, 28), 5, norm="group"), spec, kernel="trace")


class Silent(nn.Sequential):
    """A network that does not say whether it couples its examples."""


def test_a_network_that_does_not_say_is_told_how_to():
    network = Silent(nn.Flatten(), nn.Linear(1, 1))
    remedy = r"If those of Silent do not, set its attribute couples_examples = False"
    with pytest.raises(ConfigError, match=rf"method\.kernel=trace.* {remedy}, or method\.kernel=full"):
        MetaRKHSII(network, SPEC, kernel="trace")
    many = Episode.stack([Episode(*[torch.zeros(200, 1)] * 4, torch.tensor(0))])
    with pytest.warns(UserWarning, match=remedy):
        MetaRKHSII(network, SPEC)._say_what_costs(many)
    network.couples_examples = False
    MetaRKHSII(network, SPEC, kernel="trace")._say_what_costs(many)


@pytest.mark.parametrize("kind", [MetaRKHSI, MetaRKHSII, Reptile])
@pytest.mark.parametrize("layer", [nn.BatchNorm2d(4, track_running_stats=False), BatchStatistics(4)])
def test_a_network_that_says_it_does_not_couple_examples_and_does_is_refused(kind, layer):
    network = nn.Sequential(nn.Conv2d(1, 4, 3), layer, nn.Flatten(), nn.Linear(4 * 30 * 30, 3))
    spec = TaskSpec("classification", (1, 32, 32), 3)
    assert kind(network, spec).couples_queries
    network.couples_examples = False
    with pytest.raises(ConfigError, match=r"its layer 1 \(Batch\w+\) normalises.* Set couples_examples = True"):
        kind(network, spec)
    network[1] = nn.GroupNorm(2, 4)
    assert not kind(network, spec).couples_queries


def test_the_trace_kernels_queries_are_planned_for():
    network = MLP((1,), 1)
    assert MetaRKHSII(network, SPEC, kernel="trace").planner.query_rows
    assert not MetaRKHSII(network, SPEC).planner.query_rows


def test_meta_rkhs_ii_turns_tf32_off_for_itself_alone():
    method = make("meta_rkhs_ii", "classification")
    seen = []
    flags = lambda: (torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32)  # noqa: E731
    before = flags()
    method.network.register_forward_hook(lambda *_: seen.append(flags()))
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = True
    try:
        method.meta_loss(tasks("classification"))
        assert set(seen) == {(False, False)}
        assert flags() == (True, True)
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


@pytest.mark.parametrize(
    ("name", "shots", "warns"),
    [("meta_rkhs_ii", 1, False), ("meta_rkhs_ii", 40, True), ("meta_rkhs_ii_trace", 40, False)],
)
def test_meta_rkhs_ii_says_when_coupled_examples_make_it_costly(name, shots, warns):
    method = make(name, "classification")  # The trace kernel's has group norm: its examples are not coupled.
    episode = next(iter(tasks("classification")))
    many = Episode.stack([dataclasses.replace(episode, support_x=episode.support_x.repeat(shots, 1, 1, 1))])
    context = pytest.warns(UserWarning, match=r"network\.norm=group") if warns else contextlib.nullcontext()
    with context:
        method._say_what_costs(many)


def test_the_engines_layers_leave_autocast_its_choice(monkeypatch):
    monkeypatch.setattr(layers, "SMALLEST_IMAGE", 0)
    torch.manual_seed(0)
    module, x = Conv4((1, 32, 32), 3, filters=8, norm="group", downsample="pool"), torch.randn(4, 1, 32, 32)
    network, params = functional(module)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected, found = module(x), network(params, x)
    assert torch.equal(found, expected)
    assert found.dtype == torch.bfloat16
    found.float().square().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in module.parameters())
