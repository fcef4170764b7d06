"""launcher=ray: jobs are Ray tasks with their GPUs and cores, on this machine or on a cluster with a shared folder."""

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from lightning_ntk.errors import ConfigError, MissingDependencyError
from lightning_ntk.sweep.job import Job, Needs
from lightning_ntk.sweep.launchers.base import Exit
from lightning_ntk.sweep.process import run_to_end
from lightning_ntk.sweep.settings import RaySettings

# What a job on another machine needs of this one's environment; the rest is that machine's.
HANDED_ON = ("PYTHONPATH", "LIGHTNING_NTK_", "WANDB_", "OMP_NUM_THREADS")
ANSWER_WITHIN_S = 15


def import_ray() -> Any:
    """Ray, which is an extra."""
    # Without this, Ray warns that it will no longer hide the GPUs from tasks that ask for none: those use cores anyway.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        import ray
    except ImportError as error:
        raise MissingDependencyError(
            "launcher=ray needs Ray: pip install 'lightning_ntk[sweep]', or pip install 'ray>=2.9'."
        ) from error
    return ray


def check_answers(address: str) -> None:
    """Raise `ConfigError` unless something answers at a Ray address (HOST:PORT, or ray://HOST:PORT)."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        raise ConfigError(f"ray.address={address} must be auto, HOST:PORT or ray://HOST:PORT.")
    advice = "Start a cluster with `ray start --head`, or leave ray.address= out for this machine alone."
    try:
        socket.create_connection((host, int(port)), timeout=ANSWER_WITHIN_S / 3).close()
    except (OSError, OverflowError) as error:
        raise ConfigError(f"ray.address={address} does not answer ({error}). {advice}") from error
    if address.startswith("ray://"):
        return
    # Something listens: is it Ray? Its own client would ask for minutes.
    command = [sys.executable, "-m", "ray.scripts.scripts", "health-check", "--address", address]
    try:
        healthy = subprocess.run(command, capture_output=True, timeout=ANSWER_WITHIN_S, check=False).returncode == 0
    except subprocess.TimeoutExpired:
        healthy = False
    if not healthy:
        raise ConfigError(f"ray.address={address} does not answer as a Ray cluster. {advice}")


class RayHandle:
    """An attempt that was handed to Ray."""

    def __init__(self, ray: Any, reference: Any) -> None:
        self._ray, self._reference = ray, reference
        self._exit: Exit | None = None

    def poll(self) -> Exit | None:
        if self._exit is None and self._ray.wait([self._reference], timeout=0)[0]:
            try:
                self._exit = Exit(self._ray.get(self._reference))
            except self._ray.exceptions.TaskCancelledError:
                self._exit = Exit(None, "stopped")
            except self._ray.exceptions.RayTaskError as error:  # Of our own function: its folder cannot be written, ...
                self._exit = Exit(1, str(error.cause))
            except self._ray.exceptions.RayError as error:  # The worker or its machine is gone.
                self._exit = Exit(None, f"{type(error).__name__}: {str(error).strip().splitlines()[0]}")
        return self._exit

    def stop(self) -> None:
        self._ray.cancel(self._reference, force=False)

    def kill(self) -> None:
        self._ray.cancel(self._reference, force=True)


class RayLauncher:
    """Hands jobs to Ray, which finds room for each.

    Raises:
        ConfigError: the address does not answer, or no machine has what a job needs.
    """

    interval_s = 0.2

    def __init__(self, needs: Sequence[Needs], jobs: int | None, settings: RaySettings) -> None:
        self.ray = import_ray()
        if settings.address not in (None, "auto", "local"):
            check_answers(settings.address)
        try:
            self.ray.init(
                address=settings.address,
                include_dashboard=False if settings.address is None else None,
                log_to_driver=False,
                logging_level="ERROR",
                configure_logging=True,
            )
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise ConfigError(f"ray.address={settings.address}: {str(error).strip().splitlines()[0]}") from error
        self.settings = settings
        machines = [node["Resources"] for node in self.ray.nodes() if node["Alive"]]
        self.has_gpus = any(machine.get("GPU") for machine in machines)
        try:
            for need in needs:
                self._check_fits(need, machines)
        except ConfigError:
            self.close()
            raise
        self.slots = jobs or 10_000
        self._function = self.ray.remote(max_retries=0)(run_on_worker)

    def resources(self, need: Needs) -> dict[str, int]:
        """What Ray is asked for. "auto" devices are one: a task gets no more than it asks for."""
        devices = need.devices or 1
        gpus = devices if self.has_gpus and not need.cpu else 0
        return {"num_cpus": devices * self.settings.cpus, "num_gpus": gpus}

    def _check_fits(self, need: Needs, machines: list[dict[str, float]]) -> None:
        if need.nodes > 1:
            raise ConfigError(f"trainer.num_nodes={need.nodes}: a Ray task has one machine. Use launcher=slurm.")
        asked = self.resources(need)
        names = {"CPU": asked["num_cpus"], "GPU": asked["num_gpus"]}
        if not any(all(machine.get(name, 0) >= number for name, number in names.items()) for machine in machines):
            raise ConfigError(
                f"trainer.devices={need.devices}: no machine of the Ray cluster has {names['CPU']} cores and "
                f"{names['GPU']} GPUs (ray.cpus={self.settings.cpus} for each device)."
            )

    def submit(self, attempts: Sequence[tuple[Job, int]]) -> list[RayHandle]:
        variables = {name: value for name, value in os.environ.items() if name.startswith(HANDED_ON)}
        handles = []
        for job, number in attempts:
            function = self._function.options(name=job.name, **self.resources(job.needs))
            handles.append(RayHandle(self.ray, function.remote(job, number, variables, os.getcwd())))
        return handles

    def close(self) -> None:
        self.ray.shutdown()


def run_on_worker(job: Job, attempt: int, variables: dict[str, str], folder: str) -> int:
    """Run an attempt inside a Ray worker, in the folder that the sweep was started in; returns its exit status."""
    os.chdir(folder)
    return run_to_end(job, attempt, variables)
