"""The engine's convolution and pooling against PyTorch's own, through every nesting of derivatives and vmap."""

import pytest
import torch
import torch.nn.functional as F
from nestings import NESTINGS, assert_close

from lightning_ntk.ntk import convolution, layers
from lightning_ntk.ntk.layers import engine_layers

SHAPES = {
    "plain": {"stride": 1, "padding": 1},
    "strided": {"stride": 2, "padding": 1},
    "uneven": {"stride": (2, 1), "padding": (0, 2), "dilation": (1, 2)},
    "by_channel": {"stride": 1, "padding": 1, "groups": 2},
}
POOLS = {
    "halves": {"kernel_size": 2},
    "overlap": {"kernel_size": 3, "stride": 2, "padding": 1},
    "ceil": {"kernel_size": 2, "ceil_mode": True},
}


@pytest.fixture(autouse=True)
def on_small_images(monkeypatch):
    monkeypatch.setattr(layers, "SMALLEST_IMAGE", 0)


@pytest.fixture(params=["loops", "groups"])
def leading_axes(request, monkeypatch):
    # Both are plain tensor algebra, for images of any size: the form for GPUs can be checked on a CPU.
    monkeypatch.setattr(convolution, "_loops", lambda tensor: request.param == "loops")


def problem(shape, pool):
    torch.manual_seed(0)
    groups = SHAPES[shape].get("groups", 1)
    theta = {
        "weight": torch.randn(4, 2 // groups, 3, 3, dtype=torch.float64),
        "bias": torch.randn(4, dtype=torch.float64),
        "head": torch.randn(4, 3, dtype=torch.float64),
    }
    x = torch.randn(3, 2, 7, 8, dtype=torch.float64)

    def network(theta, x):
        hidden = torch.tanh(F.conv2d(x, theta["weight"], theta["bias"], **SHAPES[shape]))
        return F.max_pool2d(hidden, **POOLS[pool]).square().mean((-2, -1)) @ theta["head"]

    return network, theta, x


def engine(network):
    def inside(theta, x):
        with engine_layers():
            return network(theta, x)

    return inside


@pytest.mark.parametrize("nesting", NESTINGS)
@pytest.mark.parametrize("shape", SHAPES)
def test_convolution_is_pytorchs_under(nesting, shape, leading_axes):
    network, theta, x = problem(shape, "halves")
    assert_close(nesting(engine(network), theta, x), nesting(network, theta, x))


@pytest.mark.parametrize("shape", SHAPES)
def test_patches_are_those_of_unfold(shape):
    x, settings = torch.randn(3, 2, 7, 8), {"stride": 1, "padding": 0, "dilation": 1, **SHAPES[shape]}
    settings.pop("groups", None)
    found = convolution.patches(x, (3, 2), convolution.geometry_of(**settings, groups=1))
    assert torch.equal(found, F.unfold(x, (3, 2), **settings))


@pytest.mark.parametrize("nesting", NESTINGS)
@pytest.mark.parametrize("pool", ["overlap", "ceil"])
def test_pooling_is_pytorchs_under(nesting, pool):
    network, theta, x = problem("plain", pool)
    assert_close(nesting(engine(network), theta, x), nesting(network, theta, x))


def test_the_engine_takes_over_only_inside_its_context_and_only_what_it_serves(monkeypatch):
    calls = []
    monkeypatch.setattr(layers, "convolve", lambda *a: calls.append("convolve") or F.conv2d(a[0], a[1], padding=1))
    x, weight = torch.randn(2, 1, 6, 6), torch.randn(2, 1, 3, 3)
    F.conv2d(x, weight, padding=1)
    with engine_layers():
        F.conv2d(x, weight, padding="same")
        F.conv2d(x[0], weight, padding=1)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert F.conv2d(x, weight, padding=1).dtype == torch.bfloat16
        assert calls == []
        F.conv2d(x, weight, padding=1)
        assert calls == ["convolve"]
        monkeypatch.setattr(layers, "SMALLEST_IMAGE", 37)
        F.conv2d(x, weight, padding=1)
        assert calls == ["convolve"]


def test_leading_axes_keep_their_order(leading_axes):
    x, weight = torch.randn(2, 1, 1, 3, 6, 6), torch.randn(1, 3, 2, 3, 3, 3)
    result = convolution.convolve(x, weight, None, convolution.geometry_of(1, 1, 1, 1))
    expected = [[F.conv2d(images, w, padding=1) for w in weight[0]] for images in x[:, 0]]
    torch.testing.assert_close(result, torch.stack([torch.stack(row) for row in expected]))


def gates(prelu, glu, weight_norm, hardsigmoid):
    """A network of all four, the first on images and on vectors."""

    def network(theta, x):
        weight = weight_norm(theta["weight"], theta["lengths"])
        images = prelu(F.conv2d(x, weight, theta["bias"], padding=1), theta["slopes"])
        features = hardsigmoid(glu(images, 1)).square().mean((-2, -1))
        return prelu(features @ theta["head"], theta["slope"])

    return network


@pytest.mark.parametrize("nesting", NESTINGS)
def test_what_pytorch_lacks_derivatives_of_has_them_under(nesting):
    def prelu(x, slopes):
        return F.relu(x) - slopes.view(-1, *[1] * (x.dim() - 2)) * F.relu(-x)

    def glu(x, dim):
        return x[:, :2] * torch.sigmoid(x[:, 2:])

    def weight_norm(v, g):
        return g * v / v.square().sum((1, 2, 3), keepdim=True).sqrt()

    def hardsigmoid(x):
        return (x / 6 + 0.5).clamp(0, 1)

    _, theta, x = problem("plain", "halves")
    theta["lengths"] = torch.rand(4, 1, 1, 1, dtype=torch.float64)
    slopes = {"slopes": torch.rand(4, dtype=torch.float64), "slope": torch.rand(1, dtype=torch.float64)}
    theta = theta | slopes | {"head": theta["head"][:2]}
    found = nesting(engine(gates(F.prelu, F.glu, torch._weight_norm, F.hardsigmoid)), theta, x)
    assert_close(found, nesting(gates(prelu, glu, weight_norm, hardsigmoid), theta, x))
