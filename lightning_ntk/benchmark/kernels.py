"""The support NTK of T tasks, `[T, n, n, C, C]`: ours, and torch.func as in PyTorch's tutorial on NTKs.

The tutorial: docs.pytorch.org/tutorials/intermediate/neural_tangent_kernels.html. Its functions take two sets of
inputs; here both are the support set, so the Jacobian is computed once (as neural-tangents and ours do).
"""

import torch
from torch import Tensor
from torch.func import functional_call, jacrev, jvp, vjp, vmap

from lightning_ntk.benchmark.measure import Work
from lightning_ntk.benchmark.problem import Problem
from lightning_ntk.ntk import empirical_ntk, functional

OURS, OURS_VMAP = "lightning_ntk", "lightning_ntk, tasks by vmap"
CONTRACTION, PRODUCTS = "torch.func, Jacobian contraction", "torch.func, NTK-vector products"
# Rows of the kernel that NTK-vector products compute at once: each pair of examples holds its activations.
ROWS_AT_ONCE = {"cpu": 1, "cuda": 5}


def make_kernels(problem: Problem, slow: bool = True) -> list[Work]:
    """The works of each implementation in torch; `run` returns the kernels.

    Args:
        slow: with the NTK-vector products, whose cost grows as n^2.
    """
    x = problem.episodes.support_x  # [T, n, ...]
    theirs = problem.in_default_layout()  # In which torch.func is the faster.
    works = {OURS: lambda: torch.stack([ours(problem, task) for task in x])}
    if len(x) > 1:
        works[OURS_VMAP] = lambda: vmap(lambda task: ours(problem, task))(x)
        works[CONTRACTION] = lambda: vmap(lambda task: contraction(theirs, task))(x)
    else:
        works[CONTRACTION] = lambda: contraction(theirs, x[0])[None]
    if slow:
        works[PRODUCTS] = lambda: torch.stack([products(theirs, task) for task in x])
    return [Work(name, run, tasks=len(x)) for name, run in works.items()]


def ours(problem: Problem, x: Tensor) -> Tensor:
    """Our kernel of one task, `[n, n, C, C]`."""
    network, params = functional(problem.network)
    return empirical_ntk(network, params, x, coupled=False, kind="full")


def _tutorial(problem: Problem):
    params = {name: p.detach() for name, p in problem.network.named_parameters()}

    def one(params: dict[str, Tensor], example: Tensor) -> Tensor:
        return functional_call(problem.network, params, (example.unsqueeze(0),)).squeeze(0)

    return one, params


def contraction(problem: Problem, x: Tensor) -> Tensor:
    """The tutorial's `empirical_ntk_jacobian_contraction` of one task, `[n, n, C, C]`."""
    one, params = _tutorial(problem)
    jacobian = vmap(jacrev(one), (None, 0))(params, x)
    flat = [part.flatten(2) for part in jacobian.values()]
    return torch.stack([torch.einsum("Naf,Mbf->NMab", part, part) for part in flat]).sum(0)


def products(problem: Problem, x: Tensor) -> Tensor:
    """The tutorial's `empirical_ntk_ntk_vps` of one task, `[n, n, C, C]`."""
    one, params = _tutorial(problem)
    outputs = problem.spec.outputs
    basis = torch.eye(outputs, dtype=x.dtype, device=x.device)

    def pair(x1: Tensor, x2: Tensor) -> Tensor:
        _, pullback = vjp(lambda p: one(p, x1), params)

        def column(vector: Tensor) -> Tensor:
            return jvp(lambda p: one(p, x2), (params,), pullback(vector))[1]

        return vmap(column)(basis)

    return vmap(vmap(pair, (None, 0)), (0, None), chunk_size=ROWS_AT_ONCE[x.device.type])(x, x)
