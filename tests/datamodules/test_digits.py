"""Digits: scikit-learn's images, resized, and for testing alone."""

from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from test_train import TINY, TINY_SINE, run

from datamodules.digits import Digits
from lightning_ntk import evaluate
from lightning_ntk.errors import ConfigError
from lightning_ntk.running.results import read_results


def test_all_digits_are_the_test_split():
    (split,) = Digits(image_size=8).class_splits().items()
    assert split[0] == "test"
    assert sum(len(images) for images in split[1].values()) == 1797
    original = load_digits()
    for k in (0, 7):
        expected = np.round(original.images[original.target == k] * 255 / 16)
        assert np.array_equal(split[1][str(k)][:, 0], expected)


def test_they_are_resized_and_repeated_in_colour():
    images = Digits(image_size=28, channels=3).class_splits()["test"]["3"]
    assert images.shape[1:] == (3, 28, 28)
    assert np.array_equal(images[:, 0], images[:, 2])
    original = load_digits()
    means = original.images[original.target == 3].mean((1, 2)) * 255 / 16
    assert images[:, 0].mean((1, 2)) == pytest.approx(means, rel=0.1)
    assert images.max() > 240
    assert len(np.unique(images)) > 100, "greys between the 17 levels: the pixels are interpolated"


def test_an_episode_is_drawn_like_any_other():
    data = Digits(ways=3, shots=2, queries=4)
    data.setup()
    episode = data.draw("test", 0, 0)
    assert episode.support_x.shape == (6, 1, 28, 28)
    assert episode.query_y.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert not torch.equal(episode.query_x, data.draw("test", 0, 1).query_x)
    assert data.spec.input_shape == (1, 28, 28)
    assert not data.has_split("train")


def test_a_run_is_tested_on_them_and_cannot_be_trained_on_them():
    run(*TINY, "data=glyphs", "data.queries=2", "network.filters=8", "method=maml")
    evaluate.main(["run=run", "data=digits", "data.queries=2", "name=digits"])
    result = read_results(Path("run/evaluations/digits"))
    assert result.data == "digits"
    assert len(result.episodes["test/accuracy"]) == 5
    with pytest.raises(ConfigError, match=r"data=digits has no training classes.*lightning-ntk evaluate"):
        run("data=digits", "logger=csv", folder="other")
    assert not Path("other").exists()
    run(*TINY_SINE, folder="sine")
    with pytest.raises(ConfigError, match="trained for regression"):
        evaluate.main(["run=sine", "data=digits"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"channels": 2}, r"data\.channels must be 1 \(grey\) or 3"),
        ({"image_size": 0}, r"data\.image_size"),
        ({"ways": 11}, r"data\.eval_ways=11 classes are asked of an episode, but the test split has 10"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ConfigError, match=message):
        Digits(**settings).setup()
