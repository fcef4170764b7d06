"""Any evasion attack of the Adversarial Robustness Toolbox (ART) on a predictor, such as Square or AutoAttack.

ART hands images around in batches of its own choosing, so a predictor must not couple its images. Attacks are
untargeted: ART reads the labels that it is given as the classes to avoid, or in a targeted attack as those to reach.
"""

import inspect
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from hydra.utils import get_class
from omegaconf import OmegaConf
from torch import Tensor, nn

from lightning_ntk.attacks.base import Attacked, Predictor, check_images, evaluate
from lightning_ntk.errors import ConfigError, MissingDependencyError
from lightning_ntk.running import random_state
from lightning_ntk.settings.building import instantiate

# Targeted in each of its classes: the labels given are those to reach, and there is no switch.
ALWAYS_TARGETED = ("SaliencyMapMethod", "LowProFool")

INSTALL_LINE = "pip install adversarial-robustness-toolbox multiprocess"


def art_attack(
    predict: Predictor,
    x: Tensor,
    y: Tensor,
    settings: Mapping[str, Any],
    *,
    outputs: int,
    generator: torch.Generator,
    key: str = "art",
) -> Attacked:
    """Run one of ART's attacks on the images of one task.

    Args:
        predict: images `[n, channels, height, width]` to logits, for any n. Differentiable where the attack needs it.
        x, y: images `[m, channels, height, width]` in [0, 1] and labels `[m]`.
        settings: `{"_target_": "art.attacks.evasion.SquareAttack", "eps": 0.03, ...}`.
        outputs: C.
        generator: seeds the global generators that ART draws from, which are restored afterwards.
        key: where the settings stand, for error messages.

    Returns:
        `queries` is the mean over the images, rounded up: ART does not tell them apart.

    Raises:
        MissingDependencyError: ART is not installed.
        ConfigError: settings that ART refuses, a class that is no evasion attack, or a targeted attack.
    """
    check_images(x, y)
    network = _InputOnly(predict)
    attack = build(network, settings, x.shape[1:], outputs, x.device, key)
    one_hot = np.eye(outputs, dtype=np.float32)[y.cpu().numpy()]
    with random_state.kept(x.device):
        random_state.seed_all(int(torch.randint(2**31, (), generator=generator, device=generator.device)), x.device)
        try:
            found = attack.generate(x=x.float().cpu().numpy(), y=one_hot)
        except ModuleNotFoundError as error:  # Some of ART's attacks import what ART does not require.
            raise MissingDependencyError(
                f"{key} needs {error.name}. Install it with: pip install {error.name}"
            ) from error
        except Exception as error:  # Of any type, where an attack is for other models or images than these.
            raise ConfigError(f"{key}: {settings['_target_']} failed, {type(error).__name__}: {error}") from error
    if not isinstance(found, np.ndarray) or found.shape != x.shape:
        raise ConfigError(f"{key}: {settings['_target_']} gives no image for each image, as an evasion attack does.")
    images = torch.from_numpy(found).to(x).clamp(0, 1)
    asked = -(-network.asked // len(x))
    return Attacked(images, evaluate(predict, images), torch.full_like(y, asked))


def build(
    network: nn.Module,
    settings: Mapping[str, Any],
    shape: Sequence[int],
    outputs: int,
    device: torch.device,
    key: str = "art",
) -> Any:
    """The attack that the settings describe, on a network of images `[n, *shape]`; see `art_attack` for errors."""
    kind, classifier = _import_art()
    estimator = classifier(
        model=network,
        loss=nn.CrossEntropyLoss(),
        input_shape=tuple(shape),
        nb_classes=outputs,
        clip_values=(0.0, 1.0),
        device_type="cpu" if device.type == "cpu" else "gpu",
    )
    config = OmegaConf.create(dict(settings))
    try:
        target = get_class(config.get("_target_") or "")
    except Exception as error:  # Hydra raises ImportError, ValueError or its own, as the name may be.
        raise ConfigError(
            f"{key}._target_ must name a class such as art.attacks.evasion.SquareAttack, but is "
            f"{config.get('_target_')!r}."
        ) from error
    if not (inspect.isclass(target) and issubclass(target, kind)):
        raise ConfigError(f"{key}._target_={config['_target_']} is no evasion attack of ART.")
    takes = inspect.signature(target.__init__).parameters
    name = "estimator" if "estimator" in takes else "classifier"
    if "verbose" in takes:  # Its progress bars do not mix with the trainer's.
        config = OmegaConf.merge({"verbose": False}, config)
    try:
        attack = instantiate(config, key, kind, **{name: estimator})
    except ConfigError:
        raise
    except Exception as error:  # Of any type: a setting that lacks or is refused, another kind of model.
        raise ConfigError(f"{key}: {type(error).__name__}: {error}") from error
    if target.__name__ in ALWAYS_TARGETED:
        raise ConfigError(
            f"{key}._target_={config['_target_']} only aims at a class, but attacks here avoid the true one."
        )
    parts = getattr(attack, "attacks", [])
    # AutoAttack's targeted parts choose their classes themselves.
    if getattr(attack, "targeted", False) and not parts:
        raise ConfigError(
            f"{key}: {target.__name__} is targeted (some of ART's are unless told otherwise), and would drive each "
            f"image to its true class. Set {key}.targeted=false."
        )
    for part in parts:
        part.verbose = False
    return attack


def _import_art() -> tuple[type, Callable]:
    """ART's base of evasion attacks, and its classifier around a torch module."""
    try:
        from art.attacks import EvasionAttack
        from art.estimators.classification import PyTorchClassifier
    except ImportError as error:
        raise MissingDependencyError(
            f"callbacks.adversarial.art needs the Adversarial Robustness Toolbox, which cannot be imported ({error}). "
            f"Install it with: {INSTALL_LINE}"
        ) from error
    logging.getLogger("art").setLevel(logging.WARNING)
    return EvasionAttack, PyTorchClassifier


class _InputOnly(nn.Module):
    """A predictor as a module that passes gradients to its input and to nothing else, and counts images."""

    def __init__(self, predict: Predictor) -> None:
        super().__init__()
        # Not as an attribute of its own, which would make a module's parameters this one's.
        self.predict = lambda x: predict(x)
        self.asked = 0

    def forward(self, x: Tensor) -> Tensor:
        self.asked += len(x)
        if not (torch.is_grad_enabled() and x.requires_grad):
            return evaluate(self.predict, x)
        return _CutFromParameters.apply(x, self.predict)


class _CutFromParameters(torch.autograd.Function):
    """ART calls `backward`, which would reach the parameters that a predictor was adapted from."""

    @staticmethod
    def forward(ctx, x, predict):
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            outputs = predict(leaf)
        ctx.graph = leaf, outputs
        return outputs.detach()

    @staticmethod
    def backward(ctx, upstream):
        leaf, outputs = ctx.graph
        return torch.autograd.grad(outputs, leaf, upstream, retain_graph=True)[0], None
