"""ResNet-12 against learn2learn's, its sizes in every mode, and its bad settings."""

import contextlib
import io

import pytest
import torch

from lightning_ntk.errors import ConfigError
from lightning_ntk.networks.resnet12 import ResNet12


def learn2learns(**settings):
    with contextlib.redirect_stderr(io.StringIO()):  # gym prints a notice about its own maintenance
        learn2learn = pytest.importorskip("learn2learn")
    return learn2learn.vision.models.ResNet12(output_size=5, **settings)


@pytest.mark.parametrize("size", [84, 89])  # 89: odd sizes on the way, and 5x5 pixels in the end all the same
def test_with_batch_statistics_it_is_learn2learns_network_in_training(size):
    torch.manual_seed(0)
    ours, theirs = ResNet12((3, size, size), 5).double(), learn2learns(dropblock_dropout=0.0).double().train()
    pairs = list(zip(ours.parameters(), theirs.parameters(), strict=True))  # both in the order of the architecture
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters()) == 12_427_525
    with torch.no_grad():
        for p, q in pairs:
            assert p.shape == q.shape
            q += 0.1 * torch.randn_like(q) * (q.ndim == 1)  # scales and shifts other than the initial ones and zeros
            p.copy_(q)
    x = torch.rand(2, 3, size, size, dtype=torch.float64)
    outputs, expected = ours(x), theirs(x)
    assert torch.allclose(outputs, expected, rtol=1e-9, atol=1e-9)
    outputs.square().sum().backward()
    expected.square().sum().backward()
    for p, q in pairs:
        assert (p.grad - q.grad).norm() < 1e-8 * q.grad.norm()


def test_its_initial_weights_are_as_large_as_learn2learns():
    torch.manual_seed(0)
    for p, q in zip(ResNet12((3, 84, 84), 5).parameters(), learn2learns().parameters(), strict=True):
        if p.ndim == 4:
            assert p.std().item() == pytest.approx(q.std().item(), rel=0.15)


@pytest.mark.parametrize("norm", ["batch", "group", "none"])
@pytest.mark.parametrize(("size", "width"), [(16, 16), (28, 16), (84, 16)])
def test_sizes_in_every_mode(norm, size, width):
    torch.manual_seed(0)
    network = ResNet12((3, size, size), 5, norm=norm, width=width)
    assert network(torch.rand(2, 3, size, size)).shape == (2, 5)
    count, before = 0, 3
    for channels in (width, width * 5 // 2, width * 5, width * 10):
        count += 9 * channels * (before + 2 * channels) + before * channels
        count += (4 if norm == "none" else 8) * channels  # a bias, or scale and shift, for each of four convolutions
        before = channels
    assert sum(p.numel() for p in network.parameters()) == count + (before + 1) * 5


@pytest.mark.parametrize(("norm", "coupled"), [("batch", True), ("group", False), ("none", False)])
def test_couples_examples_says_whether_the_batch_matters(norm, coupled):
    torch.manual_seed(0)
    network = ResNet12((1, 28, 28), 5, norm=norm, width=16)
    x = torch.rand(6, 1, 28, 28)
    alone = torch.cat([network(part) for part in x.split(2)])
    assert network.couples_examples is coupled
    assert torch.allclose(network(x), alone, atol=1e-5) is not coupled


@pytest.mark.parametrize("size", [16, 84])
def test_without_norm_no_block_blows_the_activations_up(size):
    torch.manual_seed(0)
    network = ResNet12((3, size, size), 5, norm="none")
    x = torch.randn(4, 3, size, size)
    for block in network.features[:4]:
        x = block(x)
        assert 0.3 < x.std() < 4


@pytest.mark.parametrize("norm", ["batch", "group", "none"])
def test_two_calls_give_the_same_function(norm):
    network = ResNet12((1, 16, 16), 5, norm=norm, width=16)
    x = torch.rand(4, 1, 16, 16)
    trained = network.train()(x)
    assert torch.equal(trained, network(x))
    assert torch.equal(trained, network.eval()(x))


@pytest.mark.parametrize(
    ("shape", "settings", "message"),
    [
        ((4,), {}, r"network=resnet12 needs images.*network=mlp"),
        ((1, 28, 28), {"norm": "layer"}, r"network\.norm must be .* got 'layer'"),
        ((1, 28, 28), {"width": 0}, r"network\.width must be a positive multiple of 2 .* got 0"),
        ((1, 28, 28), {"width": 5}, r"network\.width must be a positive multiple of 2 .* got 5"),
        ((1, 28, 28), {"width": 24, "norm": "group"}, r"network\.width must be a positive multiple of 16 .* got 24"),
        ((1, 28, 15), {}, r"network=resnet12 .* at least 16 pixels a side, but got 28x15.*network=conv4"),
    ],
)
def test_bad_settings_name_their_key(shape, settings, message):
    with pytest.raises(ConfigError, match=message):
        ResNet12(shape, 5, **settings)
