"""The closed-form flow: against small gradient steps, matrix functions, its limits, and its derivative."""

import math

import pytest
import torch
from reference import flow_matrix, small_steps

from lightning_ntk.errors import ConfigError
from lightning_ntk.ntk import as_matrix
from lightning_ntk.ntk.flow import GradientFlow, gradient_flow

TIMES = [1e-3, 0.1, 1.0, 10.0, 1000.0, math.inf]
SETTINGS = [(t, a) for t in TIMES for a in ("exact", "pade11", "pade22") if a == "exact" or math.isfinite(t)]


def kernel_with(eigenvalues: list[float]) -> torch.Tensor:
    torch.manual_seed(0)
    q = torch.linalg.qr(torch.randn(len(eigenvalues), len(eigenvalues), dtype=torch.float64))[0]
    return q @ torch.diag(torch.tensor(eigenvalues, dtype=torch.float64)) @ q.T


def test_a_linear_model_follows_many_small_gradient_steps():
    # For f(x) = x theta the Jacobian is X itself and the kernel is X X^T: the whole flow can be done by hand.
    torch.manual_seed(0)
    x, y = torch.randn(4, 7, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    theta = torch.randn(7, dtype=torch.float64)
    moved = x.T @ gradient_flow(x @ x.T, y - x @ theta, t=0.7)
    by_steps = small_steps(x, x @ theta, y, t=0.7, steps=20_000)
    assert torch.allclose(moved, by_steps, rtol=1e-3, atol=1e-4)
    assert moved.norm() > 0.1


@pytest.mark.parametrize(("t", "approximation"), SETTINGS)
def test_it_equals_the_matrix_functions(t, approximation):
    kernel, r = kernel_with([3.0, 1.0, 0.5, 0.2]), torch.arange(1.0, 5.0, dtype=torch.float64)
    ridge = 0.1
    expected = flow_matrix(kernel, t, approximation, ridge) @ r
    assert torch.allclose(gradient_flow(kernel, r, t, approximation=approximation, ridge=ridge), expected, rtol=1e-9)


def test_time_zero_does_nothing_and_infinite_time_interpolates():
    kernel, r = kernel_with([3.0, 1.0, 0.2]), torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64)
    assert gradient_flow(kernel, r, 1e-9).norm() < 1e-8
    assert torch.allclose(gradient_flow(kernel, r, 1e-9) / 1e-9, r, rtol=1e-6)
    assert torch.allclose(kernel @ gradient_flow(kernel, r, math.inf), r)
    assert torch.allclose(gradient_flow(kernel, r, 1e6), gradient_flow(kernel, r, math.inf), rtol=1e-9)


def test_pade_approaches_the_exponential_and_the_higher_order_is_closer():
    kernel, r = kernel_with([1.0, 0.6, 0.1]), torch.ones(3, dtype=torch.float64)
    errors = {
        (t, a): (gradient_flow(kernel, r, t, approximation=a) - gradient_flow(kernel, r, t)).norm().item() / t
        for t in (0.1, 1.0)
        for a in ("pade11", "pade22")
    }
    # [1/1] is right up to (t lam)^2 and [2/2] up to (t lam)^4, so a tenth of the time gains about 2 and 4 digits.
    assert 30 < errors[1.0, "pade11"] / errors[0.1, "pade11"] < 200
    assert 2_000 < errors[1.0, "pade22"] / errors[0.1, "pade22"] < 20_000
    assert errors[1.0, "pade22"] < 0.02 * errors[1.0, "pade11"]


@pytest.mark.parametrize(
    "eigenvalues",
    [[2.0, 1.0, 0.3, 0.1], [2.0, 1.0, 1.0, 1.0], [2.0, 1.0, 1.0 + 1e-12, 0.1], [2.0, 1.0, 0.0, 0.0]],
    ids=["distinct", "equal", "1e-12 apart", "rank below n"],
)
@pytest.mark.parametrize(("t", "approximation"), SETTINGS)
def test_the_derivative_is_right_even_where_eigenvalues_coincide(eigenvalues, t, approximation):
    # The kernel is moved by a factor, K + B B^T - B0 B0^T, so that it stays symmetric and, where rank matters, psd.
    torch.manual_seed(1)
    base = kernel_with(eigenvalues)
    ridge = 0.05 if min(eigenvalues) == 0 else 0.0
    # Finite differences step to both sides: keep the spectrum from crossing 0, where the flow clamps it.
    lift = 1e-3 * torch.eye(4, dtype=torch.float64) if min(eigenvalues) == 0 else 0.0
    factor = torch.linalg.cholesky(base + lift + 1e-12 * torch.eye(4, dtype=torch.float64)).requires_grad_()
    r = torch.randn(4, dtype=torch.float64, requires_grad=True)

    def flow(b, residual):
        return gradient_flow(b @ b.T, residual, t, approximation=approximation, ridge=ridge)

    assert torch.autograd.gradcheck(flow, (factor, r), eps=1e-6, atol=1e-5 * max(1.0, min(t, 100.0)), rtol=1e-5)


@pytest.mark.parametrize("gap", [1e-12, 1e-9, 1e-6, 1e-4, 7e-4, 1e-3, 1e-2])
def test_divided_differences_keep_their_digits_between_close_eigenvalues(gap):
    # <G, dH> along the direction that separates the two eigenvectors is phi's divided difference: compare with the
    # mean-value form, an integral that has no cancellation.
    t, lam = 2.0, 0.8
    kernel = torch.diag(torch.tensor([lam, lam + gap], dtype=torch.float64))
    e1, e2 = torch.eye(2, dtype=torch.float64)
    got = GradientFlow(kernel, t).adjoint(e1, e2)[0, 1].item() * 2
    nodes = torch.linspace(0, 1, 20_001, dtype=torch.float64)
    z = t * (lam + nodes * gap)
    derivative = t * t * (torch.exp(-z) * (z + 1) - 1) / z**2
    assert got == pytest.approx(torch.trapezoid(derivative, nodes).item(), rel=1e-9)


def test_a_batch_of_kernels_equals_one_after_the_other():
    kernels = torch.stack([kernel_with([2.0, 1.0, 0.1]), kernel_with([5.0, 0.5, 0.5])])
    r = torch.tensor([[1.0, 2.0, 3.0], [-1.0, 0.0, 1.0]], dtype=torch.float64)
    batched = gradient_flow(kernels, r, 3.0)
    assert torch.allclose(batched, torch.stack([gradient_flow(k, x, 3.0) for k, x in zip(kernels, r, strict=True)]))


@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_values_and_gradients_are_finite_over_magnitudes(scale, dtype):
    kernel = (scale * kernel_with([2.0, 1.0, 1.0, 1e-9])).to(dtype).requires_grad_()
    out = gradient_flow(kernel, torch.ones(4, dtype=dtype), 10.0)
    assert out.dtype == torch.float64
    (gradient,) = torch.autograd.grad(out.sum(), kernel)
    assert gradient.dtype == dtype
    assert torch.isfinite(out).all()
    assert torch.isfinite(gradient).all()


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"t": 0.0}, "t is the time"),
        ({"t": -1.0}, "t is the time"),
        ({"t": math.nan}, "t is the time"),
        ({"t": 1e160}, "t=1e[+]160 is too large .* or inf"),
        ({"t": 1.0, "approximation": "pade33"}, "approximation"),
        ({"t": math.inf, "approximation": "pade11"}, "finite"),
        ({"t": 1.0, "ridge": -1.0}, "ridge"),
    ],
)
def test_settings_no_flow_has_are_refused(settings, word):
    with pytest.raises(ConfigError, match=word):
        GradientFlow(torch.eye(2), **settings)


def test_at_infinite_time_what_the_kernel_does_not_see_stays_as_it_is():
    torch.manual_seed(0)
    rows = torch.randn(4, 6, dtype=torch.float64)
    rows[3] = rows[0]  # A repeated example.
    r = torch.randn(4, dtype=torch.float64)
    kernel = rows @ rows.T
    moved = rows.T @ gradient_flow(kernel, r, math.inf)
    assert torch.allclose(moved, rows.T @ gradient_flow(kernel, r, 100.0))
    assert not gradient_flow(torch.zeros(2, 2), torch.ones(2), math.inf).any()

    def outputs(rows):
        return rows.T @ gradient_flow(rows @ rows.T, r, math.inf)

    # Directions along which the two stay equal, or else the limit has no derivative.
    direction = torch.randn_like(rows)
    direction[3] = direction[0]
    leaf = rows.clone().requires_grad_()
    u = torch.randn(6, dtype=torch.float64)
    (gradient,) = torch.autograd.grad(outputs(leaf) @ u, leaf)
    eps = 1e-6
    slope = (outputs(rows + eps * direction) - outputs(rows - eps * direction)) @ u / (2 * eps)
    assert (gradient * direction).sum().item() == pytest.approx(slope.item(), rel=1e-6)


def test_at_infinite_time_the_derivative_follows_a_null_space_that_turns():
    kernel, turn = kernel_with([3.0, 1.0, 0.0]), torch.randn(3, 3, dtype=torch.float64)
    turn = turn - turn.T
    r, u = torch.randn(3, dtype=torch.float64), torch.randn(3, dtype=torch.float64)

    def turned(size):  # Of the same rank.
        rotation = torch.matrix_exp(size * turn)
        return rotation @ kernel @ rotation.T

    leaf = kernel.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(gradient_flow(leaf, r, math.inf) @ u, leaf)
    ahead, behind = (gradient_flow(turned(size), r, math.inf) @ u for size in (1e-6, -1e-6))
    slope = (gradient * (turn @ kernel + kernel @ turn.T)).sum().item()
    assert ((ahead - behind) / 2e-6).item() == pytest.approx(slope, rel=1e-6)


def test_at_infinite_time_a_kernel_in_float32_is_inverted_down_to_its_own_rounding():
    torch.manual_seed(0)
    v, r = torch.randn(20), torch.randn(20)
    kernel = torch.outer(v, v) + 0.1 * torch.eye(20)[3].outer(torch.eye(20)[3])
    expected = torch.linalg.pinv(kernel, hermitian=True) @ r
    assert torch.allclose(gradient_flow(kernel, r, math.inf).float(), expected, rtol=1e-4, atol=1e-5)
    # The same numbers in float64 are taken at their word, unless one says otherwise; a ridge is the user's own bound.
    assert gradient_flow(kernel.double(), r, math.inf).norm() > 1e3 * expected.norm()
    assert torch.allclose(gradient_flow(kernel.double(), r, math.inf, rounding=1e-7).float(), expected, atol=1e-5)
    assert gradient_flow(kernel, r, math.inf, ridge=1e-7).norm() > 1e3 * expected.norm()


@pytest.mark.parametrize(
    ("kernel", "residual"),
    [((4, 4, 3, 3), (4, 3)), ((3, 3), (3, 3)), ((3, 3), (4,)), ((2, 3, 3), (3,))],
    ids=["several outputs", "trace kernel with as many examples as outputs", "another length", "one for two kernels"],
)
def test_shapes_that_would_broadcast_are_refused_with_what_to_do(kernel, residual):
    identity = torch.eye(kernel[-1]).expand(kernel)
    message = rf"shape \[.*\] for a kernel .*{kernel[-1]}\], but got \[.*as_matrix\(kernel\) and residual\.flatten\(\)"
    with pytest.raises(ConfigError, match=message):
        gradient_flow(identity, torch.ones(residual), 1.0)
    with pytest.raises(ConfigError, match=message):
        GradientFlow(identity, 1.0).adjoint(torch.ones(kernel[:-1]), torch.ones(residual))
    with pytest.raises(ConfigError, match=r"kernel of shape \[\.\.\., N, N\], but got \[3, 4\]"):
        gradient_flow(torch.ones(3, 4), torch.ones(4), 1.0)


def test_with_several_outputs_the_flow_is_that_of_the_matrix():
    # Two outputs with kernels of their own: side by side, or one after the other.
    torch.manual_seed(0)
    parts = [kernel_with([3.0, 1.0, 0.2]), kernel_with([2.0, 0.5, 0.1])]
    kernel = torch.zeros(3, 3, 2, 2, dtype=torch.float64)
    kernel[..., 0, 0], kernel[..., 1, 1] = parts
    residual = torch.randn(3, 2, dtype=torch.float64)
    found = gradient_flow(as_matrix(kernel), residual.flatten(), 3.0).view(3, 2)
    expected = [gradient_flow(part, r, 3.0) for part, r in zip(parts, residual.T, strict=True)]
    assert torch.allclose(found, torch.stack(expected, 1))
