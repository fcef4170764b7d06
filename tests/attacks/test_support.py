"""The attack through the adaptation against a case solved by hand, and beside the one that does not see through it."""

import pytest
import torch
from attacked_models import images

from lightning_ntk.attacks.base import evaluate
from lightning_ntk.attacks.losses import margin
from lightning_ntk.attacks.support import mistakes, pgd_through_adaptation
from lightning_ntk.attacks.white_box import pgd_linf
from lightning_ntk.episode import TaskSpec
from lightning_ntk.errors import ConfigError, DataError
from lightning_ntk.methods.maml import MAML
from lightning_ntk.methods.meta_rkhs_ii import MetaRKHSII
from lightning_ntk.methods.protonet import class_means
from lightning_ntk.methods.reptile import Reptile
from lightning_ntk.networks.conv4 import Conv4


def nearest_mean(x, y):
    """Logits <query, mean of the class>: linear in the support, so that the best perturbation is known."""
    means = class_means(x.flatten(1), y)
    return lambda queries: queries.flatten(1) @ means.T


def test_on_a_linear_adaptation_it_is_the_best_perturbation():
    # One query of class 0: the margin is <q, mean_1 - mean_0>, which grows with q in class 1 and falls with it in 0.
    support = 0.5 + 0.2 * (images(4) - 0.5)
    y, query = torch.tensor([0, 1, 0, 1]), images(1, seed=1)
    task, settings = (support, y, query, torch.tensor([0])), {"steps": 8, "step_size": 0.02, "loss": "margin"}
    found = pgd_through_adaptation(nearest_mean, *task, 0.1, **settings)
    sign = torch.tensor([-1.0, 1.0, -1.0, 1.0])[:, None, None, None]
    assert torch.allclose(found.images, support + 0.1 * sign, atol=1e-6)
    assert torch.allclose(found.outputs, nearest_mean(found.images, y)(query))
    assert found.queries.tolist() == [9]


def task_of():
    """Four classes with a bright quarter each, in noise: 2 shots and 10 queries of each."""
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(4).repeat(12)
    x = 0.5 * torch.rand(48, 1, 16, 16, generator=generator)
    for label in range(4):
        top, left = 8 * (label // 2), 8 * (label % 2)
        x[y == label, :, top : top + 8, left : left + 8] += 0.4
    return x[:8], y[:8], x[8:], y[8:]


def method_of(kind, norm):
    torch.manual_seed(0)
    settings = {MetaRKHSII: {"t": 100.0}, MAML: {"inner_lr": 0.3}}.get(kind, {})
    spec = TaskSpec("classification", (1, 16, 16), 4)
    return kind(Conv4((1, 16, 16), 4, filters=16, norm=norm), spec, **settings)


@pytest.mark.parametrize(("kind", "norm"), [(MetaRKHSII, "none"), (MetaRKHSII, "batch"), (MAML, "batch")])
def test_it_is_stronger_than_the_one_that_does_not_see_through_the_adaptation(kind, norm):
    support_x, support_y, query_x, query_y = task_of()
    method, eps, settings = method_of(kind, norm), 16 / 255, {"steps": 5, "step_size": 5 / 255}

    def right(x):
        return (evaluate(method.adapt(x, support_y), query_x).argmax(-1) == query_y).sum().item()

    cheap = pgd_linf(method.adapt(support_x, support_y), support_x, support_y, eps, keep="task", **settings).images
    task = (support_x, support_y, query_x, query_y)
    alone = pgd_through_adaptation(method.adapt, *task, eps, **settings)
    after = pgd_through_adaptation(method.adapt, *task, eps, start=cheap, **settings)
    assert right(alone.images) < right(cheap)
    assert right(after.images) < right(cheap)
    for found in (alone, after):
        assert (found.images - support_x).abs().max() <= eps + 1e-6
        assert found.images.min() >= 0
        assert found.images.max() <= 1
        assert right(found.images) == (found.outputs.argmax(-1) == query_y).sum()
    assert all(p.grad is None for p in method.parameters())


def test_mistakes_are_counted_at_any_scale_and_what_is_wrong_already_counts_no_more():
    outputs = torch.tensor([[9.0, 0.0], [0.0, 0.1], [-0.1, 0.0]], dtype=torch.float64, requires_grad=True)
    y = torch.tensor([1, 1, 1])

    def gains(loss, scale=1.0):
        (gradient,) = torch.autograd.grad(loss(scale * outputs, y).sum(), outputs)
        return gradient[:, 0] / gradient[1, 0]

    assert gains(margin).tolist() == [1, 1, 1]
    far, near, nearer = gains(mistakes).tolist()
    assert far < 0.1 < near == 1 <= nearer
    assert torch.allclose(gains(mistakes, 1e3), gains(mistakes))
    assert mistakes(torch.zeros(2, 3), torch.tensor([0, 1])).tolist() == [0, 0]


def test_the_worst_support_is_returned_even_if_it_is_the_first():
    support, y, query = images(2), torch.tensor([0, 1]), images(1, seed=1)

    def adapt(x, labels):  # The smaller the change, the worse; its gradient points the other way.
        change = (x - support).sum()
        return lambda queries: torch.stack([change - 1000 * change.square(), 0 * change])[None]

    found = pgd_through_adaptation(adapt, support, y, query, torch.tensor([1]), 0.1, steps=3)
    assert torch.equal(found.images, support)


def test_what_cannot_be_attacked_is_refused():
    support_x, support_y, query_x, query_y = task_of()
    with pytest.raises(ConfigError, match="do not depend differentiably"):
        pgd_through_adaptation(method_of(Reptile, "none").adapt, support_x, support_y, query_x, query_y, 0.1)
    with pytest.raises(DataError, match=r"images in \[0, 1\]"):
        pgd_through_adaptation(nearest_mean, support_x - 1, support_y, query_x, query_y, 0.1)
    with pytest.raises(ConfigError, match="eps must be from 0 to 1"):
        pgd_through_adaptation(nearest_mean, support_x, support_y, query_x, query_y, 2.0)


def test_an_adaptation_that_it_breaks_counts_as_mistakes():
    x, y, query_y = images(2), torch.tensor([0, 1]), torch.zeros(3, dtype=torch.long)

    def adapt(support, labels):
        outputs = nearest_mean(support, labels)(images(3, seed=1))
        return lambda queries: outputs if torch.equal(support, x) else outputs * torch.nan

    found = pgd_through_adaptation(adapt, x, y, images(3, seed=1), query_y, 0.1, steps=1, loss="margin")
    assert found.outputs.isnan().all()  # Their largest would be of class 0, and right.
