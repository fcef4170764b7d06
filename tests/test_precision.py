"""Mixed precision: what computes in 16 bits and what must not."""

import pytest
import torch
from test_contract import make, tasks
from test_train import TINY, run

from lightning_ntk import evaluate, train
from lightning_ntk.errors import ConfigError

SETTINGS = [*TINY, "data=glyphs", "data.ways=3", "data.queries=5", "network.filters=4", "steps=4"]


def parameters(folder):
    return torch.load(f"{folder}/checkpoints/last.ckpt", weights_only=True)["state_dict"]


def test_meta_rkhs_ii_trains_in_mixed_precision_as_in_full():
    full = run(*SETTINGS, "method=meta_rkhs_ii", folder="full")
    mixed = run(*SETTINGS, "method=meta_rkhs_ii", "trainer.precision=bf16-mixed", folder="mixed")
    assert all(torch.equal(value, parameters("mixed")[key]) for key, value in parameters("full").items())
    # Predictions do run under autocast.
    assert mixed.metrics["test/accuracy"] == pytest.approx(full.metrics["test/accuracy"], abs=0.05)


def test_meta_rkhs_ii_follows_the_scaled_loss_of_float16():
    """With `16-mixed`, which needs a GPU, Lightning scales the loss up before its backward pass."""
    method, episodes = make("meta_rkhs_ii", "classification"), tasks("classification")
    method.meta_loss(episodes).backward()
    plain = {name: p.grad.clone() for name, p in method.named_parameters()}
    method.zero_grad()
    with torch.autocast("cpu", dtype=torch.float16):
        loss = method.meta_loss(episodes)
    (loss * 1024).backward()
    assert all(torch.allclose(p.grad / 1024, plain[name], rtol=1e-6) for name, p in method.named_parameters())


def test_maml_does_use_mixed_precision():
    full = run(*SETTINGS, "method=maml", folder="full")
    mixed = run(*SETTINGS, "method=maml", "trainer.precision=bf16-mixed", folder="mixed")
    assert any(not torch.equal(value, parameters("mixed")[key]) for key, value in parameters("full").items())
    assert mixed.metrics["train/loss"] == pytest.approx(full.metrics["train/loss"], rel=0.1)


@pytest.mark.parametrize("precision", ["bf16-true", "16-true"])
def test_a_kernel_of_rounded_parameters_is_refused(precision, tmp_path):
    with pytest.raises(ConfigError, match=rf"precision={precision} rounds .*MetaRKHSII.*Use \w+-mixed"):
        train.main([*SETTINGS, "method=meta_rkhs_ii", f"trainer.precision={precision}", "run_dir=run"])
    assert not (tmp_path / "run").exists()
    train.main([*SETTINGS, "method=meta_rkhs_ii", "run_dir=run", "test=false"])
    with pytest.raises(ConfigError, match=rf"precision={precision} rounds"):
        evaluate.main(["run=run", f"trainer.precision={precision}"])
