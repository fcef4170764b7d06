"""Probe callbacks for tests, and the conf folder that chooses them by name."""

import random
from pathlib import Path

import numpy as np
import torch

from callbacks.base import ProbeCallback


class Disturbing(ProbeCallback):
    """Does all that a probe might do to training: draws, backward passes, modes, buffers."""

    name = "disturbing"

    def probe(self, method, episode, stage):
        assert torch.is_grad_enabled()
        assert not method.training
        method.train()
        loss = method.network(episode.support_x).square().mean()
        loss.backward()
        for buffer in method.buffers():
            buffer.add_(1)
        draws = [float(torch.rand(())), float(np.random.rand()), random.random()]
        return {
            "disturbing/loss": loss.item(),
            "disturbing/draw": sum(draws),
            "disturbing/shots": float(episode.support_x.shape[0]),
            "disturbing/draws": draws,
        }


class Failing(ProbeCallback):
    """Fails on the second episode, as a decomposition does where numbers are not finite."""

    name = "failing"

    def probe(self, method, episode, stage):
        if int(episode.index) == 1:
            torch.linalg.cholesky(torch.full((2, 2), torch.nan))
        return {"failing/one": 1.0}


class Wrong(ProbeCallback):
    """Has a mistake that has nothing to do with the numbers."""

    name = "wrong"

    def probe(self, method, episode, stage):
        raise KeyError("a mistake")


def write_conf(folder: Path) -> list[str]:
    """A conf folder with these callbacks; returns the words of the command line that choose it."""
    (folder / "callbacks").mkdir(parents=True)
    for kind in (Disturbing, Failing, Wrong):
        text = f"# For tests.\n{kind.name}:\n  _target_: probe_examples.{kind.__name__}\n  fit_every: 1\n"
        text += "  fit_episodes: 3\n  test_episodes: 4\n"
        (folder / "callbacks" / f"{kind.name}.yaml").write_text(text)
    return ["--config-dir", str(folder)]
