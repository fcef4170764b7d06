"""Corruptions: against scipy and colorsys, by their statistics, and on any image in [0, 1]."""

import colorsys
import itertools

import numpy as np
import pytest
import scipy.ndimage
import torch
from PIL import Image

from lightning_ntk import corruptions as c
from lightning_ntk.errors import ConfigError


def images(n=2, channels=3, side=28, seed=0):
    return torch.rand(n, channels, side, side, generator=torch.Generator().manual_seed(seed))


def apply(kind, severity, x, seed=0):
    return c.corruption(kind, severity)(x, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", c.CORRUPTIONS)
def test_every_corruption_keeps_shape_and_range_and_is_worse_with_severity(kind):
    for channels, side in ((1, 28), (3, 30)):
        # Smooth images with black and white in them: blur and pixels have something to destroy.
        x = (scipy.ndimage.gaussian_filter(images(4, channels, side).numpy(), (0, 0, 1, 1)) - 0.5) * 4 + 0.5
        x = torch.from_numpy(x).clamp(0, 1)
        distances = []
        for severity in c.SEVERITIES:
            corrupted = apply(kind, severity, x)
            assert corrupted.shape == x.shape
            assert corrupted.dtype == x.dtype
            assert corrupted.min() >= 0
            assert corrupted.max() <= 1
            distances.append(float((corrupted - x).square().mean()))
        if kind == "pixelate":  # Squares of a whole number of pixels, as at severity 2, lie better on the image.
            distances = distances[::2]
        assert all(a < b for a, b in itertools.pairwise([0.0, *distances])), distances


@pytest.mark.parametrize("kind", c.CORRUPTIONS)
def test_each_image_is_corrupted_for_itself_and_the_seed_decides(kind):
    x = images(3)
    together = apply(kind, 3, x)
    assert torch.equal(together, apply(kind, 3, x))
    draws = kind.endswith("noise")
    assert torch.equal(together, apply(kind, 3, x, seed=1)) != draws
    if not draws:
        assert torch.allclose(together[1:2], apply(kind, 3, x[1:2]), atol=1e-6)


def test_noise_has_the_moments_that_its_parameter_says():
    grey = torch.full((1, 1, 400, 400), 0.5)
    for severity in (1, 3):
        noise = apply("gaussian_noise", severity, grey) - 0.5
        assert float(noise.mean()) == pytest.approx(0, abs=1e-3)
        assert float(noise.std()) == pytest.approx(c.GAUSSIAN_NOISE[severity - 1], rel=0.02)
        shot = apply("shot_noise", severity, grey * 0.4)
        # A Poisson variable's variance is its mean: 0.2 c / c^2.
        assert float(shot.mean()) == pytest.approx(0.2, rel=0.01)
        assert float(shot.var()) == pytest.approx(0.2 / c.SHOT_NOISE[severity - 1], rel=0.05)
        impulse = apply("impulse_noise", severity, grey)
        part = c.IMPULSE_NOISE[severity - 1]
        assert float((impulse == 0).double().mean()) == pytest.approx(part / 2, rel=0.1)
        assert float((impulse == 1).double().mean()) == pytest.approx(part / 2, rel=0.1)
        assert float((impulse == 0.5).double().mean()) == pytest.approx(1 - part, rel=0.01)


def test_the_gaussian_blur_is_scipys():
    x = images(1, 2, 40)
    for severity in (1, 5):
        sigma = c.GAUSSIAN_BLUR[severity - 1] * 40
        expected = scipy.ndimage.gaussian_filter(x.numpy(), (0, 0, sigma, sigma), mode="nearest", truncate=4.0)
        assert apply("gaussian_blur", severity, x).numpy() == pytest.approx(expected, abs=1e-5)


def test_a_point_out_of_focus_is_a_disk():
    x = torch.zeros(1, 1, 41, 41)
    x[0, 0, 20, 20] = 1
    disk = apply("defocus_blur", 5, x)[0, 0]
    radius = 0.09 * 41
    distance = np.hypot(*(np.indices((41, 41)) - 20))
    assert float(disk.sum()) == pytest.approx(1, abs=1e-5)
    assert disk.numpy()[distance < radius - 0.5] == pytest.approx(float(disk[20, 20]))
    assert np.all(disk.numpy()[distance > radius + 0.5] == 0)
    assert torch.equal(disk, disk.T)


def test_brightness_raises_the_value_of_hsv():
    x = images(1, 3, 4)
    x[0, :, 0, 0] = 0
    brighter = apply("brightness", 2, x)
    for i in range(4):
        for j in range(4):
            hue, saturation, value = colorsys.rgb_to_hsv(*x[0, :, i, j].tolist())
            expected = colorsys.hsv_to_rgb(hue, saturation, min(1, value + 0.2))
            assert brighter[0, :, i, j].tolist() == pytest.approx(expected, abs=1e-5)
    grey = torch.tensor([0.0, 0.3, 0.95]).view(1, 1, 1, 3)
    assert apply("brightness", 2, grey).flatten().tolist() == pytest.approx([0.2, 0.5, 1.0])


def test_contrast_and_pixels_by_hand():
    x = torch.tensor([[0.0, 1.0], [0.5, 0.5]]).view(1, 1, 2, 2)
    assert apply("contrast", 1, x).flatten().tolist() == pytest.approx([0.3, 0.7, 0.5, 0.5])
    x = torch.arange(64.0).view(1, 1, 8, 8) / 63
    coarse = apply("pixelate", 5, x)[0, 0]  # A quarter of the resolution: 2x2 squares of 4 pixels a side.
    assert torch.equal(coarse[:4, :4], coarse[0, 0].expand(4, 4))
    assert float(coarse[0, 0]) == pytest.approx(float(x[0, 0, :4, :4].mean()))
    assert float(coarse[4, 4]) == pytest.approx(float(x[0, 0, 4:, 4:].mean()))


def test_pixels_are_those_of_pillow():
    x = images(1, 1, 29)
    for severity in c.SEVERITIES:
        size = int(c.PIXELATE[severity - 1] * 29)
        small = Image.fromarray(x[0, 0].numpy()).resize((size, size), Image.Resampling.BOX)
        expected = np.asarray(small.resize((29, 29), Image.Resampling.BOX))
        assert apply("pixelate", severity, x)[0, 0].numpy() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("kind", "severity", "message"),
    [
        ("gausian_noise", 1, r"no corruption 'gausian_noise'\. Did you mean 'gaussian_noise'"),
        ("contrast", 0, "from 1 to 5, but got 0"),
        ("contrast", 6, "from 1 to 5, but got 6"),
    ],
)
def test_what_does_not_exist_is_named(kind, severity, message):
    with pytest.raises(ConfigError, match=message):
        c.corruption(kind, severity)
