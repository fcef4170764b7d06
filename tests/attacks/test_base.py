import pytest
import torch
from attacked_models import images, smooth_network

from lightning_ntk.attacks.base import check_eps, check_images, in_parts
from lightning_ntk.attacks.losses import margin
from lightning_ntk.attacks.white_box import input_gradient
from lightning_ntk.errors import ConfigError, DataError


def test_in_parts_a_predictor_is_itself():
    network, x, y = smooth_network(channels=2), images(7, channels=2), torch.arange(7) % 4
    sizes = []

    def counting(part):
        assert part.is_contiguous()  # As it came: a network of one's own may ask for a view of it.
        sizes.append(len(part))
        return network(part)

    parted = in_parts(counting, 3)
    gradient, found = input_gradient(parted, x, y, margin)
    expected_gradient, expected = input_gradient(network, x, y, margin)
    assert sizes == [3, 2, 2]
    assert torch.allclose(found.outputs, expected.outputs, atol=1e-6)
    assert torch.allclose(gradient, expected_gradient, atol=1e-6)
    assert torch.allclose(in_parts(counting)(x), network(x), atol=1e-6)
    assert sizes[3:] == [7]


def test_the_key_of_a_bad_eps_is_named():
    check_eps(torch.tensor([0.0, 1.0]))
    with pytest.raises(ConfigError, match=r"callbacks\.adversarial\.fit_eps must be from 0 to 1 .* but got 1\.5"):
        check_eps(1.5, "callbacks.adversarial.fit_eps")


@pytest.mark.parametrize(
    ("x", "y"),
    [
        (torch.rand(0, 1, 4, 4), torch.zeros(0, dtype=torch.int64)),
        (torch.rand(2, 1, 4, 4), torch.tensor([0.0, 1.0])),
        (torch.rand(2, 1, 4, 4), torch.tensor([0, 1], dtype=torch.int32)),
        (torch.rand(2, 1, 4, 4), torch.tensor([0, -1])),
    ],
)
def test_labels_are_whole_numbers_from_0_for_one_image_at_least(x, y):
    with pytest.raises(DataError, match="images, and an int64 label from 0 on for each, but got"):
        check_images(x, y)


@pytest.mark.parametrize("size", ["8/255", None])
def test_a_size_that_is_no_number_is_refused(size):
    with pytest.raises(ConfigError, match="eps must be from 0 to 1"):
        check_eps(size)
