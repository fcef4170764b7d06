"""The energies of Meta-RKHS-I: the expansion that ties them together, and their bounds."""

import pytest
import torch
import torch.nn.functional as F
from reference import dense_jacobian

from lightning_ntk.energy import meta_rkhs_i as energy
from lightning_ntk.energy import meta_rkhs_ii
from lightning_ntk.energy.closed_form import ClosedForm
from lightning_ntk.energy.euler_steps import largest_eigenvalue
from lightning_ntk.networks.conv4 import Conv4
from lightning_ntk.networks.mlp import MLP
from lightning_ntk.ntk.jacobian import adapted_outputs
from lightning_ntk.ntk.network import functional


def task(kind, loss):
    torch.manual_seed(0)
    double = {"dtype": torch.float64}
    if kind == "mlp":
        module, shape = MLP((4,), 3, hidden=(8, 8)), (4,)
    else:
        module, shape = Conv4((1, 32, 32), 3, filters=16, norm=kind), (1, 32, 32)
    support_x, query_x = torch.rand(5, *shape, **double), torch.rand(6, *shape, **double)
    if loss is F.cross_entropy:
        support_y, query_y = torch.tensor([0, 1, 2, 0, 1]), torch.tensor([2, 1, 0, 0, 1, 2])
    else:
        support_y, query_y = torch.randn(5, 3, **double), torch.randn(6, 3, **double)
    network, params = functional(module.double())
    return network, params, support_x, support_y, query_x, query_y, loss


@pytest.mark.parametrize("kind", ["mlp", "batch"])
@pytest.mark.parametrize("loss", [F.cross_entropy, F.mse_loss])
@pytest.mark.parametrize("steps", [1, 4])
def test_the_cross_energy_is_the_first_order_expansion_of_the_euler_energy(kind, loss, steps):
    data = task(kind, loss)
    gaps = [abs(energy.euler(*data, alpha, steps) - energy.cross(*data, alpha)).item() for alpha in (1e-3, 1e-4)]
    # What is left is of second order: a tenth of the step leaves a hundredth of it.
    assert 90 < gaps[0] / gaps[1] < 110


@pytest.mark.parametrize("loss", [F.cross_entropy, F.mse_loss])
@pytest.mark.parametrize("steps", [1, 4])
def test_the_euler_energy_is_that_of_maml_with_k_steps_for_a_linear_model(loss, steps):
    torch.manual_seed(0)
    module = MLP((4,), 3, hidden=()).double()
    network, params = functional(module)
    _, _, sx, sy, qx, qy, _ = task("mlp", loss)
    stepped = params
    for _ in range(steps):
        gradients = torch.autograd.grad(loss(network(stepped, sx), sy), list(stepped.values()))
        stepped = {name: p - 1.2 / steps * g for (name, p), g in zip(stepped.items(), gradients, strict=True)}
    expected = loss(network(stepped, qx), qy)
    found = energy.euler(network, params, sx, sy, qx, qy, loss, 1.2, steps)
    assert found.item() == pytest.approx(expected.item(), rel=1e-12)


@pytest.mark.parametrize("kind", ["mlp", "batch", "group"])
@pytest.mark.parametrize("loss", [F.cross_entropy, F.mse_loss])
@pytest.mark.parametrize("steps", [1, 5])
def test_euler_steps_are_those_of_the_function_under_the_kernel(kind, loss, steps):
    network, params, sx, sy, qx, qy, _ = task(kind, loss)
    on_support, on_query = (dense_jacobian(network, params, x).detach() for x in (sx, qx))
    kernel, cross_kernel = on_support @ on_support.T, on_query @ on_support.T
    alpha = 1.0 / torch.linalg.eigvalsh(kernel)[-1].item()
    at_support, at_query = network(params, sx).detach(), network(params, qx).detach()
    for _ in range(steps):
        here = at_support.clone().requires_grad_()
        (slope,) = torch.autograd.grad(loss(here, sy), here)
        at_support = at_support - alpha / steps * (kernel @ slope.flatten()).view_as(at_support)
        at_query = at_query - alpha / steps * (cross_kernel @ slope.flatten()).view_as(at_query)
    expected = loss(at_query, qy).item()
    for pairs in (None, 2) if kind != "batch" else (None,):
        found = energy.euler(network, params, sx, sy, qx, qy, loss, alpha, steps, pairs_at_once=pairs)
        assert found.item() == pytest.approx(expected, rel=1e-10)


def test_many_euler_steps_on_the_squared_loss_are_the_flow_of_meta_rkhs_ii():
    network, params, sx, sy, qx, _, _ = task("mlp", F.mse_loss)
    half_square = lambda outputs, targets: 0.5 * (outputs - targets).square().sum()  # noqa: E731
    flow = meta_rkhs_ii.adapt(network, params, sx, sy, ClosedForm(0.3, coupled=False))(qx)

    def gap(steps):
        tangent = energy.euler_tangent(network, params, sx, sy, half_square, 0.3, steps)
        return (adapted_outputs(network, params, tangent, qx) - flow).norm().item()

    assert gap(80) < 0.05 * gap(1)
    assert gap(40) / gap(80) == pytest.approx(2, rel=0.1)  # Euler's method is of first order.


@pytest.mark.parametrize("kind", ["mlp", "batch", "group"])
def test_the_largest_eigenvalue_is_the_kernels(kind):
    network, params, x, *_ = task(kind, F.mse_loss)
    jacobian = dense_jacobian(network, params, x)
    expected = torch.linalg.eigvalsh(jacobian @ jacobian.T)[-1].item()
    found = energy.largest_ntk_eigenvalue(network, params, x)
    assert not found.requires_grad
    assert 0.99 * expected < found.item() <= expected * (1 + 1e-9)
    two = torch.vmap(lambda one: energy.largest_ntk_eigenvalue(network, params, one))(torch.stack([x, 0.5 * x]))
    assert two[0].item() == pytest.approx(found.item(), rel=1e-9)
    assert two[1] != two[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rank", [0, 1, 2, 30])
def test_an_operator_of_low_rank_exhausts_its_space_without_harm(rank, dtype):
    torch.manual_seed(0)
    root = torch.randn(30, rank, dtype=dtype)
    operator = 7 * root @ root.mT
    expected = torch.linalg.eigvalsh(operator)[-1].item()
    found = largest_eigenvalue(lambda u: operator @ u, torch.zeros(30, dtype=dtype)).item()
    assert 0.99 * expected <= found <= expected * (1 + 1e-5) + 1e-12


def test_alpha_zero_is_the_plain_loss():
    network, params, sx, sy, qx, qy, loss = task("batch", F.cross_entropy)
    plain = loss(network(params, qx), qy).item()
    assert energy.cross(network, params, sx, sy, qx, qy, loss, 0.0).item() == plain
    assert energy.euler(network, params, sx, sy, qx, qy, loss, 0.0).item() == pytest.approx(plain, rel=1e-12)


def test_the_literal_energy_is_unbounded_below_and_the_euler_energy_is_not():
    network, params, sx, sy, qx, qy, loss = task("mlp", F.mse_loss)
    values = {"literal": [], "euler": []}
    for scale in (1.0, 10.0, 100.0):
        larger = {name: (scale * p).detach().requires_grad_() for name, p in params.items()}
        values["literal"].append(energy.literal(network, larger, sx, sy, loss, 0.1).item())
        values["euler"].append(energy.euler(network, larger, sx, sy, qx, qy, loss, 0.1).item())
    assert values["literal"][0] > values["literal"][1] > values["literal"][2]
    assert values["literal"][2] < -1e6
    assert min(values["euler"]) > 0


@pytest.mark.parametrize("kind", ["mlp", "batch", "group"])
@pytest.mark.parametrize("form", ["literal", "cross", "euler", "euler in 3 steps"])
def test_the_energies_have_the_right_gradient(kind, form):
    network, params, sx, sy, qx, qy, loss = task(kind, F.cross_entropy)

    def value(theta):
        if form == "literal":
            return energy.literal(network, theta, sx, sy, loss, 0.2)
        if form == "cross":
            return energy.cross(network, theta, sx, sy, qx, qy, loss, 0.2)
        return energy.euler(network, theta, sx, sy, qx, qy, loss, 0.2, 3 if form.endswith("3 steps") else 1)

    gradients = torch.autograd.grad(value(params), list(params.values()))
    torch.manual_seed(3)
    direction = {name: torch.randn_like(p) for name, p in params.items()}
    eps = 1e-6
    ahead, behind = (
        value({name: (p + sign * eps * direction[name]).detach().requires_grad_() for name, p in params.items()})
        for sign in (1, -1)
    )
    slope = sum((g * d).sum() for g, d in zip(gradients, direction.values(), strict=True)).item()
    assert ((ahead - behind) / (2 * eps)).item() == pytest.approx(slope, rel=1e-4)
