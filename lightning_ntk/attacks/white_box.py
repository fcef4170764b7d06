"""White box attacks: FGSM (Goodfellow et al. 2015) and projected gradient descent (Madry et al. 2018).

Each step costs one forward and one backward pass of the predictor, for the gradient in its input alone; the best
iterate is kept from the outputs of these very passes. One forward pass at the end evaluates the last iterate.

The loss of all images is summed: an image has its own gradient where a predictor does not couple its inputs. Where it
does (batch statistics), the images of a task are attacked together.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lightning_ntk.attacks.base import (
    Attacked,
    Predictor,
    check_eps,
    check_images,
    evaluate,
    is_wrong,
    per_image,
)
from lightning_ntk.attacks.losses import AttackLoss, attack_loss
from lightning_ntk.errors import ConfigError, check_at_least

# Which iterate an attack returns: the worst for the model, image by image or (for a predictor that couples its images)
# task by task; or the last, whatever came before it.
Keep = Literal["image", "task", "last"]
KEEP = ("image", "task", "last")

SMALLEST_NORM = 1e-12
WITHOUT_GRADIENT = (
    "Mend the predictor, or use an attack without gradients: simba_pixel or simba_dct in callbacks.adversarial.attacks."
)


@dataclass(frozen=True)
class Iterate:
    """Images on the way, their logits, and their losses; see `Attacked` for the shapes."""

    images: Tensor
    outputs: Tensor
    losses: Tensor


def fgsm(predict: Predictor, x: Tensor, y: Tensor, eps: float | Tensor, *, loss: str = "margin") -> Attacked:
    """x + eps sign(gradient of the loss), clipped to [0, 1].

    Args:
        predict: differentiable in its input.
        x, y: images `[*batch, channels, height, width]` in [0, 1] and labels `[*batch]`.
        eps: largest change of a pixel, in [0, 1]; a tensor `[*batch]` gives one to each image.
        loss: see `attacks.losses`.

    Raises:
        ConfigError: eps out of range, an unknown loss, or a predictor without a gradient in its input.
        DataError: x holds no images in [0, 1].
    """
    check_images(x, y)
    check_eps(eps)
    gradient, _ = input_gradient(predict, x, y, attack_loss(loss))
    images = (x + per_image(eps, x) * gradient.sign()).clamp(0, 1)
    return Attacked(images, evaluate(predict, images), torch.full_like(y, 2))


def pgd_linf(
    predict: Predictor,
    x: Tensor,
    y: Tensor,
    eps: float | Tensor,
    *,
    steps: int = 20,
    step_size: float | Tensor | None = None,
    generator: torch.Generator | None = None,
    loss: str = "margin",
    keep: Keep = "image",
) -> Attacked:
    """Steps of step_size sign(gradient), each followed by a projection to the eps-cube around x and to [0, 1].

    Args:
        predict, x, y, eps, loss: see `fgsm`.
        step_size: None means `linf_step(eps, steps)`.
        generator: draws the start, uniform in the cube; None starts at x.
        keep: "image" or "task" returns the iterate, start included, with most mistakes and then the largest loss;
            "task" decides it for the images of a task together, as a predictor that couples them needs. "last" returns
            the last.

    Raises:
        ConfigError, DataError: see `fgsm`.
    """
    check_images(x, y)
    check_eps(eps)
    check_at_least(1, steps, "steps")
    step_size = linf_step(eps, steps) if step_size is None else step_size
    check_eps(step_size, "step_size")
    size, length = per_image(eps, x), per_image(step_size, x)

    def step(images: Tensor, gradient: Tensor) -> Tensor:
        change = images + length * gradient.sign() - x
        return (x + change.clamp(-size, size)).clamp(0, 1)

    start = x if generator is None else (x + size * random_cube(x, generator)).clamp(0, 1)
    return _ascend(predict, start, y, step, steps, attack_loss(loss), keep)


def linf_step(eps: float | Tensor, steps: int) -> float | Tensor:
    """2/255 (Zhou et al. 2021), and 2.5 eps / steps where steps of 2/255 cannot cross the cube.

    A random start may lie 2 eps from where an image has to go, which 20 steps of 2/255 reach up to eps = 20/255.
    """
    crossing = 2.5 * eps / steps
    if isinstance(crossing, Tensor):
        return crossing.clamp(2 / 255, 1)
    return min(max(2 / 255, crossing), 1.0)


def pgd_l2(
    predict: Predictor,
    x: Tensor,
    y: Tensor,
    eps: float | Tensor,
    *,
    steps: int = 20,
    step_size: float | Tensor | None = None,
    generator: torch.Generator | None = None,
    loss: str = "margin",
    keep: Keep = "image",
) -> Attacked:
    """Steps along the normalised gradient, each followed by a projection to the eps-ball around x and to [0, 1].

    Args:
        predict, x, y, loss, keep: see `pgd_linf`.
        eps: largest l2 norm of an image's perturbation, the image's values being in [0, 1]; it may exceed 1.
        step_size: None means 2.5 eps / steps (Madry et al. 2018).
        generator: draws the start, uniform in the ball; None starts at x.

    Raises:
        ConfigError, DataError: see `fgsm`.
    """
    check_images(x, y)
    check_eps(eps, most=float("inf"))
    check_at_least(1, steps, "steps")
    size = per_image(eps, x)
    length = 2.5 * size / steps if step_size is None else per_image(step_size, x)
    check_eps(length, "step_size", most=float("inf"))

    def step(images: Tensor, gradient: Tensor) -> Tensor:
        change = images + length * gradient / l2_norms(gradient).clamp(min=SMALLEST_NORM) - x
        # In units of the radius, a change beyond 1 is drawn back to the sphere.
        return (x + change * (size / l2_norms(change).clamp(min=SMALLEST_NORM)).clamp(max=1)).clamp(0, 1)

    start = x if generator is None else (x + size * random_ball(x, generator)).clamp(0, 1)
    return _ascend(predict, start, y, step, steps, attack_loss(loss), keep)


def input_gradient(
    predict: Predictor, x: Tensor, y: Tensor, loss: AttackLoss, remedy: str = WITHOUT_GRADIENT
) -> tuple[Tensor, Iterate]:
    """The gradient of the summed loss in the images, and the images with outputs and losses: one pass each way.

    No parameter receives a gradient. A number that is not finite counts as 0 in the gradient. `remedy`: what to do
    where there is none, for the error.

    Raises:
        ConfigError: the predictor's outputs do not depend differentiably on its input.
    """
    with torch.enable_grad():
        leaf = x.detach().clone().requires_grad_()
        outputs = predict(leaf)
        losses = loss(outputs, y)
        gradient = None
        if losses.requires_grad:
            (gradient,) = torch.autograd.grad(losses.sum(), leaf, allow_unused=True)
    if gradient is None:
        raise ConfigError(
            "This attack needs the gradient of the predictor in its input, but the predictor's outputs do not depend "
            f"differentiably on it (is there a detach, a rounding or an inference mode inside?). {remedy}"
        )
    gradient = gradient.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
    return gradient, Iterate(x.detach(), outputs.detach(), losses.detach())


def random_cube(x: Tensor, generator: torch.Generator) -> Tensor:
    """Uniform in [-1, 1] in each pixel of x. Drawn on the generator's device, so that a device changes nothing."""
    return (2 * torch.rand(x.shape, generator=generator, device=generator.device) - 1).to(x)


def random_ball(x: Tensor, generator: torch.Generator) -> Tensor:
    """Uniform in the unit l2 ball of each image of x: a uniform direction times the d-th root of a uniform number."""
    direction = torch.randn(x.shape, generator=generator, device=generator.device)
    radius = torch.rand(x.shape[:-3], generator=generator, device=generator.device)[..., None, None, None]
    return (direction / l2_norms(direction) * radius ** (1 / x.shape[-3:].numel())).to(x)


def l2_norms(images: Tensor) -> Tensor:
    """The l2 norm of each image of `[*batch, channels, height, width]`, as `[*batch, 1, 1, 1]`."""
    return images.flatten(-3).norm(dim=-1)[..., None, None, None]


def _ascend(
    predict: Predictor,
    start: Tensor,
    y: Tensor,
    step: Callable[[Tensor, Tensor], Tensor],
    steps: int,
    loss: AttackLoss,
    keep: Keep,
) -> Attacked:
    """`steps` steps from the start, and the iterate that `keep` asks for."""
    if keep not in KEEP:
        raise ConfigError(f"keep must be one of {', '.join(KEEP)}, but got {keep!r}.")
    images, kept = start, None
    for _ in range(steps):
        gradient, iterate = input_gradient(predict, images, y, loss)
        kept = _worse(kept, iterate, y, keep)
        images = step(images, gradient)
    outputs = evaluate(predict, images)
    kept = _worse(kept, Iterate(images, outputs, loss(outputs, y)), y, keep)
    return Attacked(kept.images, kept.outputs, torch.full_like(y, steps + 1))


def _worse(kept: Iterate | None, new: Iterate, y: Tensor, keep: Keep) -> Iterate:
    """Of two iterates the one with more mistakes, then with the larger loss."""
    if kept is None or keep == "last":
        return new
    (wrong, losses), (new_wrong, new_losses) = (_badness(iterate, y, keep) for iterate in (kept, new))
    is_worse = (new_wrong > wrong) | ((new_wrong == wrong) & (new_losses > losses))
    return Iterate(
        torch.where(is_worse[..., None, None, None], new.images, kept.images),
        torch.where(is_worse[..., None], new.outputs, kept.outputs),
        torch.where(is_worse, new.losses, kept.losses),
    )


def _badness(iterate: Iterate, y: Tensor, keep: Keep) -> tuple[Tensor, Tensor]:
    """Mistakes and losses, of each image or (as the same number for each of its images) of each task."""
    wrong = is_wrong(iterate.outputs, y).to(iterate.losses.dtype)
    if keep == "image":
        return wrong, iterate.losses
    return wrong.mean(-1, keepdim=True).expand_as(wrong), iterate.losses.mean(-1, keepdim=True).expand_as(wrong)
