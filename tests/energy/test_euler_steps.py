"""Euler steps on the support's kernel: the same energy and the same gradient as step by step through the network."""

import pytest
import torch
import torch.nn.functional as F
from test_meta_rkhs_i import task

from lightning_ntk.energy import meta_rkhs_i, meta_rkhs_ii
from lightning_ntk.energy.euler_steps import EulerSteps, seen, seen_numbers, slopes
from lightning_ntk.ntk import empirical_ntk


def stacked(kind, loss, count):
    """Tasks of the same shapes, and their network."""
    network, params, *data, _ = task(kind, loss)
    return (
        network,
        params,
        [torch.stack([d * 0.8**i if d.is_floating_point() else d for i in range(count)]) for d in data],
    )


def any_other_loss(outputs, targets):
    """One of which nothing is written out."""
    return F.softplus(-targets * outputs).mean()


@pytest.mark.parametrize("kind", ["mlp", "batch", "group"])
@pytest.mark.parametrize("loss", [F.cross_entropy, F.mse_loss, any_other_loss])
@pytest.mark.parametrize("steps", [1, 7])
def test_the_meta_gradient_is_that_of_the_steps_through_the_network(kind, loss, steps):
    network, params, data = stacked(kind, loss, 2)
    alpha = 1.0
    values = [meta_rkhs_i.euler(network, params, *one, loss, alpha, steps) for one in zip(*data, strict=True)]
    expected = torch.autograd.grad(sum(values) / 2, list(params.values()))
    how = EulerSteps(loss, alpha, steps, coupled=kind == "batch", rank_tolerance=0.0)
    for tasks_per_chunk in (1, 2):
        found = meta_rkhs_ii.meta_gradient(network, params, *data, loss, how, tasks_per_chunk=tasks_per_chunk)
        assert found.loss.item() == pytest.approx(sum(values).item() / 2, rel=1e-10)
        for g, e in zip(found.gradient.values(), expected, strict=True):
            assert torch.allclose(g, e, rtol=1e-8, atol=1e-10 * max(e.abs().max() for e in expected).item())


@pytest.mark.parametrize("loss", [F.cross_entropy, F.mse_loss])
def test_the_cap_is_the_same_with_and_without_the_kernel(loss):
    network, params, sx, sy, qx, qy, _ = task("mlp", loss)
    largest = meta_rkhs_i.largest_ntk_eigenvalue(seen(network, loss, sy), params, sx)
    alpha = 4 * 0.3 * 2 * len(sx) / largest
    expected = meta_rkhs_i.euler(network, params, sx, sy, qx, qy, loss, alpha, 4)
    how = EulerSteps(loss, 1e6, 4, step_cap=0.3, coupled=False)
    found = meta_rkhs_ii.meta_gradient(network, params, sx[None], sy[None], qx[None], qy[None], loss, how)
    assert found.loss.item() == pytest.approx(expected.item(), rel=1e-9)


def test_cross_entropy_sees_all_of_the_outputs_but_their_mean():
    network, params, x, y, *_ = task("mlp", F.cross_entropy)
    outputs = network(params, x)
    n, classes = outputs.shape
    contrasts = seen(network, F.cross_entropy, y)
    centred = outputs - outputs.mean(-1, keepdim=True)
    # An isometry of the centred outputs, and so of their kernel.
    assert contrasts(params, x).shape == (n, seen_numbers(F.cross_entropy, classes)) == (n, classes - 1)
    assert torch.allclose(contrasts(params, x) @ contrasts(params, x).T, centred @ centred.T)
    projection = torch.eye(classes, dtype=torch.float64) - 1 / classes
    full = empirical_ntk(network, params, x, coupled=False)
    expected = torch.einsum("ijcd,ce,df->ijef", full, projection, projection).movedim(2, 1).flatten(0, 1).flatten(1)
    found = empirical_ntk(contrasts, params, x, coupled=False).movedim(2, 1).flatten(0, 1).flatten(1)
    spectrum = torch.linalg.eigvalsh(found)
    assert torch.allclose(spectrum, torch.linalg.eigvalsh(expected)[n:], atol=1e-9 * spectrum[-1].item())


def test_other_losses_see_all_of_the_outputs():
    network, _, _, y, *_ = task("mlp", F.cross_entropy)
    for loss, targets in [(F.mse_loss, y.double()), (any_other_loss, y), (F.cross_entropy, y[:, None].double())]:
        assert seen(network, loss, targets) is network, "probabilities need not sum to 1"
    assert seen_numbers(F.mse_loss, 5) == seen_numbers(any_other_loss, 5) == 5


def test_a_kernel_of_zeros_leaves_the_step_as_it_is():
    contrasts, targets = torch.zeros(2, 2, dtype=torch.float64), torch.tensor([0, 1])
    capped, plain = (EulerSteps(F.cross_entropy, 1.0, 5, step_cap=cap) for cap in (0.3, None))
    kernel = torch.zeros(4, 4, dtype=torch.float64)
    assert torch.equal(capped.solve(kernel, contrasts, targets).a, plain.solve(kernel, contrasts, targets).a)


@pytest.mark.parametrize(
    "loss, targets",
    [
        (F.mse_loss, torch.randn(4, 3, dtype=torch.float64)),
        (F.cross_entropy, torch.rand(4, 3, dtype=torch.float64)),  # Probabilities, which need not sum to 1.
        (any_other_loss, torch.rand(4, 3, dtype=torch.float64)),
    ],
)
def test_slopes_and_curvatures_are_the_derivatives_of_the_loss(loss, targets):
    check_slopes(loss, targets, lambda outputs: outputs)


def test_slopes_and_curvatures_of_contrasts_are_the_derivatives_of_cross_entropy():
    targets = torch.tensor([0, 2, 1, 0])
    basis = seen(lambda _, x: x, F.cross_entropy, targets)({}, torch.eye(3, dtype=torch.float64))
    check_slopes(F.cross_entropy, targets, lambda contrasts: contrasts @ basis.T)


def check_slopes(loss, targets, outputs_of):
    """`outputs_of`: outputs of which the loss sees these numbers."""
    network = seen(lambda _, x: x, loss, targets)
    at = network({}, torch.randn(4, 3, dtype=torch.float64))
    u = torch.randn_like(at)
    g, curvature = slopes(loss, targets, at)(at)
    expected = torch.func.grad(lambda x: loss(outputs_of(x), targets))(at)
    _, along = torch.autograd.functional.hvp(lambda x: loss(outputs_of(x), targets), at, u)
    assert torch.allclose(network({}, outputs_of(at)), at)
    assert torch.allclose(g, expected, rtol=1e-10, atol=1e-14)
    assert torch.allclose(curvature(u), along, rtol=1e-10, atol=1e-14)
