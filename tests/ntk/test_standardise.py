"""Standardisation against its definition, through every nesting of derivatives and vmap, in either memory layout."""

import pytest
import torch
import torch.nn.functional as F
from nestings import NESTINGS, around, assert_close
from torch.func import grad, jvp, vmap

from lightning_ntk.ntk import layers
from lightning_ntk.ntk.layers import engine_layers
from lightning_ntk.ntk.standardise import standardise

EPS = 1e-2


def by_definition(x, groups, eps):
    """Each image of `[n, channels, h, w]` over groups of its channels."""
    sets, dims = x.unflatten(1, (groups, -1)), (2, 3, 4)
    mean = sets.mean(dims, keepdim=True)
    variance = (sets - mean).square().mean(dims, keepdim=True)
    return ((sets - mean) / (variance + eps).sqrt()).reshape(x.shape)


def problem(groups, memory_format):
    """Networks with the standardisation of the engine and with the definition's, theta and images."""
    torch.manual_seed(0)
    theta = {
        "convolution": torch.randn(4, 2, 3, 3, dtype=torch.float64),
        "head": torch.randn(4, 3, dtype=torch.float64),
    }
    x = 3 + torch.randn(3, 2, 5, 6, dtype=torch.float64)

    def network(function, theta, x):
        return around(lambda hidden: function(hidden, groups, EPS), theta, x, memory_format)

    def ours(theta, x):
        return network(standardise, theta, x)

    return ours, lambda theta, x: network(by_definition, theta, x), theta, x


@pytest.mark.parametrize("nesting", NESTINGS)
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("memory_format", ["contiguous", "channels_last"])
def test_it_is_the_definition_under(nesting, groups, memory_format):
    ours, definition, theta, x = problem(groups, memory_format)
    assert_close(nesting(ours, theta, x), nesting(definition, theta, x))


def cubed(function, groups, x, directions):
    """Third derivatives, by reverse over reverse over reverse mode and by reverse over forward over reverse mode."""

    def value(x):
        return function(x, groups, EPS).pow(3).sum()

    def along(f, d):
        return lambda x: (f(x) * d).sum()

    by_reverse = grad(along(grad(along(grad(value), directions[0])), directions[1]))(x)
    by_forward = grad(lambda x: (jvp(grad(value), (x,), (directions[0],))[1] * directions[1]).sum())(x)
    at_once = vmap(lambda d: grad(along(grad(along(grad(value), directions[0])), d))(x))(directions)
    return by_reverse, by_forward, at_once


@pytest.mark.parametrize("groups", [1, 2])
def test_third_derivatives_are_the_definitions(groups):
    torch.manual_seed(0)
    x, directions = torch.randn(2, 4, 3, 3, dtype=torch.float64), torch.randn(2, 2, 4, 3, 3, dtype=torch.float64)
    assert_close(cubed(standardise, groups, x, directions), cubed(by_definition, groups, x, directions))


def test_float32_images_far_from_zero_keep_their_digits():
    torch.manual_seed(0)
    x = 100 + torch.randn(4, 4, 6, 6)
    found, tangent = jvp(lambda x: standardise(x, 2, 1e-5), (x,), (torch.randn_like(x),))
    expected = by_definition(x.double(), 2, 1e-5)
    assert (found - expected).abs().max() < 1e-4
    assert tangent.isfinite().all()


def test_the_engine_serves_group_norm_of_images_with_all_or_none_of_its_parameters(monkeypatch):
    calls = []
    serve = lambda *a: calls.append(a) or standardise(*a)  # noqa: E731
    monkeypatch.setattr(layers, "standardise", serve)
    monkeypatch.setattr(layers, "SMALLEST_IMAGE", 36)
    torch.manual_seed(0)
    x, weight, bias = torch.randn(2, 4, 3, 3), torch.randn(4), torch.randn(4)
    for images, parameters, served in [
        (x, (weight, bias), True),
        (x, (), True),
        (x, (weight,), False),
        (x[:, :, 0], (weight, bias), False),
        (x[:, :, 1:], (weight, bias), False),
    ]:
        calls.clear()
        with engine_layers():
            found = F.group_norm(images, 2, *parameters, eps=EPS)
        assert bool(calls) is served
        assert torch.allclose(found, F.group_norm(images, 2, *parameters, eps=EPS), atol=1e-5)
    calls.clear()
    with engine_layers(), torch.autocast("cpu", dtype=torch.bfloat16):
        F.group_norm(x, 2, weight, bias)
    assert not calls
