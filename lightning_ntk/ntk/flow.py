"""Gradient flow under a fixed kernel, in closed form (Zhou et al. 2021, eq. 5 and 6).

For the squared loss 1/2 sum_i |f(x_i) - y_i|^2 (a sum, not a mean: that sets the unit of time t), the outputs on the
support follow df/ds = H (Y - f). Moving the parameters along with them gives, after time t,

    f_t(x) = f(x) + Theta(x, X) phi(H) (Y - f(X)),     phi(lam) = (1 - e^{-t lam}) / lam,     phi = 1 / lam at t = inf.

Everything here runs in float64, whatever the kernel's type: H is often conditioned worse than float32 can hold. H is a
matrix and r a vector: a kernel `[n, n, C, C]` of several outputs becomes one by `ntk.as_matrix`, `[n C, n C]`, and a
residual `[n, C]` by `.flatten()`.
"""

import math
from typing import Literal

import torch
from torch import Tensor

from lightning_ntk.errors import ConfigError

Approximation = Literal["exact", "pade11", "pade22"]

# The end of an error about shapes.
_IN_SHAPE = (
    "Of a kernel [n, n, C, C] and a residual [n, C], take ntk.as_matrix(kernel) and residual.flatten(); with a trace "
    "kernel [n, n], one column of the residual at a time."
)

# Two eigenvalues closer than this (times t, relative to their size) are treated by a Taylor series about their mean:
# the plain quotient loses as many digits as they share.
_CLOSE = 1e-3

# Derivatives have powers of t up to the fourth.
LARGEST_T = 1e50


def check_flow_settings(t: float, approximation: str, ridge: float, prefix: str = "method.") -> None:
    """Raise `ConfigError` for settings no flow has: t <= 0 or NaN, a negative ridge, an unknown approximation."""
    if not t > 0:
        raise ConfigError(f"{prefix}t is the time of the gradient flow: expected a positive number or inf, got {t}.")
    if LARGEST_T < t < math.inf:
        raise ConfigError(f"{prefix}t={t} is too large to compute with: take at most {LARGEST_T}, or inf.")
    if approximation not in ("exact", "pade11", "pade22"):
        raise ConfigError(f"{prefix}approximation must be 'exact', 'pade11' or 'pade22', but got {approximation!r}.")
    if approximation != "exact" and math.isinf(t):
        raise ConfigError(
            f"{prefix}approximation={approximation} needs a finite {prefix}t; t=inf has a formula: exact."
        )
    if not (ridge >= 0 and math.isfinite(ridge)):
        raise ConfigError(f"{prefix}ridge must be zero or positive and finite, but got {ridge}.")


class GradientFlow:
    """phi(H) for one kernel or a batch of kernels, from one eigendecomposition.

    Args:
        kernel: H, symmetric `[..., N, N]`; symmetrised and converted to float64. Negative eigenvalues, which a kernel
            has by rounding alone, are set to 0: of an indefinite matrix the flow is that of its positive part.
        t: time, in (0, 1e50] or inf.
        approximation: "exact", or the exponential by a Pade fraction: "pade11" [1/1] or "pade22" [2/2].
        ridge: added to every eigenvalue. At t = inf a positive ridge is what keeps directions that the kernel hardly
            sees (eigenvalues at the rounding level of a kernel that was computed in float32) from being divided by next
            to nothing. Without a ridge, those that it does not see at all, by its rounding, are left out: there
            Theta(x, X) is 0 as well, so that the flow's limit is the pseudo-inverse.
        rounding: an eigenvalue below N times this, relative to the largest, is not seen; None: that of the kernel's
            type. A kernel from a Jacobian in another precision has the square of what the rows are off by.

    Raises:
        ConfigError: settings no flow has, or a kernel that is not square in its last two axes.
    """

    def __init__(
        self,
        kernel: Tensor,
        t: float,
        *,
        approximation: Approximation = "exact",
        ridge: float = 0.0,
        rounding: float | None = None,
    ) -> None:
        check_flow_settings(t, approximation, ridge, prefix="")
        if kernel.dim() < 2 or kernel.shape[-1] != kernel.shape[-2]:
            raise ConfigError(f"Expected a kernel of shape [..., N, N], but got {list(kernel.shape)}. {_IN_SHAPE}")
        self.t = float(t)
        self.approximation = approximation
        symmetric = 0.5 * (kernel + kernel.mT)
        eigenvalues, self.eigenvectors = torch.linalg.eigh(symmetric.double())
        self.eigenvalues = eigenvalues.clamp(min=0) + ridge
        if ridge:  # It stands in for what the kernel does not see: only what float64 does not is left out.
            rounding = torch.finfo(torch.float64).eps
        elif rounding is None:
            rounding = torch.finfo(symmetric.dtype).eps
        self.phi = _phi(self.eigenvalues, self.t, approximation, rounding)

    def apply(self, residual: Tensor) -> Tensor:
        """phi(H) r for r `[..., N]`, one for each kernel, in float64.

        Raises:
            ConfigError: a residual of another shape.
        """
        self._check(residual)
        rotated = self.eigenvectors.mT @ residual.double().unsqueeze(-1)
        return (self.eigenvectors @ (self.phi.unsqueeze(-1) * rotated)).squeeze(-1)

    def adjoint(self, cotangent: Tensor, residual: Tensor) -> Tensor:
        """dc^T phi(H) r / dH, the symmetric matrix G `[..., N, N]` with d<c, phi(H) r> = <G, dH>.

        Daleckii-Krein: G = U [(U^T c)(U^T r)^T o Phi] U^T symmetrised, with Phi the divided differences of phi. Unlike
        the derivative of `eigh` it stays finite where eigenvalues coincide.
        """
        self._check(cotangent)
        self._check(residual)
        c = self.eigenvectors.mT @ cotangent.double().unsqueeze(-1)
        r = self.eigenvectors.mT @ residual.double().unsqueeze(-1)
        inner = (c @ r.mT) * _divided_differences(self.eigenvalues, self.phi, self.t, self.approximation)
        return self.eigenvectors @ (0.5 * (inner + inner.mT)) @ self.eigenvectors.mT

    def _check(self, vector: Tensor) -> None:
        # Another shape may broadcast, to numbers that mean nothing.
        if vector.shape != self.eigenvalues.shape:
            kernel = [*self.eigenvectors.shape]
            raise ConfigError(
                f"Expected a residual of shape {kernel[:-1]} for a kernel of shape {kernel}, but got "
                f"{list(vector.shape)}. {_IN_SHAPE}"
            )


def gradient_flow(
    kernel: Tensor,
    residual: Tensor,
    t: float,
    *,
    approximation: Approximation = "exact",
    ridge: float = 0.0,
    rounding: float | None = None,
) -> Tensor:
    """phi(H) r, differentiable once in kernel `[..., N, N]` and residual `[..., N]`; the result is float64.

    By autograd, that is (`backward`, `torch.autograd.grad`); not inside the transforms of torch.func.

    See `GradientFlow` for the arguments and errors. The derivative in the kernel uses the Daleckii-Krein formula.
    """
    return _GradientFlowFunction.apply(kernel, residual, t, approximation, ridge, rounding)


class _GradientFlowFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, kernel, residual, t, approximation, ridge, rounding):
        ctx.flow = GradientFlow(kernel, t, approximation=approximation, ridge=ridge, rounding=rounding)
        ctx.save_for_backward(residual)
        ctx.dtypes = kernel.dtype, residual.dtype
        return ctx.flow.apply(residual)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, cotangent):
        (residual,) = ctx.saved_tensors
        kernel_dtype, residual_dtype = ctx.dtypes
        d_kernel = ctx.flow.adjoint(cotangent, residual).to(kernel_dtype)
        return d_kernel, ctx.flow.apply(cotangent).to(residual_dtype), None, None, None, None


def _phi(lam: Tensor, t: float, approximation: Approximation, rounding: float) -> Tensor:
    """phi of eigenvalues `[..., N]`; see `GradientFlow` for `rounding`."""
    if math.isinf(t):
        seen = lam > lam.shape[-1] * rounding * lam.amax(-1, keepdim=True)
        return torch.where(seen, 1 / torch.where(seen, lam, 1.0), 0.0)
    z = t * lam
    if approximation == "pade11":
        return t / (1 + z / 2)
    if approximation == "pade22":
        return t / (1 + z / 2 + z.square() / 12)
    return t * _g(z)


def _divided_differences(lam: Tensor, phi: Tensor, t: float, approximation: Approximation) -> Tensor:
    """Phi_ij = (phi(lam_i) - phi(lam_j)) / (lam_i - lam_j), and phi'(lam_i) where they are equal. `[..., N, N]`."""
    products = phi.unsqueeze(-1) * phi.unsqueeze(-2)
    if math.isinf(t):  # With phi = 0 where the pseudo-inverse has left out an eigenvalue: 1 / lam_j^2 beside another.
        x, y = phi.unsqueeze(-1), phi.unsqueeze(-2)
        return -products + torch.where(x == 0, y.square(), 0.0) + torch.where(y == 0, x.square(), 0.0)
    if approximation == "pade11":  # phi = t / q(lam): Phi = -phi_i phi_j q[lam_i, lam_j] / t
        return -products / 2
    x, y = (t * lam).unsqueeze(-1), (t * lam).unsqueeze(-2)
    if approximation == "pade22":
        return -products * (0.5 + (x + y) / 12)
    middle, half = (x + y) / 2, (x - y) / 2
    size = middle.clamp(min=1)
    close = (2 * half).abs() < _CLOSE * size
    quotient = (_g(x) - _g(y)) / torch.where(close, 1.0, 2 * half)
    first, third = _g_derivatives(middle)
    return t * t * torch.where(close, first + half.square() * third / 6, quotient)


def _g(z: Tensor) -> Tensor:
    """(1 - e^-z) / z, and its limit 1 at z = 0."""
    safe = torch.where(z == 0, 1.0, z)
    return torch.where(z == 0, 1.0, -torch.expm1(-safe) / safe)


def _g_derivatives(z: Tensor) -> tuple[Tensor, Tensor]:
    """First and third derivative of (1 - e^-z) / z: closed forms for z >= 1, the power series below."""
    big = z.clamp(min=1)
    decay = torch.exp(-big)
    first = (decay * (big + 1) - 1) / big**2
    third = (decay * (big**3 + 3 * big**2 + 6 * big + 6) - 6) / big**4
    small = z.clamp(max=1)
    first_series, third_series = torch.zeros_like(z), torch.zeros_like(z)
    for k in range(1, 22):  # g(z) = sum_k (-z)^k / (k + 1)!
        coefficient = (-1) ** k / math.factorial(k + 1)
        first_series = first_series + coefficient * k * small ** (k - 1)
        if k >= 3:
            third_series = third_series + coefficient * k * (k - 1) * (k - 2) * small ** (k - 3)
    return torch.where(z >= 1, first, first_series), torch.where(z >= 1, third, third_series)
