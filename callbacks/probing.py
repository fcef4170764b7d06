"""The surroundings of a probe: fixed episodes on the device, and the method as it was."""

import contextlib
from collections.abc import Iterator

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor

from lightning_ntk.episode import Episode
from lightning_ntk.errors import ConfigError
from lightning_ntk.methods.base import MetaLearner
from lightning_ntk.running import random_state


@contextlib.contextmanager
def undisturbed(method: MetaLearner) -> Iterator[None]:
    """Inside, modules are in eval mode and gradients enabled; afterwards the method and all random generators are as
    they were: modes, buffers and gradients of parameters."""
    modes = {module: module.training for module in method.modules()}
    buffers = [(buffer, buffer.clone()) for buffer in method.buffers()]
    gradients = [(parameter, parameter.grad) for parameter in method.parameters()]
    versions = {name: parameter._version for name, parameter in method.named_parameters()}
    for parameter, _ in gradients:
        parameter.grad = None
    method.eval()
    try:
        with random_state.kept(method.device), torch.enable_grad():
            yield
        for name, parameter in method.named_parameters():
            if parameter._version != versions[name]:
                raise ConfigError(
                    f"A probe has written to the parameter {name}, which training goes on with. Measure a copy of the "
                    "method: copy.deepcopy(method)."
                )
    finally:
        for module, mode in modes.items():
            module.training = mode
        for parameter, gradient in gradients:
            parameter.grad = gradient
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)


def episode_seed(eval_seed: int, split: str, index: int) -> int:
    """The seed of what is drawn at random while an episode is probed, below 2**32: the same for all callbacks."""
    return int(np.random.SeedSequence([eval_seed, ("val", "test").index(split), index]).generate_state(1)[0])


def on_device(trainer: pl.Trainer, episode: Episode) -> Episode:
    """One drawn task, converted and brought to the device as Lightning does with a batch of them."""
    batch = trainer.precision_plugin.convert_input(Episode.stack([episode]))
    return next(iter(trainer.strategy.batch_to_device(batch)))


def is_finite(method: MetaLearner) -> bool:
    """Whether all parameters are finite numbers."""
    return all(bool(torch.isfinite(parameter).all()) for parameter in method.parameters())


def check_outputs(outputs: Tensor) -> None:
    """Raise `FloatingPointError`, which a probe reports as a failed episode, unless all outputs are finite: the largest
    of others means nothing."""
    if not bool(torch.isfinite(outputs).all()):
        raise FloatingPointError("the adapted model's outputs are no finite numbers")
