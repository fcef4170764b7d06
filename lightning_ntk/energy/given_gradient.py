"""A gradient that was computed by hand, handed over to automatic optimisation."""

import torch
from torch import Tensor

from lightning_ntk.ntk.params import Params


def with_gradient(value: Tensor, params: Params, gradient: Params) -> Tensor:
    """A scalar equal to `value` whose `backward` adds `gradient` to `params`.

    So a gradient that was computed by hand takes part in automatic optimisation: hooks of DDP, scaling and
    accumulation work as for any other loss. Differentiable once.
    """
    return _WithGradient.apply(value, list(gradient.values()), *params.values())


class _WithGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value, gradients, *parameters):
        ctx.save_for_backward(*gradients)
        return value.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, upstream):
        return None, None, *(upstream * g for g in ctx.saved_tensors)
