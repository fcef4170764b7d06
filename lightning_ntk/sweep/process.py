"""The process of one attempt at a job, on the machine where it runs: started, polled, stopped with all its children."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping

from lightning_ntk.sweep.job import Job, log_file

# How long a process that was asked to stop may take, in seconds: a step, and a look at the signal.
GRACE_S = 15.0
# Set by whatever started the sweep (torchrun, Lightning, a SLURM step, an agent of W&B): a job is none of its ranks.
NOT_HANDED_ON = (
    "LOCAL_RANK",
    "NODE_RANK",
    "GROUP_RANK",
    "WORLD_SIZE",
    "RANK",
    "LOCAL_WORLD_SIZE",
    "GROUP_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "PL_GLOBAL_SEED",
    "LIGHTNING_NTK_RUN_FOLDER",
    "LIGHTNING_NTK_LOCK",
    "SLURM_NTASKS",
    "SLURM_NPROCS",
    "SLURM_PROCID",
    "SLURM_LOCALID",
    "SLURM_NODEID",
    "SLURM_GTIDS",
    "SLURM_NTASKS_PER_NODE",
    "SLURM_STEPID",
    "WANDB_RUN_ID",
    "WANDB_SWEEP_ID",
    "WANDB_SWEEP_PARAM_PATH",
)
PREFIXES_NOT_HANDED_ON = ("TORCHELASTIC_", "SLURM_STEP_", "OMPI_COMM_", "PMI_", "PMIX_")


def job_environment(given: Mapping[str, str], added: Mapping[str, str]) -> dict[str, str]:
    """The environment of a job: the given one without the ranks of another program, and what is added."""
    kept = {
        name: value
        for name, value in given.items()
        if name not in NOT_HANDED_ON and not name.startswith(PREFIXES_NOT_HANDED_ON)
    }
    return {**kept, "PYTHONUNBUFFERED": "1", **added}


class JobProcess:
    """One attempt at a job, in a process group of its own that writes to a log.

    Args:
        added: environment variables of the job beside this process's own.
        rank: of the process in a job whose ranks are started one by one; only rank 0 owns the folder and the log.
    """

    def __init__(self, job: Job, attempt: int, added: Mapping[str, str], rank: int = 0) -> None:
        command = [sys.executable, "-m", "lightning_ntk.sweep.start"]
        log = log_file(job, attempt)
        log = log if rank == 0 else log.with_stem(f"{log.stem}_rank{rank}")
        with log.open("ab") as output:
            self.process = subprocess.Popen(
                [*command, str(job.folder), str(rank), str(os.getpid()), *job.arguments()],
                env=job_environment(os.environ, added),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._kill_at: float | None = None
        self._code: int | None = None

    def poll(self) -> int | None:
        """The exit status once it has ended, and nothing of it is left; None while it runs."""
        if self._code is None:
            code = self.process.poll()
            if code is not None or (self._kill_at is not None and time.monotonic() >= self._kill_at):
                self._signal(signal.SIGKILL)  # Its children too, which may outlive it.
            self._code = code
        return self._code

    def stop(self, grace_s: float = GRACE_S) -> None:
        """Ask it to stop, as Ctrl+C does; from `grace_s` seconds later on, `poll` kills it."""
        if self._kill_at is None and self.poll() is None:
            self._signal(signal.SIGINT)
            self._kill_at = time.monotonic() + grace_s

    def kill(self) -> None:
        """Kill it now."""
        if self.poll() is None:
            self._signal(signal.SIGKILL)

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, number)


def run_to_end(job: Job, attempt: int, added: Mapping[str, str], rank: int = 0) -> int:
    """Run an attempt and return its exit status; an exception that arrives meanwhile stops it first."""
    process = JobProcess(job, attempt, added, rank)
    try:
        while (code := process.poll()) is None:
            time.sleep(0.1)
    except BaseException:
        process.stop()
        while process.poll() is None:
            time.sleep(0.1)
        raise
    return code
