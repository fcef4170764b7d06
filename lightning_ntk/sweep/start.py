"""What a job's process does before it becomes the training: `python -m lightning_ntk.sweep.start FOLDER RANK PARENT`.

It runs on the machine of the job and imports nothing heavy. It sees to it that the job dies with the one that started
it, that no two processes write one folder, and that a run with a checkpoint goes on from there. Then it is replaced by
`python ARGUMENTS run_dir=FOLDER` (or `ckpt=FOLDER`).
"""

import os
import re
import shutil
import signal
import sys
from pathlib import Path

from lightning_ntk.running.cluster import die_with_parent
from lightning_ntk.running.lock import HELD_VARIABLE, LOCK_FILE, holder, lock

STATE_FILE = "job.json"
LAST_CHECKPOINT = Path("checkpoints") / "last.ckpt"
# What a job's folder keeps when the job begins anew.
KEPT = r"job\.json|\.lock|log_\d+(_rank\d+)?\.txt"
# How long a process of an earlier attempt, whose parent is gone, may take to die.
LOCK_WAIT_S = 30.0
EXIT_LOCKED = 75  # EX_TEMPFAIL


def main(argv: list[str]) -> None:
    """Become the training process of a job."""
    folder, rank, parent, arguments = Path(argv[0]), int(argv[1]), int(argv[2]), argv[3:]
    die_with(parent)
    # SLURM sends it to all processes before it takes the machine; the one that started us knows what to do then.
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    going_on = (folder / LAST_CHECKPOINT).is_file()
    if rank == 0:
        held = lock(folder / LOCK_FILE, LOCK_WAIT_S)
        if held is None:
            who = holder(folder / LOCK_FILE)
            sys.stderr.write(f"lightning-ntk: {folder} is being written by another process ({who}).\n")
            sys.exit(EXIT_LOCKED)
        os.set_inheritable(held, True)  # The training holds it on, for as long as it lives.
        os.environ[HELD_VARIABLE] = str(held)
        going_on = (folder / LAST_CHECKPOINT).is_file()
        if not going_on:  # What was begun has nothing to go on from.
            clear(folder)
    where = f"ckpt={folder}" if going_on else f"run_dir={folder}"
    os.execv(sys.executable, [sys.executable, *arguments, where])


def clear(folder: Path) -> None:
    """Remove what earlier attempts of a job left in its folder, but for its state and its logs."""
    for path in folder.iterdir():
        if not re.fullmatch(KEPT, path.name):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def die_with(parent: int) -> None:
    """Ask Linux to kill this process when its parent ends, however that ends."""
    die_with_parent()
    if sys.platform == "linux" and os.getppid() != parent:  # It has ended already.
        sys.exit(EXIT_LOCKED)


if __name__ == "__main__":
    main(sys.argv[1:])
