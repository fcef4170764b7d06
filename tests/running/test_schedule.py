"""The meta learning rate over the steps: the curve, its end, and a run that is taken up on the way."""

import csv
import math
import signal
from pathlib import Path

import pytest
import torch
from test_resume import check_equal, parameters
from test_train import TINY_SINE, run

from lightning_ntk import train
from lightning_ntk.errors import ConfigError
from lightning_ntk.methods.maml import MAML
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


class TwoRates(MAML):
    """Its head learns ten times as fast."""

    def configure_optimizers(self):
        head = {"params": self.network.head.parameters(), "lr": 10 * self.lr}
        return torch.optim.AdamW([{"params": self.network.features.parameters()}, head], lr=self.lr)


class OwnSchedule(MAML):
    def configure_optimizers(self):
        optimiser = super().configure_optimizers()
        return {"optimizer": optimiser, "lr_scheduler": torch.optim.lr_scheduler.StepLR(optimiser, 1)}


class TwoOptimisers(MAML):
    def configure_optimizers(self):
        return super().configure_optimizers(), super().configure_optimizers()


class Manual(MAML):
    automatic_optimization = False


def of_class(kind, folder):
    """The words that choose a method of one's own."""
    (folder / "method").mkdir(exist_ok=True)
    (folder / "method" / "mine.yaml").write_text(f"_target_: test_schedule.{kind.__name__}\nlr: 0.01\n")
    return ["--config-dir", str(folder), *(word for word in COSINE if not word.startswith("method=")), "method=mine"]


def kept_rates(folder):
    checkpoint = torch.load(f"{folder}/checkpoints/last.ckpt", weights_only=True)
    return [group["lr"] for group in checkpoint["optimizer_states"][0]["param_groups"]]


@pytest.mark.parametrize("schedule", ["cosine", "constant"])
def test_parameters_with_rates_of_their_own_keep_the_ratio_also_when_a_run_goes_on(schedule, tmp_path, monkeypatch):
    words = [*of_class(TwoRates, tmp_path), f"lr_schedule={schedule}", "method.lr=1e-3"]
    train.main([*words, "steps=8", "run_dir=whole"])
    slow, fast = kept_rates("whole")
    assert fast == pytest.approx(10 * slow)
    assert slow == pytest.approx(1e-3 if schedule == "constant" else 5e-4 * (1 + math.cos(math.pi * 7 / 8)))
    step = MAML.training_step

    def stop(self, *arguments):
        if self.global_step == 5:
            signal.raise_signal(signal.SIGINT)
        return step(self, *arguments)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(MAML, "training_step", stop)
        train.main([*words, "steps=8", "run_dir=stopped"])
    train.main(["ckpt=stopped"])
    check_equal("whole", "stopped")
    if schedule == "constant":
        train.main(["ckpt=stopped", "steps=10", "method.lr=2e-3"])
        assert kept_rates("stopped") == pytest.approx([2e-3, 2e-2])


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (OwnSchedule, r"OwnSchedule has a learning rate schedule of its own.*lr_schedule=constant"),
        (TwoOptimisers, "TwoOptimisers has 2 optimisers"),
        (Manual, "Manual has automatic_optimization = False"),
    ],
)
def test_another_way_to_take_steps_is_refused_before_training(kind, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        train.main([*of_class(kind, tmp_path), "run_dir=run"])
    assert not Path("run").exists()


def test_a_schedule_of_ones_own_is_taken_beside_a_constant_rate(tmp_path):
    train.main([*of_class(OwnSchedule, tmp_path), "lr_schedule=constant", "steps=4", "run_dir=run"])
    assert kept_rates("run")[0] < 0.01
