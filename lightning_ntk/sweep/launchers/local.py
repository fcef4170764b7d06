"""launcher=local: jobs are processes of this machine, each with its GPUs or its share of the cores."""

import os
import re
import shutil
import subprocess
from collections.abc import Sequence

from lightning_ntk.errors import ConfigError
from lightning_ntk.sweep.job import Job, Needs
from lightning_ntk.sweep.launchers.base import Exit
from lightning_ntk.sweep.process import JobProcess


def visible_gpus() -> list[str]:
    """The GPUs that a process started here would see, as CUDA_VISIBLE_DEVICES names them. Without importing torch."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        return [name.strip() for name in chosen.split(",") if name.strip() not in ("", "-1")]
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    listing = subprocess.run([tool, "--list-gpus"], capture_output=True, text=True, check=False).stdout
    return re.findall(r"^GPU (\d+):", listing, re.MULTILINE)  # The parts of a GPU (MIG) stand between them.


def available_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class LocalHandle:
    """An attempt in a process of this machine; gives its slot back when it has ended."""

    def __init__(self, process: JobProcess, slot: int, free: list[int]) -> None:
        self.process, self._slot, self._free = process, slot, free
        self._exit: Exit | None = None

    def poll(self) -> Exit | None:
        if self._exit is None and (code := self.process.poll()) is not None:
            self._exit = Exit(code)
            self._free.append(self._slot)
        return self._exit

    def stop(self) -> None:
        self.process.stop()

    def kill(self) -> None:
        self.process.kill()


class LocalLauncher:
    """Runs `jobs` at once.

    With GPUs, slot i has the GPUs i d, ..., i d + d - 1 (modulo their number: more slots than GPUs share them), where d
    is the largest number of devices that a job asks for. The cores are shared out through OMP_NUM_THREADS, unless that
    is set already.

    Raises:
        ConfigError: a job asks for more devices or machines than there are.
    """

    interval_s = 0.05

    def __init__(self, needs: Sequence[Needs], jobs: int | None) -> None:
        gpus, cores = visible_gpus(), available_cores()
        self.gpus = [] if all(need.cpu for need in needs) else gpus
        devices = 1
        for need in needs:
            present, what = (len(gpus), "GPUs") if gpus and not need.cpu else (cores, "cores")
            if need.nodes > 1:
                raise ConfigError(
                    f"trainer.num_nodes={need.nodes}: launcher=local has this machine alone. Use launcher=slurm."
                )
            asked = need.devices or (present if what == "GPUs" else 1)
            if asked > present:
                raise ConfigError(f"trainer.devices={asked} are asked for, but this machine has {present} {what}.")
            devices = max(devices, asked)
        self.devices = devices
        self.slots = jobs or max(1, len(self.gpus) // devices)
        self._free = list(reversed(range(self.slots)))
        self.threads = max(1, cores // (self.slots * devices))

    def variables(self, slot: int) -> dict[str, str]:
        """The environment variables that a slot adds to those of its job."""
        added = {} if "OMP_NUM_THREADS" in os.environ else {"OMP_NUM_THREADS": str(self.threads)}
        if self.gpus:
            chosen = [self.gpus[(slot * self.devices + k) % len(self.gpus)] for k in range(self.devices)]
            added["CUDA_VISIBLE_DEVICES"] = ",".join(chosen)
        return added

    def submit(self, attempts: Sequence[tuple[Job, int]]) -> list[LocalHandle]:
        handles = []
        for job, number in attempts:
            slot = self._free.pop()
            handles.append(LocalHandle(JobProcess(job, number, self.variables(slot)), slot, self._free))
        return handles

    def close(self) -> None:
        """Nothing is held."""
