"""What PyTorch differentiates wrongly by reverse mode over forward mode: its values, and right second derivatives."""

import pytest
import torch
from nestings import own_tangents_reversed, tangents_like
from torch import nn
from torch.func import grad, jvp

from lightning_ntk.errors import ConfigError
from lightning_ntk.ntk.network import functional


def positive(a):
    return a @ a.mT + torch.eye(3)


def symmetric(a):
    return a + a.mT + torch.diag(torch.tensor([0.0, 2, 5]))


def functions_of_eigenvalues(values, vectors):
    return vectors @ torch.diag_embed(values.cos()) @ vectors.mT


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
    "eigh": lambda a: torch.linalg.eigh(symmetric(a)).eigenvectors,
    "eigh, of the upper half": lambda a: functions_of_eigenvalues(*torch.linalg.eigh(symmetric(a), UPLO="U")),
    "cdist": lambda a: torch.cdist(a, a.tanh() + 1) + torch.cdist(a, a + 1, 1.0, "use_mm_for_euclid_dist"),
    "select_scatter": lambda a: torch.select_scatter(a, a[..., 1] ** 2, -1, -3) + a.select_scatter(a[:, 0], 1, 2),
    "scatter_reduce": lambda a: torch.ones_like(a).scatter_reduce(-1, torch.tensor([0, 0, 2]).expand_as(a), a, "sum"),
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


@pytest.mark.parametrize("name", FUNCTIONS)
def test_examples_and_directions_at_once_give_the_derivatives_of_each_alone(name):
    network, params = functional(Solving(FUNCTIONS[name]))
    params, x = {key: p.detach() for key, p in params.items()}, torch.randn(3, 4)
    found = own_tangents_reversed(network, params, x)
    some = {key: t.unflatten(0, (3, 2)) for key, t in tangents_like(params, 6).items()}

    def along(q, i, k):
        return jvp(lambda p: network(p, x[i : i + 1]), (q,), ({key: t[i, k] for key, t in some.items()},))[1]

    expected = grad(lambda q: sum(along(q, i, k).square().sum() for i in range(3) for k in range(2)))(params)
    error, size = (torch.cat([g[key].flatten() for key in params]) for g in (found, expected))
    assert (error - size).norm() < 1e-10 * size.norm()


@pytest.mark.parametrize(("outputs", "how"), [(4, None), (6, "cayley"), (6, "householder"), (6, "matrix_exp")])
def test_orthogonal_weights_have_right_derivatives(outputs, how):
    linear = nn.utils.parametrizations.orthogonal(nn.Linear(6, outputs), orthogonal_map=how)
    network, params = functional(nn.Sequential(linear, nn.Tanh(), nn.Linear(outputs, 2)))
    # Of reflections, the diagonal is a sign, which cannot be moved.
    tangent = {key: torch.randn_like(p).tril(-1) if "original" in key else p for key, p in params.items()}
    found, expected = second(network, params, torch.randn(3, 6), tangent)
    assert (found - expected).norm() < 1e-6 * expected.norm()


@pytest.mark.parametrize(
    ("function", "replacement"),
    [
        (lambda a: torch.linalg.solve_ex(positive(a), a).result, r"torch\.linalg\.solve"),
        (lambda a: torch.linalg.lu_solve(*torch.linalg.lu_factor(positive(a)), a), r"torch\.linalg\.solve"),
        (lambda a: torch.ones_like(a).scatter_reduce(1, torch.zeros_like(a).long(), a, "prod"), "cumprod"),
    ],
)
def test_what_is_not_served_is_refused(function, replacement):
    network, params = functional(Solving(function))
    with pytest.raises(ConfigError, match=f"derivatives come out wrong here. Call {replacement}"):
        network(params, torch.randn(3, 4))
