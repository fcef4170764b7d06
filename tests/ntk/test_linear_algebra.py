"""What PyTorch differentiates wrongly by reverse mode over forward mode: its values, and right second derivatives."""

import pytest
import torch
from torch import nn
from torch.func import jvp

from lightning_ntk.errors import ConfigError
from lightning_ntk.ntk.jacobian import functional


def positive(a):
    return a @ a.mT + torch.eye(3)


FUNCTIONS = {
    "solve": lambda a: torch.linalg.solve(positive(a), a),
    "solve, from the right": lambda a: torch.linalg.solve(positive(a), a, left=False),
    "solve, a vector": lambda a: torch.linalg.solve(positive(a), a[..., 0]),
    "solve, one vector": lambda a: torch.linalg.solve(positive(a), a[0, 0]),
    "det": lambda a: torch.linalg.det(a + torch.eye(3)),
    "torch.det": lambda a: torch.det(a) + a.det(),
    "slogdet": lambda a: torch.linalg.slogdet(a).logabsdet,
    "torch.slogdet": lambda a: torch.slogdet(a).sign * torch.slogdet(a)[1] * a.slogdet().sign,
    "logdet": lambda a: torch.logdet(positive(a)) + positive(a).logdet(),
    "cholesky_inverse": lambda a: torch.cholesky_inverse(torch.linalg.cholesky(positive(a))),
    "cholesky_inverse, upper": lambda a: torch.linalg.cholesky(positive(a)).mT.cholesky_inverse(True),
    "householder_product": lambda a: torch.linalg.householder_product(a[..., :2], a.tanh()[..., 2, :2]),
    "orgqr": lambda a: torch.orgqr(a[..., :2], a.new_tensor([0.4]).expand(*a.shape[:-2], 1)),
}


class Solving(nn.Module):
    """A layer, a function of 3x3 matrices made of what it gives, and another layer."""

    def __init__(self, function):
        super().__init__()
        self.first, self.function = nn.Linear(4, 9), function
        outputs = self.middle(torch.randn(2, 4)).shape[1]
        self.last = nn.Linear(outputs, 2)

    def middle(self, x):
        return self.function(self.first(x).view(-1, 3, 3)).reshape(len(x), -1)

    def forward(self, x):
        return self.last(self.middle(x).tanh())


@pytest.fixture(autouse=True)
def _double():
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def second(network, params, x, tangent, h=1e-5):
    """d/dtheta of <1, J v> by reverse over forward mode, and by differences of PyTorch's plain gradients."""

    def of_product():
        leaves = {name: p.detach().requires_grad_() for name, p in params.items()}
        product = jvp(lambda theta: network(theta, x), (leaves,), (tangent,))[1]
        return torch.autograd.grad(product.sum(), list(leaves.values()), materialize_grads=True)

    def gradient(sign):
        leaves = {name: (p + sign * h * tangent[name]).detach().requires_grad_() for name, p in params.items()}
        return torch.autograd.grad(network.plain(leaves, x).sum(), list(leaves.values()), materialize_grads=True)

    differences = [(a - b) / (2 * h) for a, b in zip(gradient(1), gradient(-1), strict=True)]
    return (torch.cat([g.flatten() for g in found]) for found in (of_product(), differences))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_values_are_pytorchs_and_derivatives_of_jacobian_products_are_right(name):
    module, x = Solving(FUNCTIONS[name]), torch.randn(3, 4)
    network, params = functional(module)
    assert torch.allclose(network(params, x), module(x), rtol=1e-10)
    found, expected = second(network, params, x, {key: torch.randn_like(p) for key, p in params.items()})
    assert (found - expected).norm() < 1e-6 * expected.norm()


@pytest.mark.parametrize(("outputs", "how"), [(4, None), (6, "cayley"), (6, "householder"), (6, "matrix_exp")])
def test_orthogonal_weights_have_right_derivatives(outputs, how):
    linear = nn.utils.parametrizations.orthogonal(nn.Linear(6, outputs), orthogonal_map=how)
    network, params = functional(nn.Sequential(linear, nn.Tanh(), nn.Linear(outputs, 2)))
    # Of reflections, the diagonal is a sign, which cannot be moved.
    tangent = {key: torch.randn_like(p).tril(-1) if "original" in key else p for key, p in params.items()}
    found, expected = second(network, params, torch.randn(3, 6), tangent)
    assert (found - expected).norm() < 1e-6 * expected.norm()


def test_what_is_not_served_is_refused():
    network, params = functional(Solving(lambda a: torch.linalg.solve_ex(positive(a), a).result))
    with pytest.raises(ConfigError, match=r"derivatives come out wrong here. Call torch\.linalg\.solve instead"):
        network(params, torch.randn(3, 4))
