"""FGSM and PGD against foolbox, a case solved by hand, and what an attack must never do."""

import functools
import warnings

import pytest
import torch
from attacked_models import generator, images, linear_model, smooth_network

from lightning_ntk.attacks.base import side_by_side
from lightning_ntk.attacks.losses import LOSSES, margin
from lightning_ntk.attacks.white_box import (
    fgsm,
    input_gradient,
    l2_norms,
    pgd_l2,
    pgd_linf,
    random_ball,
    random_cube,
)
from lightning_ntk.episode import TaskSpec
from lightning_ntk.errors import ConfigError, DataError
from lightning_ntk.methods.meta_rkhs_ii import MetaRKHSII
from lightning_ntk.networks.conv4 import Conv4

ATTACKS = {
    "fgsm": fgsm,
    "pgd_linf": functools.partial(pgd_linf, steps=7),
    "pgd_l2": functools.partial(pgd_l2, steps=7),
}
EPS = {"fgsm": 0.07, "pgd_linf": 0.05, "pgd_l2": 0.7}


def labelled(network, x):
    """Labels that are half right and half wrong."""
    with torch.no_grad():
        y = network(x).argmax(-1)
    y[..., ::2] = (y[..., ::2] + 1) % 4
    return y


# ---- against foolbox -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def foolbox():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("foolbox")


def theirs(foolbox, attack, network, x, y, eps):
    model = foolbox.PyTorchModel(network.eval(), bounds=(0, 1))
    return attack(model, x, y, epsilons=eps)[1]


def test_fgsm_is_foolboxs(foolbox):
    network, x = smooth_network(), images(10)
    y = labelled(network, x)
    found = fgsm(network, x, y, 8 / 255, loss="cross_entropy").images
    expected = theirs(foolbox, foolbox.attacks.LinfFastGradientAttack(random_start=False), network, x, y, 8 / 255)
    assert torch.allclose(found, expected, atol=1e-6)
    assert (found - x).abs().amax() > 7 / 255


@pytest.mark.parametrize("random_start", [False, True])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_pgd_takes_foolboxs_steps_from_the_same_start(foolbox, norm, random_start):
    network, x = smooth_network(), images(10)
    y = labelled(network, x)
    ours, draw, base, eps, size = {
        "linf": (pgd_linf, random_cube, foolbox.attacks.LinfProjectedGradientDescentAttack, 8 / 255, 2 / 255),
        "l2": (pgd_l2, random_ball, foolbox.attacks.L2ProjectedGradientDescentAttack, 1.0, 0.2),
    }[norm]

    class FromOurStart(base):
        def get_random_start(self, x0, epsilon):
            return x0 + epsilon * type(x0)(draw(x0.raw, generator(3)))

    attack = FromOurStart(abs_stepsize=size, steps=20, random_start=random_start)
    expected = theirs(foolbox, attack, network, x, y, eps)
    start = generator(3) if random_start else None
    settings = {"steps": 20, "step_size": size, "loss": "cross_entropy", "keep": "last"}
    found = ours(network, x, y, eps, generator=start, **settings).images
    assert torch.allclose(found, expected, atol=1e-6)
    assert not torch.allclose(found, x, atol=1e-2)


# ---- by hand ---------------------------------------------------------------------------------------------------------


def test_a_linear_model_moves_by_eps_times_the_sign_of_its_weights():
    weights = torch.randn(1, 4, 4, generator=generator(1))
    x = 0.5 + 0.2 * (images(6, size=4) - 0.5)  # Far enough from 0 and 1 that nothing is clipped.
    predict = linear_model(weights, bias=0.1)
    y = torch.tensor([0, 1, 0, 1, 0, 1])
    towards = torch.where(y == 0, -1.0, 1.0)[:, None, None, None]
    for loss in ("margin", "cross_entropy"):
        best = x + 0.1 * towards * weights.sign()
        assert torch.allclose(fgsm(predict, x, y, 0.1, loss=loss).images, best, atol=1e-6)
        found = pgd_linf(predict, x, y, 0.1, generator=generator(), steps=20, step_size=0.02, loss=loss)
        assert torch.allclose(found.images, best, atol=1e-6)
        assert torch.allclose(found.outputs, predict(best), atol=1e-5)
        sphere = pgd_l2(predict, x, y, 0.3, steps=5, loss=loss)
        assert torch.allclose(sphere.images, x + 0.3 * towards * weights / weights.norm(), atol=1e-6)


# ---- what holds for all ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("name", ATTACKS)
class TestEveryWhiteBoxAttack:
    def attack(self, name, *arguments, **settings):
        random = {} if name == "fgsm" else {"generator": settings.pop("generator", generator())}
        settings.pop("generator", None)
        return ATTACKS[name](*arguments, **random, **settings)

    def test_bounds_are_kept_and_the_outputs_are_those_of_the_images(self, name, loss):
        network, x = smooth_network(), images(20)
        x[:10] = x[:10].round()  # At the corners of the unit cube.
        y = labelled(network, x)
        found = self.attack(name, network, x, y, EPS[name], loss=loss)
        change = found.images - x
        sizes = l2_norms(change) if name == "pgd_l2" else change.abs()
        assert sizes.max() <= EPS[name] + 1e-6
        assert sizes.max() > 0.9 * EPS[name]
        assert found.images.min() >= 0
        assert found.images.max() <= 1
        assert torch.allclose(found.outputs, network(found.images), atol=1e-6)
        assert not found.outputs.requires_grad

    def test_it_hurts(self, name, loss):
        network, x = smooth_network(), images(40)
        y = network(x).argmax(-1)
        found = self.attack(name, network, x, y, EPS[name], loss=loss)
        assert (found.outputs.argmax(-1) == y).float().mean() < 0.75
        assert (LOSSES[loss](found.outputs, y) > LOSSES[loss](network(x), y)).all()

    def test_tasks_at_once_are_the_tasks_one_by_one(self, name, loss):
        predictors = [smooth_network(seed=seed) for seed in range(3)]
        x = images(3, 5)
        y = torch.stack([labelled(network, part) for network, part in zip(predictors, x, strict=True)])
        # No random start: its numbers would be drawn in another order.
        together = self.attack(name, side_by_side(predictors), x, y, EPS[name], loss=loss, generator=None)
        for task, network in enumerate(predictors):
            alone = self.attack(name, network, x[task], y[task], EPS[name], loss=loss, generator=None)
            assert torch.allclose(together.images[task], alone.images, atol=1e-6)
            assert torch.allclose(together.outputs[task], alone.outputs, atol=1e-5)

    def test_an_image_does_not_depend_on_its_batch(self, name, loss):
        network, x = smooth_network(), images(6)
        y = labelled(network, x)
        together = self.attack(name, network, x, y, EPS[name], loss=loss, generator=None)
        alone = self.attack(name, network, x[2:3], y[2:3], EPS[name], loss=loss, generator=None)
        assert torch.allclose(together.images[2:3], alone.images, atol=1e-6)

    def test_no_parameter_gets_a_gradient_and_the_input_stays(self, name, loss):
        network, x = smooth_network(), images(5)
        before, y = x.clone(), labelled(network, x)
        with torch.no_grad():
            self.attack(name, network, x, y, EPS[name], loss=loss)
        assert all(p.grad is None for p in network.parameters())
        assert torch.equal(x, before)
        assert not x.requires_grad


@pytest.mark.parametrize("attack", [pgd_linf, pgd_l2])
def test_the_generator_alone_decides_the_start(attack):
    network, x = smooth_network(), images(5)
    y, state = labelled(network, x), torch.get_rng_state()
    first, again, other = (attack(network, x, y, 0.02, steps=1, generator=generator(s)).images for s in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_random_ball_is_uniform():
    radii = l2_norms(random_ball(images(4000, size=2), generator())).flatten()
    assert radii.max() <= 1
    # P(radius < r) = r^d: the mean is d / (d + 1).
    assert abs(radii.mean() - 4 / 5) < 0.01


@pytest.mark.parametrize("attack", [fgsm, pgd_linf, pgd_l2])
def test_each_image_may_have_its_own_eps(attack):
    network, x = smooth_network(), images(4)
    y = labelled(network, x)
    eps = torch.tensor([0.0, 0.01, 0.02, 0.03])
    sizes = attack(network, x, y, eps).images - x
    sizes = l2_norms(sizes).flatten() if attack is pgd_l2 else sizes.abs().amax((1, 2, 3))
    assert torch.allclose(sizes, eps, atol=1e-6)


def swinging(x):
    """Two classes, the second only between 0.4 and 0.5: an attack's later steps leave it again."""
    score = (x.mean((-3, -2, -1)) - 0.45).abs() - 0.05
    return torch.stack([score, -score], dim=-1)


def test_the_worst_iterate_is_kept():
    x, y = torch.full((1, 1, 2, 2), 0.3), torch.tensor([0])
    settings = {"steps": 2, "step_size": 0.15}
    assert swinging(pgd_linf(swinging, x, y, 0.5, **settings, keep="last").images).argmax() == 0
    kept = pgd_linf(swinging, x, y, 0.5, **settings)
    assert kept.outputs.argmax() == 1
    assert torch.allclose(kept.images, x + 0.15)


def test_coupled_images_are_kept_together():
    """Their outputs are those of one batch that was really seen, not of images from different iterates."""
    torch.manual_seed(0)
    network = Conv4((1, 16, 16), 4, filters=4, norm="batch")
    x = images(2, 6, size=16)
    y = torch.randint(4, (2, 6), generator=generator())
    together = side_by_side([network, network])
    for attack, eps in ((pgd_linf, 0.03), (pgd_l2, 0.5)):
        found = attack(together, x, y, eps, generator=generator(), keep="task")
        assert torch.allclose(together(found.images), found.outputs, atol=1e-5)
        mixed = attack(together, x, y, eps, generator=generator(), keep="image")
        assert not torch.allclose(together(mixed.images), mixed.outputs, atol=1e-5)


@pytest.mark.parametrize("steps", [1, 20])
def test_a_step_costs_one_pass_each_way(steps):
    network, x = smooth_network(), images(4)
    y, passes = labelled(network, x), {"forward": 0, "backward": 0}

    def counting(z):
        passes["forward"] += 1
        outputs = network(z)
        if outputs.requires_grad:
            outputs.register_hook(lambda _: passes.update(backward=passes["backward"] + 1))
        return outputs

    found = pgd_linf(counting, x, y, 0.03, steps=steps, generator=generator())
    assert passes == {"forward": steps + 1, "backward": steps}
    assert found.queries.tolist() == [steps + 1] * 4


# ---- adapted models --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "channels", "norm"),
    [(24, 1, "group"), (12, 1, "batch"), (84, 3, "none")],
    ids=["group", "batch", "engine"],
)
def test_the_linearised_predictors_input_gradient_is_that_of_finite_differences(size, channels, norm):
    """At 84x84 with three channels the engine's own convolutions and poolings take part."""
    torch.manual_seed(0)
    shape = (channels, size, size)
    downsample = "pool" if size == 84 else "stride"
    network = Conv4(shape, 3, filters=8, norm=norm, downsample=downsample)
    method = MetaRKHSII(network, TaskSpec("classification", shape, 3), t=10.0).double()
    x = images(6, channels=channels, size=size, dtype=torch.float64)
    predict = method.adapt(x[:3], torch.arange(3))
    query, y = x[3:], torch.tensor([0, 2, 1])
    gradient, _ = input_gradient(predict, query, y, margin)
    assert all(p.grad is None for p in method.parameters())
    # The change that linearising adds is no small part of the outputs.
    assert (predict(query) - network(query)).abs().max() > 0.1 * network(query).abs().max()
    for seed in range(3):
        direction = torch.randn(query.shape, generator=generator(seed), dtype=torch.float64)
        direction /= direction.norm()
        step = 1e-5
        rise = (margin(predict(query + step * direction), y) - margin(predict(query - step * direction), y)).sum()
        assert (gradient * direction).sum().item() == pytest.approx(rise.item() / (2 * step), rel=1e-3, abs=1e-7)


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("eps", [-0.1, 1.5, float("nan"), float("inf"), True])
@pytest.mark.parametrize("attack", [fgsm, pgd_linf])
def test_eps_outside_the_unit_interval_is_refused(attack, eps):
    with pytest.raises(ConfigError, match="eps must be from 0 to 1"):
        attack(smooth_network(), images(1), torch.tensor([0]), eps)


@pytest.mark.parametrize(
    ("attack", "settings", "message"),
    [
        (pgd_l2, {"eps": -1.0}, "eps must be finite"),
        (pgd_l2, {"eps": float("inf")}, "eps must be finite"),
        (pgd_l2, {"eps": 1.0, "step_size": -1.0}, "step_size must be"),
        (pgd_linf, {"eps": 0.1, "step_size": 2.0}, "step_size must be from 0 to 1"),
        (pgd_linf, {"eps": 0.1, "steps": 0}, "steps must be a whole number of at least 1"),
        (pgd_l2, {"eps": 0.1, "steps": 0}, "steps must be a whole number of at least 1"),
        (pgd_linf, {"eps": 0.1, "keep": "best"}, "keep must be one of image, task, last"),
        (pgd_linf, {"eps": 0.1, "loss": "hinge"}, "loss must be one of"),
        (fgsm, {"eps": torch.tensor([0.5, 2.0])}, "eps must be from 0 to 1"),
    ],
)
def test_bad_settings_are_refused(attack, settings, message):
    with pytest.raises(ConfigError, match=message):
        attack(smooth_network(), images(2), torch.tensor([0, 1]), **settings)


@pytest.mark.parametrize("attack", [fgsm, pgd_linf, pgd_l2])
def test_an_attack_without_gradients_says_so(attack):
    network, x, y = smooth_network(), images(2), torch.tensor([0, 1])
    for predict in (lambda z: network(z.detach()), lambda z: network(z).detach(), lambda z: network(z.round()).round()):
        blind = torch.no_grad()(predict) if predict(x).requires_grad else predict
        with pytest.raises(ConfigError, match=r"gradient of the predictor in its input.*simba"):
            attack(blind, x, y, 0.1)
    # Its parameters take gradients, its input does not.
    with pytest.raises(ConfigError, match="gradient of the predictor in its input"):
        attack(lambda z: network(z.detach()), x, y, 0.1)


def test_images_outside_the_unit_interval_are_refused():
    network, y = smooth_network(), torch.tensor([0, 1])
    for x in (images(2) * 255, images(2) - 0.5, images(2) * float("nan")):
        with pytest.raises(DataError, match=r"images in \[0, 1\]"):
            fgsm(network, x, y, 0.1)
    with pytest.raises(DataError, match="labels"):
        fgsm(network, images(2), torch.tensor([0]), 0.1)
    with pytest.raises(DataError, match="float images"):
        fgsm(network, torch.zeros(2, 1, 8, 8, dtype=torch.uint8), y, 0.1)


def test_numbers_that_are_not_finite_leave_the_images_in_place():
    def broken(x):
        return x.flatten(1)[:, :3] * torch.tensor([1.0, float("nan"), 1.0])

    x, y = images(2), torch.tensor([0, 2])
    for found in (
        fgsm(broken, x, y, 0.1),
        pgd_linf(broken, x, y, 0.1, keep="last"),
        pgd_l2(broken, x, y, 0.1, keep="last"),
    ):
        assert torch.isfinite(found.images).all()
