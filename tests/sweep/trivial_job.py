"""A job that trains nothing, for tests of what is around it: `trivial_job.py KEY=VALUE ... run_dir=FOLDER`.

It counts to `steps`, with a checkpoint at each step, notes each of its starts, and leaves a results.json like a run's.
`seconds` a step; `fail_at=STEP` raises; `stall_at=STEP` stands still there, but not after a restart; `gate=FILE` stands
still after the first step until there is such a file; `ckpt=FOLDER` goes on. Its validation score grows with the steps,
most where `method.lr` is 0.01.
"""

import math
import os
import sys
import time
from pathlib import Path

from lightning_ntk.running.results import RunResult, write_results

settings = dict(word.partition("=")[::2] for word in sys.argv[1:])
folder = Path(settings.get("ckpt") or settings["run_dir"])
checkpoint = folder / "checkpoints" / "last.ckpt"
checkpoint.parent.mkdir(parents=True, exist_ok=True)
first = int(checkpoint.read_text()) if "ckpt" in settings else 0
quality = math.exp(-((math.log10(float(settings.get("method.lr", 0.01))) + 2) ** 2))
with (folder.parent / f"starts_{folder.name}.txt").open("a") as starts:
    starts.write(f"{first} {os.getpid()} {os.environ.get('LOCAL_RANK', '-')} {time.process_time()}\n")
if not (folder / "metrics.csv").exists():
    (folder / "metrics.csv").write_text("step,val/accuracy\n")
for step in range(first, int(settings.get("steps", 1))):
    if settings.get("fail_at") == str(step):
        raise ArithmeticError(f"diverged at step {step}")
    stalls = first == 0 and settings.get("stall_at") == str(step)
    time.sleep(1000 if stalls else float(settings.get("seconds", 0)))
    checkpoint.with_suffix(".tmp").write_text(str(step + 1))
    checkpoint.with_suffix(".tmp").replace(checkpoint)
    with (folder / "metrics.csv").open("a") as rows:
        rows.write(f"{step + 1},{quality * (step + 1) / (step + 2)}\n")
    while "gate" in settings and not os.path.exists(settings["gate"]):
        time.sleep(0.02)
score = 0.25
result = RunResult(
    settings.get("method", "maml"),
    "glyphs",
    int(settings.get("seed", 0)),
    {"test/accuracy": score, "test/accuracy_ci95": 0.0},
    {"test/accuracy": [score, score]},
    "same",
    {"data": "none"},
    {},
    {},
    {"method": {key: value for key, value in settings.items() if key.startswith("method.")}},
)
write_results(folder, result)
