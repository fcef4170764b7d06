import math

import pytest
import torch
from attacked_models import generator, images, smooth_network

from lightning_ntk.attacks.masking import black_box_wins, curve_signs, zero_gradients
from lightning_ntk.attacks.simba import simba
from lightning_ntk.attacks.suite import Suite


def test_zero_gradients_are_counted_by_image():
    gradient = torch.zeros(4, 1, 2, 2)
    gradient[1, 0, 1, 1] = 1e-30
    assert zero_gradients(gradient) == 0.75


def test_signs_by_hand():
    clean = [0.9, 0.7, 0.8]
    falling = {2 / 255: [0.8, 0.6, 0.7], 8 / 255: [0.5, 0.3, 0.4]}
    signs = curve_signs(clean, {"pgd_linf": falling, "fgsm": {8 / 255: [0.6, 0.4, 0.5]}, "noise": {8 / 255: clean}})
    expected = {"rise_with_eps": -0.1, "single_step_wins": -0.1, "noise_wins": -0.4, "no_fall": 0.0}
    assert signs == pytest.approx(expected)
    masked = {2 / 255: clean, 8 / 255: [1.0, 0.8, 0.9]}
    signs = curve_signs(clean, {"pgd_linf": masked, "fgsm": falling, "noise": {8 / 255: clean}})
    assert signs == pytest.approx({"rise_with_eps": 0.1, "single_step_wins": 0.5, "noise_wins": 0.1, "no_fall": 1.0})
    # The difference must be sure: of episodes that disagree, nothing follows.
    unsure = curve_signs(clean, {"pgd_linf": {8 / 255: [0.0, 0.0, 1.0]}, "fgsm": {8 / 255: [0.5, 0.0, 0.1]}})
    assert unsure["single_step_wins"] < 0
    # Nothing need fall at a tiny eps, and what is not there has no sign.
    assert curve_signs(clean, {"pgd_linf": {1 / 255: clean}})["no_fall"] == 0
    assert curve_signs(clean, {"fgsm": falling}) == {}
    # An episode that failed takes no part.
    assert curve_signs([*clean, math.nan], {"pgd_linf": {8 / 255: [0.5, 0.3, 0.4, math.nan]}})["rise_with_eps"] < 0


def test_a_black_box_attack_wins_where_gradients_lead_nowhere():
    network, x = smooth_network(), images(12)
    y = network(x).argmax(-1)
    suite = Suite()
    for predict, wins in ((network, False), (lambda z: network((8 * z).round() / 8) + 0 * network(z), True)):
        found = simba(predict, x, y, generator=generator())
        assert (found.outputs.argmax(-1) != y).float().mean() > 0.5
        share = black_box_wins(suite, predict, x, y, found, 0)
        assert (share > 0.1) if wins else (share == 0)
