"""The simulated cluster: against a schedule made by hand, and a count of what is lost."""

import pytest

from lightning_ntk.sweep.job import read_state
from lightning_ntk.sweep.simulate import Cluster, simulate

EVEN = Cluster(jobs=20, gpus=8, job_s=1000, spread=0.0, start_s=20, lost_every_s=1e12, own_failures=0.0)


def test_equal_jobs_take_whole_rounds(tmp_path):
    outcome = simulate(EVEN, tmp_path)
    assert (outcome.done, outcome.failed, outcome.losses, outcome.most_attempts) == (20, 0, 0, 1)
    assert outcome.makespan_s == pytest.approx(3 * 1020, abs=3 * 20), "20 jobs on 8 GPUs are three rounds"
    assert outcome.ideal_s == pytest.approx(20 * 1020 / 8)
    assert outcome.busy == pytest.approx(20 * 1020 / (8 * outcome.makespan_s))


def test_lost_gpus_cost_work_and_no_job(tmp_path):
    stormy = Cluster(jobs=60, gpus=4, lost_every_s=4 * 3600, own_failures=0.1)
    outcome = simulate(stormy, tmp_path, retries=20)
    assert outcome.losses > 5
    assert outcome.done + outcome.failed == 60
    assert 0 < outcome.failed < 15, "those that fail by themselves"
    states = [read_state(folder) for folder in tmp_path.iterdir()]
    assert sum(state.attempts - 1 for state in states) == outcome.losses
    assert sum((tmp_path / f"job={number}" / "results.json").exists() for number in range(60)) == outcome.done
    assert 0 < outcome.wasted < 0.1, "at most a checkpoint's interval and a start for each loss"
    assert simulate(stormy, tmp_path / "again", retries=20) == outcome


def test_work_that_was_kept_is_not_done_twice(tmp_path):
    even = Cluster(jobs=40, gpus=4, spread=0.0, lost_every_s=2 * 3600, own_failures=0.0)
    outcome = simulate(even, tmp_path, retries=20)
    assert outcome.losses > 5
    assert outcome.ideal_s == pytest.approx(40 * (3600 + 20) / 4)


def test_a_job_is_given_up_after_its_retries(tmp_path):
    outcome = simulate(Cluster(jobs=8, gpus=4, lost_every_s=1800, own_failures=0.0), tmp_path, retries=0)
    assert outcome.failed == outcome.losses > 0
    assert outcome.most_attempts == 1
