"""Settings of every test: one thread a process (two run at once), the glyph cache shared, runs in temporary folders."""

import os
import signal
import tempfile
from pathlib import Path

import pytest
import torch

# Shared between tests and with later runs of them: the file name holds a hash of what it depends on.
os.environ.setdefault("LIGHTNING_NTK_CACHE", str(Path(tempfile.gettempdir()) / "lightning_ntk-tests"))
os.environ.setdefault("WANDB_MODE", "offline")
torch.set_num_threads(1)
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # As a script's background jobs have it; tests press Ctrl+C.
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _alone(tmp_path, monkeypatch):
    """Every test works in a folder of its own, where ./runs goes, leaves the environment as it was, and has the same
    random numbers whatever tests ran before."""
    torch.manual_seed(0)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LIGHTNING_NTK_RUN_FOLDER", raising=False)
