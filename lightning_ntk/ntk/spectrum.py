"""What a kernel's spectrum says: conditioning, rank, alignment with the targets, and how far the kernel has moved.

Pure functions in float64. Eigenvalues come in ascending order, as `spectrum` gives them.
"""

import torch
from torch import Tensor

from lightning_ntk.errors import ConfigError

# Beyond this part of the largest entry, entries that should be equal do not differ by rounding.
ASYMMETRIC = 1e-2


def as_matrix(kernel: Tensor) -> Tensor:
    """A full kernel `[n, n, C, C]` as the matrix H `[n C, n C]`; one that is a matrix already stays so. Float64,
    symmetrised.

    Raises:
        ConfigError: the kernel is not square, or not symmetric, being one of two sets of examples.
    """
    if kernel.dim() == 4:
        kernel = kernel.transpose(1, 2).flatten(2).flatten(0, 1)
    if kernel.dim() != 2 or kernel.shape[0] != kernel.shape[1]:
        raise ConfigError(
            f"Expected the kernel of one set of examples, [n, n, C, C] or a square matrix, but got one that makes "
            f"{list(kernel.shape)}. Of two sets, take kernel.transpose(1, 2).flatten(2).flatten(0, 1)."
        )
    kernel = kernel.double()
    apart = (kernel - kernel.mT).abs().max()
    if apart > ASYMMETRIC * kernel.abs().max():
        raise ConfigError(
            "Expected the kernel of one set of examples, but this one is not symmetric, as those of two sets are. Of "
            "two sets, take kernel.transpose(1, 2).flatten(2).flatten(0, 1)."
        )
    return 0.5 * (kernel + kernel.mT)


def spectrum(kernel: Tensor) -> Tensor:
    """Eigenvalues of a symmetric kernel `[N, N]` in float64, ascending `[N]`.

    Raises:
        torch.linalg.LinAlgError: numbers that are not finite.
    """
    if not bool(torch.isfinite(kernel).all()):
        raise torch.linalg.LinAlgError("A kernel that is not finite has no eigenvalues.")
    return torch.linalg.eigvalsh(as_matrix(kernel))


def resolution(eigenvalues: Tensor, dtype: torch.dtype = torch.float64) -> float:
    """Below this, an eigenvalue is rounding: eps lambda_max, eps of the type in which the kernel was computed."""
    return float(torch.finfo(dtype).eps * eigenvalues[-1].clamp(min=0))


def condition_number(eigenvalues: Tensor, *, ridge: float = 0.0, dtype: torch.dtype = torch.float64) -> float:
    """(lambda_max + ridge) / (lambda_min + ridge), lambda_min raised to `resolution` where it is less.

    So without ridge it is at most 1 / eps, which then means "at least that". Of a kernel that is zero it is inf.
    """
    smallest = max(float(eigenvalues[0]), resolution(eigenvalues, dtype)) + ridge
    return (float(eigenvalues[-1]) + ridge) / smallest if smallest > 0 else float("inf")


def effective_rank(eigenvalues: Tensor) -> float:
    """exp of the Shannon entropy of lambda_i / sum lambda (Roy and Vetterli 2007): N when all are equal, 1 when one is
    all there is. Negative eigenvalues, which are rounding, count as 0. A kernel that is zero has rank 0."""
    positive = eigenvalues.double().clamp(min=0)
    total = positive.sum()
    if total == 0:
        return 0.0
    shares = positive / total
    return float(torch.special.entr(shares).sum().exp())


def negative_eigenvalues(eigenvalues: Tensor) -> int:
    """How many are below 0. A kernel has none but by rounding: they tell that small ones are not resolved."""
    return int((eigenvalues < 0).sum())


def largest_step(eigenvalues: Tensor) -> float:
    """2 / lambda_max: gradient steps on 1/2 sum |f - y|^2 under a fixed kernel converge below it (inf for a zero
    kernel). For a mean over n examples of 1/2 |f - y|^2 it is n times as large."""
    largest = float(eigenvalues[-1])
    return 2 / largest if largest > 0 else float("inf")


def centred_targets(y: Tensor, outputs: int) -> Tensor:
    """Targets `[n, C]` to align with: class numbers `[n]` become one-hot vectors less 1/C, real vectors stay."""
    if y.dtype.is_floating_point:
        return y.double()
    return torch.nn.functional.one_hot(y, outputs).double() - 1 / outputs


def alignment(kernel: Tensor, targets: Tensor, *, centre: bool = False) -> float:
    """Kernel-target alignment <K, Y Y^T> / (|K| |Y Y^T|), in Frobenius products (Cristianini et al. 2001).

    Args:
        kernel: one value for each pair of examples, `[n, n]`.
        targets: Y `[n, C]`.
        centre: centre K and Y Y^T first, K - mean of rows and columns: the variant of Cortes et al. (2012), which a
            kernel's constant part does not move.

    Returns:
        In [-1, 1], and 1 where K is Y Y^T up to a factor; 0 where one of the two is zero.
    """
    kernel, wanted = kernel.double(), targets.double() @ targets.double().mT
    if centre:
        kernel, wanted = _centred(kernel), _centred(wanted)
    return _cosine(kernel, wanted)


def drift(kernel: Tensor, before: Tensor) -> float:
    """1 - <K, K0> / (|K| |K0|), in Frobenius products: the kernel distance of Fort et al. (2020). In [0, 1] for
    kernels; 0 when K is K0 up to a factor (a change of scale shows in the trace)."""
    return max(0.0, 1 - _cosine(kernel.double(), before.double()))


def _cosine(a: Tensor, b: Tensor) -> float:
    # Each divided by its largest entry: products of large kernels must not overflow, nor those of small ones vanish.
    a, b = (x / x.abs().max().clamp(min=torch.finfo(torch.float64).tiny) for x in (a, b))
    norms = torch.linalg.norm(a) * torch.linalg.norm(b)
    return float((a * b).sum() / norms) if norms > 0 else 0.0


def _centred(kernel: Tensor) -> Tensor:
    centred = kernel - kernel.mean(0, keepdim=True)
    centred = centred - centred.mean(1, keepdim=True)
    # What is left of a constant kernel is rounding.
    return centred if centred.abs().max() > 1e-12 * kernel.abs().max() else torch.zeros_like(kernel)
