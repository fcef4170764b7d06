"""The empirical neural tangent kernel Theta(x1, x2) = J(x1) J(x2)^T (Jacot et al. 2018)."""

from typing import Literal

from torch import Tensor

from lightning_ntk.ntk.jacobian import Jacobian, Network, Params


def empirical_ntk(
    network: Network,
    params: Params,
    x1: Tensor,
    x2: Tensor | None = None,
    *,
    kind: Literal["full", "trace", "mean_trace"] = "full",
    coupled: bool = True,
    chunk_size: int | None = None,
) -> Tensor:
    """Kernel between inputs x1 `[n1, ...]` and x2 `[n2, ...]` (x1 itself when None).

    Args:
        kind: "full" gives `[n1, n2, C, C]`. "trace" sums the C diagonal entries of each block, "mean_trace" divides
            that sum by C; both give `[n1, n2]`. (neural-tangents' "trace" is the mean.)
        coupled: see `Jacobian`.
        chunk_size: Jacobian rows (coupled) or examples (otherwise) in memory at a time while J is built.

    Memory: the two Jacobians, n C P numbers each.
    """
    j1 = Jacobian(network, params, x1, coupled=coupled).dense(chunk_size)
    j2 = j1 if x2 is None else Jacobian(network, params, x2, coupled=coupled).dense(chunk_size)
    if kind == "full":
        n1, c, _ = j1.shape
        n2 = j2.shape[0]
        return (j1.flatten(0, 1) @ j2.flatten(0, 1).T).view(n1, c, n2, c).transpose(1, 2)
    trace = j1.flatten(1) @ j2.flatten(1).T
    if kind == "trace":
        return trace
    if kind == "mean_trace":
        return trace / j1.shape[1]
    raise ValueError(f"Expected argument `kind` to be 'full', 'trace' or 'mean_trace', but got {kind!r}.")
