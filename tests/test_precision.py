"""Mixed precision: what computes in 16 bits and what must not."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_contract import make, tasks
from test_train import TINY, run

from lightning_ntk import evaluate, train
from lightning_ntk.episode import TaskSpec
from lightning_ntk.errors import ConfigError
from lightning_ntk.methods.meta_rkhs_i import MetaRKHSI
from lightning_ntk.methods.meta_rkhs_ii import MetaRKHSII
from lightning_ntk.networks.conv4 import Conv4
from lightning_ntk.running.results import read_results

REPOSITORY = Path(__file__).resolve().parents[1]

SETTINGS = [*TINY, "data=glyphs", "data.ways=3", "data.queries=5", "network.filters=4", "steps=4"]


def parameters(folder):
    return torch.load(f"{folder}/checkpoints/last.ckpt", weights_only=True)["state_dict"]


def test_meta_rkhs_ii_trains_in_mixed_precision_as_in_full():
    full = run(*SETTINGS, "method=meta_rkhs_ii", folder="full")
    mixed = run(*SETTINGS, "method=meta_rkhs_ii", "trainer.precision=bf16-mixed", folder="mixed")
    assert all(torch.equal(value, parameters("mixed")[key]) for key, value in parameters("full").items())
    assert mixed.metrics["test/accuracy"] == full.metrics["test/accuracy"]


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


def test_training_in_float16_alone_is_refused():
    protonet = [*SETTINGS, "method=protonet"]
    with pytest.raises(ConfigError, match=r"precision=16-true .*eps of 1e-8 is 0.*Use 16-mixed .*or bf16-true"):
        train.main([*protonet, "trainer.precision=16-true", "run_dir=run"])
    assert not Path("run").exists()
    train.main([*protonet, "test=false", "run_dir=run"])
    evaluate.main(["run=run", "trainer.precision=16-true", "name=it"])
    assert read_results(Path("run/evaluations/it")).metrics["test/accuracy"] > 0
    run(*SETTINGS, "method=nearest_centroid", "trainer.precision=16-true", folder="untrained")


@pytest.mark.parametrize("norm", ["none", "group", "batch"])
@pytest.mark.parametrize(("kind", "settings"), [(MetaRKHSI, {}), (MetaRKHSI, {"euler_steps": 1}), (MetaRKHSII, {})])
def test_both_methods_of_the_kernel_compute_the_same_under_autocast(kind, settings, norm):
    torch.manual_seed(0)
    method = kind(Conv4((1, 32, 32), 3, filters=8, norm=norm), TaskSpec("classification", (1, 32, 32), 3), **settings)
    episodes = tasks("classification")
    loss, outputs = method.meta_loss(episodes), method.predict(episodes)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(method.meta_loss(episodes), loss)
        assert torch.equal(method.predict(episodes), outputs)


@pytest.mark.parametrize("setting", ["highest", "high", "medium", "new", "old"])
def test_the_processs_precision_is_put_back(setting):
    code = (
        "import sys, torch\nfrom lightning_ntk.ntk.precision import full_precision\n"
        "if sys.argv[1] == 'new': torch.backends.cuda.matmul.fp32_precision = 'tf32'\n"
        "elif sys.argv[1] == 'old': torch.backends.cuda.matmul.allow_tf32 = True\n"
        "else: torch.set_float32_matmul_precision(sys.argv[1])\n"
        "state = lambda: [p.fp32_precision for p in (torch.backends.cuda.matmul, torch.backends.cudnn.conv)]\n"
        "before = state()\n"
        "with full_precision('cpu'): assert not {'tf32', 'bf16'} & set(state())\n"
        "assert state() == before\n"
        "if sys.argv[1] not in ('new', 'old'): assert torch.get_float32_matmul_precision() == sys.argv[1]\n"
    )
    if not hasattr(torch.backends.cudnn, "conv"):
        pytest.skip("this PyTorch has the old flags alone")
    subprocess.run([sys.executable, "-c", code, setting], check=True, env={**os.environ, "PYTHONPATH": str(REPOSITORY)})
