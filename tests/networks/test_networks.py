"""Shapes, input normalisation and bad settings of the networks."""

import pytest
import torch

from lightning_ntk.errors import ConfigError
from lightning_ntk.networks.conv4 import Conv4
from lightning_ntk.networks.mlp import MLP
from lightning_ntk.networks.resnet12 import ResNet12


@pytest.mark.parametrize("norm", ["batch", "group", "none"])
@pytest.mark.parametrize(("size", "downsample", "width"), [(28, "stride", 128), (28, "pool", 32), (84, "pool", 800)])
def test_conv4_has_the_published_sizes(norm, size, downsample, width):
    network = Conv4((3, size, size), 5, norm=norm, downsample=downsample)
    assert network(torch.rand(2, 3, size, size)).shape == (2, 5)
    assert network.head.in_features == width
    convolutions = (3 * 9 + 1) * 32 + 3 * (32 * 9 + 1) * 32
    normalisations = 0 if norm == "none" else 4 * 2 * 32
    assert sum(p.numel() for p in network.parameters()) == convolutions + normalisations + (width + 1) * 5


@pytest.mark.parametrize(("norm", "coupled"), [("batch", True), ("group", False), ("none", False)])
def test_couples_examples_says_whether_the_batch_matters(norm, coupled):
    torch.manual_seed(0)
    network = Conv4((1, 28, 28), 5, norm=norm)
    x = torch.rand(6, 1, 28, 28)
    alone = torch.cat([network(part) for part in x.split(2)])
    assert network.couples_examples is coupled
    assert torch.allclose(network(x), alone, atol=1e-5) is not coupled


def test_the_input_is_normalised_by_the_given_statistics():
    torch.manual_seed(0)
    plain = MLP((2, 1, 1), 3)
    normalised = MLP((2, 1, 1), 3, mean=(0.5, 0.2), std=(0.1, 2.0))
    normalised.load_state_dict(plain.state_dict())
    x = torch.rand(4, 2, 1, 1)
    statistics = torch.tensor([0.5, 0.2]).view(2, 1, 1), torch.tensor([0.1, 2.0]).view(2, 1, 1)
    assert torch.allclose(normalised(x), plain((x - statistics[0]) / statistics[1]))


@pytest.mark.parametrize("network", [Conv4((3, 28, 28), 5, norm="none"), ResNet12((3, 16, 16), 5, width=4)])
def test_convolutions_get_images_with_their_channels_last_on_a_cpu(network):
    layouts = []
    first = next(layer for layer in network.modules() if isinstance(layer, torch.nn.Conv2d))
    first.register_forward_pre_hook(
        lambda layer, inputs: layouts.append(inputs[0].is_contiguous(memory_format=torch.channels_last))
    )
    x = torch.rand(6, *((3, 28, 28) if isinstance(network, Conv4) else (3, 16, 16)))
    outputs = network(x)
    network.channels_last = False
    assert torch.allclose(outputs, network(x), atol=1e-5)
    assert layouts == [True, False]


def test_tasks_at_once_get_the_layout_too():
    torch.manual_seed(0)
    network = Conv4((3, 28, 28), 5, norm="none").double()
    x = torch.rand(2, 3, 3, 28, 28, dtype=torch.float64)
    assert torch.allclose(torch.func.vmap(network)(x), torch.stack([network(task) for task in x]), atol=1e-12)


@pytest.mark.parametrize(
    ("shape", "settings", "key"),
    [
        ((4,), {}, "network=mlp"),
        ((1, 28, 28), {"norm": "layer"}, "network.norm"),
        ((1, 28, 28), {"norm": "group", "filters": 12}, "network.filters"),
        ((1, 28, 28), {"filters": 0}, "network.filters"),
        ((1, 28, 28), {"downsample": "crop"}, "network.downsample"),
        ((1, 12, 12), {"downsample": "pool"}, "network.downsample"),
        ((1, 16, 16), {"norm": "group", "filters": 8}, "network.filters=8 makes a constant of block 4"),
    ],
)
def test_conv4s_bad_settings_name_their_key(shape, settings, key):
    with pytest.raises(ConfigError, match=key):
        Conv4(shape, 5, **settings)


@pytest.mark.parametrize("hidden", [(0,), (40, -3)])
def test_an_mlp_needs_widths(hidden):
    with pytest.raises(ConfigError, match=r"network\.hidden"):
        MLP((4,), 3, hidden=hidden)
