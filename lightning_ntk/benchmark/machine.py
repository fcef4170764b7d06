"""The machine and the software, named."""

import os
import platform
from pathlib import Path
from typing import Any

import torch

from lightning_ntk.benchmark.counting import peak_rate
from lightning_ntk.running.results import package_versions

GIB = 2**30


def describe_machine(device: str, threads: int | None) -> dict[str, Any]:
    """CPU model, cores, threads, memory in GiB, GPU, versions, and the rate of a float32 matrix product in GFLOP/s."""
    affinity = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    machine: dict[str, Any] = {
        "device": device,
        "cpu": cpu_model(),
        "cores": len(affinity),
        "threads": threads or torch.get_num_threads(),
        "memory_gib": _memory_gib(),
        "system": f"{platform.system()} {platform.release()}",
        "versions": package_versions(),
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        machine["gpu"] = properties.name
        machine["gpu_memory_gib"] = round(properties.total_memory / GIB, 1)
        machine["versions"]["cuda"] = torch.version.cuda
    machine["product_gflops"] = round(peak_rate(device) / 1e9, 1)
    return machine


def cpu_model() -> str:
    """The processor's name, as the system has it."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.lower().startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def in_words(machine: dict[str, Any]) -> str:
    """The machine in a line or two."""
    words = [f"{machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads"]
    if machine["memory_gib"]:
        words.append(f"{machine['memory_gib']} GiB")
    if "gpu" in machine:
        words.insert(0, f"{machine['gpu']} ({machine['gpu_memory_gib']} GiB)")
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    rate = f"Float32 product: {machine['product_gflops']:.0f} GFLOP/s."
    return f"{'; '.join(words)}. {machine['system']}. {versions}. {rate}"


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB, 1)
    except (ValueError, OSError, AttributeError):
        return None
