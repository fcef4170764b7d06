"""neural-tangents in its own environment and process: found, started, asked in turns, checked."""

import contextlib
import json
import os
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from lightning_ntk.benchmark.measure import Report, Work
from lightning_ntk.benchmark.problem import Problem
from lightning_ntk.benchmark.settings import Settings
from lightning_ntk.errors import ConfigError, MissingDependencyError
from lightning_ntk.running.allocation import ENVIRONMENT
from lightning_ntk.settings.paths import as_path

FOLDER = ".venv-peers"
SCRIPT = Path(__file__).with_name("neural_tangents_peer.py")
IMPLEMENTATIONS = {
    "neural-tangents, Jacobian contraction": "JACOBIAN_CONTRACTION",
    "neural-tangents, NTK-vector products": "NTK_VECTOR_PRODUCTS",
    "neural-tangents, structured derivatives": "STRUCTURED_DERIVATIVES",
}


def find_python(setting: str | None) -> Path | None:
    """The Python that has neural-tangents: as set, or of .venv-peers here or at the top of the checkout.

    Raises:
        ConfigError: the one that was set is not there.
    """
    if setting == "none":
        return None
    if setting is not None:
        python = as_path(setting, "peers")
        python = python / "bin" / "python" if python.is_dir() else python
        if not python.exists():
            raise ConfigError(f"peers={setting} is no Python, nor a folder with bin/python. `make peers` makes one.")
        return python.absolute()
    for top in (Path.cwd(), Path(__file__).resolve().parents[2]):
        # Made whole: the target leaves this mark at its end.
        if (top / FOLDER / "installed").exists():
            return top / FOLDER / "bin" / "python"
    return None


class NeuralTangents:
    """neural-tangents' process on one problem.

    Attributes:
        versions: of jax and neural-tangents.
        compile_s: seconds of compiling and the first run, by implementation.
        flop: operations of one run as XLA counts them, where it does.
    """

    def __init__(self, python: Path, problem: Problem, settings: Settings, folder: Path) -> None:
        self.folder = folder
        self.compile_s: dict[str, float] = {}
        self.flop: dict[str, float | None] = {}
        np.savez(folder / "input.npz", **to_numpy(problem))
        threads = str(settings.threads or torch.get_num_threads())
        command = [str(python), "-I", str(SCRIPT), str(folder), settings.device, threads]
        environment = {**ENVIRONMENT, **os.environ}  # Both processes keep what they free.
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        with (folder / "stderr").open("w") as errors:
            self.process = subprocess.Popen(command, stderr=errors, env=environment, **pipes)
        try:
            self.versions: dict[str, str] = self._answer()["versions"]
        except BaseException:
            self.stop()
            raise

    def compile(self, name: str) -> None:
        """Compile an implementation and run it once."""
        answer = self._ask("compile", name)
        self.compile_s[name], self.flop[name] = answer["seconds"], answer["flop"]

    def run(self, name: str) -> float:
        """Seconds of one run of an implementation that was compiled."""
        return self._ask("run", name)["seconds"]

    def _ask(self, command: str, name: str) -> dict:
        if self.process.poll() is None:
            self.process.stdin.write(f"{command} {IMPLEMENTATIONS[name]}\n")
            self.process.stdin.flush()
        return self._answer()

    def kernel(self, name: str) -> Tensor:
        """The kernels `[T, n, n, C, C]` of an implementation that was compiled."""
        return torch.from_numpy(np.load(self.folder / f"{IMPLEMENTATIONS[name]}.npy"))

    def _answer(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            lines = (self.folder / "stderr").read_text(errors="replace").strip().splitlines()
            raise MissingDependencyError(f"neural-tangents' process ended: {(lines or ['without a word'])[-1]}")
        content = json.loads(line)
        if "error" in content:
            raise MissingDependencyError(f"neural-tangents: {content['error']}")
        return content

    def stop(self) -> None:
        """End the process."""
        self.process.stdin.close()
        try:
            self.process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()


@contextlib.contextmanager
def neural_tangents(
    problem: Problem, settings: Settings, report: Report
) -> Iterator[tuple[list[Work], NeuralTangents | None]]:
    """The works of neural-tangents' three implementations, and its process while the context lasts (None without)."""
    python = find_python(settings.peers)
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        try:
            if python is None:
                why = "left out by peers=none" if settings.peers == "none" else "run `make peers`"
                raise MissingDependencyError(why)
            peer = NeuralTangents(python, problem, settings, Path(folder))
        except (OSError, MissingDependencyError) as error:
            yield [Work(name, absent=str(error)) for name in IMPLEMENTATIONS], None
            return
        stack.callback(peer.stop)
        yield [_work(peer, name, problem.episodes.tasks, report) for name in IMPLEMENTATIONS], peer


def _work(peer: NeuralTangents, name: str, tasks: int, report: Report) -> Work:
    report(f"{name}: compiling")
    try:
        peer.compile(name)
    except MissingDependencyError as error:
        return Work(name, absent=str(error))
    note = f"compiled in {peer.compile_s[name]:.1f} s, which is not counted"
    return Work(name, clock=lambda: peer.run(name), tasks=tasks, note=note)


def to_numpy(problem: Problem) -> dict[str, np.ndarray]:
    """The support images and a Conv4's weights in the layout of the peer's script."""
    convolutions = [module for module in problem.network.modules() if isinstance(module, nn.Conv2d)]
    arrays = {"x": problem.episodes.support_x.movedim(2, -1)}
    for block, module in enumerate(convolutions):
        arrays[f"w{block}"] = module.weight.permute(2, 3, 1, 0)
        arrays[f"b{block}"] = module.bias
    head = problem.network.head
    arrays |= {"w": head.weight.mT, "b": head.bias}
    return {name: np.ascontiguousarray(value.detach().cpu().numpy()) for name, value in arrays.items()}
