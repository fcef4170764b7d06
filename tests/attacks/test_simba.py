"""SimBA against the authors' loop written out, against ART, and with the states of many images at once."""

import warnings

import numpy as np
import pytest
import scipy.fft
import torch
from attacked_models import generator, images, linear_model, smooth_network

from lightning_ntk.attacks.base import side_by_side
from lightning_ntk.attacks.losses import LOSSES
from lightning_ntk.attacks.simba import _basis, cosines, simba
from lightning_ntk.errors import ConfigError
from lightning_ntk.networks.conv4 import Conv4


def one_by_one(predict, x, y, vectors, order, step, loss):
    """Guo et al. (2019), `simba_single`, for one image `[channels, height, width]`: the image and its queries."""
    x, queries = x[None], 0
    outputs = predict(x)
    last = LOSSES[loss](outputs, y[None])
    for number in order:
        if outputs.argmax() != y:
            break
        direction = step * vectors(number[None])
        for candidate in ((x - direction).clamp(0, 1), (x + direction).clamp(0, 1)):
            seen = predict(candidate)
            queries += 1
            if LOSSES[loss](seen, y[None]) > last:
                x, outputs, last = candidate, seen, LOSSES[loss](seen, y[None])
                break
    return x[0], queries


@pytest.mark.parametrize("loss", ["cross_entropy", "log_odds", "margin"])
@pytest.mark.parametrize("basis", ["pixel", "dct"])
def test_images_together_are_the_images_one_by_one(basis, loss):
    network, x = smooth_network(channels=2), images(16, channels=2)
    with torch.no_grad():
        y = network(x).argmax(-1)
        y[::4] = (y[::4] + 1) % 4  # Misclassified from the start.
        count, vectors = _basis(basis, x, 0.5)
        order = torch.rand(16, count, generator=generator()).argsort(-1)[:, :40]
        found = simba(network, x, y, basis=basis, step=0.1, frequencies=0.5, order=order, loss=loss)
        for i in range(16):
            expected, queries = one_by_one(network, x[i], y[i], vectors, order[i], 0.1, loss)
            assert torch.allclose(found.images[i], expected, atol=1e-6)
            assert found.queries[i] == queries
    assert torch.allclose(found.outputs, network(found.images), atol=1e-5)
    broken = network(found.images).argmax(-1) != y
    # Some were never attacked, some broken, some tried in vain, and no two of the states are the same.
    assert (found.queries[::4] == 0).all()
    assert broken[::4].all()
    assert broken.sum() > 5
    assert not broken.all()
    assert len(set(found.queries.tolist())) > 5


def test_large_logits_do_not_make_a_model_hold():
    weights, x = torch.randn(1, 8, 8, generator=generator(1)), images(40, size=8)
    small = linear_model(weights, bias=0.1)
    with torch.no_grad():
        y = small(x).argmax(-1)
        found, scaled = (
            simba(lambda z, k=k: k * small(z), x, y, basis="pixel", generator=generator(), directions=20)
            for k in (1.0, 100.0)
        )
    assert torch.equal(found.images, scaled.images)
    assert (found.outputs.argmax(-1) != y).any()
    with torch.no_grad():
        stuck = simba(lambda z: 100 * small(z), x, y, generator=generator(), directions=20, loss="cross_entropy")
    assert not torch.equal(found.images, stuck.images), "what the default spares"


@pytest.mark.parametrize("basis", ["pixel", "dct"])
def test_tasks_at_once_and_a_coupled_predictor_that_couples_nothing_change_no_image(basis):
    predictors = [smooth_network(seed=seed) for seed in range(2)]
    x = images(2, 6)
    y = torch.stack([network(part).argmax(-1) for network, part in zip(predictors, x, strict=True)])
    count, _ = _basis(basis, x, 0.5)
    order = torch.rand(2, 6, count, generator=generator()).argsort(-1)
    settings = {"basis": basis, "step": 0.1, "frequencies": 0.5}
    together = simba(side_by_side(predictors), x, y, order=order, **settings)
    for task, network in enumerate(predictors):
        alone = simba(network, x[task], y[task], order=order[task], **settings)
        assert torch.allclose(together.images[task], alone.images, atol=1e-6)
        assert torch.equal(together.queries[task], alone.queries)
        coupled = simba(network, x[task], y[task], order=order[task], coupled=True, **settings)
        assert torch.allclose(coupled.images, alone.images, atol=1e-6)
        assert (coupled.queries > alone.queries).any()  # Looking again at the batch is counted.


@pytest.mark.parametrize("basis", ["pixel", "dct"])
def test_the_predictor_sees_no_image_more_often_than_is_counted(basis):
    network, x, seen = smooth_network(), images(16), []

    def predict(part):
        seen.append(len(part))
        return network(part)

    y = network(x).argmax(-1)
    before = x.clone()
    found = simba(predict, x, y, basis=basis, step=0.3, directions=20, generator=generator())
    assert sum(seen) == 16 + found.queries.sum()  # The first look at the clean images is not counted.
    assert seen[1] == 16 > seen[-1]
    assert torch.equal(x, before)


def test_a_coupled_batch_is_judged_as_it_really_is():
    torch.manual_seed(0)
    network = Conv4((1, 16, 16), 4, filters=4, norm="batch")
    x = images(8, size=16)
    with torch.no_grad():
        y = network(x).argmax(-1)
        found = simba(network, x, y, generator=generator(), directions=60, coupled=True)
        assert torch.allclose(found.outputs, network(found.images), atol=1e-5)
        assert (found.outputs.argmax(-1) == y).float().mean() < 0.8
        # As if the others stood still, outputs are none of this batch.
        apart = simba(network, x, y, generator=generator(), directions=60)
        assert not torch.allclose(apart.outputs, network(apart.images), atol=1e-5)


@pytest.mark.parametrize("attack", ["px", "dct"])
def test_it_is_arts(attack, monkeypatch):
    """Two classes, a linear model and nothing clipped: only one side of a direction helps, so that ART, which looks at
    both sides and takes the better one, must go the same way, with two queries a direction."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        evasion = pytest.importorskip("art.attacks.evasion")
        from art.estimators.classification import PyTorchClassifier

    size, directions = 8, 10
    weights = torch.randn(1, size, size, generator=generator(5))
    predict = linear_model(weights, bias=-float(weights.sum()) / 2)
    x = 0.5 + 0.3 * (images(8) - 0.5)
    y = predict(x).argmax(-1)
    kept = size if attack == "px" else 4
    basis = {"basis": "pixel" if attack == "px" else "dct", "frequencies": kept / size}
    orders = [torch.randperm(kept * kept, generator=generator(i))[:directions] for i in range(len(x))]
    in_full = [o if attack == "px" else o // kept * size + o % kept for o in orders]  # ART numbers all frequencies.
    ours = simba(predict, x, y, order=torch.stack(orders), step=0.1, **basis)

    calls = []

    class Probabilities(torch.nn.Module):
        def forward(self, batch):
            calls.append(len(batch))
            return predict(batch).softmax(-1)

    loss = torch.nn.CrossEntropyLoss()
    classifier = PyTorchClassifier(Probabilities(), loss, (1, size, size), 2, clip_values=(0, 1), device_type="cpu")
    theirs = evasion.SimBA(classifier, attack=attack, epsilon=0.1, max_iter=directions, freq_dim=kept, verbose=False)
    for i in range(len(x)):
        order = in_full[i].numpy()
        monkeypatch.setattr(np.random, "permutation", lambda _, order=order: order)
        monkeypatch.setattr(evasion.SimBA, "_block_order", lambda *_, order=order, **__: order)
        calls.clear()
        found = theirs.generate(x[i : i + 1].numpy(), np.eye(2, dtype=np.float32)[y[i : i + 1].numpy()])
        assert np.allclose(found[0], ours.images[i].numpy(), atol=1e-6)
        tried = (len(calls) - 1) // 2
        assert tried <= ours.queries[i] <= 2 * tried
    broken = ours.outputs.argmax(-1) != y
    assert broken.any()
    assert not broken.all()


def test_the_cosines_are_those_of_scipy_and_orthonormal():
    full = cosines(9, 9, torch.zeros((), dtype=torch.float64))
    assert torch.allclose(full @ full.T, torch.eye(9, dtype=torch.float64))
    assert np.allclose(full.numpy(), scipy.fft.dct(np.eye(9), norm="ortho", axis=0))


@pytest.mark.parametrize(("basis", "count"), [("pixel", 2 * 6 * 8), ("dct", 2 * 3 * 4)])
def test_directions_are_orthonormal_images(basis, count):
    x = torch.zeros(1, 2, 6, 8, dtype=torch.float64)
    number, vectors = _basis(basis, x, 0.5)
    assert number == count
    found = vectors(torch.arange(count)).flatten(1)
    assert torch.allclose(found @ found.T, torch.eye(count, dtype=torch.float64), atol=1e-12)


@pytest.mark.parametrize("basis", ["pixel", "dct"])
def test_bounds_are_kept_and_the_generator_alone_decides(basis):
    network, x = smooth_network(), images(8)
    x[:4] = x[:4].round()
    y, state = network(x).argmax(-1), torch.get_rng_state()
    settings = {"basis": basis, "step": 0.3, "directions": 10}
    first, again, other = (simba(network, x, y, generator=generator(s), **settings).images for s in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)
    assert first.min() >= 0
    assert first.max() <= 1
    change = first - x
    assert change.flatten(1).norm(dim=1).max() <= 0.3 * 10**0.5 + 1e-6
    if basis == "pixel":
        assert change.abs().max() <= 0.3 + 1e-6
        assert (change.flatten(1) != 0).sum(1).max() <= 10
    assert change.abs().max() > 0.05
    assert all(p.grad is None for p in network.parameters())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"step": 0.0}, "step must be above 0"),
        ({"step": 1.5}, "step must be from 0 to 1"),
        ({"basis": "wavelet"}, "basis must be one of pixel, dct"),
        ({"basis": "dct", "frequencies": 0.0}, r"frequencies must be a share in \(0, 1\]"),
        ({"directions": 0}, "directions must be a whole number"),
        ({"loss": "hinge"}, "loss must be one of"),
        ({"generator": None}, "needs a generator"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        simba(smooth_network(), images(2), torch.tensor([0, 1]), **{"generator": generator(), **settings})


@pytest.mark.parametrize("order", [torch.zeros(3, 2), torch.full((6, 2), 10**6), torch.full((6, 2), -1)])
def test_an_order_of_other_images_or_directions_is_refused(order):
    network, x = smooth_network(), images(6)
    with pytest.raises(ConfigError, match="order must hold numbers of directions"):
        simba(network, x, network(x).argmax(-1), order=order.long())


def test_outputs_that_are_no_numbers_are_a_mistake_already():
    x = images(2)
    found = simba(lambda z: z.flatten(1)[:, :3] * torch.nan, x, torch.tensor([0, 1]), generator=generator())
    assert found.queries.tolist() == [0, 0]
