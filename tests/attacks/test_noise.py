import pytest
import torch
from attacked_models import generator, images, smooth_network

from lightning_ntk.attacks.noise import gaussian_noise
from lightning_ntk.errors import ConfigError


def test_its_deviation_is_eps_and_its_images_stay_in_the_unit_cube():
    network = smooth_network(size=32)
    x = torch.full((20, 1, 32, 32), 0.5)
    y = torch.zeros(20, dtype=torch.long)
    found = gaussian_noise(network, x, y, 0.1, generator=generator())
    assert (found.images - x).std().item() == pytest.approx(0.1, rel=0.02)
    assert torch.allclose(found.outputs, network(found.images), atol=1e-6)
    assert torch.equal(found.images, gaussian_noise(network, x, y, 0.1, generator=generator()).images)
    wide = gaussian_noise(network, images(20, size=32), y, 1.0, generator=generator()).images
    assert (wide.min(), wide.max()) == (0, 1)


@pytest.mark.parametrize("eps", [-0.1, 1.1])
def test_eps_outside_the_unit_interval_is_refused(eps):
    with pytest.raises(ConfigError, match="eps must be from 0 to 1"):
        gaussian_noise(smooth_network(), images(1), torch.tensor([0]), eps, generator=generator())
