"""The lock of a run: who has it from before, and what happens inside."""

import os

import pytest

from lightning_ntk.errors import ConfigError
from lightning_ntk.running.lock import HELD_VARIABLE, LOCK_FILE, is_locked, lock, writing


@pytest.mark.parametrize("from_the_start", [False, True])
def test_an_error_inside_stays_what_it_is(from_the_start, tmp_path, monkeypatch):
    if from_the_start:
        held = lock(tmp_path / LOCK_FILE)
        monkeypatch.setenv(HELD_VARIABLE, str(held))
    with pytest.raises(OSError, match="No space left"), writing(tmp_path):
        assert is_locked(tmp_path / LOCK_FILE)
        raise OSError(28, "No space left on device")
    # A lock from before belongs to the process, not to the run.
    assert is_locked(tmp_path / LOCK_FILE) == from_the_start
    if from_the_start:
        os.close(held)


def test_a_lock_of_another_folder_is_none_of_this_one(tmp_path, monkeypatch):
    (tmp_path / "other").mkdir()
    held, taken = lock(tmp_path / "other" / LOCK_FILE), lock(tmp_path / LOCK_FILE)
    monkeypatch.setenv(HELD_VARIABLE, str(held))
    with pytest.raises(ConfigError, match="is being written by another process"), writing(tmp_path):
        pass
    os.close(held)
    os.close(taken)
