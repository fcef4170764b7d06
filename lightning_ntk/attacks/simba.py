"""SimBA, the simple black box attack (Guo et al. 2019), on many images at once.

It sees nothing but outputs. In a random order of orthonormal directions it moves an image by -step along a direction,
then by +step where that did not help, and keeps what raises the loss. With `loss="log_odds"` that is what lowers the
probability of the true class, as in the paper; cross-entropy says the same, but in float32 it no longer moves where the
true class is certain, and a model with large logits would hold for that reason alone.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from lightning_ntk.attacks.base import Attacked, Predictor, check_eps, check_images, evaluate, is_wrong
from lightning_ntk.attacks.losses import attack_loss
from lightning_ntk.errors import ConfigError, check_at_least

BASES = ("pixel", "dct")

# Numbers of directions [N] to unit vectors [N, channels, height, width].
Directions = Callable[[Tensor], Tensor]


def simba(
    predict: Predictor,
    x: Tensor,
    y: Tensor,
    *,
    basis: str = "pixel",
    step: float = 0.2,
    directions: int | None = None,
    frequencies: float = 0.25,
    generator: torch.Generator | None = None,
    order: Tensor | None = None,
    loss: str = "log_odds",
    coupled: bool = False,
) -> Attacked:
    """Move each image along its own sequence of directions until it is misclassified; then leave it alone.

    One direction costs an image one or two queries, whose number is counted without the first look at the clean image
    (as in the authors' code). A pixel changes at most by `step` ("pixel"), an image at most by `step` sqrt(directions)
    in l2: "pixel" always, "dct" where no pixel was cut to [0, 1], which turns moves out of their directions.

    Args:
        predict: images to logits; no gradient is taken.
        x, y: images `[*batch, channels, height, width]` in [0, 1] and labels `[*batch]`. With one batch axis and
            `coupled=False`, only the images still in play are handed to the predictor.
        basis: "pixel" (one channel of one pixel), or "dct" (low frequencies of the discrete cosine transform).
        step: length of a move, in (0, 1].
        directions: how many an image tries at most; None tries all of the basis.
        frequencies: for "dct", the share of the frequencies along height and along width, lowest first, in (0, 1].
        generator: draws each image's order; needed unless `order` is given.
        order: int64 `[*batch, directions]`, numbers of directions: for "pixel" the position in the flattened image, for
            "dct" that in the flattened `[channels, kept, kept]` frequencies.
        loss: see `attacks.losses`.
        coupled: the predictor's output for an image depends on its batch. Images then move together: each is judged
            beside the others as they are tried, and the batch is asked again as it came out (counted as a query).

    Raises:
        ConfigError: a setting out of range.
        DataError: x holds no images in [0, 1].
    """
    check_images(x, y)
    check_eps(step, "step")
    if step == 0:
        raise ConfigError("step must be above 0, but got 0.")
    score = attack_loss(loss)
    count, vectors = _basis(basis, x, frequencies)
    batch, image = x.shape[:-3], x.shape[-3:]
    order = _orders(batch, count, directions, generator) if order is None else order
    if order.shape[:-1] != batch or not (order.min() >= 0 and order.max() < count):
        raise ConfigError(
            f"order must hold numbers of directions, from 0 to {count - 1}, for each image, {[*batch]} + [directions], "
            f"but is {list(order.shape)} from {order.min()} to {order.max()}."
        )
    order = order.to(x.device).flatten(0, -2)

    # An image in play is asked about alone, unless the predictor needs its batch, or its task's place in one.
    alone = not coupled and len(batch) == 1
    images, labels = x.detach().clone().reshape(-1, *image), y.flatten()
    outputs = evaluate(predict, x).flatten(0, -2).clone()
    losses, queries = score(outputs, labels), torch.zeros_like(labels)

    def ask(tried: Tensor, rows: Tensor) -> Tensor:
        """Outputs for what is tried in the places of some images."""
        if alone:
            return evaluate(predict, tried)
        return evaluate(predict, images.index_copy(0, rows, tried).view(x.shape)).flatten(0, -2)[rows]

    for numbers in order.T:
        playing = rows = (~is_wrong(outputs, labels)).nonzero()[:, 0]
        if not len(playing):
            break
        move = vectors(numbers[rows])
        for signed_step in (-step, step):
            tried = images[rows].add_(move, alpha=signed_step).clamp_(0, 1)
            seen = ask(tried, rows)
            queries[rows] += 1
            found = score(seen, labels[rows])
            better = found > losses[rows]
            gained = rows[better]
            images[gained], outputs[gained], losses[gained] = tried[better], seen[better], found[better]
            if coupled and len(gained):
                outputs = evaluate(predict, images.view(x.shape)).flatten(0, -2)
                losses = score(outputs, labels)
                queries[playing] += 1
            rows, move = rows[~better], move[~better]
            if not len(rows):
                break
    return Attacked(images.view(x.shape), outputs.view(*batch, -1), queries.view(batch))


def _orders(batch: torch.Size, count: int, directions: int | None, generator: torch.Generator | None) -> Tensor:
    """Random orders without repetition, `[*batch, directions]`."""
    if generator is None:
        raise ConfigError("simba needs a generator, which draws the order of the directions, or the order itself.")
    if directions is not None:
        check_at_least(1, directions, "directions")
    drawn = torch.rand(*batch, count, generator=generator, device=generator.device)
    return drawn.argsort(-1)[..., :directions]


def _basis(name: str, x: Tensor, frequencies: float) -> tuple[int, Directions]:
    """How many directions there are, and the function that makes them."""
    if name not in BASES:
        raise ConfigError(f"basis must be one of {', '.join(BASES)}, but got {name!r}.")
    channels, height, width = x.shape[-3:]
    if name == "pixel":
        return channels * height * width, lambda numbers: _pixels(numbers, x)
    if not 0 < frequencies <= 1:
        raise ConfigError(f"frequencies must be a share in (0, 1], but got {frequencies}.")
    rows, columns = (cosines(size, math.ceil(frequencies * size), x) for size in (height, width))

    def waves(numbers: Tensor) -> Tensor:
        channel, row, column = torch.unravel_index(numbers, (channels, len(rows), len(columns)))
        wave = rows[row][:, None, :, None] * columns[column][:, None, None, :]
        return wave * (torch.arange(channels, device=x.device) == channel[:, None])[:, :, None, None]

    return channels * len(rows) * len(columns), waves


def _pixels(numbers: Tensor, x: Tensor) -> Tensor:
    image = x.shape[-3:]
    return x.new_zeros(len(numbers), image.numel()).scatter_(1, numbers[:, None], 1.0).view(-1, *image)


def cosines(size: int, kept: int, like: Tensor) -> Tensor:
    """The `kept` lowest rows of the orthonormal discrete cosine transform (DCT-II) of length `size`: `[kept, size]`."""
    k, i = torch.arange(kept, dtype=torch.float64)[:, None], torch.arange(size, dtype=torch.float64)
    waves = math.sqrt(2 / size) * torch.cos(math.pi * (2 * i + 1) * k / (2 * size))
    waves[0] /= math.sqrt(2)
    return waves.to(like)
