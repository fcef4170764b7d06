"""The meta learning rate over the steps: the curve, its end, and a run that is taken up on the way."""

import csv
import math
import signal

import pytest
from test_resume import check_equal, parameters
from test_train import TINY_SINE, run

from lightning_ntk import train
from lightning_ntk.errors import ConfigError
from lightning_ntk.running.schedule import CosineSchedule

COSINE = [*TINY_SINE, "lr_schedule=cosine", "method.lr=0.01", "val_every=2", "trainer.log_every_n_steps=1"]


def rates(folder):
    with open(f"{folder}/metrics.csv", newline="") as lines:
        return {int(row["step"]): float(row["train/lr"]) for row in csv.DictReader(lines) if row.get("train/lr")}


def test_the_rate_falls_along_a_half_cosine():
    run(*COSINE, "steps=8")
    expected = {step: 0.005 * (1 + math.cos(math.pi * step / 8)) for step in range(8)}
    assert rates("run") == pytest.approx(expected, rel=1e-6)


def test_a_run_that_is_taken_up_goes_on_along_the_curve(monkeypatch):
    whole = run(*COSINE, "steps=8", folder="whole")
    schedule = CosineSchedule.on_train_batch_start

    def stop(self, trainer, *args):
        if trainer.global_step == 5:
            signal.raise_signal(signal.SIGINT)
        schedule(self, trainer, *args)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(CosineSchedule, "on_train_batch_start", stop)
        run(*COSINE, "steps=8", folder="stopped")
    train.main(["ckpt=stopped"])
    check_equal("whole", "stopped")
    assert whole.metrics["train/lr"] < 0.001


def test_it_is_the_optimizer_that_gets_the_rate():
    run(*COSINE, "steps=2", folder="cosine")
    run(*COSINE, "steps=2", "lr_schedule=constant", folder="constant")
    assert rates("constant") == {}
    assert any(not value.equal(parameters("constant")[key]) for key, value in parameters("cosine").items())


def test_another_schedule_is_refused():
    with pytest.raises(ConfigError, match=r"lr_schedule must be one of constant, cosine, but got 'linear'"):
        train.main([*TINY_SINE, "lr_schedule=linear"])
