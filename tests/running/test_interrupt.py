"""Ctrl+C and SIGTERM: status 130, the command to go on with, and a folder that it works on."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from test_train import TINY_SINE, run

from lightning_ntk import evaluate, train
from lightning_ntk.methods.base import MetaLearner
from lightning_ntk.running.interruption import Interruption
from lightning_ntk.running.results import read_results
from lightning_ntk.settings.config import conf_folder

SIGNALS = [signal.SIGINT, signal.SIGTERM]


@pytest.mark.parametrize("number", SIGNALS)
def test_an_interrupted_run_says_how_to_go_on_and_does(number):
    command = [sys.executable, "-W", "ignore", "-m", "lightning_ntk.cli", "train", *TINY_SINE, "steps=20000"]
    environment = {**os.environ, "PYTHONPATH": str(conf_folder().parent), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [*command, "val_every=10", "run_dir=run"], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    deadline = time.monotonic() + 280
    while not Path("run/checkpoints/last.ckpt").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(number)
    _, error = process.communicate(timeout=280)
    assert process.returncode == 130, error.decode()
    assert f"Go on with: lightning-ntk train ckpt={Path('run').resolve()}" in error.decode()
    assert not Path("run/results.json").exists()
    train.main(["ckpt=run", "steps=10", "val_every=10"])
    assert len(read_results(Path("run")).episodes["test/mse"]) == 5


def test_an_interruption_while_a_checkpoint_is_written_is_one_too(monkeypatch):
    save = torch.save

    def interrupted(checkpoint, file):
        write = file.write

        class Slow:
            """Ctrl+C comes within the second write, of which torch makes a RuntimeError."""

            calls = 0

            def write(self, content):
                self.calls += 1
                if self.calls == 2:
                    signal.raise_signal(signal.SIGINT)
                return write(content)

            def flush(self):
                file.flush()

        save(checkpoint, Slow())

    monkeypatch.setattr(torch, "save", interrupted)
    with pytest.raises(KeyboardInterrupt, match=r"There is no checkpoint yet: delete .*run and train again"):
        train.main([*TINY_SINE, "steps=2", "val_every=1", "run_dir=run"])
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert not Path("run/checkpoints/last.ckpt").exists()


@pytest.mark.parametrize("number", SIGNALS)
def test_an_interrupted_test_says_that_it_has_no_result(monkeypatch, number):
    run(*TINY_SINE)
    monkeypatch.setattr(MetaLearner, "test_step", lambda *_: signal.raise_signal(number))
    with pytest.raises(KeyboardInterrupt, match="There is no result"):
        evaluate.main(["run=run", "name=it"])
    assert not Path("run/evaluations/it/results.json").exists()


def test_other_errors_stay_what_they_are():
    with pytest.raises(RuntimeError, match="of its own"), Interruption().saying(str):
        raise RuntimeError("of its own")
    with pytest.raises(SystemExit), Interruption().saying(str):
        sys.exit(1)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_process_that_ignores_the_signal_goes_on_ignoring_it(number):
    before = signal.signal(number, signal.SIG_IGN)
    try:
        with Interruption().saying(str):
            signal.raise_signal(number)
        assert signal.getsignal(number) is signal.SIG_IGN
    finally:
        signal.signal(number, before)


def test_lightnings_handler_of_sigterm_is_not_in_force(monkeypatch):
    """It would broadcast inside of the handler, for which other processes may never be ready."""
    seen = []

    def watched(step):
        def watching(self, *arguments):
            seen.append(signal.getsignal(signal.SIGTERM))
            return step(self, *arguments)

        return watching

    for step in ("training_step", "test_step"):
        monkeypatch.setattr(MetaLearner, step, watched(getattr(MetaLearner, step)))
    run(*TINY_SINE)
    assert len(seen) > 1
    assert all(isinstance(getattr(handler, "__self__", None), Interruption) for handler in seen)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
