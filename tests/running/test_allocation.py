"""Freed memory stays with the process."""

import subprocess
import sys

import pytest

from lightning_ntk.running import allocation

# Blocks like the activations of a step, again and again: page faults of the last round.
ROUNDS = """
import resource
import torch
from lightning_ntk.running.allocation import keep_freed_memory

assert keep_freed_memory()
for number in range(8):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [torch.ones(5 * 2**20) for _ in range(6)]
    del blocks
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(faults)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="mallopt is glibc's")
def test_memory_that_was_freed_needs_no_new_pages():
    # The blocks are 30,720 pages, which by default are most often given back: it depends on what lies behind them.
    command = [sys.executable, "-W", "ignore", "-c", ROUNDS]
    assert int(subprocess.run(command, capture_output=True, text=True, check=True).stdout) < 100


def test_the_users_choice_is_kept(monkeypatch):
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "131072")
    assert not allocation.keep_freed_memory()


def test_another_allocator_is_left_alone(monkeypatch):
    monkeypatch.setattr("lightning_ntk.running.allocation.ctypes.CDLL", lambda name: object())
    assert not allocation.keep_freed_memory()


# Starts a module as `python -m` does, with the given words, and says when memory is asked to be kept.
START = """
import runpy
import sys
from lightning_ntk.running import allocation

allocation.keep_freed_memory = lambda: print("kept")
sys.argv = sys.argv[1:] + ["--help"]
runpy.run_module(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize(
    "words", [["lightning_ntk.cli", "benchmark"], ["lightning_ntk.train"], ["lightning_ntk.benchmark"]]
)
def test_every_command_runs_with_it_however_it_is_started(words):
    command = [sys.executable, "-W", "ignore", "-c", START, *words]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert printed.startswith("kept")
