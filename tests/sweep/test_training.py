"""Real trainings on two devices each under all three launchers: the same results, and none of the others' ranks."""

from pathlib import Path

import pytest
from test_train import TINY_SINE

from lightning_ntk import cli
from lightning_ntk.running.results import read_results
from lightning_ntk.settings.config import conf_folder
from lightning_ntk.sweep.job import read_state

LAUNCHERS = {
    "local": ["launcher=local"],
    "ray": ["launcher=ray"],
    "slurm": ["launcher=slurm", "slurm.cluster=local", "slurm.cpus=1"],
}


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_jobs_of_two_devices_run_under_every_launcher(launcher, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(conf_folder().parent))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    # As inside a training that Lightning has started on several devices.
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "4")
    settings = [*TINY_SINE, "method=maml", "trainer.precision=64-true"]
    alone = ["sweep", *settings, "seed=0,1", "out=alone"]
    assert cli.main(alone) == 0
    assert cli.main(["sweep", *settings, "seed=0,1", "trainer.devices=2", "out=two", *LAUNCHERS[launcher]]) == 0
    for seed in (0, 1):
        first, second = read_results(Path(f"alone/seed={seed}")), read_results(Path(f"two/seed={seed}"))
        assert read_state(Path(f"two/seed={seed}")).attempts == 1
        assert second.config["trainer"]["devices"] == 2
        assert second.episode_ids == first.episode_ids
        assert second.episodes["test/mse"] == pytest.approx(first.episodes["test/mse"], rel=1e-6)
    assert not Path("runs").exists()
