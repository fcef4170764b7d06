"""Slow, obvious oracles: each computes by the definition what the package computes cleverly."""

import math

import torch
from torch import Tensor
from torch.func import jacrev

from lightning_ntk.ntk.network import Network
from lightning_ntk.ntk.params import Params


def dense_jacobian(network: Network, params: Params, x: Tensor) -> Tensor:
    """J(x) `[n C, P]` by reverse mode, one output at a time, differentiable in params."""
    rows = jacrev(lambda theta: network(theta, x).flatten())(params)
    return torch.cat([block.reshape(block.shape[0], -1) for block in rows.values()], dim=1)


def flow_matrix(kernel: Tensor, t: float, approximation: str, ridge: float) -> Tensor:
    """phi(H) `[N, N]` by matrix functions, without an eigendecomposition."""
    eye = torch.eye(kernel.shape[-1], dtype=kernel.dtype)
    h = kernel + ridge * eye
    if math.isinf(t):
        return torch.linalg.inv(h)
    if approximation == "pade11":
        return t * torch.linalg.inv(eye + t * h / 2)
    if approximation == "pade22":
        return t * torch.linalg.inv(eye + t * h / 2 + t * t * h @ h / 12)
    return torch.linalg.solve(h, eye - torch.matrix_exp(-t * h))


def closed_form_outputs(
    network: Network,
    params: Params,
    support_x: Tensor,
    targets: Tensor,
    query_x: Tensor,
    t: float,
    approximation: str = "exact",
    ridge: float = 0.0,
) -> Tensor:
    """f_t(x_q) `[m, C]` through both full Jacobians (Zhou et al. 2021, eq. 5), differentiable by plain autograd."""
    on_support = dense_jacobian(network, params, support_x)
    on_query = dense_jacobian(network, params, query_x)
    residual = (targets - network(params, support_x)).flatten()
    step = flow_matrix(on_support @ on_support.T, t, approximation, ridge) @ residual
    outputs = network(params, query_x)
    return outputs + (on_query @ (on_support.T @ step)).view_as(outputs)


def small_steps(jacobian: Tensor, start: Tensor, targets: Tensor, t: float, steps: int) -> Tensor:
    """theta's movement `[P]` under `steps` plain gradient steps of size t / steps on 1/2 |start + J d - targets|^2."""
    moved = torch.zeros(jacobian.shape[1], dtype=jacobian.dtype)
    for _ in range(steps):
        moved = moved - t / steps * jacobian.T @ (start + jacobian @ moved - targets)
    return moved
