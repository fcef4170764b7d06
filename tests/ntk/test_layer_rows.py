"""Jacobian rows from what layers saw: equal to plain reverse mode where served, and left alone where not."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from reference import dense_jacobian
from torch import nn

from lightning_ntk.networks.conv4 import Conv4
from lightning_ntk.networks.mlp import MLP
from lightning_ntk.networks.resnet12 import ResNet12
from lightning_ntk.ntk.jacobian import Jacobian
from lightning_ntk.ntk.layer_rows import layer_rows
from lightning_ntk.ntk.network import composed, functional
from lightning_ntk.ntk.params import flatten, unflatten

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
    # Wide and narrow windows, uneven in every way, and more outputs than go together.
    "uneven": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 20, (3, 1), stride=(1, 2), padding=(2, 0), dilation=(2, 1)),
            nn.Tanh(),
            nn.Conv2d(20, 4, (2, 3), stride=(2, 1), padding=(0, 1), dilation=(1, 2), groups=2),
            nn.Flatten(),
            nn.Linear(32, 7),
        ),
        (2, 8, 8),
    ),
}


@pytest.mark.parametrize("patch_bytes", [24 * 2**20, 4096])
@pytest.mark.parametrize("name", SERVED)
def test_rows_and_outputs_are_those_of_reverse_mode(name, patch_bytes, monkeypatch):
    monkeypatch.setattr("lightning_ntk.ntk.layer_rows.PATCH_BYTES", patch_bytes)  # All examples, and some.
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


@pytest.mark.parametrize("name", SERVED)
def test_rows_of_operations_that_keep_the_order_are_not_checked(name, monkeypatch):
    monkeypatch.delattr("lightning_ntk.ntk.layer_rows._add_up")
    make, shape = SERVED[name]
    network, params = functional(make())
    assert layer_rows(network.plain, {key: p.detach() for key, p in params.items()}, torch.rand(4, *shape)) is not None


def test_layers_serve_a_network_that_a_function_of_its_outputs_follows(monkeypatch):
    network, params = functional(Conv4((1, 32, 32), 3, filters=8, norm="group").double())
    whole = composed(network, lambda outputs: outputs[:, 1:] * outputs[:, :1])
    x = torch.rand(4, 1, 32, 32, dtype=torch.float64)
    with monkeypatch.context() as patch:
        patch.delattr("lightning_ntk.ntk.network.engine_layers")  # The rows are of PyTorch's own layers, the fastest.
        rows, _ = layer_rows(whole.plain, {key: p.detach() for key, p in params.items()}, x)
    expected = dense_jacobian(whole, params, x)
    assert (flatten(rows, batch_dims=2).flatten(0, 1) - expected).abs().max() < 1e-11 * expected.abs().max()
    assert torch.equal(whole(params, x), network(params, x)[:, 1:] * network(params, x)[:, :1])


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


class Folded(nn.Module):
    """Two patches of each example, one after the other in the first axis."""

    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.Linear(3, 2), nn.Linear(4, 2)

    def forward(self, x):
        return self.head(torch.tanh(self.layer(torch.cat([x, -x], 1).view(-1, 3))).view(len(x), 4))


class OnConstants(nn.Module):
    """Layers whose input is a buffer, of as many rows as there are examples, and a parameter."""

    def __init__(self):
        super().__init__()
        self.register_buffer("table", torch.randn(4, 3))
        self.token = nn.Parameter(torch.randn(4, 3))
        self.of_table, self.of_token, self.head = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x):
        shared = torch.tanh(self.of_table(self.table)).mean(0) + torch.tanh(self.of_token(self.token)).mean(0)
        return self.head(x * shared)


class Untracked(nn.Module):
    """A part whose parameters are trainable, but that the network uses without gradients."""

    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.Linear(3, 3), nn.Linear(3, 2)

    @torch.no_grad()
    def features(self, x):
        return torch.tanh(self.layer(x))

    def forward(self, x):
        return self.head(self.features(x))


class OfTwoTypes(nn.Module):
    """Parameters of 32 bits, followed by some of 64, and examples in another order in between."""

    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x):
        y = torch.tanh(self.layer(x.float())).double()
        return self.head(y.flip(0).flip(0))

    def double(self):
        self.head.double()
        return self


def test_an_input_that_is_written_over_is_no_longer_what_the_layer_saw():
    network, params = functional(Overwritten().double())  # Autograd refuses it, too.
    x = torch.randn(4, 3, dtype=torch.float64)
    assert layer_rows(network.plain, {key: p.detach() for key, p in params.items()}, x) is None


@pytest.mark.parametrize("make", [Scaled, Twice, Tied, OnSequences, Unused, Folded, OnConstants, Untracked])
def test_what_is_not_served_is_left_to_vmap(make):
    torch.manual_seed(0)
    network, params = functional(make().double())
    x = torch.randn(4, 3, dtype=torch.float64)
    assert layer_rows(network.plain, {key: p.detach() for key, p in params.items()}, x) is None
    expected = dense_jacobian(network, params, x)
    assert torch.allclose(Jacobian(network, params, x, coupled=False).dense().flatten(0, 1), expected)


def test_rows_of_parameters_of_two_types_are_checked_too():
    torch.manual_seed(0)
    network, params = functional(OfTwoTypes().double())
    x = torch.randn(4, 3, dtype=torch.float64)
    operator = Jacobian(network, params, x, coupled=False)
    rows = operator.dense()
    found = operator.jvp(unflatten(rows[0, 0], params))  # Each tangent in its parameter's type.
    assert torch.allclose(found, rows @ rows[0, 0], atol=1e-5)


def test_rows_stay_differentiable_in_an_input_that_asks_for_it():
    network, params = functional(MLP((3,), 2, hidden=(5,)).double())
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    rows = Jacobian(network, params, x, coupled=False).dense()
    (gradient,) = torch.autograd.grad(rows.square().sum(), x)
    assert gradient.abs().sum() > 0


class InPlace(nn.Module):
    """Activations that write over what a layer gave, the first layer's and a norm's too."""

    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Conv2d(2, 8, 3), nn.GroupNorm(2, 8)
        self.second, self.head = nn.Conv2d(8, 4, 3), nn.Linear(64, 2)

    def forward(self, x):
        x = F.relu(self.norm(F.relu(self.first(x), inplace=True)), inplace=True)
        return self.head(F.relu(self.second(x), inplace=True).flatten(1))


def test_activations_in_place_leave_the_rows_right():
    torch.manual_seed(0)
    network, params = functional(InPlace().double())
    x = torch.rand(3, 2, 8, 8, dtype=torch.float64)
    found = layer_rows(network.plain, {key: p.detach() for key, p in params.items()}, x)
    expected = dense_jacobian(lambda theta, x: network(theta, x.clone()), params, x)
    assert (flatten(found[0], batch_dims=2).flatten(0, 1) - expected).abs().max() < 1e-11 * expected.abs().max()


class Overwritten(nn.Module):
    """A layer's input is written over after the layer has read it."""

    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x):
        x = 2 * x
        y = self.layer(x)
        x += 1
        return self.head(x * torch.tanh(y))


class Auxiliary(nn.Module):
    """A head whose outputs are computed and not used, and one that only the first output uses."""

    def __init__(self):
        super().__init__()
        self.layer, self.other, self.first = nn.Linear(3, 2), nn.Linear(3, 2), nn.Linear(3, 1)

    def forward(self, x):
        self.other(x)
        return self.layer(x) + torch.cat([self.first(x), 0 * x[:, :1]], dim=1)


def test_layers_that_an_output_does_not_use_have_rows_of_zeros():
    torch.manual_seed(0)
    network, params = functional(Auxiliary().double())
    x = torch.randn(4, 3, dtype=torch.float64)
    rows, _ = layer_rows(network.plain, {key: p.detach() for key, p in params.items()}, x)
    assert rows["other.weight"].shape == (4, 2, 2, 3)
    assert not rows["other.weight"].any()
    assert torch.allclose(flatten(rows, batch_dims=2).flatten(0, 1), dense_jacobian(network, params, x))


def test_parameters_inside_a_vmap_are_left_to_vmap():
    torch.manual_seed(0)
    network, params = functional(MLP((3,), 2, hidden=(5,)).double())
    x = torch.randn(4, 3, dtype=torch.float64)
    several = {key: torch.stack([p.detach(), 2 * p.detach()]) for key, p in params.items()}
    found = torch.func.vmap(lambda theta: Jacobian(network, theta, x, coupled=False).dense())(several)
    for k in range(2):
        one = {key: p[k] for key, p in several.items()}
        assert torch.allclose(found[k], Jacobian(network, one, x, coupled=False).dense())


class Reordering(nn.Module):
    """A network that puts its examples into another order, and back at the end."""

    def __init__(self, there, back):
        super().__init__()
        self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 2)
        self.there, self.back = there, back

    def forward(self, x):
        order = x[:, 0].argsort()
        return self.back(self.last(self.first(self.there(x, order)).tanh()), order)


def backwards(x):
    return torch.arange(len(x) - 1, -1, -1)


def written(x):
    result = torch.zeros_like(x)
    result[backwards(x)] = x
    return result


# The examples from the last to the first.
REVERSALS = [
    lambda x: torch.eye(len(x), dtype=x.dtype)[backwards(x)] @ x,
    lambda x: torch.einsum("ij,jk->ik", torch.eye(len(x), dtype=x.dtype)[backwards(x)], x),
    lambda x: (torch.eye(len(x), dtype=x.dtype)[backwards(x)][..., None] * x[:, None]).sum(0),
    lambda x: (torch.eye(len(x), dtype=x.dtype)[backwards(x)][..., None] * x.view(1, *x.shape)).sum(1),
    lambda x: torch.zeros_like(x).index_add(0, backwards(x), x),
    lambda x: torch.zeros_like(x).scatter_add_(0, backwards(x)[:, None].expand_as(x), x),
    lambda x: F.embedding(backwards(x), x),
    lambda x: torch.fft.fft(torch.fft.fft(x, dim=0), dim=0).real.roll(-1, 0) / len(x),
    lambda x: x.mT[..., backwards(x)].mT,
    written,
]


@pytest.mark.parametrize(
    "module",
    [
        Reordering(lambda x, order: x[order], lambda x, order: x[order.argsort()]),
        Reordering(lambda x, order: x.flip(0), lambda x, order: x.flip(0)),
        Reordering(lambda x, order: x[np.arange(len(x))[::-1].copy()], lambda x, order: x.flip(0)),
        Reordering(lambda x, order: torch.roll(x, 1, 0), lambda x, order: x.roll(-1, 0)),
        Reordering(lambda x, order: x.index_select(0, order), lambda x, order: x.index_select(0, order.argsort())),
        Reordering(lambda x, order: torch.cat([x[1:], x[:1]]), lambda x, order: torch.cat([x[-1:], x[:-1]])),
        Reordering(
            lambda x, order: torch.stack([x[i] for i in reversed(range(len(x)))]),
            lambda x, order: torch.stack([*x][::-1]),
        ),
        Reordering(lambda x, order: torch.cat(x.split(1)[::-1]), lambda x, order: torch.cat(x.split(1)[::-1])),
        Reordering(lambda x, order: torch.stack(x.unbind()[::-1]), lambda x, order: torch.cat(x.split(1)[::-1])),
        *(Reordering(lambda x, order, f=f: f(x), lambda x, order, f=f: f(x)) for f in REVERSALS),
    ],
)
def test_examples_in_another_order_keep_their_rows(module):
    network, params = functional(module.double())
    x = torch.tensor([[3.0, 1, 0], [1, 2, 5], [2, 0, 1]], dtype=torch.float64)
    assert layer_rows(network.plain, {key: p.detach() for key, p in params.items()}, x) is None
    found = Jacobian(network, params, x, coupled=False).dense()
    assert torch.allclose(found.flatten(0, 1), dense_jacobian(network, params, x))


class Transposing(nn.Module):
    """As many features as examples, which change places before a layer and back after it."""

    def __init__(self, turn):
        super().__init__()
        self.first, self.last, self.turn = nn.Linear(3, 3, bias=False), nn.Linear(3, 2), turn

    def forward(self, x):
        return self.last(self.turn(self.first(self.turn(x))).tanh())


@pytest.mark.parametrize(
    "turn", [lambda x: x.T, lambda x: x.mT, lambda x: x.t(), lambda x: x.transpose(0, 1), lambda x: x.permute(1, 0)]
)
def test_features_in_the_place_of_examples_are_none(turn):
    network, params = functional(Transposing(turn))
    assert layer_rows(network.plain, {key: p.detach() for key, p in params.items()}, torch.randn(3, 3)) is None


def test_axes_that_change_places_behind_the_examples_do_no_harm():
    module = nn.Sequential(nn.Conv2d(3, 4, 3), Moving(), nn.Flatten(), nn.Linear(4 * 2 * 3, 2)).double()
    network, params = functional(module)
    x = torch.randn(5, 3, 4, 5, dtype=torch.float64)
    rows, _ = layer_rows(network.plain, {key: p.detach() for key, p in params.items()}, x)
    expected = dense_jacobian(network, params, x).unflatten(0, (5, 2))
    assert torch.allclose(flatten({key: rows[key] for key in params}, batch_dims=2), expected)


class Moving(nn.Module):
    def forward(self, x):
        return x.movedim(1, -1).transpose(1, 2)


@pytest.mark.parametrize("examples", [4, 5])
def test_a_trainable_part_that_is_left_out_is_no_example(examples):
    class Prototypes(nn.Module):
        def __init__(self):
            super().__init__()
            self.query, self.key = nn.Linear(3, 4), nn.Linear(3, 4)
            self.prototypes = nn.Parameter(torch.randn(5, 3))

        def forward(self, x):
            return F.linear(self.query(x), self.key(self.prototypes))

    network, params = functional(Prototypes().double())
    del params["prototypes"]
    x = torch.randn(examples, 3, dtype=torch.float64)
    found = Jacobian(network, params, x, coupled=False).dense()
    assert torch.allclose(found.flatten(0, 1), dense_jacobian(network, params, x))
