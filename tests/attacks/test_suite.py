import pytest
import torch
from attacked_models import generator, images, linear_model, smooth_network

from lightning_ntk.attacks.losses import margin
from lightning_ntk.attacks.simba import simba
from lightning_ntk.attacks.suite import Suite, parse_sizes
from lightning_ntk.attacks.white_box import fgsm, linf_step, pgd_l2, pgd_linf
from lightning_ntk.errors import ConfigError


def test_names_stand_for_attacks_with_these_settings():
    network, x = smooth_network(), images(6)
    y = network(x).argmax(-1)
    suite = Suite(linf_eps=(2 / 255, 0.5 / 255), l2_eps=(0.5,), steps=3, loss="dlr", simba_step=0.1, simba_directions=5)
    named = suite.named()
    names = [f"{name}/eps_{e}" for name in ("fgsm", "pgd_linf") for e in ("2", "0.5")]
    assert list(named) == [*names, "pgd_l2/eps_0.5", "noise/eps_2", "noise/eps_0.5", "simba_pixel", "simba_dct"]

    def same(name, expected):
        return torch.equal(named[name](network, x, y, 7).images, expected.images)

    assert same("fgsm/eps_2", fgsm(network, x, y, 2 / 255, loss="dlr"))
    assert same("pgd_l2/eps_0.5", pgd_l2(network, x, y, 0.5, steps=3, loss="dlr", generator=generator(7)))
    assert same("simba_dct", simba(network, x, y, basis="dct", step=0.1, directions=5, generator=generator(7)))
    assert Suite(attacks=()).named() == {}


def test_pgd_crosses_the_cube_from_any_start():
    weights, x = torch.randn(1, 4, 4, generator=generator(1)), torch.full((6, 1, 4, 4), 0.5)
    predict, y = linear_model(weights, bias=0.1), torch.tensor([0, 1, 0, 1, 0, 1])
    suite = Suite()
    for eps in (8 / 255, 32 / 255, 0.5):
        best = fgsm(predict, x, y, eps)
        assert torch.allclose(suite.pgd_linf(eps, predict, x, y, 3).outputs, best.outputs, atol=1e-5)
    short = Suite(step_size=2 / 255).pgd_linf(32 / 255, predict, x, y, 3)
    assert (margin(short.outputs, y) < margin(fgsm(predict, x, y, 32 / 255).outputs, y) - 0.01).all()
    assert [linf_step(eps, 20) for eps in (2 / 255, 16 / 255, 32 / 255)] == [2 / 255, 2 / 255, 4 / 255]
    assert linf_step(1.0, 1) == 1.0
    assert torch.allclose(linf_step(torch.tensor([2 / 255, 32 / 255]), 20), torch.tensor([2 / 255, 4 / 255]))


def test_pgd_on_its_own_crosses_the_cube_too():
    weights, x = torch.randn(1, 4, 4, generator=generator(1)), torch.full((6, 1, 4, 4), 0.5)
    predict, y = linear_model(weights, bias=0.1), torch.tensor([0, 1, 0, 1, 0, 1])
    found = pgd_linf(predict, x, y, 0.5, generator=generator(3))
    assert torch.allclose(found.outputs, fgsm(predict, x, y, 0.5).outputs, atol=1e-5)


def test_an_answer_that_is_no_number_is_a_mistake():
    network, x = smooth_network(), images(6)
    y = network(x).argmax(-1)
    found = pgd_linf(lambda tried: network(tried) if torch.equal(tried, x) else network(tried) * torch.nan, x, y, 0.1)
    assert found.outputs.isnan().all()


def test_sizes_are_numbers_or_quotients():
    assert parse_sizes(["8/255", 0.5, "2/255", "0.5", 1], "key") == (2 / 255, 8 / 255, 0.5, 1.0)
    for wrong in ("8/", "/255", "1/0", "x", True, None, "1/2/3"):
        with pytest.raises(ConfigError, match="key takes numbers or quotients"):
            parse_sizes([wrong], "key")
