"""Batch statistics: the values of `nn.BatchNorm2d`. (Derivatives of derivatives: ntk/test_norms.py.)"""

import torch
from torch import nn

from lightning_ntk.networks.normalisation import BatchStatistics


def test_it_computes_what_torchs_batch_norm_computes():
    torch.manual_seed(0)
    ours, torchs = BatchStatistics(3), nn.BatchNorm2d(3, track_running_stats=False)
    state = {"weight": torch.randn(3), "bias": torch.randn(3)}
    ours.load_state_dict(state)
    torchs.load_state_dict(state)
    x = 5 + 2 * torch.randn(4, 3, 6, 6)
    assert torch.allclose(ours(x), torchs(x), atol=1e-5)


def test_one_value_a_channel_is_its_bias():
    assert torch.equal(BatchStatistics(3)(torch.randn(1, 3, 1, 1)), torch.zeros(1, 3, 1, 1))
