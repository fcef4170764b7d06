"""What an attack raises: one number an image, larger the further the model is from the true class.

Models differ in the scale of their logits. One trained by cross-entropy grows them with its confidence; one trained by
regression on shifted one-hot targets keeps them near -1/C and 1 - 1/C, whatever its confidence. `margin` points the
same way at any scale, and `dlr` does not change at all. `cross_entropy` changes its direction with the scale: on large
logits its gradient vanishes in float32 for images that are classified with confidence, on small ones it pushes all
other classes instead of the nearest. docs/ROBUSTNESS.md compares them. `log_odds` rises with it, and is never flat: it
tells any two probabilities of the true class apart, which is all that SimBA asks.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_ntk.errors import ConfigError, nearest_name

# Logits [*batch, C] and labels [*batch] to a number an image, [*batch].
AttackLoss = Callable[[Tensor, Tensor], Tensor]


def cross_entropy(outputs: Tensor, y: Tensor) -> Tensor:
    """-log softmax(z)_y, `[*batch]` for logits `[*batch, C]`. In float32 it is 0 from a margin of some 17 on."""
    return -outputs.log_softmax(-1).gather(-1, y[..., None]).squeeze(-1)


def log_odds(outputs: Tensor, y: Tensor) -> Tensor:
    """log((1 - p) / p) of the true class's probability p = softmax(z)_y, `[*batch]`: log sum_{j != y} e^{z_j} - z_y.

    It rises as p falls, wherever p is: where cross-entropy has rounded to 0, it still goes on like the margin.
    """
    true = F.one_hot(y, outputs.shape[-1]).bool()
    return outputs.masked_fill(true, -torch.inf).logsumexp(-1) - outputs.gather(-1, y[..., None]).squeeze(-1)


def margin(outputs: Tensor, y: Tensor) -> Tensor:
    """max_{j != y} z_j - z_y, `[*batch]` (after Carlini and Wagner 2017): positive where another
    class is predicted."""
    true = F.one_hot(y, outputs.shape[-1]).bool()
    return outputs.masked_fill(true, -torch.inf).amax(-1) - outputs.gather(-1, y[..., None]).squeeze(-1)


def dlr(outputs: Tensor, y: Tensor) -> Tensor:
    """The margin over z_(1) - z_(3), the first and third largest logit, `[*batch]` (Croce and Hein 2020).

    It is flat, at 1, where y comes third: an attack that has got there needs no further.

    Raises:
        ConfigError: fewer than three classes.
    """
    if outputs.shape[-1] < 3:
        raise ConfigError(f"loss=dlr needs three classes or more, but there are {outputs.shape[-1]}. Use loss=margin.")
    largest = outputs.topk(3, dim=-1).values
    return margin(outputs, y) / (largest[..., 0] - largest[..., 2] + 1e-12)


LOSSES: dict[str, AttackLoss] = {"cross_entropy": cross_entropy, "log_odds": log_odds, "margin": margin, "dlr": dlr}


def attack_loss(name: str, key: str = "loss") -> AttackLoss:
    """The loss of this name.

    Raises:
        ConfigError: there is none; the message names the key.
    """
    if name not in LOSSES:
        raise ConfigError(f"{key} must be one of {', '.join(LOSSES)}, but got {name!r}.{nearest_name(name, LOSSES)}")
    return LOSSES[name]
