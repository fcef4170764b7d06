"""The energies of Meta-RKHS-I: Theorem 2, the expansion that ties them together, and their bounds."""

import pytest
import torch
import torch.nn.functional as F
from reference import dense_jacobian

from lightning_ntk.energy import meta_rkhs_i as energy
from lightning_ntk.networks.conv4 import Conv4
from lightning_ntk.networks.mlp import MLP
from lightning_ntk.ntk.jacobian import functional


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


@pytest.mark.parametrize("kind", ["mlp", "batch", "none"])
@pytest.mark.parametrize("loss", [F.cross_entropy, F.mse_loss])
def test_theorem_2_the_rkhs_norm_of_the_gradient_is_its_parameter_norm(kind, loss):
    # In the RKHS of the kernel Theta, grad_f L = sum_i Theta(., x_i) g_i with g = dL/df(x_i), and its squared norm is
    # sum_ij g_i Theta(x_i, x_j) g_j. Theorem 2 of the paper: that is ||grad_theta L||^2.
    network, params, x, y, _, _, _ = task(kind, loss)
    outputs = network(params, x)
    (g,) = torch.autograd.grad(loss(outputs, y), outputs)
    jacobian = dense_jacobian(network, params, x).detach()
    rkhs = g.flatten() @ (jacobian @ jacobian.T) @ g.flatten()

    value = loss(network(params, x), y)
    at_one = energy.literal(network, params, x, y, loss, alpha=1.0)
    assert (value - at_one).item() == pytest.approx(rkhs.item(), rel=1e-10)
    assert rkhs > 1e-3


@pytest.mark.parametrize("kind", ["mlp", "batch"])
@pytest.mark.parametrize("loss", [F.cross_entropy, F.mse_loss])
def test_the_cross_energy_is_the_first_order_expansion_of_the_euler_energy(kind, loss):
    data = task(kind, loss)
    gaps = [abs(energy.euler(*data, alpha) - energy.cross(*data, alpha)).item() for alpha in (1e-2, 1e-3)]
    # What is left is of second order: a tenth of the step leaves a hundredth of it.
    assert 80 < gaps[0] / gaps[1] < 120


@pytest.mark.parametrize("loss", [F.cross_entropy, F.mse_loss])
def test_the_euler_energy_is_one_step_maml_for_a_linear_model(loss):
    torch.manual_seed(0)
    module = MLP((4,), 3, hidden=()).double()
    network, params = functional(module)
    _, _, sx, sy, qx, qy, _ = task("mlp", loss)
    gradients = torch.autograd.grad(loss(network(params, sx), sy), list(params.values()))
    stepped = {name: p - 0.3 * g for (name, p), g in zip(params.items(), gradients, strict=True)}
    expected = loss(network(stepped, qx), qy)
    assert energy.euler(network, params, sx, sy, qx, qy, loss, 0.3).item() == pytest.approx(expected.item(), rel=1e-12)


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
@pytest.mark.parametrize("form", ["literal", "cross", "euler"])
def test_the_energies_have_the_right_gradient(kind, form):
    network, params, sx, sy, qx, qy, loss = task(kind, F.cross_entropy)

    def value(theta):
        if form == "literal":
            return energy.literal(network, theta, sx, sy, loss, 0.2)
        return getattr(energy, form)(network, theta, sx, sy, qx, qy, loss, 0.2)

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
