"""Euler steps on the support's kernel: the same energy and the same gradient as step by step through the network."""

import pytest
import torch
import torch.nn.functional as F
from test_meta_rkhs_i import task

from lightning_ntk.energy import meta_rkhs_i, meta_rkhs_ii
from lightning_ntk.energy.euler_steps import EulerSteps, slopes


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


def test_the_cap_is_the_same_with_and_without_the_kernel():
    network, params, sx, sy, qx, qy, loss = task("mlp", F.cross_entropy)
    largest = meta_rkhs_i.largest_ntk_eigenvalue(network, params, sx)
    alpha = 4 * 0.3 * 2 * len(sx) / largest
    expected = meta_rkhs_i.euler(network, params, sx, sy, qx, qy, loss, alpha, 4)
    how = EulerSteps(loss, 1e6, 4, step_cap=0.3, coupled=False)
    found = meta_rkhs_ii.meta_gradient(network, params, sx[None], sy[None], qx[None], qy[None], loss, how)
    assert found.loss.item() == pytest.approx(expected.item(), rel=1e-9)


def test_a_kernel_of_zeros_leaves_the_step_as_it_is():
    outputs, targets = torch.zeros(2, 3, dtype=torch.float64), torch.tensor([0, 1])
    capped, plain = (EulerSteps(F.cross_entropy, 1.0, 5, step_cap=cap) for cap in (0.3, None))
    kernel = torch.zeros(6, 6, dtype=torch.float64)
    assert torch.equal(capped.solve(kernel, outputs, targets).a, plain.solve(kernel, outputs, targets).a)


@pytest.mark.parametrize(
    "loss, targets",
    [
        (F.mse_loss, torch.randn(4, 3, dtype=torch.float64)),
        (F.cross_entropy, torch.tensor([0, 2, 1, 0])),
        (F.cross_entropy, torch.rand(4, 3, dtype=torch.float64)),  # Probabilities, which need not sum to 1.
        (any_other_loss, torch.rand(4, 3, dtype=torch.float64)),
    ],
)
def test_slopes_and_curvatures_are_the_derivatives_of_the_loss(loss, targets):
    outputs, u = torch.randn(2, 4, 3, dtype=torch.float64)
    g, curvature = slopes(loss, targets, 3)(outputs)
    expected = torch.func.grad(lambda at: loss(at, targets))(outputs)
    _, along = torch.autograd.functional.hvp(lambda at: loss(at, targets), outputs, u)
    assert torch.allclose(g, expected, rtol=1e-12)
    assert torch.allclose(curvature(u), along, rtol=1e-12)
