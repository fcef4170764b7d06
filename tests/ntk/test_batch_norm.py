"""Batch norm in closed form against its definition, through every nesting of derivatives and vmap, in either layout."""

import pytest
import torch
import torch.nn.functional as F
from nestings import NESTINGS, around, assert_close
from torch.func import grad, jvp, vmap

from lightning_ntk.ntk import batch_norm as module
from lightning_ntk.ntk import norms
from lightning_ntk.ntk.batch_norm import batch_norm
from lightning_ntk.ntk.layers import engine_layers

EPS = 1e-2


def by_definition(x, weight, bias, eps):
    """Each channel of `[n, channels, h, w]` over all images."""
    mean = x.mean((0, 2, 3), keepdim=True)
    variance = (x - mean).square().mean((0, 2, 3), keepdim=True)
    return (x - mean) / (variance + eps).sqrt() * weight[:, None, None] + bias[:, None, None]


def problem(memory_format):
    """Networks with the engine's batch norm and with the definition's, theta and images."""
    torch.manual_seed(0)
    theta = {
        "convolution": torch.randn(4, 2, 3, 3, dtype=torch.float64),
        "weight": torch.randn(4, dtype=torch.float64),
        "bias": torch.randn(4, dtype=torch.float64),
        "head": torch.randn(4, 3, dtype=torch.float64),
    }
    x = 3 + torch.randn(3, 2, 5, 6, dtype=torch.float64)

    def network(function, theta, x):
        return around(lambda hidden: function(hidden, theta["weight"], theta["bias"], EPS), theta, x, memory_format)

    def ours(theta, x):
        return network(batch_norm, theta, x)

    return ours, lambda theta, x: network(by_definition, theta, x), theta, x


@pytest.mark.parametrize("nesting", NESTINGS)
@pytest.mark.parametrize("memory_format", ["contiguous", "channels_last"])
def test_it_is_the_definition_under(nesting, memory_format):
    ours, definition, theta, x = problem(memory_format)
    assert_close(nesting(ours, theta, x), nesting(definition, theta, x))


def test_without_further_derivatives_they_come_from_pytorchs_kernel_and_are_the_same(monkeypatch):
    # Ordinary reverse mode over forward mode, as in a meta-step; and the gradient alone.
    ours, definition, theta, x = problem("contiguous")
    torch.manual_seed(1)
    z = {name: torch.randn_like(p) for name, p in theta.items()}
    calls = []
    wanted = module._gradients
    monkeypatch.setattr(module, "_gradients", lambda *a: calls.append(torch.is_grad_enabled()) or wanted(*a))

    def gradients(network):
        leaves = [{name: p.clone().requires_grad_() for name, p in some.items()} for some in (theta, z)]
        images = x.clone().requires_grad_()
        value, change = jvp(lambda q: network(q, images), (leaves[0],), (leaves[1],))
        flat = [*leaves[0].values(), *leaves[1].values(), images]
        of_value = torch.autograd.grad(value.square().sum(), flat, materialize_grads=True, retain_graph=True)
        return *of_value, *torch.autograd.grad(change.square().sum(), flat, materialize_grads=True)

    found = gradients(ours)
    assert calls and not any(calls)
    assert_close(found, gradients(definition))


def cubed(function, x, weight, bias, directions):
    """Third derivatives, by reverse and forward mode over one another."""

    def value(x):
        return function(x, weight, bias, EPS).pow(3).sum()

    def along(f, d):
        return lambda x: (f(x) * d).sum()

    by_reverse = grad(along(grad(along(grad(value), directions[0])), directions[1]))(x)
    by_forward = grad(lambda x: (jvp(grad(value), (x,), (directions[0],))[1] * directions[1]).sum())(x)
    at_once = vmap(lambda d: grad(along(grad(along(grad(value), directions[0])), d))(x))(directions)
    forward = jvp(lambda x: jvp(value, (x,), (directions[0],))[1], (x,), (directions[1],))[1]
    of_forward = grad(along(grad(lambda x: jvp(value, (x,), (directions[0],))[1]), directions[1]))(x)
    return by_reverse, by_forward, at_once, forward, of_forward


def test_third_derivatives_are_the_definitions():
    torch.manual_seed(0)
    x, *directions = torch.randn(3, 2, 4, 3, 3, dtype=torch.float64)
    weight, bias = torch.randn(2, 4, dtype=torch.float64)
    given = x, weight, bias, torch.stack(directions)
    assert_close(cubed(batch_norm, *given), cubed(by_definition, *given))


def test_float32_images_far_from_zero_keep_their_digits():
    torch.manual_seed(0)
    x, weight, bias = 100 + torch.randn(4, 4, 6, 6), torch.rand(4), torch.randn(4)
    t = torch.randn_like(x)

    def both(x, t, weight, bias, function):
        return jvp(lambda x: function(x, weight, bias, 1e-5), (x,), (t,))

    found, tangent = both(x, t, weight, bias, batch_norm)
    expected, slope = both(x.double(), t.double(), weight.double(), bias.double(), by_definition)
    assert (found - expected).abs().max() < 1e-4
    assert (tangent - slope).abs().max() < 1e-4


def test_batch_statistics_of_large_images_are_in_closed_form(monkeypatch):
    calls = []
    serve = lambda *a: calls.append(a) or batch_norm(*a)  # noqa: E731
    monkeypatch.setattr(norms, "closed_batch_norm", serve)
    monkeypatch.setattr(norms, "SMALLEST_IMAGE", 36)
    torch.manual_seed(0)
    x, weight, bias = torch.randn(2, 4, 3, 3), torch.randn(4), torch.randn(4)
    averages = torch.zeros(4), torch.ones(4)

    def engines(*arguments):
        with engine_layers():
            return F.batch_norm(*arguments)

    def transformed(x, _, __, weight, bias, ___):
        return jvp(lambda x: norms.batch_statistics(x, weight, bias, 1e-5), (x,), (x,))[0]

    def plain(x, _, __, weight, bias, ___):
        return norms.batch_statistics(x, weight, bias, 1e-5)

    for function, images, running, parameters, training, served in [
        (engines, x, (None, None), (weight, bias), True, True),
        (transformed, x, (None, None), (weight, bias), True, True),
        (plain, x, (None, None), (weight, bias), True, False),
        (engines, x, (None, None), (None, None), True, False),
        (engines, x, averages, (weight, bias), False, False),
        (engines, x[:, :3], (None, None), (weight[:3], bias[:3]), True, False),
        (transformed, x[:, :3], (None, None), (weight[:3], bias[:3]), True, False),
        (transformed, x.bfloat16(), (None, None), (weight.bfloat16(), bias.bfloat16()), True, False),
    ]:
        calls.clear()
        arguments = images, *running, *parameters, training
        found = function(*arguments)
        assert bool(calls) is served
        assert torch.allclose(found, F.batch_norm(*arguments), atol=1e-5 if images.dtype == x.dtype else 0.05)
    calls.clear()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        transformed(x, None, None, weight, bias, True)
    assert not calls
