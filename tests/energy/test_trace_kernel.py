"""Meta-RKHS-II with the trace kernel: against the definition, plain autodiff, and the full kernel where they agree."""

import math

import pytest
import torch
import torch.nn.functional as F
from reference import dense_jacobian, flow_matrix
from test_meta_rkhs_ii import make_network, make_tasks

from lightning_ntk.energy import meta_rkhs_ii as energy
from lightning_ntk.energy.closed_form import ClosedForm
from lightning_ntk.networks.mlp import MLP
from lightning_ntk.ntk.network import functional
from lightning_ntk.ntk.params import flatten

SETTINGS = [(0.1, "exact"), (10.0, "exact"), (math.inf, "exact"), (100.0, "pade11"), (100.0, "pade22")]
RIDGE = 0.1


def by_definition(network, params, support_x, targets, query_x, t, approximation):
    """f(x_q) + K(x_q, X) phi(K) (Y - f(X)) with K the mean over the outputs' kernels; differentiable."""
    n, outputs = targets.shape
    on_support = dense_jacobian(network, params, support_x).view(n, -1)
    on_query = dense_jacobian(network, params, query_x).view(query_x.shape[0], -1)
    step = flow_matrix(on_support @ on_support.T / outputs, t, approximation, RIDGE)
    return network(params, query_x) + on_query @ on_support.T / outputs @ step @ (targets - network(params, support_x))


@pytest.mark.parametrize("name", ["mlp", "conv4-group-stride", "conv4-none-stride"])
@pytest.mark.parametrize(("t", "approximation"), SETTINGS)
def test_it_is_the_definition_and_its_meta_gradient_plain_autodiff(name, t, approximation):
    module, shape = make_network(name)
    network, params = functional(module)
    tasks = make_tasks(shape, tasks=2)
    how = ClosedForm(t, approximation, RIDGE, coupled=False, kernel="trace")
    losses = []
    for support_x, targets, query_x, query_y in zip(*tasks, strict=True):
        outputs = by_definition(network, params, support_x, targets, query_x, t, approximation)
        predictor = energy.adapt(network, params, support_x, targets, how)
        assert torch.allclose(predictor(query_x), outputs, rtol=1e-8)
        losses.append(F.mse_loss(outputs, query_y))
    expected_loss = torch.stack(losses).mean()
    expected = torch.cat([g.flatten() for g in torch.autograd.grad(expected_loss, list(params.values()))])
    for chunks in ({}, {"tasks_per_chunk": 2}, {"pairs_at_once": 4}):
        result = energy.meta_gradient(network, params, *tasks, F.mse_loss, how, **chunks)
        assert result.loss.item() == pytest.approx(expected_loss.item(), rel=1e-9)
        assert (flatten(result.gradient) - expected).norm() < 1e-9 * expected.norm()


def test_with_one_output_it_is_the_full_kernel():
    torch.manual_seed(0)
    network, params = functional(MLP((4,), 1, hidden=(16, 16)).double())
    tasks = make_tasks((4,), tasks=1, outputs=1)
    results = [
        energy.meta_gradient(network, params, *tasks, F.mse_loss, ClosedForm(2.0, coupled=False, kernel=kernel))
        for kernel in ("full", "trace")
    ]
    assert results[0].loss.item() == pytest.approx(results[1].loss.item(), rel=1e-10)
    assert torch.allclose(flatten(results[0].gradient), flatten(results[1].gradient), rtol=1e-7)


def test_with_several_outputs_it_is_another_function():
    module, shape = make_network("mlp")
    network, params = functional(module)
    support_x, targets, query_x, _ = (a[0] for a in make_tasks(shape, tasks=1))
    full, trace = (
        energy.adapt(network, params, support_x, targets, ClosedForm(2.0, coupled=False, kernel=kernel))(query_x)
        for kernel in ("full", "trace")
    )
    assert (full - trace).abs().max() > 1e-2


def test_the_predictor_is_differentiable_in_its_input():
    module, shape = make_network("conv4-none-stride")
    network, params = functional(module)
    support_x, targets, query_x, _ = (a[0] for a in make_tasks(shape, tasks=1))
    predictor = energy.adapt(network, params, support_x, targets, ClosedForm(2.0, coupled=False, kernel="trace"))
    x = query_x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(predictor(x).square().sum(), x)
    direction, eps = torch.randn_like(query_x), 1e-6
    ahead, behind = (predictor(query_x + sign * eps * direction).square().sum() for sign in (1, -1))
    assert ((ahead - behind) / (2 * eps)).item() == pytest.approx((gradient * direction).sum().item(), rel=1e-5)
