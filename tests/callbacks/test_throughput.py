"""Episodes a second and the share of time waiting for data, against a clock that the test sets."""

import csv
import types

import pytest
import torch
from test_train import TINY_SINE, run

from callbacks import throughput
from callbacks.throughput import Throughput


class Clock:
    """A time that passes only when told to."""

    def __init__(self, monkeypatch) -> None:
        self.seconds = 100.0
        monkeypatch.setattr(throughput.time, "perf_counter", lambda: self.seconds)


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


def train_epoch(callback, clock, *, steps, ranks=1, device="cpu", log_every=10, goes_on=False) -> dict[str, float]:
    """Steps that wait a second and work three, as Lightning tells of them; returns what is logged at the validation.

    `goes_on`: the epoch has begun before, and this validation is another one inside it.
    """
    trainer = types.SimpleNamespace(
        num_training_batches=steps, world_size=ranks, global_step=10, log_every_n_steps=log_every, sanity_checking=False
    )
    logged = {}
    module = types.SimpleNamespace(device=torch.device(device), log=lambda name, value: logged.update({name: value}))
    batch = types.SimpleNamespace(tasks=4)
    if not goes_on:
        callback.on_train_epoch_start(trainer, module)
    for number in range(steps):
        clock.seconds += 1
        callback.on_train_batch_start(trainer, module, batch, number)
        clock.seconds += 3
        callback.on_train_batch_end(trainer, module, None, batch, number)
    callback.on_validation_start(trainer, module)
    clock.seconds += 1000  # The validation and its probes.
    callback.on_validation_epoch_end(trainer, module)
    callback.on_validation_end(trainer, module)
    return logged


def test_a_quarter_of_the_time_is_waiting_and_a_second_has_one_episode_a_rank(clock):
    callback = Throughput()
    assert train_epoch(callback, clock, steps=5) == {"time/episodes_per_s": 1.0, "time/data_share": 0.25}
    assert train_epoch(callback, clock, steps=5, ranks=2) == {"time/episodes_per_s": 2.0, "time/data_share": 0.25}


def test_the_first_steps_do_not_count_where_there_are_more(clock):
    callback = Throughput()
    module = types.SimpleNamespace(device=torch.device("cpu"))
    trainer = types.SimpleNamespace(num_training_batches=5, world_size=1, global_step=1, log_every_n_steps=10)
    batch = types.SimpleNamespace(tasks=4)
    callback.on_train_epoch_start(trainer, module)
    for number, seconds in enumerate([50.0, 20.0, 10.0, 2.0, 2.0]):
        clock.seconds += seconds
        callback.on_train_batch_start(trainer, module, batch, number)
        callback.on_train_batch_end(trainer, module, None, batch, number)
    callback.on_validation_start(trainer, module)
    logged = {}
    module.log = lambda name, value: logged.update({name: value})
    trainer.sanity_checking = False
    callback.on_validation_epoch_end(trainer, module)
    assert logged == {"time/episodes_per_s": 2.0, "time/data_share": 1.0}
    # One step a validation: nothing else is left to measure.
    assert train_epoch(Throughput(), clock, steps=1)["time/episodes_per_s"] == 1.0


def test_validations_inside_an_epoch_are_no_waiting(clock):
    callback = Throughput()
    for goes_on in (False, True, True):
        logged = train_epoch(callback, clock, steps=5, goes_on=goes_on)
        assert logged == {"time/episodes_per_s": 1.0, "time/data_share": 0.25}


def test_a_trainer_that_logs_at_validations_alone_is_measured(clock):
    assert train_epoch(Throughput(), clock, steps=5, log_every=0)["time/data_share"] == 0.25


def test_a_gpu_is_read_where_it_can_be(clock, monkeypatch):
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    read = iter([40, 60])
    monkeypatch.setattr(torch.cuda, "utilization", lambda device: next(read))
    assert train_epoch(Throughput(), clock, steps=5, device="cuda")["gpu/utilization"] == 50.0

    def missing(device):
        raise ModuleNotFoundError("nvidia-ml-py does not seem to be installed")

    monkeypatch.setattr(torch.cuda, "utilization", missing)
    assert "gpu/utilization" not in train_epoch(Throughput(), clock, steps=5, device="cuda")


def test_a_run_logs_it_and_trains_as_without():
    plain = run(*TINY_SINE, folder="plain")
    measured = run(*TINY_SINE, "callbacks=[timing,throughput]", folder="measured")
    assert measured.episodes == plain.episodes
    assert 0 < measured.metrics["time/data_share"] < 1
    assert measured.metrics["time/episodes_per_s"] > 0
    with open("measured/metrics.csv", newline="") as lines:
        rows = [row for row in csv.DictReader(lines) if row["time/data_share"]]
    assert len(rows) == 2
