"""The attack on a support set that sees through the adaptation: it aims at the queries."""

from collections.abc import Callable

import torch
from torch import Tensor

from lightning_ntk.attacks.base import Attacked, Predictor, check_eps, check_images, is_wrong
from lightning_ntk.attacks.losses import attack_loss, margin
from lightning_ntk.attacks.white_box import input_gradient, linf_step
from lightning_ntk.errors import check_at_least

# Adapts to support images [n, channels, height, width] with labels [n]; passes gradients on to the images.
Adapt = Callable[[Tensor, Tensor], Predictor]

REMEDY = "A method whose adaptation passes gradients on (`adapts_differentiably`) has one."


def pgd_through_adaptation(
    adapt: Adapt,
    support_x: Tensor,
    support_y: Tensor,
    query_x: Tensor,
    query_y: Tensor,
    eps: float,
    *,
    steps: int = 20,
    step_size: float | None = None,
    loss: str = "mistakes",
    start: Tensor | None = None,
) -> Attacked:
    """PGD (l-infinity) on the support images of one task, by the gradient of the query loss through the adaptation.

        x <- project(x + step_size sign(d/dx sum_q loss(adapt(x, support_y)(query_q), y_q)))

    The attacker knows the method, the support and the very queries that will be asked: with unseen queries of the same
    classes (Oldewage et al. 2022, "Adversarial attacks are a surprisingly strong baseline for poisoning few-shot
    meta-learners") it could do at most as much. Cost: steps + 1 adaptations, each with its gradient.

    Args:
        adapt: of a method with `adapts_differentiably`.
        support_x, query_x: images in [0, 1]; the queries stay as they are.
        eps, step_size: see `attacks.white_box.pgd_linf`.
        loss: "mistakes" (see `mistakes`), or one of `attacks.losses`.
        start: within eps of the support, as another attack has left it; None starts at the support. The result is
            never weaker than the start.

    Returns:
        The support images whose adapted model makes the most mistakes (then: has the largest loss) on the queries, with
        its outputs `[m, C]` for the queries.

    Raises:
        ConfigError: a setting out of range, or an adaptation that passes no gradient on.
        DataError: the support holds no images in [0, 1].
    """
    check_images(support_x, support_y)
    check_eps(eps)
    check_at_least(1, steps, "steps")
    step_size = linf_step(eps, steps) if step_size is None else step_size
    check_eps(step_size, "step_size")
    score = mistakes if loss == "mistakes" else attack_loss(loss)

    def predict(images: Tensor) -> Tensor:
        return adapt(images, support_y)(query_x)

    images, most, kept = support_x if start is None else start, None, None
    for _ in range(steps + 1):
        gradient, found = input_gradient(predict, images, query_y, score, REMEDY)
        harm = (is_wrong(found.outputs, query_y).sum().item(), found.losses.sum().item())
        if most is None or harm > most:
            most, kept = harm, found
        images = (support_x + (images + step_size * gradient.sign() - support_x).clamp(-eps, eps)).clamp(0, 1)
    return Attacked(kept.images, kept.outputs, torch.full_like(query_y, steps + 1))


def mistakes(outputs: Tensor, y: Tensor) -> Tensor:
    """tanh(margin / s) `[m]`, s the mean size of the margins: a smooth count of the queries that are answered wrong.

    One change of the support moves all queries. The margin itself would gain as much by driving a query further that is
    wrong already as by turning one that is right; it has no end, where the count has. It depends on no logits' scale.
    """
    margins = margin(outputs, y)
    return torch.tanh(margins / margins.detach().abs().mean().clamp(min=torch.finfo(margins.dtype).tiny))
