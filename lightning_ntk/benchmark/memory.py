"""Peak memory of one meta-step, in a fresh process: what other works left in the allocator is not counted.

`python -m lightning_ntk.benchmark.memory JSON` is that process; `measure_memory` starts it.
"""

import ctypes
import dataclasses
import gc
import json
import os
import subprocess
import sys
from pathlib import Path

import torch

from lightning_ntk.benchmark.measure import float32_and_threads, once, synchronise
from lightning_ntk.benchmark.problem import make_problem
from lightning_ntk.benchmark.settings import Settings
from lightning_ntk.benchmark.steps import make_step
from lightning_ntk.errors import LightningNTKError

MIB = 2**20
STATUS = Path("/proc/self/status")
PACKAGE = Path(__file__).resolve().parents[2]
TIMEOUT_S = 3600


@dataclasses.dataclass(frozen=True)
class Probe:
    """Peak MiB of one step, the seconds a task of it and of the steps after it; `note` says why there are none."""

    mib: float | None = None
    seconds: tuple[float, ...] = ()
    note: str = ""


def measure_memory(settings: Settings, step: str, *, network: str = "conv4", tasks: int = 1, repeats: int = 0) -> Probe:
    """Measure a meta-step (by its name in `steps`) in a process of its own.

    The peak is that of CUDA's allocator, or on a CPU the growth of the resident set during the step, over what the
    process held just before it: network, data and libraries are in memory by then.

    Args:
        repeats: steps to time after the one whose memory is measured, which is timed too.
    """
    names = ("ways", "shots", "queries", "image_size", "channels", "filters", "seed")
    numbers = {name: getattr(settings, name) for name in names}
    numbers |= {"device": settings.device, "threads": settings.threads or torch.get_num_threads()}
    request = {"settings": numbers, "step": step, "network": network, "tasks": tasks, "repeats": repeats}
    command = [sys.executable, "-W", "ignore", "-m", "lightning_ntk.benchmark.memory", json.dumps(request)]
    path = os.pathsep.join([str(PACKAGE), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path}
    try:
        run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired:
        return Probe(note=f"not measured: it took more than {TIMEOUT_S} s")
    if run.returncode:
        # The system ends a process that takes too much memory by signal 9.
        why = "killed, out of memory?" if run.returncode == -9 else (run.stderr.strip().splitlines() or ["?"])[-1]
        return Probe(note=f"not measured: {why[:160]}")
    content = json.loads(run.stdout.strip().splitlines()[-1])
    return Probe(content["mib"], tuple(content["seconds"]), content["note"])


def probe(request: dict) -> Probe:
    """In the process: warm up on one image a class, then take the step."""
    settings = Settings(**request["settings"], tasks=request["tasks"])
    with float32_and_threads(settings.threads):
        try:
            step = make_step(request["step"], make_problem(settings, network=request["network"]))
            # Libraries load what they need on first use, which is no memory of the method's.
            warm_up = make_step(request["step"], make_problem(settings, network=request["network"], shots=1, queries=1))
            if step.absent:
                return Probe(note=f"not measured: {step.absent}")
            once(warm_up, settings.device)
            del warm_up
            seconds: list[float] = []
            mib = peak_of(lambda: seconds.append(once(step, settings.device)), settings.device)
            seconds += [once(step, settings.device) for _ in range(request["repeats"])]
        except (torch.OutOfMemoryError, MemoryError, LightningNTKError) as error:
            return Probe(note=f"not measured: {type(error).__name__}: {str(error).splitlines()[0][:160]}")
    return Probe(mib, tuple(seconds))


def peak_of(function, device: str) -> float:
    """MiB at the peak of a call: CUDA's allocator, or the growth of the resident set."""
    gc.collect()
    if device == "cuda":
        synchronise(device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        function()
        return torch.cuda.max_memory_allocated() / MIB
    if not STATUS.exists():
        raise LightningNTKError("peak memory on a CPU is read from /proc, which this system lacks")
    # Hand freed memory back to the system, so that the step does not grow into it unseen.
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = _status_mib("VmRSS")
    function()
    return _status_mib("VmHWM") - before


def _status_mib(field: str) -> float:
    for line in STATUS.read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) / 1024
    raise LightningNTKError(f"{STATUS} has no {field}")


if __name__ == "__main__":
    sys.stdout.write(json.dumps(dataclasses.asdict(probe(json.loads(sys.argv[1])))) + "\n")
