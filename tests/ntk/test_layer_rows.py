"""Jacobian rows from what layers saw: equal to plain reverse mode where served, and left alone where not."""

import pytest
import torch
import torch.nn.functional as F
from reference import dense_jacobian
from torch import nn

from lightning_ntk.networks.conv4 import Conv4
from lightning_ntk.networks.mlp import MLP
from lightning_ntk.networks.resnet12 import ResNet12
from lightning_ntk.ntk.jacobian import Jacobian, flatten, functional
from lightning_ntk.ntk.layer_rows import layer_rows

SERVED = {
    "mlp": (lambda: MLP((3,), 2, hidden=(5, 4)), (3,)),
    "none": (lambda: Conv4((2, 16, 16), 3, filters=8, norm="none", downsample="pool"), (2, 16, 16)),
    "group": (lambda: Conv4((2, 32, 32), 3, filters=8, norm="group"), (2, 32, 32)),
    "resnet12": (lambda: ResNet12((1, 16, 16), 2, width=16, norm="group"), (1, 16, 16)),
    "grouped, no bias": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 4, 3, stride=2, groups=2, bias=False), nn.Flatten(), nn.Linear(36, 2, bias=False)
        ),
        (2, 8, 8),
    ),
}


@pytest.mark.parametrize("name", SERVED)
def test_rows_and_outputs_are_those_of_reverse_mode(name):
    torch.manual_seed(0)
    make, shape = SERVED[name]
    module = make().double()
    network, params = functional(module)
    x = torch.rand(4, *shape, dtype=torch.float64)
    found = layer_rows(network.plain, {key: p.detach() for key, p in params.items()}, x)
    assert found is not None
    rows, outputs = found
    assert list(rows) == list(params)
    expected = dense_jacobian(network, params, x)
    assert (flatten(rows, batch_dims=2).flatten(0, 1) - expected).abs().max() < 1e-11 * expected.abs().max()
    assert torch.allclose(outputs, module(x))
    assert not outputs.requires_grad


class Scaled(nn.Module):
    """A parameter outside any layer."""

    def __init__(self):
        super().__init__()
        self.layer, self.scale = nn.Linear(3, 2), nn.Parameter(torch.tensor(1.5))

    def forward(self, x):
        return self.scale * self.layer(x)


class Twice(nn.Module):
    """A layer used twice."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x):
        return self.layer(torch.tanh(self.layer(x)))


class Tied(nn.Module):
    """A weight used as it is and transposed."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x):
        return F.linear(torch.tanh(self.layer(x)), self.layer.weight.T)


class OnSequences(nn.Module):
    """A linear layer on more than vectors."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(1, 2)

    def forward(self, x):
        return self.layer(x.unsqueeze(-1)).sum(1)


class Unused(nn.Module):
    """A parameter that nothing uses."""

    def __init__(self):
        super().__init__()
        self.layer, self.other = nn.Linear(3, 2), nn.Linear(3, 2)

    def forward(self, x):
        return self.layer(x)


@pytest.mark.parametrize("make", [Scaled, Twice, Tied, OnSequences, Unused])
def test_what_is_not_served_is_left_to_vmap(make):
    torch.manual_seed(0)
    network, params = functional(make().double())
    x = torch.randn(4, 3, dtype=torch.float64)
    assert layer_rows(network.plain, {key: p.detach() for key, p in params.items()}, x) is None
    expected = dense_jacobian(network, params, x)
    assert torch.allclose(Jacobian(network, params, x, coupled=False).dense().flatten(0, 1), expected)


def test_rows_stay_differentiable_in_an_input_that_asks_for_it():
    network, params = functional(MLP((3,), 2, hidden=(5,)).double())
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    rows = Jacobian(network, params, x, coupled=False).dense()
    (gradient,) = torch.autograd.grad(rows.square().sum(), x)
    assert gradient.abs().sum() > 0
