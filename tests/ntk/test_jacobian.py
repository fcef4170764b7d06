"""J, J v and J^T u against the definition."""

import subprocess
import sys

import pytest
import torch
from reference import dense_jacobian
from torch import nn

from lightning_ntk.networks.conv4 import Conv4
from lightning_ntk.networks.mlp import MLP
from lightning_ntk.ntk.jacobian import Jacobian, flatten, functional, unflatten
from lightning_ntk.ntk.kernel import empirical_ntk


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


PEAK = """
import torch
from lightning_ntk.benchmark.memory import peak_of
from lightning_ntk.networks.mlp import MLP
from lightning_ntk.ntk.jacobian import Jacobian, functional

network, params = functional(MLP((100,), 5, hidden=(1000, 1000)))
x = torch.randn(8, 100)
for coupled, at_once in ((True, 8), (False, 1)):
    Jacobian(network, params, x[:2], coupled=coupled).dense(at_once)
    print(peak_of(lambda: Jacobian(network, params, x, coupled=coupled).dense(at_once), "cpu"))
"""


def test_the_dense_jacobian_is_in_memory_once():
    # In a process of its own, whose heap holds nothing else. 8 examples, 5 outputs, 1.1 million parameters: 169 MiB,
    # and a part of 21 MiB in up to three states.
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", PEAK], capture_output=True, text=True, check=True)
    for mib in map(float, run.stdout.split()):
        assert 160 < mib < 300


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


def test_flatten_and_unflatten_are_inverse():
    _, params = functional(MLP((3,), 2, hidden=(4,)))
    vector = torch.arange(float(sum(p.numel() for p in params.values())))
    assert torch.equal(flatten(unflatten(vector, params)), vector)
