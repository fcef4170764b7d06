"""Two processes on gloo: one run folder, each episode counted once, the same scores as one process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_train import TINY, run

from lightning_ntk.config import conf_folder
from lightning_ntk.results import read_results

SETTINGS = [*TINY, "data=sinusoid", "data.queries=5", "data.tasks_per_step=4", "trainer.precision=64-true", "steps=4"]


# The default rank tolerance lets gradients differ by 1e-6 with the tasks that share a chunk.
@pytest.mark.parametrize("method", [["method=meta_rkhs_ii", "method.rank_tolerance=1e-13"], ["method=maml"]])
def test_two_processes_give_what_one_gives(method):
    alone = run(*SETTINGS, *method, folder="one")
    command = [sys.executable, "-m", "lightning_ntk.train", *SETTINGS, *method, "trainer.devices=2"]
    environment = {**os.environ, "PYTHONPATH": str(conf_folder().parent), "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, "run_dir=two"], check=True, env=environment, capture_output=True, timeout=200)
    together = read_results(Path("two"))
    assert together.episode_ids == alone.episode_ids
    assert together.episodes["test/mse"] == pytest.approx(alone.episodes["test/mse"], rel=1e-6)
    assert len(together.episodes["test/mse"]) == 5
    first, second = (
        torch.load(f"{folder}/checkpoints/last.ckpt", weights_only=True)["state_dict"] for folder in ("one", "two")
    )
    assert all(torch.allclose(first[key], second[key], rtol=1e-6, atol=1e-9) for key in first)
    assert not Path("runs").exists(), "the second process must not open a folder of its own"
