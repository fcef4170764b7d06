"""Norms with right nested derivatives: PyTorch's values, and slopes of Jacobian products by finite differences."""

import pytest
import torch
from torch import nn
from torch.func import jvp

from lightning_ntk.errors import ConfigError
from lightning_ntk.networks.normalisation import BatchStatistics
from lightning_ntk.ntk import norms
from lightning_ntk.ntk.network import functional

SHAPE = (3, 6, 6)
NORMS = {
    "layer": lambda: nn.LayerNorm(SHAPE),
    "layer, last axis": lambda: nn.LayerNorm(6, bias=False),
    "layer, plain": lambda: nn.LayerNorm(SHAPE, elementwise_affine=False),
    "instance": lambda: nn.InstanceNorm2d(3, affine=True),
    "instance, plain": lambda: nn.InstanceNorm2d(3),
    "batch": lambda: nn.BatchNorm2d(3, track_running_stats=False),
    "batch, plain": lambda: nn.BatchNorm2d(3, affine=False, track_running_stats=False),
    "our batch": lambda: BatchStatistics(3),
    "group": lambda: nn.GroupNorm(3, 3),
    "batch of vectors": lambda: nn.Sequential(nn.Flatten(), nn.BatchNorm1d(108, track_running_stats=False)),
    "averages in evaluation": lambda: nn.BatchNorm2d(3).eval(),
    "torch.layer_norm": lambda: Called(SHAPE, lambda x, w, b: torch.layer_norm(x, SHAPE, w, b)),
    "torch.batch_norm": lambda: Called(
        (3,), lambda x, w, b: torch.batch_norm(x, w, b, None, None, True, 0.1, 1e-5, True)
    ),
    "torch.instance_norm": lambda: Called(
        (3,), lambda x, w, b: torch.instance_norm(x, w, b, None, None, True, 0.1, 1e-5, True)
    ),
}


class Called(nn.Module):
    """A norm that is called by a function of torch's, beside those of torch.nn.functional."""

    def __init__(self, shape, function):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(shape)), nn.Parameter(torch.zeros(shape))
        self.function = function

    def forward(self, x):
        return self.function(x, self.weight, self.bias)


def make(name):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(1, 3, 3), NORMS[name](), nn.Tanh(), nn.Flatten(), nn.Linear(108, 2))
    for p in module.parameters():
        nn.init.normal_(p, std=0.5)
    return module.double(), torch.randn(4, 1, 8, 8, dtype=torch.float64)


@pytest.mark.parametrize("name", NORMS)
def test_the_values_are_pytorchs(name):
    module, x = make(name)
    network, params = functional(module)
    assert torch.allclose(network(params, x), module(x), rtol=1e-12)
    half = module.to(torch.bfloat16)
    network, params = functional(half)
    found = network(params, x.to(torch.bfloat16))
    assert found.dtype == torch.bfloat16
    assert torch.allclose(found, half(x.to(torch.bfloat16)), atol=0.1)


@pytest.mark.parametrize("name", NORMS)
def test_the_derivative_of_a_jacobian_product_is_right(name):
    # d/dtheta <u, J(x; theta) v> by reverse mode over forward mode: what PyTorch's own get wrong without a warning.
    module, x = make(name)
    network, params = functional(module)
    v = {key: torch.randn_like(p) for key, p in params.items()}
    u = torch.randn(4, 2, dtype=torch.float64)

    def product(theta):
        return (jvp(lambda q: network(q, x), (theta,), (v,))[1] * u).sum()

    # The last bias has no part in J v.
    leaves = list(params.values())
    gradients = torch.autograd.grad(product(params), leaves, allow_unused=True, materialize_grads=True)
    direction = {key: torch.randn_like(p) for key, p in params.items()}
    slope = sum((g * d).sum() for g, d in zip(gradients, direction.values(), strict=True)).item()
    eps = 1e-6
    ahead, behind = (
        product({key: (p + sign * eps * direction[key]).detach() for key, p in params.items()}) for sign in (1, -1)
    )
    assert ((ahead - behind) / (2 * eps)).item() == pytest.approx(slope, rel=1e-5)


@pytest.mark.parametrize(
    ("function", "instead"),
    [
        (lambda x, w, b: torch.native_layer_norm(x, SHAPE, w, b, 1e-5)[0], r"F\.layer_norm"),
        (lambda x, w, b: torch.native_batch_norm(x, w, b, None, None, True, 0.1, 1e-5)[0], r"F\.batch_norm"),
    ],
)
def test_what_cannot_be_put_right_is_refused(function, instead):
    network, params = functional(Called(SHAPE if "layer" in instead else (3,), function))
    with pytest.raises(ConfigError, match=f"derivatives come out wrong here. Call {instead}"):
        network(params, torch.randn(4, *SHAPE))


def test_a_scripted_or_exported_part_is_refused():
    scripted = torch.jit.script(nn.LayerNorm(SHAPE))
    with pytest.raises(ConfigError, match=r"network: 1 was scripted or exported.*before torch\.jit or torch\.export"):
        functional(nn.Sequential(nn.Conv2d(1, 3, 3), scripted))
    with pytest.raises(ConfigError, match="all of it was scripted"):
        functional(scripted)
    exported = torch.export.export(nn.LayerNorm(SHAPE), (torch.randn(2, *SHAPE),)).module()
    with pytest.raises(ConfigError, match="all of it was scripted or exported"):
        functional(exported)
    functional(torch.fx.symbolic_trace(nn.LayerNorm(SHAPE)))  # Calls what the engine sees.


def test_batch_statistics_of_either_layout_have_the_same_derivatives():
    torch.manual_seed(0)
    norm = BatchStatistics(32).double()
    nn.init.normal_(norm.weight)
    x, u = torch.randn(2, 3, 32, 26, 26, dtype=torch.float64)  # Large enough for the closed form.
    found = []
    for layout in (torch.contiguous_format, torch.channels_last):
        leaf = x.to(memory_format=layout).requires_grad_()
        value = (norm(leaf).tanh() * u).sum()
        first = torch.autograd.grad(value, [leaf, *norm.parameters()], create_graph=True)
        norms = sum(g.square().sum() for g in first)
        found.append([value, *first, *torch.autograd.grad(norms, [leaf, *norm.parameters()])])
    for default, last in zip(*found, strict=True):
        assert torch.allclose(default, last, rtol=1e-9, atol=1e-11)


def test_large_images_with_their_channels_last_are_in_closed_form(monkeypatch):
    called = []
    monkeypatch.setattr(norms, "closed_batch_norm", lambda x, *rest: called.append(x.shape) or x)
    norm = BatchStatistics(32)
    for size in (8, 26):
        x = torch.randn(3, 32, size, size)
        norm(x)
        norm(x.to(memory_format=torch.channels_last))
    assert called == [(3, 32, 26, 26)]
