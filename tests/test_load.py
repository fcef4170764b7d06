"""A run taken up in Python: it says of the test episodes what the run's own test said."""

import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from test_train import TINY, TINY_SINE, run
from tiny_data import save_image

from lightning_ntk import load_data, load_method
from lightning_ntk.errors import ConfigError

TINY_GLYPHS = [*TINY, "data=glyphs", "data.queries=3", "network.filters=8"]
RUNS = {
    "meta_rkhs_ii": TINY_GLYPHS,
    "maml": TINY_GLYPHS,
    "protonet": TINY_GLYPHS,
    "from_scratch": TINY_GLYPHS,
    "imaml": TINY_SINE,
}


@pytest.mark.parametrize("name", RUNS)
def test_a_loaded_run_repeats_its_test(name):
    result = run(*RUNS[name], f"method={name}")
    method, data = load_method("run"), load_data(Path("run"))
    assert not method.training
    episodes = data.batch("test", range(5))
    metric = "mse" if "data=sinusoid" in RUNS[name] else "accuracy"
    scores = method.score(method.predict(episodes), episodes.query_y)[metric]
    assert scores.tolist() == pytest.approx(result.episodes[f"test/{metric}"], rel=1e-6)
    task = next(iter(episodes))
    outputs = method.adapt(task.support_x, task.support_y)(task.query_x)
    assert method.score(outputs[None], task.query_y[None])[metric].item() == pytest.approx(scores[0].item(), rel=1e-6)


@pytest.mark.parametrize(
    ("precision", "words"),
    [
        ("64-true", [*TINY_SINE, "method=meta_rkhs_ii", "method.t=inf"]),
        ("64-true", [*TINY_SINE, "method=from_scratch"]),
        ("64-true", [*TINY_GLYPHS, "method=maml"]),
        ("bf16-true", [*TINY_GLYPHS, "method=protonet"]),
    ],
)
def test_a_run_in_another_precision_is_loaded_in_it(precision, words):
    result = run(*words, f"trainer.precision={precision}")
    method, data = load_method("run"), load_data("run")
    dtype = torch.float64 if precision == "64-true" else torch.bfloat16
    episodes = data.batch("test", range(5))
    assert {method.dtype, episodes.support_x.dtype, episodes.query_x.dtype} == {dtype}
    ((metric, kept),) = result.episodes.items()
    scores = method.score(method.predict(episodes), episodes.query_y)[metric.removeprefix("test/")]
    assert scores.tolist() == pytest.approx(kept, rel=1e-9)
    assert torch.get_default_dtype() == torch.float32


def test_a_checkpoint_of_a_folder_is_chosen():
    run(*TINY_SINE)
    assert load_method("run", checkpoint="last").run["config"]["steps"] == 2
    of_file = load_method("run/checkpoints/last.ckpt").state_dict()
    for name, value in load_method("run", checkpoint="last").state_dict().items():
        assert torch.equal(value, of_file[name])
    with pytest.raises(ConfigError, match="checkpoint must be 'best' or 'last', but got 'newest'"):
        load_method("run", checkpoint="newest")
    with pytest.raises(ConfigError, match="nowhere"):
        load_method("nowhere")


def test_settings_take_the_place_of_the_runs_own():
    run(*TINY_SINE)
    method, data = load_method("run", t=5.0), load_data("run", eval_shots=7)
    assert (method.how.t, load_method("run").how.t) == (5.0, 10.0)
    assert data.batch("test", [0]).support_x.shape == (1, 7, 1)
    with pytest.raises(ConfigError, match=r"method\.T is no setting of"):
        load_method("run", T=5.0)
    with pytest.raises(ConfigError, match=r"data\.eval_shot is no setting of.*eval_shots"):
        load_data("run", eval_shot=5)


def test_settings_that_change_the_parameters_are_refused():
    run(*TINY_SINE, "method=maml")
    with pytest.raises(ConfigError, match="parameters are not those of the checkpoint"):
        load_method("run", learn_inner_lrs=True)


def test_loading_draws_from_no_global_generator_and_sets_no_variable():
    run(*TINY_SINE)
    os.environ.pop("PL_GLOBAL_SEED", None)
    before = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state())
    load_method("run")
    load_data("run")
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before[:2]
    assert torch.equal(torch.get_rng_state(), before[2])
    assert "PL_GLOBAL_SEED" not in os.environ


def test_a_run_whose_data_have_gone_still_adapts():
    for split in ("train", "test"):
        for number in range(12):
            save_image(Path(f"images/{split}/{split}{number // 4}/{number}.png"), split, number, size=(16, 16))
    run(*TINY, "data=image_folder", "data.root=images", "data.ways=3", "data.queries=2", "network.filters=8")
    Path("images").rename("elsewhere")
    with pytest.raises(ConfigError, match=r"data\.root=images is not a folder"):
        load_data("run")
    task = next(iter(load_data("run", root="elsewhere").batch("test", [0])))
    assert load_method("run").adapt(task.support_x, task.support_y)(task.query_x).shape == (6, 3)


def test_a_batch_is_what_training_sees():
    run(*TINY_GLYPHS)
    for settings in ({"augment": "crop_flip"}, {"resident": "device"}):
        data = load_data("run", **settings)
        batch = data.batch("train", range(2))
        (seen, *_) = (data.on_after_batch_transfer(each, 0) for each in data.train_dataloader())
        assert torch.equal(batch.support_x, seen.support_x)
        assert 0 <= batch.query_x.min() < batch.query_x.max() <= 1


def test_bytes_are_refused_by_a_network():
    run(*TINY_GLYPHS)
    method, data = load_method("run"), load_data("run")
    drawn = data.draw("test", 0, 0)
    with pytest.raises(ConfigError, match=r"takes floats, images in \[0, 1\], but got torch\.uint8"):
        method.adapt(drawn.support_x, drawn.support_y)
