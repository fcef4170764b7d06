import pytest
import torch
from attacked_models import generator, images, smooth_network

from lightning_ntk.attacks.simba import simba
from lightning_ntk.attacks.suite import Suite, parse_sizes
from lightning_ntk.attacks.white_box import fgsm, pgd_l2
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


def test_sizes_are_numbers_or_quotients():
    assert parse_sizes(["8/255", 0.5, "2/255", "0.5", 1], "key") == (2 / 255, 8 / 255, 0.5, 1.0)
    for wrong in ("8/", "/255", "1/0", "x", True, None, "1/2/3"):
        with pytest.raises(ConfigError, match="key takes numbers or quotients"):
            parse_sizes([wrong], "key")
