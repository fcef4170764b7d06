"""The network as an operator on its parameters: J (dense), J v and J^T u.

`J(x) = d f(theta, x) / d theta`, shape `[n, C, P]` for n inputs, C outputs and P parameters.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp, vjp, vmap

Params = dict[str, Tensor]
# f(theta, x): inputs [n, *input_shape] to outputs [n, C].
Network = Callable[[Params, Tensor], Tensor]


def functional(module: nn.Module) -> tuple[Network, Params]:
    """A module as a pure function of its trainable parameters, with those parameters as they are (not detached)."""
    params = {name: p for name, p in module.named_parameters() if p.requires_grad}
    return lambda theta, x: functional_call(module, theta, (x,)), params


def flatten(params: Params, batch_dims: int = 0) -> Tensor:
    """Concatenate parameter-shaped tensors to one vector `[..., P]`, keeping `batch_dims` leading axes."""
    return torch.cat([p.flatten(start_dim=batch_dims) for p in params.values()], dim=-1)


def unflatten(vector: Tensor, like: Params) -> Params:
    """Cut a vector `[P]` into tensors of the shapes of `like`: the inverse of `flatten`."""
    pieces = vector.split([p.numel() for p in like.values()])
    return {name: piece.view_as(p) for (name, p), piece in zip(like.items(), pieces, strict=True)}


class Jacobian:
    """J(x) of a network at theta on one batch of inputs.

    Args:
        network: f(theta, x).
        params: theta. Derivatives of the Jacobian itself are not tracked: everything is computed on detached values.
        x: inputs `[n, *input_shape]`.
        coupled: True when outputs depend on the whole batch (batch statistics). J is then that of the whole batch and
            costs n C backward passes over n examples; otherwise it costs C of them.
    """

    def __init__(self, network: Network, params: Params, x: Tensor, *, coupled: bool = True) -> None:
        self.network = network
        self.params = {name: p.detach() for name, p in params.items()}
        self.x = x
        self.coupled = coupled
        self.outputs, self._pullback = vjp(lambda theta: network(theta, x), self.params)  # [n, C]

    def jvp(self, tangent: Params) -> Tensor:
        """J v: `[n, C]` for a tangent of the parameters' shapes. Costs about two forward passes."""
        return jvp(lambda theta: self.network(theta, self.x), (self.params,), (tangent,))[1]

    def vjp(self, cotangent: Tensor) -> Params:
        """J^T u: parameter-shaped, for a cotangent `[n, C]`. Costs one backward pass."""
        return self._pullback(cotangent)[0]

    def dense(self, chunk_size: int | None = None) -> Tensor:
        """The whole Jacobian `[n, C, P]`; `chunk_size` rows at a time when given."""
        n, outputs = self.outputs.shape
        if self.coupled:
            basis = torch.eye(n * outputs, dtype=self.x.dtype, device=self.x.device).view(n * outputs, n, outputs)
            rows = vmap(self.vjp, chunk_size=chunk_size)(basis)
            return flatten(rows, batch_dims=1).view(n, outputs, -1)
        basis = torch.eye(outputs, dtype=self.x.dtype, device=self.x.device)

        def of_one(example: Tensor) -> Params:
            _, pullback = vjp(lambda theta: self.network(theta, example.unsqueeze(0)).squeeze(0), self.params)
            return vmap(lambda cotangent: pullback(cotangent)[0])(basis)

        return flatten(vmap(of_one, chunk_size=chunk_size)(self.x), batch_dims=2)
