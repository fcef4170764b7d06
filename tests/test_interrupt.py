"""Ctrl+C: status 130, the command to go on with, and a folder that it works on."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from test_train import TINY_SINE

from lightning_ntk import train
from lightning_ntk.config import conf_folder
from lightning_ntk.results import read_results


def test_an_interrupted_run_says_how_to_go_on_and_does():
    command = [sys.executable, "-W", "ignore", "-m", "lightning_ntk.cli", "train", *TINY_SINE, "steps=20000"]
    environment = {**os.environ, "PYTHONPATH": str(conf_folder().parent), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [*command, "val_every=10", "run_dir=run"], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    deadline = time.monotonic() + 280
    while not Path("run/checkpoints/last.ckpt").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=280)
    assert process.returncode == 130
    assert f"Go on with: lightning-ntk train ckpt={Path('run').resolve()}" in error.decode()
    assert not Path("run/results.json").exists()
    train.main(["ckpt=run", "steps=10", "val_every=10"])
    assert len(read_results(Path("run")).episodes["test/mse"]) == 5
