"""Figure 1: what is drawn for one task, and the command that draws runs side by side."""

import math
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from test_contract import make
from test_train import TINY, TINY_SINE, run

from datamodules.sinusoid import Sinusoid
from lightning_ntk.cli import guarded
from lightning_ntk.comparison import fit_figure
from lightning_ntk.comparison.fit_figure import draw_fit
from lightning_ntk.errors import ConfigError


def test_a_folder_of_a_sweep_that_is_not_there_is_named():
    with pytest.raises(ConfigError, match=r"no setting 'method'.* Nor is there a folder method=maml,seed=0"):
        fit_figure.main(["method=maml,seed=0"])


def test_the_panel_shows_the_truth_the_support_and_both_predictions():
    method, episode = make("meta_rkhs_ii", "regression"), Sinusoid(shots=6, eval_queries=40).draw("test", 0, 3)
    axis = Figure().subplots()
    errors = draw_fit(axis, method, episode)
    lines = {line.get_label(): torch.as_tensor(line.get_xydata()) for line in axis.lines}
    assert list(lines) == ["true", "before adaptation", "after adaptation", "support"]
    x = lines["true"][:, :1].float()
    assert (x.diff(dim=0) >= 0).all(), "a curve is drawn from left to right"
    assert set(x.flatten().tolist()) == set(episode.query_x.flatten().tolist())
    # A wave: y and its second derivative are opposite, so that the curve belongs to these x.
    amplitude, phase = wave(episode)
    assert torch.allclose(lines["true"][:, 1:].float(), amplitude * torch.sin(x - phase), atol=1e-5)
    predictor = method.adapt(episode.support_x, episode.support_y)
    for name, predict, error in zip(
        ("before adaptation", "after adaptation"), (method.network, predictor), errors, strict=True
    ):
        assert torch.allclose(lines[name][:, 1:].float(), predict(x), atol=1e-5)
        on_queries = (predict(episode.query_x) - episode.query_y).square().mean().item()
        assert error == pytest.approx(on_queries, rel=1e-4)
    assert torch.allclose(lines["support"].float(), torch.cat([episode.support_x, episode.support_y], dim=1))


def wave(episode) -> tuple[float, float]:
    """A and b of y = A sin(x - b), by least squares on sin x and cos x."""
    basis = torch.cat([episode.query_x.sin(), -episode.query_x.cos()], dim=1)
    a, b = torch.linalg.lstsq(basis, episode.query_y).solution.flatten().tolist()
    return math.hypot(a, b), math.atan2(b, a)


def test_the_command_draws_runs_side_by_side(capsys):
    run(*TINY_SINE)
    fit_figure.main(["run", "run", "tasks=3", "out=folder/fit.png"])
    assert capsys.readouterr().out.endswith("folder/fit.png\n")
    with Image.open("folder/fit.png") as picture:
        assert picture.width > 600
        assert picture.height > 900
    methods, episodes = fit_figure.load(["run"], 2)
    assert [name for name, _ in methods] == ["meta_rkhs_ii"]
    assert not torch.equal(episodes[0].query_y, episodes[1].query_y)


@pytest.mark.parametrize("precision", ["64-true", "bf16-true"])
def test_runs_of_other_precisions_are_drawn(precision):
    run(*TINY_SINE, "method=maml", f"trainer.precision={precision}")
    fit_figure.main(["run", "tasks=1", "out=fit.png"])
    assert Path("fit.png").exists()


def test_what_cannot_be_drawn_is_refused(capsys):
    with pytest.raises(ConfigError, match=r"classification.*\(1, 32, 32\)"):
        draw_fit(Figure().subplots(), make("maml", "classification"), None)
    run(*TINY_SINE)
    for words, reason in (
        (["nowhere"], r"run=nowhere"),
        (["run", "tasks=0"], r"tasks must be .* '0'"),
        (["run", "task=2"], r"Did you mean 'tasks'"),
        (["run", "out=fit.docx"], r"out=fit.docx"),
        (["out=fit.png"], r"nothing to draw"),
    ):
        with pytest.raises(ConfigError, match=reason):
            fit_figure.main(words)
    assert guarded(lambda: fit_figure.main(["nowhere"])) == 2
    assert not Path("fit.docx").exists()


def test_a_run_of_images_is_refused():
    run(*TINY, "data=glyphs", "data.queries=2", "network.filters=8")
    with pytest.raises(ConfigError, match=r"RUN run.*data=sinusoid"):
        fit_figure.main(["run"])
