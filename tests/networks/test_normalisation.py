"""Batch statistics: the values of `nn.BatchNorm2d`, and derivatives of derivatives that are right."""

import pytest
import torch
from torch import nn
from torch.func import functional_call, jvp

from lightning_ntk.networks.normalisation import BatchStatistics


def test_it_computes_what_torchs_batch_norm_computes():
    torch.manual_seed(0)
    ours, torchs = BatchStatistics(3), nn.BatchNorm2d(3, track_running_stats=False)
    state = {"weight": torch.randn(3), "bias": torch.randn(3)}
    ours.load_state_dict(state)
    torchs.load_state_dict(state)
    x = 5 + 2 * torch.randn(4, 3, 6, 6)
    assert torch.allclose(ours(x), torchs(x), atol=1e-5)


def test_the_derivative_of_a_jacobian_product_is_right():
    # d/dtheta <u, J(x; theta) v>, by reverse mode over forward mode, against finite differences: the case that
    # torch's own batch norm gets silently wrong.
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(1, 2, 3), BatchStatistics(2), nn.Tanh(), nn.Flatten()).double()
    x = torch.randn(4, 1, 5, 5, dtype=torch.float64)
    params = {name: p.detach().requires_grad_() for name, p in module.named_parameters()}
    v = {name: torch.randn_like(p) for name, p in params.items()}
    u = torch.randn(4, 18, dtype=torch.float64)

    def product(theta):
        return (jvp(lambda q: functional_call(module, q, (x,)), (theta,), (v,))[1] * u).sum()

    gradients = torch.autograd.grad(product(params), list(params.values()))
    direction = {name: torch.randn_like(p) for name, p in params.items()}
    slope = sum((g * d).sum() for g, d in zip(gradients, direction.values(), strict=True)).item()
    eps = 1e-6
    ahead, behind = (
        product({name: (p + sign * eps * direction[name]).detach() for name, p in params.items()}) for sign in (1, -1)
    )
    assert ((ahead - behind) / (2 * eps)).item() == pytest.approx(slope, rel=1e-6)
