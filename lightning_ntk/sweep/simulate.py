"""`python -m lightning_ntk.sweep.simulate`: how a sweep of 1000 jobs goes on 64 GPUs of which some are lost.

The runner is the real one, with its files; the launcher and the clock are not. A job's training time is drawn from a
log-normal distribution. A GPU is lost at random times, with whatever runs on it, and comes back after a while; its job
is taken up again from its last checkpoint. Some jobs fail by themselves, which is final.
"""

import dataclasses
import heapq
import random
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from lightning_ntk.running.results import RunResult, write_results
from lightning_ntk.sweep.command import JobList
from lightning_ntk.sweep.job import Job, State
from lightning_ntk.sweep.launchers.base import Exit
from lightning_ntk.sweep.progress import Progress
from lightning_ntk.sweep.runner import Clock, Runner


@dataclasses.dataclass(frozen=True)
class Cluster:
    """What is simulated; times in seconds.

    Attributes:
        job_s: median time of a job, with `spread` (of its logarithm) around it.
        start_s: from a job's start to its first step.
        checkpoint_s: between two checkpoints; what was done since the last one is lost with a GPU.
        lost_every_s: mean time until a given GPU is lost; `repair_s` until it is back.
        own_failures: share of jobs that fail by themselves.
    """

    jobs: int = 1000
    gpus: int = 64
    job_s: float = 3600.0
    spread: float = 0.5
    start_s: float = 20.0
    checkpoint_s: float = 300.0
    lost_every_s: float = 48 * 3600.0
    repair_s: float = 1800.0
    own_failures: float = 0.02
    seed: int = 0


class SimulatedClock(Clock):
    """A clock that moves when somebody sleeps."""

    def __init__(self) -> None:
        self.time = 0.0
        super().__init__(lambda: self.time, self._advance)

    def _advance(self, seconds: float) -> None:
        self.time += seconds


class SimulatedHandle:
    """An attempt: it ends at `ends_at`, or with its GPU at `lost_at`."""

    def __init__(self, launcher: "SimulatedLauncher", job: Job, ends_at: float, lost_at: float, gpu: int) -> None:
        self.launcher, self.job, self.gpu = launcher, job, gpu
        self.ends_at, self.lost_at, self.started = ends_at, lost_at, launcher.clock.time
        self._exit: Exit | None = None

    def poll(self) -> Exit | None:
        if self._exit is None and self.launcher.clock.time >= min(self.ends_at, self.lost_at):
            self._exit = self.launcher.end(self)
        return self._exit

    def stop(self) -> None:
        """Nothing is stopped in a simulation."""

    def kill(self) -> None:
        """Nothing is stopped in a simulation."""


class SimulatedLauncher:
    """As many GPUs as there are at the moment, each with one job."""

    interval_s = 20.0

    def __init__(self, cluster: Cluster, clock: SimulatedClock) -> None:
        self.cluster, self.clock = cluster, clock
        self.random = random.Random(cluster.seed)
        self.free = list(range(cluster.gpus))
        self.in_repair: list[tuple[float, int]] = []
        self.lost_at = [self._next_loss() for _ in range(cluster.gpus)]
        self.left: dict[str, float] = {}
        self.fails: dict[str, bool] = {}
        self.used_s = self.wasted_s = 0.0
        self.losses = 0

    @property
    def slots(self) -> int:
        """The GPUs that are there now."""
        while self.in_repair and self.in_repair[0][0] <= self.clock.time:
            self.free.append(heapq.heappop(self.in_repair)[1])
        return self.cluster.gpus - len(self.in_repair)

    def _next_loss(self) -> float:
        return self.clock.time + self.random.expovariate(1 / self.cluster.lost_every_s)

    def submit(self, attempts: Sequence[tuple[Job, int]]) -> list[SimulatedHandle]:
        handles = []
        for job, _ in attempts:
            if job.name not in self.left:
                self.left[job.name] = self.cluster.job_s * self.random.lognormvariate(0, self.cluster.spread)
                self.fails[job.name] = self.random.random() < self.cluster.own_failures
            gpu = self.free.pop()
            while self.lost_at[gpu] <= self.clock.time:  # It was lost and repaired while it was idle.
                self.lost_at[gpu] = self._next_loss()
            ends_at = self.clock.time + self.cluster.start_s + self.left[job.name]
            handles.append(SimulatedHandle(self, job, ends_at, self.lost_at[gpu], gpu))
        return handles

    def end(self, handle: SimulatedHandle) -> Exit:
        """Account for an attempt that is over."""
        worked = min(handle.ends_at, handle.lost_at) - handle.started
        self.used_s += worked
        if handle.lost_at < handle.ends_at:
            self.losses += 1
            kept = max(0.0, worked - self.cluster.start_s) // self.cluster.checkpoint_s * self.cluster.checkpoint_s
            self.left[handle.job.name] -= kept
            self.wasted_s += worked - kept
            self.lost_at[handle.gpu] = self._next_loss() + self.cluster.repair_s
            heapq.heappush(self.in_repair, (self.clock.time + self.cluster.repair_s, handle.gpu))
            return Exit(None, "the GPU is lost")
        self.free.append(handle.gpu)
        if self.fails[handle.job.name]:
            return Exit(1)
        write_results(handle.job.folder, RESULT)
        return Exit(0)

    def close(self) -> None:
        """Nothing is held."""


RESULT = RunResult("maml", "glyphs", 0, {}, {"test/accuracy": [0.5]}, "", {}, {}, {}, {})


class Silent:
    """A board that shows nothing."""

    def changed(self, job: Job, state: State, progress: Progress) -> None:
        """Nobody looks."""

    def look(self, running: Sequence[tuple[Job, State, Progress]]) -> None:
        """Nobody looks."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How it went; times in seconds.

    Attributes:
        makespan_s: from the start to the end of the last job.
        ideal_s: the work of all jobs shared out evenly over all GPUs, with no loss.
        busy: share of the GPUs' time, those in repair included, in which a job ran.
        wasted: share of the time of jobs that was lost with a GPU.
    """

    done: int
    failed: int
    losses: int
    most_attempts: int
    makespan_s: float
    ideal_s: float
    busy: float
    wasted: float


def simulate(cluster: Cluster, folder: Path, retries: int = 5) -> Outcome:
    """Run a sweep on a cluster that does not exist."""
    clock = SimulatedClock()
    launcher = SimulatedLauncher(cluster, clock)
    jobs = [Job(f"job={number}", (f"seed={number}",), folder / f"job={number}") for number in range(cluster.jobs)]
    states = Runner(JobList(jobs), launcher, Silent(), retries, clock).run()
    statuses = [state.status for state in states.values()]
    work = launcher.used_s - launcher.wasted_s
    return Outcome(
        done=statuses.count("done"),
        failed=statuses.count("failed"),
        losses=launcher.losses,
        most_attempts=max(state.attempts for state in states.values()),
        makespan_s=clock.time,
        ideal_s=work / cluster.gpus,
        busy=launcher.used_s / (clock.time * cluster.gpus),
        wasted=launcher.wasted_s / launcher.used_s,
    )


def main() -> None:
    """Print the schedule of several clusters as a Markdown table."""
    rows = [
        ("no losses", Cluster(lost_every_s=1e12)),
        ("a GPU is lost every 48 h of its time", Cluster()),
        ("every 6 h", Cluster(lost_every_s=6 * 3600.0)),
        ("every 6 h, checkpoints once an hour", Cluster(lost_every_s=6 * 3600.0, checkpoint_s=3600.0)),
    ]
    header = ["1000 jobs of 1 h (median) on 64 GPUs", "done", "failed", "GPUs lost", "most attempts", "hours"]
    header += ["ideal hours", "GPUs busy, %", "work lost, %"]
    lines = [header, ["---"] + ["---:"] * (len(header) - 1)]
    for name, cluster in rows:
        with tempfile.TemporaryDirectory() as folder:
            outcome = simulate(cluster, Path(folder))
        numbers = [outcome.done, outcome.failed, outcome.losses, outcome.most_attempts]
        times = [f"{outcome.makespan_s / 3600:.1f}", f"{outcome.ideal_s / 3600:.1f}"]
        shares = [f"{100 * outcome.busy:.1f}", f"{100 * outcome.wasted:.1f}"]
        lines.append([name, *map(str, numbers), *times, *shares])
    sys.stdout.write("\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n")


if __name__ == "__main__":
    main()
