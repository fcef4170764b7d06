"""Solutions of equations, determinants and products of reflections, written out.

Reverse mode over PyTorch's forward mode of these comes out wrong, off by as much as the derivative itself (torch 2.14;
each of them alone, and double backward, are right). Of LU factors and of triangular solutions it is right, and under
nested vmap too, where solutions by packed factors (`lu_solve`) are not.
"""

import torch
from torch import Tensor


def solve(A: Tensor, B: Tensor, *, left: bool = True) -> Tensor:
    """`torch.linalg.solve`: A `[..., n, n]`, and B `[..., n, k]` or vectors."""
    if not left:
        return solve(A.mT, B.mT).mT
    vectors = B.dim() == 1 or B.shape == A.shape[:-1]
    P, L, U = torch.lu_unpack(*torch.linalg.lu_factor(A))
    right = P.mT @ (B.unsqueeze(-1) if vectors else B)
    below = torch.linalg.solve_triangular(L, right, upper=False, unitriangular=True)
    solution = torch.linalg.solve_triangular(U, below, upper=True)
    return solution.squeeze(-1) if vectors else solution


def eigh(A: Tensor, UPLO: str = "L") -> tuple[Tensor, Tensor]:
    """`torch.linalg.eigh`: by the singular values of A + s I, for an s that makes all its eigenvalues positive.

    (Reverse over forward mode of PyTorch's is NaN.) Signs of the eigenvectors are PyTorch's.
    """
    A = A.tril() + A.tril(-1).mH if UPLO.upper() == "L" else A.triu() + A.triu(1).mH
    values, vectors = torch.linalg.eigh(A.detach())
    shift = 2 * values.abs().amax(-1)[..., None, None]
    left, shifted, _ = torch.linalg.svd(A + shift * torch.eye(A.shape[-1], dtype=A.dtype, device=A.device))
    left = left.flip(-1)
    signs = (left.detach().conj() * vectors).sum(-2, keepdim=True).sgn()
    return shifted.flip(-1) - shift[..., 0], left * signs


def slogdet(A: Tensor) -> tuple[Tensor, Tensor]:
    """`torch.linalg.slogdet`: the sign and the logarithm of the size of the determinant."""
    factors, pivots = torch.linalg.lu_factor(A)
    diagonal = factors.diagonal(dim1=-2, dim2=-1)
    return _parity(pivots, A) * diagonal.detach().sign().prod(-1), diagonal.abs().log().sum(-1)


def det(A: Tensor) -> Tensor:
    """`torch.linalg.det`."""
    factors, pivots = torch.linalg.lu_factor(A)
    return _parity(pivots, A) * factors.diagonal(dim1=-2, dim2=-1).prod(-1)


def logdet(A: Tensor) -> Tensor:
    """`torch.logdet`: NaN where the determinant is negative."""
    sign, size = slogdet(A)
    return torch.where(sign < 0, torch.nan, size)


def _parity(pivots: Tensor, like: Tensor) -> Tensor:
    """1 for an even number of rows exchanged, -1 for an odd one."""
    places = torch.arange(1, 1 + pivots.shape[-1], device=pivots.device)
    return 1 - 2 * ((pivots != places).sum(-1) % 2).to(like.dtype)


def cholesky_inverse(L: Tensor, upper: bool = False) -> Tensor:
    """`torch.cholesky_inverse`."""
    return torch.cholesky_solve(torch.eye(L.shape[-1], dtype=L.dtype, device=L.device).expand_as(L), L, upper)


def householder_product(A: Tensor, tau: Tensor) -> Tensor:
    """`torch.linalg.householder_product`: the first columns of (I - tau_1 v_1 v_1^T) (I - tau_2 v_2 v_2^T) ..."""
    identity = torch.eye(*A.shape[-2:], dtype=A.dtype, device=A.device)
    vectors = A.tril(-1) + identity
    product = identity.expand_as(A)
    for k in reversed(range(tau.shape[-1])):
        v = vectors[..., k : k + 1]
        product = product - tau[..., k, None, None] * (v @ (v.mT @ product))
    return product
