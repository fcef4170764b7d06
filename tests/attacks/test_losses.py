import pytest
import torch
import torch.nn.functional as F

from lightning_ntk.attacks.losses import LOSSES, attack_loss, cross_entropy, dlr, log_odds, margin
from lightning_ntk.errors import ConfigError


def test_by_hand():
    outputs = torch.tensor([[3.0, 1.0, 0.0], [3.0, 1.0, 0.0], [3.0, 1.0, 0.0]])
    y = torch.tensor([0, 1, 2])
    assert margin(outputs, y).tolist() == [-2.0, 2.0, 3.0]
    assert torch.allclose(dlr(outputs, y), torch.tensor([-2 / 3, 2 / 3, 1.0]))


def test_cross_entropy_is_torchs_for_any_batch():
    outputs, y = torch.randn(2, 7, 5), torch.randint(5, (2, 7))
    theirs = F.cross_entropy(outputs.flatten(0, 1), y.flatten(), reduction="none").view(2, 7)
    assert torch.allclose(cross_entropy(outputs, y), theirs)


def test_log_odds_are_those_of_the_true_class_and_go_on_where_it_is_certain():
    outputs, y = torch.randn(2, 7, 5, dtype=torch.float64), torch.randint(5, (2, 7))
    p = outputs.softmax(-1).gather(-1, y[..., None]).squeeze(-1)
    assert torch.allclose(log_odds(outputs, y), ((1 - p) / p).log())
    certain, y = torch.tensor([[40.0, 0.0, 1.0], [40.1, 0.0, 1.0]]), torch.tensor([0, 0])
    assert cross_entropy(certain, y).tolist() == [0.0, 0.0]
    assert log_odds(certain, y).diff() < -0.09


@pytest.mark.parametrize("name", LOSSES)
def test_it_rises_as_the_true_class_falls_and_its_batches_are_independent(name):
    generator = torch.Generator().manual_seed(0)
    outputs = torch.randn(2, 7, 5, generator=generator)
    y = outputs.argmax(-1)
    y[:, 0] = (y[:, 0] + 1) % 5
    losses = LOSSES[name](outputs, y)
    lower = outputs.scatter_add(-1, y[..., None], torch.full((2, 7, 1), -0.01))
    assert (LOSSES[name](lower, y) > losses).all()
    assert torch.allclose(LOSSES[name](outputs[1], y[1]), losses[1])


@pytest.mark.parametrize("name", ["margin", "dlr"])
def test_its_gradient_points_the_same_way_at_any_scale(name):
    outputs = torch.tensor([[3.0, 2.5, -1.0, 0.0]], dtype=torch.float64)
    y = torch.tensor([0])

    def direction(scale, loss):
        leaf = (scale * outputs).requires_grad_()
        (gradient,) = torch.autograd.grad(loss(leaf, y).sum(), leaf)
        return gradient / gradient.norm()

    assert torch.allclose(direction(1e-3, LOSSES[name]), direction(1e3, LOSSES[name]), atol=1e-6)
    # What makes it matter: cross-entropy pushes all other classes alike where logits are small.
    small, large = direction(1e-3, cross_entropy), direction(10, cross_entropy)
    assert small[0, 2] / small[0, 1] > 0.99
    assert large[0, 2] / large[0, 1] < 1e-10


def test_unknown_names_and_too_few_classes_are_refused():
    with pytest.raises(ConfigError, match=r"callbacks\.adversarial\.loss must be one of .* Did you mean 'margin'"):
        attack_loss("margn", "callbacks.adversarial.loss")
    with pytest.raises(ConfigError, match="three classes"):
        dlr(torch.zeros(3, 2), torch.zeros(3, dtype=torch.long))
