"""A run that was killed and resumed ends as one that was never stopped, bit for bit."""

import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from test_train import TINY, TINY_SINE, run

from lightning_ntk import train
from lightning_ntk.config import conf_folder
from lightning_ntk.errors import ConfigError
from lightning_ntk.results import read_results

EIGHT = ["steps=8", "val_every=2"]


def parameters(folder, name="last"):
    return torch.load(f"{folder}/checkpoints/{name}.ckpt", weights_only=True)["state_dict"]


def metric_rows(folder):
    """The rows of metrics.csv without what a clock or the memory decides."""
    with open(f"{folder}/metrics.csv", newline="") as lines:
        table = list(csv.DictReader(lines))
    return [
        {key: value for key, value in row.items() if value and not key.startswith(("time/", "memory/"))}
        for row in table
    ]


def check_equal(folder, other):
    for name in ("last", "best"):
        first, second = parameters(folder, name), parameters(other, name)
        assert first.keys() == second.keys()
        assert all(torch.equal(first[key], second[key]) for key in first)
    a, b = read_results(Path(folder)), read_results(Path(other))
    assert a.episodes == b.episodes
    assert a.episode_ids == b.episode_ids
    assert metric_rows(folder) == metric_rows(other)


@pytest.mark.parametrize("method", ["meta_rkhs_ii", "maml"])
def test_a_killed_run_resumes_to_the_same_end(method):
    settings = [*TINY, "steps=40", "val_every=4", f"method={method}", "data=glyphs", "data.queries=2"]
    settings += ["network.filters=8"]
    run(*settings, folder="whole")
    command = [sys.executable, "-W", "ignore", "-m", "lightning_ntk.train", *settings, "run_dir=killed"]
    environment = {**os.environ, "PYTHONPATH": str(conf_folder().parent), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not Path("killed/checkpoints/last.ckpt").exists():
        assert time.monotonic() < deadline, "no checkpoint came"
        assert process.poll() is None
        time.sleep(0.01)
    time.sleep(0.2)  # Somewhere within a later epoch.
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not Path("killed/results.json").exists(), "the kill came too late to show anything"
    reached = torch.load("killed/checkpoints/last.ckpt", weights_only=True)["global_step"]
    assert 0 < reached < 40
    assert metric_rows("killed"), "what was measured before the kill must be readable"
    train.main(["ckpt=killed"])
    check_equal("whole", "killed")


def test_training_for_longer_continues_where_a_run_ended():
    run(*TINY_SINE, *EIGHT, folder="whole")
    run(*TINY_SINE, "steps=4", "val_every=2", folder="short")
    train.main(["ckpt=short/checkpoints/last.ckpt", "steps=8"])
    for key, value in parameters("whole").items():
        assert torch.equal(value, parameters("short")[key])
    assert read_results(Path("short")).episodes == read_results(Path("whole")).episodes
    assert OmegaConf.load("short/config.yaml").steps == 8


def test_timings_go_on_after_a_resume():
    run(*TINY_SINE, "steps=4", "val_every=2", folder="run")
    before = read_results(Path("run")).timings["fit_s"]
    train.main(["ckpt=run", "steps=6"])
    assert read_results(Path("run")).timings["fit_s"] > before


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["method=maml"], r"checkpoint of MetaRKHSII, but method=MAML"),
        (["val_every=2"], r"val_every=2 differs from the run's 1"),
        (["network.hidden=[7]"], r"another network \(network\.hidden: \[40, 40\] there, \[7\] asked\)"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused(overrides, message):
    train.main([*TINY_SINE, "run_dir=run", "test=false"])
    with pytest.raises(ConfigError, match=message):
        train.main(["ckpt=run", *overrides])


@pytest.mark.parametrize("content", [b"", b"no checkpoint", None])
def test_a_file_that_is_no_checkpoint_of_ours_is_named(content):
    file = Path("strange.ckpt")
    if content is None:
        torch.save({"state_dict": {}}, file)
    else:
        file.write_bytes(content)
    with pytest.raises(ConfigError, match=r"ckpt=strange\.ckpt"):
        train.main(["ckpt=strange.ckpt"])
