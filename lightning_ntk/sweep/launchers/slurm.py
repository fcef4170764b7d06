"""launcher=slurm: jobs are SLURM jobs in an array, through submitit; a task of SLURM's is a device of the job.

submitit's own preemption is used: on its signal the training is stopped, the SLURM job goes back into the queue, and
takes the run up from its last checkpoint. `slurm.cluster=local` runs the same code on this machine.
"""

import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_ntk.errors import ConfigError, MissingDependencyError
from lightning_ntk.sweep.job import Job, Needs
from lightning_ntk.sweep.launchers.base import Exit
from lightning_ntk.sweep.process import run_to_end
from lightning_ntk.sweep.settings import SlurmSettings

# As long as submitit itself waits.
RESULTS_WITHIN_S = 15.0
# submitit lets a job meet its time limit so often before it gives it up; a long training goes on each time.
TIME_LIMITS = 10_000


def import_submitit() -> Any:
    """submitit, which is an extra."""
    try:
        import submitit
    except ImportError as error:
        raise MissingDependencyError(
            "launcher=slurm needs submitit: pip install 'lightning_ntk[sweep]', or pip install 'submitit>=1.5'."
        ) from error
    return submitit


class Attempt:
    """What submitit pickles and calls in every task of a job."""

    def __init__(self, job: Job, number: int) -> None:
        self.job, self.number = job, number

    def __call__(self) -> int:
        """Run this task's process of the job; returns its exit status."""
        environment = import_submitit().JobEnvironment()
        return run_to_end(self.job, self.number, rank_variables(environment, self.job), environment.global_rank)

    def checkpoint(self) -> Any:
        """What submitit puts back into the queue when the job is preempted: itself, to go on from its checkpoint."""
        return import_submitit().helpers.DelayedSubmission(self)


def rank_variables(environment: Any, job: Job) -> dict[str, str]:
    """What Lightning reads when somebody else starts its ranks; nothing for a job of one process."""
    if environment.num_tasks == 1:
        return {}
    # The job's number decides the port, so that all ranks name the same one.
    number = int(re.sub(r"\D", "", environment.job_id) or 0)
    return {
        "LOCAL_RANK": str(environment.local_rank),
        "NODE_RANK": str(environment.node),
        "MASTER_ADDR": "127.0.0.1" if environment.num_nodes == 1 else environment.hostnames[0],
        "MASTER_PORT": str(20_000 + number % 20_000),
        "LIGHTNING_NTK_RUN_FOLDER": str(job.folder),
    }


class SlurmHandle:
    """An attempt that was handed to submitit."""

    def __init__(self, submitit: Any, job: Any) -> None:
        self._submitit, self._job = submitit, job
        self._exit: Exit | None = None
        # Until when the results of a job that has ended may be on their way through the shared folder.
        self._results_until: float | None = None

    def poll(self) -> Exit | None:
        if self._exit is None and self._job.done():
            if self._results_until is None:
                self._results_until = time.monotonic() + RESULTS_WITHIN_S
            tasks = [self._job.task(number) for number in range(self._job.num_tasks)]
            if all(task.paths.result_pickle.exists() for task in tasks):
                self._exit = self._read()
            elif time.monotonic() >= self._results_until:  # Cancelled, timed out, or its machine is gone.
                self._exit = Exit(None, f"SLURM job {self._job.job_id} ended as {self._job.state}, without results")
        return self._exit

    def _read(self) -> Exit:
        try:
            codes = self._job.results()
        except self._submitit.core.utils.FailedJobError as error:  # Of our own function.
            return Exit(1, str(error).strip().splitlines()[-1])
        # One rank's failure ends the others': the first one that is not zero.
        return Exit(next((code for code in codes if code), 0))

    def stop(self) -> None:
        self._results_until = time.monotonic()
        self._job.cancel(check=False)

    def kill(self) -> None:
        self._job.cancel(check=False)


class SlurmLauncher:
    """Submits jobs in arrays of those that need the same.

    Args:
        folder: where submitit keeps what it hands over; all machines must see it.

    Raises:
        ConfigError: there is no SLURM here.
    """

    def __init__(self, needs: Sequence[Needs], jobs: int | None, settings: SlurmSettings, folder: Path) -> None:
        self.submitit = import_submitit()
        if settings.cluster not in ("slurm", "local"):
            raise ConfigError(f"slurm.cluster must be slurm or local, but got {settings.cluster!r}.")
        for need in needs:
            if not need.devices:
                raise ConfigError("trainer.devices must be a number under launcher=slurm: it is the number of tasks.")
        try:
            submitit_folder = folder / "slurm"
            self.executor = self.submitit.AutoExecutor(
                submitit_folder, cluster=settings.cluster, slurm_max_num_timeout=TIME_LIMITS
            )
        except (RuntimeError, OSError) as error:
            raise ConfigError(f"launcher=slurm: {error} (is this a machine of a SLURM cluster?)") from error
        self.settings = settings
        self.slots = jobs or 10_000
        self.interval_s = 0.1 if settings.cluster == "local" else 5.0

    def parameters(self, need: Needs) -> dict[str, Any]:
        """What SLURM is asked for."""
        asked = {
            "name": "lightning_ntk",
            "nodes": need.nodes,
            "tasks_per_node": need.devices,
            "cpus_per_task": self.settings.cpus,
            "gpus_per_node": 0 if need.cpu else need.devices,
            "timeout_min": self.settings.minutes,
        }
        if self.settings.mem_gb is not None:
            asked["mem_gb"] = self.settings.mem_gb
        if self.settings.cluster == "slurm":
            if self.settings.partition is not None:
                asked["slurm_partition"] = self.settings.partition
            if self.settings.account is not None:
                asked["slurm_account"] = self.settings.account
            asked["slurm_additional_parameters"] = dict(self.settings.extra)
            asked["slurm_array_parallelism"] = min(self.slots, 1000)
        return asked

    def submit(self, attempts: Sequence[tuple[Job, int]]) -> list[SlurmHandle]:
        handles: dict[str, SlurmHandle] = {}
        alike: dict[tuple, list[tuple[Job, int]]] = {}
        for job, number in attempts:
            alike.setdefault((job.needs.devices, job.needs.nodes, job.needs.cpu), []).append((job, number))
        for same in alike.values():
            self.executor.update_parameters(**self.parameters(same[0][0].needs))
            with self.executor.batch():
                submitted = [self.executor.submit(Attempt(job, number)) for job, number in same]
            for (job, _), handed in zip(same, submitted, strict=True):
                handles[job.name] = SlurmHandle(self.submitit, handed)
        return [handles[job.name] for job, _ in attempts]

    def close(self) -> None:
        """Nothing is held: SLURM keeps what it was given."""
