"""Pictures of episodes: what is drawn is what the method said, on any number of ranks, and training is left alone."""

import json
import math
from pathlib import Path

import matplotlib.colors
import pytest
import torch
from matplotlib.patches import Rectangle
from test_train import TINY, TINY_SINE, run

from callbacks import pictures, pictures_figures
from callbacks.pictures import Pictures, right_ones
from callbacks.pictures_figures import RIGHT, TRUE, WRONG, Changed
from lightning_ntk import train
from lightning_ntk.episode import Episode
from lightning_ntk.errors import ConfigError

TINY_GLYPHS = [*TINY, "data=glyphs", "data.queries=3", "network.filters=8"]


def shown() -> tuple[Episode, torch.Tensor]:
    """Two classes, two shots, three queries each, of which the last of class 1 is wrong."""
    images = torch.rand(10, 1, 6, 6, generator=torch.Generator().manual_seed(0))
    support_y, query_y = torch.tensor([0, 0, 1, 1]), torch.tensor([0, 0, 0, 1, 1, 1])
    probabilities = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.7, 0.3], [0.4, 0.6], [0.2, 0.8], [0.75, 0.25]])
    return Episode(images[:4], support_y, images[4:], query_y, torch.tensor(7)), probabilities


def frames(axes) -> list[str]:
    drawn = [patch for patch in axes.patches if isinstance(patch, Rectangle) and not patch.get_fill()]
    return [matplotlib.colors.to_hex(patch.get_edgecolor()).upper() for patch in drawn]


def test_each_query_is_marked_right_or_wrong_with_its_probabilities():
    episode, probabilities = shown()
    (axes,) = pictures_figures.episode(episode, probabilities, 3, None).axes
    assert frames(axes) == [RIGHT] * 5 + [WRONG]
    assert len(axes.images) == 10
    assert torch.allclose(torch.as_tensor(axes.images[0].get_array()), episode.support_x[0, 0])
    texts = [text.get_text() for text in axes.texts]
    assert [text for text in texts if "%" in text] == [
        "✓ 0: 90 %",
        "✓ 0: 80 %",
        "✓ 0: 70 %",
        "✓ 1: 60 %",
        "✓ 1: 80 %",
        "✗ 0: 75 %",
    ]
    assert "accuracy 83 % of 6 queries" in axes.get_title(loc="left")
    bars = [patch for patch in axes.patches if patch.get_fill()]
    heights = torch.tensor([bar.get_height() for bar in bars]).view(6, 2)
    assert torch.allclose(heights / heights.sum(1, keepdim=True), probabilities, atol=1e-6)
    of_truth = [matplotlib.colors.to_hex(bar.get_facecolor()).upper() == TRUE for bar in bars]
    assert of_truth == [True, False] * 3 + [False, True] * 3


def test_fewer_queries_are_shown_when_asked():
    episode, probabilities = shown()
    (axes,) = pictures_figures.episode(episode, probabilities, 1, None).axes
    assert len(axes.images) == 4 + 2


def test_the_change_is_drawn_around_grey():
    episode, probabilities = shown()
    eps = 8 / 255
    change = torch.zeros(1, 1, 6, 6)
    change[0, 0, 0, :3] = torch.tensor([eps, -eps, eps / 2])
    changed = Changed(torch.tensor([3]), episode.query_x[3:4] + change, torch.tensor([[0.9, 0.1]]), eps)
    (axes,) = pictures_figures.episode(episode, probabilities, 3, changed).axes
    assert frames(axes)[-2:] == [RIGHT, WRONG]
    drawn = torch.as_tensor(axes.images[-1].get_array())
    assert drawn[0, :4].tolist() == pytest.approx([1.0, 0.0, 0.75, 0.5], abs=1e-6)
    assert "eps 8/255, change enlarged 15.9 times" in axes.get_title(loc="left")


def test_attacked_ones_are_right_and_of_many_classes():
    outputs = torch.eye(3)[torch.tensor([0, 0, 0, 1, 1, 0])]
    targets = torch.tensor([0, 0, 0, 1, 1, 2])
    assert right_ones(outputs, targets).tolist() == [0, 1, 3, 4]
    assert right_ones(outputs[:3], 1 + targets[:3]).tolist() == []


def test_a_run_draws_its_episodes_and_trains_as_without():
    # Batch statistics: the attack then sees all queries of a task together.
    settings = [*TINY_GLYPHS, "method=maml", "network.norm=batch"]
    plain = run(*settings, folder="plain")
    words = ["callbacks=[timing,pictures]", "callbacks.pictures.fit_every=1", "callbacks.pictures.fit_episodes=2"]
    drawn = run(*settings, *words, "callbacks.pictures.steps=2", "callbacks.pictures.test_episodes=1", folder="drawn")
    assert drawn.episodes == plain.episodes
    names = {file.name for file in Path("drawn/figures/pictures").iterdir()}
    assert names == {"fit_episode_0.png", "fit_episode_1.png", "test_episode_0.png"}
    assert drawn.probes["pictures"] == {"episodes": {}, "series": {}}
    json.dumps(drawn.probes)
    weights = [torch.load(f"{f}/checkpoints/last.ckpt", weights_only=True)["state_dict"] for f in ("plain", "drawn")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_what_is_drawn_is_what_the_method_says(monkeypatch):
    kept = []
    figure = pictures_figures.episode
    monkeypatch.setattr(pictures_figures, "episode", lambda *words: (kept.append(words), figure(*words))[1])
    result = run(*TINY_GLYPHS, "method=anil", "callbacks=[pictures]")
    accuracies = [float((p.argmax(-1) == shown.query_y).double().mean()) for shown, p, _, _ in kept]
    assert accuracies == pytest.approx(result.episodes["test/accuracy"][:3])
    for episode, probabilities, _, changed in kept:
        assert probabilities.sum(-1) == pytest.approx(1.0, abs=1e-5)
        if changed is not None:
            change = changed.images - episode.query_x[changed.chosen]
            assert 0 < change.abs().max() <= changed.eps + 1e-6


def test_an_episode_without_a_right_query_is_drawn_without_an_attack(monkeypatch):
    chosen = iter([[0], [], [1]])
    monkeypatch.setattr(pictures, "right_ones", lambda outputs, targets: torch.tensor(next(chosen), dtype=torch.long))
    kept = []
    figure = pictures_figures.episode
    monkeypatch.setattr(pictures_figures, "episode", lambda *words: (kept.append(words), figure(*words))[1])
    run(*TINY_GLYPHS, "method=maml", "callbacks=[pictures]", "callbacks.pictures.steps=1")
    assert [changed is None for *_, changed in kept] == [False, True, False]


@pytest.mark.parametrize("data", [TINY_GLYPHS, TINY_SINE])
def test_outputs_that_are_not_finite_are_a_failed_episode_and_not_drawn(data, break_outputs):
    break_outputs(Pictures)
    with pytest.warns(UserWarning, match=r"pictures: 1 of 3 probe episodes could not be measured.*no finite numbers"):
        result = run(*data, "method=maml", "callbacks=[pictures]", "callbacks.pictures.steps=2")
    assert result.metrics["pictures/failed_episodes"] == 1
    names = {file.name for file in Path("run/figures/pictures").iterdir()}
    assert names == ({"test_fits.png"} if data is TINY_SINE else {"test_episode_0.png", "test_episode_2.png"})


def test_fits_of_a_regression(monkeypatch):
    kept = []
    figure = pictures_figures.fits
    monkeypatch.setattr(pictures_figures, "fits", lambda *words: (kept.append(words), figure(*words))[1])
    result = run(*TINY_SINE, "method=maml", "callbacks=[pictures]")
    ((episodes, before, after),) = kept
    errors = [float((a - e.query_y).square().mean()) for e, a in zip(episodes, after, strict=True)]
    assert errors == pytest.approx(result.episodes["test/mse"][:3], rel=1e-4)
    assert not torch.equal(before[0], after[0])
    assert Path("run/figures/pictures/test_fits.png").stat().st_size > 10_000


def test_bad_settings_name_their_key():
    for settings, message in (
        ({"eps": 2.0}, r"callbacks\.pictures\.eps must be from 0 to 1"),
        ({"eps": -0.1}, r"callbacks\.pictures\.eps must be"),
        ({"eps": math.nan}, r"callbacks\.pictures\.eps must be"),
        ({"eps": "eight"}, r"callbacks\.pictures\.eps takes numbers or quotients"),
        ({"steps": 0}, r"callbacks\.pictures\.steps must be a whole number"),
        ({"queries": 0}, r"callbacks\.pictures\.queries must be a whole number"),
        ({"queries": 2.5}, r"callbacks\.pictures\.queries must be a whole number"),
    ):
        with pytest.raises(ConfigError, match=message):
            Pictures(**settings)
    with pytest.raises(ConfigError, match=r"callbacks\.pictures\.queries must be a whole number, but got 'x'"):
        train.main([*TINY_SINE, "callbacks=[pictures]", "callbacks.pictures.queries=x", "run_dir=run"])
