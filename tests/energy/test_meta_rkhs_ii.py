"""The closed-form adaptation and its meta-gradient, against naive autodiff and against real gradient steps."""

import math

import pytest
import torch
import torch.nn.functional as F
from reference import closed_form_outputs, dense_jacobian, small_steps
from torch import nn

from lightning_ntk.energy import meta_rkhs_ii as energy
from lightning_ntk.energy.closed_form import ClosedForm
from lightning_ntk.networks.conv4 import Conv4
from lightning_ntk.networks.mlp import MLP
from lightning_ntk.networks.resnet12 import ResNet12
from lightning_ntk.ntk import convolution, layers
from lightning_ntk.ntk.network import functional
from lightning_ntk.ntk.params import flatten

# The ridge keeps the oracle's own matrix functions well conditioned, so that the comparison can be tight.
SETTINGS = [
    (0.1, "exact", 0.0),
    (0.1, "exact", 0.1),
    (10.0, "exact", 0.1),
    (1000.0, "exact", 0.1),
    (math.inf, "exact", 0.1),
    (100.0, "pade11", 0.1),
    (100.0, "pade22", 0.1),
]


class Foreign(nn.Sequential):
    """A network of somebody else's, with one of PyTorch's norms and with activations in place."""

    def __init__(self, norm):
        layers = [nn.Conv2d(1, 4, 3, stride=2), norm, nn.ReLU(inplace=True), nn.Conv2d(4, 4, 3), nn.ReLU(inplace=True)]
        super().__init__(*layers, nn.Flatten(), nn.Linear(36, 3))
        self.couples_examples = isinstance(norm, nn.BatchNorm2d)


class Attention(nn.Module):
    """A transformer's layer on sequences `[n, 3, 4]`, and a head."""

    couples_examples = False

    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True), nn.Linear(12, 3)

    def forward(self, x):
        return self.head(self.layer(x).flatten(1))


class Scale(nn.Module):
    """A learned temperature: a parameter without axes."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.5))

    def forward(self, x):
        return self.scale * x


FOREIGN = {
    "layer norm": lambda: nn.LayerNorm((4, 5, 5)),
    "instance norm": lambda: nn.InstanceNorm2d(4, affine=True),
    "torch's batch norm": lambda: nn.BatchNorm2d(4, track_running_stats=False),
    "in place": lambda: nn.GroupNorm(2, 4),
    "prelu": lambda: nn.PReLU(4),
    "one number": Scale,
}


def make_network(name):
    torch.manual_seed(0)
    if name in FOREIGN:
        return Foreign(FOREIGN[name]()).double(), (1, 12, 12)
    if name == "attention":
        return Attention().double(), (3, 4)
    if name == "mlp":
        return MLP((4,), 3, hidden=(16, 16)).double(), (4,)
    if name.startswith("resnet12"):
        return ResNet12((1, 16, 16), 3, width=16, norm=name.split("-")[1]).double(), (1, 16, 16)
    _, norm, downsample = name.split("-")
    return Conv4((1, 32, 32), 3, filters=8, norm=norm, downsample=downsample).double(), (1, 32, 32)


def make_tasks(shape, tasks=2, n=3, m=4, outputs=3):
    torch.manual_seed(1)
    double = {"dtype": torch.float64}
    return (
        torch.randn(tasks, n, *shape, **double),
        torch.randn(tasks, n, outputs, **double),
        torch.randn(tasks, m, *shape, **double),
        torch.randn(tasks, m, outputs, **double),
    )


CONV4 = ["conv4-batch-stride", "conv4-group-stride", "conv4-none-stride", "conv4-batch-pool"]
NETWORKS = ["mlp", "attention", *CONV4, "resnet12-batch", "resnet12-group", "resnet12-none", *FOREIGN]


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize(("t", "approximation", "ridge"), SETTINGS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
def test_the_meta_gradient_equals_naive_autodiff(name, t, approximation, ridge, dtype, tolerance):
    module, shape = make_network(name)
    network, params = functional(module)
    support_x, targets, query_x, query_y = make_tasks(shape, tasks=1)
    expected_loss = F.mse_loss(
        closed_form_outputs(network, params, support_x[0], targets[0], query_x[0], t, approximation, ridge), query_y[0]
    )
    expected = torch.cat([g.flatten() for g in torch.autograd.grad(expected_loss, list(params.values()))])

    how = ClosedForm(t, approximation, ridge, module.couples_examples, rank_tolerance=tolerance / 10)
    network, params = functional(module.to(dtype))
    data = (a.to(dtype) for a in (support_x, targets, query_x, query_y))
    loss, gradient, *_ = energy.meta_gradient(network, params, *data, F.mse_loss, how)
    assert loss.item() == pytest.approx(expected_loss.item(), rel=tolerance)
    assert (flatten(gradient).double() - expected).norm() < tolerance * expected.norm()


@pytest.mark.parametrize("name", ["mlp", "conv4-batch-stride", "conv4-none-stride"])
def test_tasks_at_once_equal_tasks_one_by_one(name):
    module, shape = make_network(name)
    network, params = functional(module)
    tasks = make_tasks(shape, tasks=3)
    how = ClosedForm(10.0, ridge=0.1, coupled=module.couples_examples, rank_tolerance=1e-12)
    one_by_one = energy.meta_gradient(network, params, *tasks, F.mse_loss, how, tasks_per_chunk=1)
    for settings in ({"tasks_per_chunk": 2}, {"tasks_per_chunk": 3}, {"tasks_per_chunk": 3, "queries_apart": True}):
        loss, gradient, *_ = energy.meta_gradient(network, params, *tasks, F.mse_loss, how, **settings)
        assert torch.allclose(loss, one_by_one[0], rtol=1e-12)
        assert (flatten(gradient) - flatten(one_by_one[1])).norm() < 1e-10 * flatten(gradient).norm()


@pytest.mark.parametrize("name", ["mlp", "conv4-batch-stride", "conv4-none-stride"])
@pytest.mark.parametrize("pairs_at_once", [1, 7])
@pytest.mark.parametrize("t", [10.0, math.inf])
def test_pairs_at_once_change_nothing(name, pairs_at_once, t):
    module, shape = make_network(name)
    network, params = functional(module)
    tasks = make_tasks(shape, tasks=2)
    how = ClosedForm(t, ridge=0.1, coupled=module.couples_examples, rank_tolerance=1e-12)
    whole = energy.meta_gradient(network, params, *tasks, F.mse_loss, how)
    for tasks_per_chunk in (1, 2):
        parted = energy.meta_gradient(
            network, params, *tasks, F.mse_loss, how, tasks_per_chunk=tasks_per_chunk, pairs_at_once=pairs_at_once
        )
        assert torch.allclose(parted.loss, whole.loss, rtol=1e-12)
        assert (flatten(parted.gradient) - flatten(whole.gradient)).norm() < 1e-10 * flatten(whole.gradient).norm()


def test_few_directions_where_they_suffice_and_an_examples_own_rows_where_they_do_not():
    module, shape = make_network("conv4-none-stride")
    network, params = functional(module)
    tasks = make_tasks(shape, tasks=1, n=6)

    def tangents(t, coupled, approximation="exact"):
        how = ClosedForm(t, approximation, ridge=0.1, coupled=coupled, rank_tolerance=1e-9)
        return energy.meta_gradient(network, params, *tasks, F.mse_loss, how).tangents

    assert tangents(math.inf, coupled=False) == 2
    assert tangents(10.0, coupled=False, approximation="pade11") == 2
    assert tangents(10.0, coupled=True) > 3
    assert tangents(10.0, coupled=False) == 3


@pytest.mark.parametrize("form", ["loops", "groups"])
@pytest.mark.parametrize("name", ["conv4-none-stride", "conv4-group-stride"])
def test_on_images_that_the_engine_takes_over_the_gradient_is_the_same(name, form, monkeypatch):
    module, shape = make_network(name)
    network, params = functional(module)
    tasks = make_tasks(shape, tasks=2)
    how = ClosedForm(10.0, ridge=0.1, coupled=False, rank_tolerance=1e-12)
    expected = energy.meta_gradient(network, params, *tasks, F.mse_loss, how)
    monkeypatch.setattr(layers, "SMALLEST_IMAGE", 0)
    monkeypatch.setattr(convolution, "_loops", lambda tensor: form == "loops")
    for chunks in ({"tasks_per_chunk": 1}, {"tasks_per_chunk": 2}, {"pairs_at_once": 4}):
        found = energy.meta_gradient(network, params, *tasks, F.mse_loss, how, **chunks)
        assert (flatten(found.gradient) - flatten(expected.gradient)).norm() < 1e-10 * flatten(expected.gradient).norm()


@pytest.mark.parametrize("tolerance", [1e-2, 1e-5])
def test_what_the_truncation_left_out_is_reported_and_within_the_tolerance(tolerance):
    module, shape = make_network("conv4-batch-stride")
    network, params = functional(module)
    how = ClosedForm(0.1, rank_tolerance=tolerance)
    result = energy.meta_gradient(network, params, *make_tasks(shape, tasks=2, n=6), F.mse_loss, how)
    assert 0 < result.left_out <= tolerance
    assert 1 <= result.tangents < 18


def test_a_looser_rank_tolerance_stays_within_its_error():
    module, shape = make_network("conv4-none-stride")
    network, params = functional(module)
    tasks = make_tasks(shape, tasks=1, n=6)
    gradients = {
        tolerance: flatten(
            energy.meta_gradient(network, params, *tasks, F.mse_loss, ClosedForm(10.0, rank_tolerance=tolerance))[1]
        )
        for tolerance in (1e-13, 1e-3)
    }
    error = (gradients[1e-3] - gradients[1e-13]).norm() / gradients[1e-13].norm()
    assert 1e-9 < error < 1e-3


def test_the_adapted_function_is_the_linearised_network_after_many_small_steps():
    module, _ = make_network("mlp")
    network, params = functional(module)
    x, y, query_x, _ = (a[0] for a in make_tasks((4,), tasks=1))
    adapted = energy.adapt(network, params, x, y, ClosedForm(2.0, coupled=False))(query_x)

    jacobian = dense_jacobian(network, params, x)
    moved = small_steps(jacobian, network(params, x).flatten(), y.flatten(), t=2.0, steps=20_000)
    by_steps = network(params, query_x) + (dense_jacobian(network, params, query_x) @ moved).view(-1, 3)
    assert torch.allclose(adapted, by_steps, atol=1e-3)
    assert (adapted - network(params, query_x)).abs().max() > 0.1


def test_for_a_wide_network_and_a_short_time_it_is_gradient_descent_itself():
    # The real network's parameters, not its linearisation, moved by many small steps of the same flow.
    torch.manual_seed(0)
    module = MLP((4,), 2, hidden=(2000,)).double()
    network, params = functional(module)
    x, y = torch.randn(3, 4, dtype=torch.float64), torch.randn(3, 2, dtype=torch.float64)
    query_x = torch.randn(5, 4, dtype=torch.float64)
    t, steps = 0.01, 100
    adapted = energy.adapt(network, params, x, y, ClosedForm(t, coupled=False))(query_x)
    theta = {name: p.detach().clone().requires_grad_() for name, p in params.items()}
    for _ in range(steps):
        loss = 0.5 * (network(theta, x) - y).square().sum()
        gradients = torch.autograd.grad(loss, list(theta.values()))
        theta = {
            name: (p - t / steps * g).detach().requires_grad_()
            for (name, p), g in zip(theta.items(), gradients, strict=True)
        }
    change = adapted - network(params, query_x)
    assert (network(theta, query_x) - adapted).norm() < 0.05 * change.norm()
    assert change.norm() > 0.1


def test_time_zero_changes_nothing_and_infinite_time_fits_the_support():
    module, _ = make_network("mlp")
    network, params = functional(module)
    x, y, query_x, _ = (a[0] for a in make_tasks((4,), tasks=1))
    still = energy.adapt(network, params, x, y, ClosedForm(1e-9))
    assert torch.allclose(still(query_x), network(params, query_x), atol=1e-6)
    fitted = energy.adapt(network, params, x, y, ClosedForm(math.inf))
    assert torch.allclose(fitted(x), y, atol=1e-6)


@pytest.mark.parametrize("t, ridge", [(5e3, 0.0), (1e6, 0.0), (math.inf, 1e-6)])
def test_at_large_times_and_small_ridges_the_kernel_is_more_exact_than_single_precision(t, ridge):
    x, query = torch.linspace(-5, 5, 15)[None, :, None], torch.linspace(-5, 5, 23)[None, :, None]
    found = []
    for dtype in (torch.float32, torch.float64):
        torch.manual_seed(0)
        network, params = functional(MLP((1,), 1).to(dtype))
        data = [part.to(dtype) for part in (x, x.sin(), query, query.sin())]
        found.append(energy.meta_gradient(network, params, *data, F.mse_loss, ClosedForm(t, ridge=ridge)))
    single, double = (flatten(result.gradient).double() for result in found)
    assert (single - double).norm() < 1e-3 * double.norm()
