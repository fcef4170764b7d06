"""Small models for the tests of attacks."""

import torch
from torch import nn


def images(*batch, channels=1, size=8, seed=0, dtype=torch.float32):
    return torch.rand(*batch, channels, size, size, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def smooth_network(channels=1, size=8, classes=4, seed=0, dtype=torch.float32):
    """A convolution and a linear layer with a smooth nonlinearity, so that finite differences are exact enough."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers = [nn.Conv2d(channels, 6, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(6 * size * size, classes)]
        return nn.Sequential(*layers).to(dtype)


def linear_model(weights, bias=0.0):
    """Logits (s, -s) / 2 with s = <weights, x> + bias: two classes, the first where s is positive."""

    def predict(x):
        score = (x * weights).sum((-3, -2, -1)) + bias
        return torch.stack([score, -score], dim=-1) / 2

    return predict
