"""How long training takes and how much memory it needs."""

import contextlib
import resource
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch

# The first steps allocate memory and compile kernels.
WARM_UP_STEPS = 3
MIB = 2**20


class Timing(pl.Callback):
    """Logs `time/fit` (seconds of training so far, validation excluded), `time/meta_step` (median seconds from one
    training step's end to the next's, loading included) and `memory/peak_mib`.

    The peak is that of the GPU's allocator, or on a CPU of the process's resident memory since training began.
    What callbacks measure on episodes of their own (`ProbeCallback`) counts neither in seconds nor in the peak.
    Seconds and steps go on where they were when a run is resumed, and begin anew with another method.
    """

    def __init__(self) -> None:
        self.fit_s = 0.0
        self.test_s = 0.0
        self.peak_mib = 0.0
        self.steps_s: list[float] = []
        self._mark = 0.0
        self._method: pl.LightningModule | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit" and self._method is not pl_module:  # A checkpoint's state is loaded after this.
            self._method, self.fit_s, self.peak_mib, self.steps_s = pl_module, 0.0, 0.0, []

    @property
    def meta_step_s(self) -> float:
        """Median seconds of a meta-step, after warm-up; NaN before there is one."""
        return statistics.median(self.steps_s[WARM_UP_STEPS:] or self.steps_s or [float("nan")])

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        reset_peak_memory(pl_module.device)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._mark = time.perf_counter()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        now = time.perf_counter()
        self.steps_s.append(now - self._mark)
        self.fit_s += now - self._mark
        self._mark = now
        pl_module.log("time/fit", self.fit_s)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.sanity_checking or not self.steps_s:
            return
        self.peak_mib = max(self.peak_mib, peak_memory_mib(pl_module.device))
        pl_module.log("time/fit", self.fit_s)
        pl_module.log("time/meta_step", self.meta_step_s)
        pl_module.log("memory/peak_mib", self.peak_mib)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._mark = time.perf_counter()

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.peak_mib = max(self.peak_mib, peak_memory_mib(pl_module.device))

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._test_start = time.perf_counter()

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.test_s = time.perf_counter() - self._test_start

    @contextlib.contextmanager
    def paused(self, device: torch.device) -> Iterator[None]:
        """What happens inside is not training: neither its time nor its memory counts."""
        self.peak_mib = max(self.peak_mib, peak_memory_mib(device))
        started = time.perf_counter()
        try:
            yield
        finally:
            reset_peak_memory(device)
            self._mark += time.perf_counter() - started

    def state_dict(self) -> dict[str, Any]:
        return {"fit_s": self.fit_s, "peak_mib": self.peak_mib, "steps_s": self.steps_s}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.fit_s, self.peak_mib, self.steps_s = state["fit_s"], state["peak_mib"], list(state["steps_s"])


def reset_peak_memory(device: torch.device) -> None:
    """Let the peak count from here, where the system allows it (CUDA, Linux)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def peak_memory_mib(device: torch.device) -> float:
    """Peak memory of the device's allocator, or of this process's resident set, in MiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / MIB
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    except OSError:
        pass
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kilobytes / (MIB if sys.platform == "darwin" else 1024)
