"""The convolutional networks' `norm` option, and batch normalisation that is right under nested derivatives."""

import torch
from torch import Tensor, nn

from lightning_ntk.errors import ConfigError
from lightning_ntk.ntk.norms import batch_statistics

GROUPS = 8


def check_norm(norm: str) -> None:
    """Raise `ConfigError` unless `norm` is "batch", "group" or "none"."""
    if norm not in ("batch", "group", "none"):
        raise ConfigError(f"network.norm must be 'batch', 'group' or 'none', but got {norm!r}.")


def normalisation_layers(norm: str, channels: int) -> list[nn.Module]:
    """The layer that follows a convolution with this many channels (a multiple of `GROUPS` for "group"), if any."""
    if norm == "batch":
        return [BatchStatistics(channels)]
    return [nn.GroupNorm(GROUPS, channels)] if norm == "group" else []


class BatchStatistics(nn.Module):
    """Batch normalisation (Ioffe and Szegedy 2015) without running averages: `[n, channels, h, w]` to the same shape.

    It computes what `nn.BatchNorm2d(channels, track_running_stats=False)` computes, and by the same function where
    reverse mode alone differentiates. Ours exists because PyTorch's own forward-mode derivative treats the batch mean
    and variance as constants when reverse mode differentiates it again: d/dtheta of J v comes out wrong without a
    warning (seen with torch 2.15; `tests/ntk/test_norms.py`).
    """

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return batch_statistics(x, self.weight, self.bias, self.eps)
