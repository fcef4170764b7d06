"""Parameters as vectors, and their products."""

import torch

from lightning_ntk.networks.mlp import MLP
from lightning_ntk.ntk.network import functional
from lightning_ntk.ntk.params import flatten, inner_products, unflatten


def test_flatten_and_unflatten_are_inverse():
    _, params = functional(MLP((3,), 2, hidden=(4,)))
    vector = torch.arange(float(sum(p.numel() for p in params.values())))
    assert torch.equal(flatten(unflatten(vector, params)), vector)


def test_numbers_of_16_bits_are_multiplied_in_32():
    torch.manual_seed(0)
    a, b = torch.randn(3, 10_000).bfloat16(), torch.randn(4, 10_000).bfloat16()
    assert torch.allclose(inner_products(a, b), a.double() @ b.double().T, rtol=1e-4, atol=1e-4)
