"""Two processes on gloo: one run folder, each episode counted once, the same parameters and scores as one process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ports import free_port
from test_train import TINY, run

from lightning_ntk import train
from lightning_ntk.errors import ConfigError
from lightning_ntk.running.results import read_results
from lightning_ntk.settings.config import conf_folder, groups

SETTINGS = [*TINY, "data.queries=5", "data.tasks_per_step=4", "trainer.precision=64-true", "steps=5"]
IMAGES = ["data=glyphs", "data.ways=3", "network.filters=4"]
# Of the default rank tolerance's size, 1e-6, gradients differ with the tasks that share a chunk.
EXACT = ["method.rank_tolerance=1e-13"]
WITHOUT_TRAINING = ("from_scratch", "nearest_centroid")
# What both ranks run: all methods in one pair of processes, since starting one takes longer than five steps.
RANK = """
import atexit, sys, torch
atexit.register(lambda: torch.distributed.is_initialized() and sys.stderr.write("a process group is left"))  # Last.
from lightning_ntk import train
for line in sys.stdin.read().splitlines():
    train.main(line.split("\\t"))
"""


def trained_methods():
    return [name for name in groups([conf_folder()])["method"] if name not in WITHOUT_TRAINING]


def train_by_two(lines):
    """Two processes, each of which trains what the lines say, one after the other."""
    variables = {"TORCHELASTIC_RUN_ID": "parity", "WORLD_SIZE": "2", "GROUP_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
    variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    variables |= {"PYTHONPATH": str(conf_folder().parent), "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", RANK],
            env={**os.environ, **variables, "RANK": rank, "LOCAL_RANK": rank},
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in ("0", "1")
    ]
    for rank in ranks:
        rank.stdin.write("\n".join("\t".join(line) for line in lines))
        rank.stdin.close()
        rank.stdin = None
    errors = [rank.communicate(timeout=280)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], errors
    assert not any("a process group is left" in error for error in errors)


def check_same_scores(together, alone):
    (metric,) = (name for name in alone.episodes if name in ("test/accuracy", "test/mse"))
    assert together.episode_ids == alone.episode_ids
    assert together.episodes[metric] == pytest.approx(alone.episodes[metric], rel=1e-6)
    # Five episodes for two ranks: none is left out, none counted twice.
    assert len(together.episodes[metric]) == 5
    # Of all tasks of the last step, not of the first rank's alone.
    of_training = {name for name in alone.metrics if name.startswith(("train/", "meta_gradient/"))}
    assert of_training == {name for name in together.metrics if name.startswith(("train/", "meta_gradient/"))}
    for name in of_training - {"meta_gradient/left_out"}:  # Of the rank tolerance's size, and so rounding, here.
        assert together.metrics[name] == pytest.approx(alone.metrics[name], rel=1e-6), name
    assert together.metrics[f"{metric}_ci95"] == pytest.approx(alone.metrics[f"{metric}_ci95"], rel=1e-6)


def parameters(folder):
    return torch.load(Path(folder) / "checkpoints/last.ckpt", weights_only=True)["state_dict"]


@pytest.mark.timeout(600)
def test_two_processes_train_the_parameters_that_one_trains():
    settings = {method: [*SETTINGS, *IMAGES, f"method={method}"] for method in trained_methods()}
    settings["meta_rkhs_ii"] += EXACT
    settings["regression"] = [*SETTINGS, "data=sinusoid", "method=meta_rkhs_ii", *EXACT]
    settings["compiled"] = [*settings["regression"], "method.compile=true"]
    # Without training: by the first rank's checkpoint, nothing would wait for the others.
    settings |= {method: [*SETTINGS, *IMAGES, f"method={method}"] for method in WITHOUT_TRAINING}
    train_by_two([[*words, "trainer.devices=2", f"run_dir=two/{name}"] for name, words in settings.items()])
    for name, words in settings.items():
        alone = run(*words, folder=f"one/{name}")
        assert ("train/loss" in alone.metrics) == (name not in WITHOUT_TRAINING)
        check_same_scores(read_results(Path("two") / name), alone)
        found = parameters(f"two/{name}")
        # The gradient of a bias before batch norm is 0 but for rounding, 1e-13 here, which Adam divides by 1e-8.
        for key, value in parameters(f"one/{name}").items():
            atol = 1e-6 if key.endswith("bias") else 1e-9
            torch.testing.assert_close(
                found[key], value, rtol=1e-6, atol=atol, msg=lambda m, n=name, k=key: f"{n} {k}: {m}"
            )


def test_lightnings_own_launch_gives_one_folder():
    command = [sys.executable, "-m", "lightning_ntk.train", *SETTINGS, "data=sinusoid", "trainer.devices=2"]
    environment = {**os.environ, "PYTHONPATH": str(conf_folder().parent), "OMP_NUM_THREADS": "1"}
    subprocess.run(command, check=True, env=environment, capture_output=True, timeout=280)
    (folder,) = Path("runs").iterdir()
    assert len(read_results(folder).episodes["test/mse"]) == 5


OWN_TRAINER = """
import sys
import pytorch_lightning as pl
from datamodules.sinusoid import Sinusoid
from lightning_ntk.methods.meta_rkhs_ii import MetaRKHSII
from lightning_ntk.networks.mlp import MLP

pl.seed_everything(0)
data = Sinusoid(steps_per_epoch=3, val_episodes=2, test_episodes=5)
method = MetaRKHSII(MLP((1,), 1).double(), data.spec, rank_tolerance=1e-13, lr=1e-2)
trainer = pl.Trainer(
    max_epochs=1, accelerator="cpu", devices=int(sys.argv[1]), strategy="ddp", precision="64-true", logger=False,
    inference_mode=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
)
trainer.fit(method, data)
trainer.test(method, data, verbose=False)
if trainer.is_global_zero:
    print(trainer.global_step, *method.scores["mse"])
"""


def test_a_trainer_of_ones_own_with_lightnings_defaults_shares_the_episodes_out_once():
    Path("own.py").write_text(OWN_TRAINER)
    environment = {**os.environ, "PYTHONPATH": str(conf_folder().parent), "OMP_NUM_THREADS": "1"}
    alone, together = (
        subprocess.check_output(
            [sys.executable, "-W", "ignore", "own.py", devices],
            env=environment,
            stderr=subprocess.DEVNULL,
            text=True,
            timeout=280,
        ).split()
        for devices in ("1", "2")
    )
    assert together[0] == alone[0] == "3", "steps"
    assert [float(score) for score in together] == pytest.approx([float(score) for score in alone], rel=1e-6)
    assert len(together) == 1 + 5


def test_synchronised_batch_norm_is_refused_with_the_reason():
    with pytest.raises(ConfigError, match=r"sync_batchnorm.*second-order gradients do not pass"):
        train.main([*SETTINGS, "data=sinusoid", "+trainer.sync_batchnorm=true"])
