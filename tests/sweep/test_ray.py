"""launcher=ray: a cluster of two nodes that loses one, and addresses that do not answer."""

import gc
import socket
import subprocess
import warnings

import pytest
from sweeping import Notes, starts, trivial

from lightning_ntk.errors import ConfigError
from lightning_ntk.running.lock import LOCK_FILE, is_locked
from lightning_ntk.running.results import read_results
from lightning_ntk.settings.config import conf_folder
from lightning_ntk.sweep.command import JobList
from lightning_ntk.sweep.job import Needs
from lightning_ntk.sweep.launchers.ray import RayLauncher, check_answers
from lightning_ntk.sweep.runner import Runner
from lightning_ntk.sweep.settings import RaySettings


@pytest.fixture(scope="module")
def cluster():
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(conf_folder().parent))
        made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
        yield made
        made.shutdown()
        del made
        with warnings.catch_warnings():  # Of the processes that Ray has ended without waiting for them.
            warnings.simplefilter("ignore", ResourceWarning)
            gc.collect()


def test_every_result_is_there_although_a_node_is_lost(cluster, tmp_path):
    second = cluster.add_node(num_cpus=1)
    gate = tmp_path / "gate"  # All jobs stand still after their first step until it is there.
    jobs = [trivial(f"seed={seed}", tmp_path, f"seed={seed}", "steps=3", f"gate={gate}") for seed in range(4)]

    class Killing(Notes):
        """Kills the second node once both are at work, and lets the others go on when its job is dead."""

        killed = False

        def look(self, running):
            begun = [job for job in jobs if (job.folder / "checkpoints" / "last.ckpt").exists()]
            at_work = [job for job in begun if is_locked(job.folder / LOCK_FILE)]
            if len(at_work) == 2 and not self.killed:
                cluster.remove_node(second, allow_graceful=False)
                self.killed = True
            elif self.killed and len(at_work) < 2:
                gate.touch()

    launcher = RayLauncher([Needs()], None, RaySettings(cluster.address))
    board = Killing()
    try:
        states = Runner(JobList(jobs), launcher, board).run()
    finally:
        launcher.close()
    assert board.killed
    assert {state.status for state in states.values()} == {"done"}
    assert [read_results(job.folder).seed for job in jobs] == list(range(4))
    again = [job for job in jobs if states[job.name].attempts > 1]
    assert again, "no job was on the node that was lost"
    assert all(len(starts(job)) == states[job.name].attempts for job in again)
    assert [starts(job)[0][0] for job in again] == ["0"] * len(again)
    assert all(int(starts(job)[-1][0]) > 0 for job in again), "it began anew"


def test_what_no_machine_has_is_refused(cluster):
    with pytest.raises(ConfigError, match=r"trainer\.devices=64: no machine of the Ray cluster has 64 cores"):
        RayLauncher([Needs(devices=64)], None, RaySettings(cluster.address))
    with pytest.raises(ConfigError, match=r"num_nodes=2.*launcher=slurm"):
        RayLauncher([Needs(nodes=2)], None, RaySettings(cluster.address))


def test_an_address_that_does_not_answer_is_named_soon(monkeypatch):
    limits = []
    connect, call = socket.create_connection, subprocess.run

    def connected(address, timeout):
        limits.append(timeout)
        return connect(address, timeout)

    def called(command, timeout, **settings):
        limits.append(timeout)
        return call(command, timeout=1, **settings)

    monkeypatch.setattr(socket, "create_connection", connected)
    monkeypatch.setattr(subprocess, "run", called)
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        with pytest.raises(ConfigError, match=r"ray\.address=127\.0\.0\.1:\d+ does not answer \("):
            check_answers(f"127.0.0.1:{unused.getsockname()[1]}")
    limits.clear()
    refused = pytest.raises(ConfigError, match="does not answer as a Ray cluster")
    with socket.create_server(("127.0.0.1", 0)) as silent, refused:  # It listens, and says nothing.
        check_answers(f"127.0.0.1:{silent.getsockname()[1]}")
    assert len(limits) == 2
    assert sum(limits) <= 20, "as docs/SCALING.md has it"
    with pytest.raises(ConfigError, match="must be auto, HOST:PORT"):
        check_answers("somewhere")
