"""Attacks of the Adversarial Robustness Toolbox through the adapter: they see the predictor as it is."""

import builtins
import random
import warnings

import numpy as np
import pytest
import torch
from attacked_models import generator, images, smooth_network

from lightning_ntk.attacks.art_adapter import art_attack
from lightning_ntk.attacks.white_box import pgd_linf
from lightning_ntk.errors import ConfigError, MissingDependencyError

SQUARE = {"_target_": "art.attacks.evasion.SquareAttack", "eps": 0.1, "max_iter": 30}


@pytest.fixture(scope="module", autouse=True)
def _art():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("art.attacks.evasion")


def labelled(network, count=12):
    x = images(count)
    with torch.no_grad():
        return x, network(x).argmax(-1)


def test_arts_pgd_through_the_adapter_is_our_pgd():
    network = smooth_network()
    x, y = labelled(network)
    settings = {
        "_target_": "art.attacks.evasion.ProjectedGradientDescentPyTorch",
        "eps": 8 / 255,
        "eps_step": 2 / 255,
        "max_iter": 10,
    }
    theirs = art_attack(network, x, y, settings, outputs=4, generator=generator())
    ours = pgd_linf(network, x, y, 8 / 255, steps=10, loss="cross_entropy", keep="last")
    assert torch.allclose(theirs.images, ours.images, atol=1e-6)
    assert torch.allclose(theirs.outputs, ours.outputs, atol=1e-5)
    assert (theirs.outputs.argmax(-1) == y).float().mean() < 0.9


@pytest.mark.parametrize("name", ["ProjectedGradientDescent", "ProjectedGradientDescentNumpy"])
def test_arts_other_forms_of_pgd_are_taken(name):
    network = smooth_network()
    x, y = labelled(network, 3)
    settings = {"_target_": f"art.attacks.evasion.{name}", "eps": 0.1, "max_iter": 3}
    assert (art_attack(network, x, y, settings, outputs=4, generator=generator()).images - x).abs().max() <= 0.1 + 1e-6


def test_square_finds_something_counts_and_leaves_everything_as_it_was():
    network = smooth_network()
    x, y = labelled(network)
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    first, again, other = (art_attack(network, x, y, SQUARE, outputs=4, generator=generator(s)) for s in (0, 0, 1))
    assert (first.images - x).abs().max() <= 0.1 + 1e-6
    assert (first.outputs.argmax(-1) == y).float().mean() < 1
    assert torch.allclose(first.outputs, network(first.images), atol=1e-6)
    assert 30 < first.queries[0] < 100
    assert torch.equal(first.images, again.images)
    assert not torch.equal(first.images, other.images)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.array_equal(np.random.get_state()[1], states[1])
    assert random.getstate() == states[2]


def test_arts_backward_reaches_no_parameter_of_an_adapted_model():
    """A clone of MAML's still hangs on the parameters that it was adapted from."""
    network = smooth_network()
    x, y = labelled(network)
    weights = {name: 1.0 * p for name, p in network.named_parameters()}

    def predict(images):
        return torch.func.functional_call(network, weights, (images,))

    for _ in range(2):
        settings = {"_target_": "art.attacks.evasion.FastGradientMethod", "eps": 0.1}
        found = art_attack(predict, x, y, settings, outputs=4, generator=generator())
    assert (found.images - x).abs().max() > 0.09
    assert all(p.grad is None for p in network.parameters())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"eps": 0.1}, "art.square._target_ must name a class"),
        ({"_target_": "art.attacks.evasion.Squared"}, "art.square._target_ must name a class"),
        ({"_target_": "torch.nn.Linear"}, "is no evasion attack"),
        ({**SQUARE, "epsilon": 0.1}, "art.square.epsilon is no setting of art.attacks.evasion.SquareAttack"),
        ({**SQUARE, "eps": -0.1}, "art.square: "),
        ({**SQUARE, "max_iter": "many"}, "art.square: .*max_iter"),
        (
            {"_target_": "art.attacks.evasion.BoundaryAttack"},
            "BoundaryAttack is targeted .* Set art.square.targeted=false",
        ),
        ({"_target_": "art.attacks.evasion.SaliencyMapMethod"}, "only aims at a class"),
        ({"_target_": "art.attacks.evasion.ShadowAttack"}, "ShadowAttack failed, ValueError: .*single sample"),
        ({"_target_": "art.attacks.evasion.FeatureAdversariesPyTorch"}, "art.square: TypeError: .*delta"),
        ({"_target_": "art.attacks.evasion.DPatch"}, "art.square: EstimatorError"),
        (
            {"_target_": "art.attacks.evasion.AdversarialPatchNumpy", "targeted": False, "max_iter": 1},
            "gives no image for each image",
        ),
    ],
)
def test_bad_settings_are_refused(settings, message):
    network = smooth_network()
    x, y = labelled(network, 2)
    with pytest.raises(ConfigError, match=message):
        art_attack(network, x, y, settings, outputs=4, generator=generator(), key="art.square")


def test_without_art_the_install_line_is_given(monkeypatch):
    real = builtins.__import__

    def without(name, *arguments, **keywords):
        if name.split(".")[0] == "art":
            raise ImportError(f"No module named {name}")
        return real(name, *arguments, **keywords)

    network = smooth_network()
    x, y = labelled(network, 2)
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingDependencyError, match="pip install adversarial-robustness-toolbox"):
        art_attack(network, x, y, SQUARE, outputs=4, generator=generator())
