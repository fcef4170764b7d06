"""Runs whose processes a cluster starts: SLURM's `srun`, or `torchrun`.

There, every rank runs the same command line by itself. The ranks agree on a run folder without talking to each other
(the job's number is in its name), and a job that the cluster starts again goes on in that folder.
"""

import contextlib
import ctypes
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from lightning_ntk.errors import ConfigError
from lightning_ntk.running.run_folder_names import RUN_FOLDER_VARIABLE

PR_SET_PDEATHSIG = 1
# What gloo and NCCL say to the ranks that are left when one has ended.
LOST_RANK = re.compile(r"[Cc]onnection (reset|closed) by peer|remote process exited")


def is_slurm() -> bool:
    """Whether `srun` started this process. Lightning asks the same way: a job named bash or interactive is not one."""
    return "SLURM_NTASKS" in os.environ and os.environ.get("SLURM_JOB_NAME") not in ("bash", "interactive")


def is_torchrun() -> bool:
    """Whether `torchrun` started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def is_child() -> bool:
    """Whether Lightning's first process started this one, as it does without a cluster."""
    return "LOCAL_RANK" in os.environ and RUN_FOLDER_VARIABLE in os.environ and not (is_slurm() or is_torchrun())


def is_first() -> bool:
    """Whether this is the process that owns the run folder."""
    if is_slurm():
        return os.environ.get("SLURM_PROCID", "0") == "0"
    if is_torchrun():
        return os.environ.get("RANK", "0") == "0"
    return not is_child()


def slurm_job() -> str:
    """The job's number as `scontrol` takes it; a task of a job array has two."""
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    return f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}" if array else os.environ["SLURM_JOB_ID"]


def job_name() -> str | None:
    """What all ranks of this job, and no other job, can name a folder after; None outside a cluster.

    Raises:
        ConfigError: under `torchrun` without an id of its own.
    """
    if is_slurm():
        return f"slurm{slurm_job()}"
    if is_torchrun():
        if os.environ["TORCHELASTIC_RUN_ID"] == "none":
            raise ConfigError(
                "torchrun starts every rank by itself, so they need a name for their folder: set run_dir=FOLDER, or "
                "give torchrun an --rdzv-id."
            )
        return f"torchrun-{os.environ['TORCHELASTIC_RUN_ID']}"
    return None


def is_restarted() -> bool:
    """Whether the cluster has started this job before: after a preemption, a failed node or a failed rank."""
    counts = (os.environ.get("SLURM_RESTART_COUNT"), os.environ.get("TORCHELASTIC_RESTART_COUNT"))
    return any(count not in (None, "", "0") for count in counts)


@contextlib.contextmanager
def requeued_on_signal(folder: Path) -> Iterator[None]:
    """Under SLURM, SIGUSR1 (`sbatch --signal=SIGUSR1@60`) puts the job back into the queue.

    Lightning would save a checkpoint inside the signal's handler: in the middle of a step, and with a barrier that
    ranks in other places may never reach. Ours goes on from the last checkpoint, at most `val_every` steps back, and so
    ends exactly as a run that was never stopped. `running.trainer` keeps Lightning from setting its own.
    """
    if not is_slurm():
        yield
        return

    def requeue(number: int, frame: object) -> None:
        if is_first():
            sys.stderr.write(f"lightning-ntk: requeueing job {slurm_job()}, which works on {folder}\n")
            try:
                subprocess.run(["scontrol", "requeue", slurm_job()], check=False)
            except OSError as error:  # In a container, for example; the training need not end for it.
                sys.stderr.write(f"lightning-ntk: scontrol cannot be run ({error.strerror}): submit the job again\n")

    before = signal.signal(signal.SIGUSR1, requeue)
    try:
        yield
    finally:
        signal.signal(signal.SIGUSR1, before)


def die_with_parent() -> None:
    """Let the system end this process when the one that started it is killed (Linux; elsewhere it outlives it)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
