"""J, J v and J^T u against the definition."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from reference import dense_jacobian
from torch import nn

from lightning_ntk.errors import ConfigError
from lightning_ntk.networks.conv4 import Conv4
from lightning_ntk.networks.mlp import MLP
from lightning_ntk.ntk import jacobian as jacobian_module
from lightning_ntk.ntk.jacobian import Jacobian
from lightning_ntk.ntk.kernel import empirical_ntk
from lightning_ntk.ntk.network import functional
from lightning_ntk.ntk.params import flatten, unflatten


def networks():
    torch.manual_seed(0)
    image = torch.rand(4, 1, 16, 16, dtype=torch.float64)
    yield pytest.param(MLP((3,), 2, hidden=(5, 5)), torch.randn(4, 3, dtype=torch.float64), id="mlp")
    for norm in ("batch", "group", "none"):
        for downsample in ("stride", "pool"):
            # Group norm wants more than one value a group: two channels a group at one pixel.
            network = Conv4((1, 16, 16), 3, filters=16, norm=norm, downsample=downsample)
            yield pytest.param(network, image, id=f"conv4-{norm}-{downsample}")


@pytest.mark.parametrize(("module", "x"), networks())
def test_dense_and_products_equal_the_definition(module, x):
    network, params = functional(module.double())
    expected = dense_jacobian(network, params, x)
    jacobian = Jacobian(network, params, x, coupled=module.couples_examples)
    n, outputs = jacobian.outputs.shape
    assert torch.allclose(jacobian.dense().view(n * outputs, -1), expected, atol=1e-12)
    assert torch.allclose(jacobian.dense(pairs_at_once=3).view(n * outputs, -1), expected, atol=1e-12)
    v, u = torch.randn(expected.shape[1], dtype=x.dtype), torch.randn(n, outputs, dtype=x.dtype)
    assert torch.allclose(jacobian.jvp(unflatten(v, params)).flatten(), expected @ v, atol=1e-10)
    assert torch.allclose(flatten(jacobian.vjp(u)), u.flatten() @ expected, atol=1e-10)


def test_coupled_rows_of_few_outputs_at_once_are_those_of_plain_passes(monkeypatch):
    torch.manual_seed(0)
    module = Conv4((1, 16, 16), 3, filters=4, norm="batch").double()
    module.unused = nn.Parameter(torch.ones(2, dtype=torch.float64))
    network, params = functional(module)
    x = torch.rand(4, 1, 16, 16, dtype=torch.float64)
    engine, plain = [], []
    vjp, pass_through = Jacobian.vjp, network.plain
    monkeypatch.setattr(Jacobian, "vjp", lambda *a: engine.append(a) or vjp(*a))
    network.plain = lambda *a: plain.append(a) or pass_through(*a)
    expected = Jacobian(network, params, x).dense()
    assert engine and not plain
    engine.clear()
    whole = Jacobian(network, params, x).dense(pairs_at_once=8)
    some = Jacobian(network, params, x).rows(1, 3, pairs_at_once=8)
    assert plain and not engine
    assert torch.allclose(whole, expected, atol=1e-12)
    assert torch.allclose(flatten(some, batch_dims=2), expected[1:3], atol=1e-12)
    # Where the result is to be differentiated, or a transform follows it, they are the engine's.
    plain.clear()
    (slope,) = torch.autograd.grad(Jacobian(network, params, x.requires_grad_()).dense(8).square().sum(), x)
    of_tasks = torch.func.vmap(lambda x: Jacobian(network, params, x).dense(8))(x.detach()[None])
    assert slope.abs().max() > 0
    assert torch.allclose(of_tasks[0], expected, atol=1e-12)
    assert engine and not plain


PEAK = """
import torch
from lightning_ntk.benchmark.memory import peak_of
from lightning_ntk.networks.mlp import MLP
from lightning_ntk.ntk import Jacobian, functional

network, params = functional(MLP((100,), 5, hidden=(1000, 1000)))
x = torch.randn(8, 100)
for coupled, at_once in ((True, 8), (False, 1)):
    Jacobian(network, params, x[:2], coupled=coupled).dense(at_once)
    print(peak_of(lambda: Jacobian(network, params, x, coupled=coupled).dense(at_once), "cpu"))
"""


def test_the_dense_jacobian_is_in_memory_once():
    # In a process of its own, whose heap holds nothing else, nor keeps what was freed. 8 examples, 5 outputs and 1.1
    # million parameters: 169 MiB, and a part of 21 MiB in up to three states.
    at_once = {"MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, "-W", "ignore", "-c", PEAK]
    run = subprocess.run(command, env={**os.environ, **at_once}, capture_output=True, text=True, check=True)
    for mib in map(float, run.stdout.split()):
        assert 160 < mib < 250


def test_the_jacobian_of_a_linear_model_is_its_input():
    module = nn.Linear(3, 1, bias=False)
    x = torch.randn(5, 3)
    network, params = functional(module)
    assert torch.equal(Jacobian(network, params, x, coupled=False).dense(), x.unsqueeze(1))
    assert torch.allclose(empirical_ntk(network, params, x, coupled=False).squeeze(), x @ x.T, atol=1e-6)


def test_a_batch_norm_network_really_couples_its_examples():
    # Were its Jacobian block-wise like the others', `couples_examples` would be a needless cost.
    module = Conv4((1, 16, 16), 3, filters=8, norm="batch").double()
    x = torch.rand(4, 1, 16, 16, dtype=torch.float64)
    network, params = functional(module)
    whole = Jacobian(network, params, x, coupled=True).dense()
    single = Jacobian(network, params, x, coupled=False).dense()
    assert (whole - single).abs().max() > 1e-2


class Ending(nn.Module):
    """A layer, and what it gives in another shape."""

    def __init__(self, end):
        super().__init__()
        self.layer, self.end = nn.Linear(3, 4), end

    def forward(self, x):
        return self.end(self.layer(x))


@pytest.mark.parametrize("coupled", [True, False])
@pytest.mark.parametrize(
    ("end", "shape"),
    [(lambda y: y[:, 0], [5]), (lambda y: y.view(-1, 2, 2), [5, 2, 2]), (lambda y: y.sum(0, keepdim=True), [1, 4])],
)
def test_outputs_of_another_shape_are_named(end, shape, coupled):
    network, params = functional(Ending(end))
    x = torch.randn(5, 3)
    message = rf"outputs \[n, C\], but it takes inputs \[{{}}, 3\] to outputs \[{', '.join(map(str, shape))}\]"
    for work in (lambda j: j.dense(), lambda j: j.rows(), lambda j: j.outputs):
        with pytest.raises(ConfigError, match=message.format(5)):
            work(Jacobian(network, params, x, coupled=coupled))
    if shape[0] == 5:  # From one example, a sum over them cannot be told.
        with pytest.raises(ConfigError, match=r"Let it end in outputs\.reshape"):
            empirical_ntk(network, params, x, coupled=coupled)


def test_inference_mode_is_refused():
    network, params = functional(MLP((3,), 2))
    with torch.inference_mode(), pytest.raises(ConfigError, match=r"torch\.no_grad\(\) instead"):
        empirical_ntk(network, params, torch.randn(4, 3))
    with torch.no_grad():
        assert empirical_ntk(network, params, torch.randn(4, 3)).diagonal().abs().sum() > 0


def test_the_callers_precision_makes_no_difference():
    torch.manual_seed(0)
    network, params = functional(MLP((3,), 2))
    x, u = torch.randn(4, 3), torch.randn(4, 2)
    found = []
    for autocast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            for coupled in (False, True):
                j = Jacobian(network, params, x, coupled=coupled)
                parts = (j.outputs, j.dense(), j.jvp(params), *j.vjp(u).values(), empirical_ntk(network, params, x))
                found.append(parts)
    for plain, cast in zip(found[:2], found[2:], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(plain, cast, strict=True))


def test_layers_that_do_not_serve_are_tried_once(monkeypatch):
    tried = []
    served = jacobian_module.layer_rows
    monkeypatch.setattr(jacobian_module, "layer_rows", lambda *a: tried.append(len(a[2])) or served(*a))
    network, params = functional(nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4)))
    j = Jacobian(network, params, torch.randn(6, 3), coupled=False)
    whole = j.rows(pairs_at_once=2)
    assert torch.equal(flatten(j.rows(pairs_at_once=4), batch_dims=2), flatten(whole, batch_dims=2))
    j.dense(pairs_at_once=2)
    assert tried == [2]


def test_rows_in_parts_are_the_rows():
    network, params = functional(MLP((3,), 2).double())
    j = Jacobian(network, params, torch.randn(7, 3, dtype=torch.float64), coupled=False)
    for name, rows in j.rows(pairs_at_once=3).items():
        assert torch.allclose(rows, j.rows()[name], atol=1e-14)


def test_a_network_may_write_over_its_input():
    class Halving(nn.Linear):
        def forward(self, x):
            return super().forward(x.mul_(0.5))

    linear = Halving(5, 2).double()
    network, params = functional(linear)
    x = torch.randn(3, 5, dtype=torch.float64)
    found = empirical_ntk(network, params, x.clone(), coupled=False)
    products = 0.25 * x @ x.mT + 1
    assert torch.allclose(found, products[..., None, None] * torch.eye(2, dtype=torch.float64))


class ScaledByItself(nn.Module):
    """Divides by the size of a weight, which it takes as a constant."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 2)

    def forward(self, x):
        with torch.no_grad():
            size = self.first.weight.norm()
        return self.last(torch.tanh(F.linear(x, self.first.weight / size, self.first.bias)))


@pytest.mark.parametrize("coupled", [True, False])
def test_what_a_network_computes_under_no_grad_is_constant_in_both_modes(coupled):
    torch.manual_seed(0)
    network, params = functional(ScaledByItself().double())
    operator = Jacobian(network, params, torch.randn(3, 4, dtype=torch.float64), coupled=coupled)
    expected = operator.dense() @ flatten(params)
    assert torch.allclose(operator.jvp(params), expected)
    with torch.no_grad():  # Around the network, it is no affair of the network's.
        assert torch.allclose(operator.jvp(params), expected)


def test_outputs_of_another_type_are_told():
    class Pair(nn.Linear):
        def forward(self, x):
            return super().forward(x), x

    network, params = functional(Pair(3, 2))
    with pytest.raises(ConfigError, match=r"its outputs are of type tuple\. Wrap it"):
        empirical_ntk(network, params, torch.randn(3, 3))


@pytest.mark.parametrize("coupled", [True, False])
def test_rows_are_counted_from_the_end_as_in_a_list(coupled):
    network, params = functional(MLP((3,), 2).double())
    j = Jacobian(network, params, torch.randn(5, 3, dtype=torch.float64), coupled=coupled)
    assert torch.allclose(flatten(j.rows(-2), batch_dims=2), j.dense()[-2:])
    assert torch.allclose(flatten(j.rows(1, -1), batch_dims=2), j.dense()[1:-1])


def test_a_module_in_the_place_of_a_function_is_told():
    module, x = nn.Linear(3, 2), torch.randn(4, 3)
    _, params = functional(module)
    with pytest.raises(ConfigError, match=r"got the module Linear. Take network, parameters = ntk.functional"):
        empirical_ntk(module, params, x)


@pytest.mark.parametrize("several", [{"x": torch.ones(4, 3)}, (torch.ones(4, 3), torch.ones(4, 3)), np.ones((4, 3))])
def test_inputs_that_are_not_one_tensor_are_told(several):
    network, params = functional(nn.Linear(3, 2))
    with pytest.raises(ConfigError, match=rf"Expected inputs as one tensor .* got a {type(several).__name__}"):
        empirical_ntk(network, params, several)


def test_recurrent_layers_are_told_to_couple_their_examples():
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.head = nn.GRU(2, 3, batch_first=True), nn.Linear(3, 2)

        def forward(self, x):
            return self.head(self.layer(x)[0][:, -1])

    network, params = functional(Recurrent())
    x = torch.randn(4, 5, 2)
    with pytest.raises(ConfigError, match=r"goes through no vmap, as recurrent ones do. Take coupled=True"):
        Jacobian(network, params, x, coupled=False).dense()
    assert Jacobian(network, params, x).dense().isfinite().all()
