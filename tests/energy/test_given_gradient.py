"""A gradient that is handed over reaches the parameters as any loss's does."""

import torch

from lightning_ntk.energy.given_gradient import with_gradient


def test_with_gradient_hands_a_given_gradient_to_backward():
    params = {"a": torch.ones(2, requires_grad=True), "b": torch.ones(1, requires_grad=True)}
    gradient = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([3.0])}
    loss = with_gradient(torch.tensor(7.0), params, gradient)
    assert loss.item() == 7.0
    (2 * loss).backward()
    assert torch.equal(params["a"].grad, torch.tensor([2.0, 4.0]))
    assert torch.equal(params["b"].grad, torch.tensor([6.0]))
