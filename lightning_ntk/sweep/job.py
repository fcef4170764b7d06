"""One job of a sweep: its name, its overrides, its folder, and the state that the folder keeps in job.json."""

import dataclasses
import json
import os
import re
from pathlib import Path

from lightning_ntk.errors import ConfigError, DataError
from lightning_ntk.running.cluster import LOST_RANK
from lightning_ntk.running.results import FILE_NAME, read_results
from lightning_ntk.sweep.start import LAST_CHECKPOINT, STATE_FILE

TEMPORARY_STATE_FILE = f"{STATE_FILE}.tmp"
TRAIN = ("-m", "lightning_ntk.cli", "train")


@dataclasses.dataclass(frozen=True)
class Needs:
    """What a job needs and how long it is, from its composed config.

    Attributes:
        devices: processes on each node (0: as many as there are, Lightning's "auto" and -1).
        nodes: machines.
        cpu: it asks for CPUs, also where there are GPUs.
        steps: meta-steps in all.
        tests: it ends with a test, and so with results.json.
    """

    devices: int = 1
    nodes: int = 1
    cpu: bool = False
    steps: int = 0
    tests: bool = True


@dataclasses.dataclass(frozen=True)
class Job:
    """One job: `python PROGRAM OVERRIDES run_dir=FOLDER` in a fresh process.

    Attributes:
        program: what Python runs (another one in tests).
        config_folder: the user's own configuration folder.
        method: what it trains.
    """

    name: str
    overrides: tuple[str, ...]
    folder: Path
    needs: Needs = Needs()
    config_folder: str | None = None
    program: tuple[str, ...] = TRAIN
    method: str = ""

    def arguments(self) -> list[str]:
        """What Python is called with, but for where the run lies: start.py adds that."""
        own = [] if self.config_folder is None else ["--config-dir", self.config_folder]
        # A log file is no place for a progress bar.
        bar = [] if any(o.startswith("trainer.enable_progress_bar=") for o in self.overrides) else [NO_BAR]
        return [*self.program, *own, *self.overrides, *bar]


NO_BAR = "trainer.enable_progress_bar=false"


@dataclasses.dataclass
class State:
    """What is known of a job, kept in its job.json.

    Attributes:
        status: pending, running, done, failed or pruned.
        attempts: how many times it was started.
        exit_code: of the last attempt; negative: the signal that ended it.
        error: in one line, why it failed.
        log: the file that the last attempt wrote.
        started, ended: Unix times of the last attempt.
        first_step: the meta-step that it went on from.
        overrides, config_folder: what the folder was made with.
    """

    status: str = "pending"
    attempts: int = 0
    exit_code: int | None = None
    error: str | None = None
    log: str | None = None
    started: float | None = None
    ended: float | None = None
    first_step: int = 0
    overrides: list[str] = dataclasses.field(default_factory=list)
    config_folder: str | None = None


def read_state(folder: Path) -> State:
    """The state that a job's folder keeps; a fresh one where there is none, or none that can be read."""
    try:
        content = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return State()
    known = {field.name for field in dataclasses.fields(State)}
    return State(**{key: value for key, value in content.items() if key in known})


def write_state(folder: Path, state: State) -> None:
    """Keep a job's state in its folder, whole or not at all.

    Raises:
        ConfigError: the folder cannot be written (the disk is full, for example).
    """
    temporary = folder / TEMPORARY_STATE_FILE
    try:
        folder.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(dataclasses.asdict(state), indent=1) + "\n", encoding="utf-8")
        os.replace(temporary, folder / STATE_FILE)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise ConfigError(
            f"out: {folder} cannot be written ({error.strerror}). What is finished is kept; make room, or name another "
            "folder, and give the same command again."
        ) from error


def log_file(job: Job, attempt: int) -> Path:
    """Where an attempt writes what it says."""
    return job.folder / f"log_{attempt}.txt"


def result_error(job: Job) -> str | None:
    """Why a job has no result, or None when it has one."""
    if not job.needs.tests:
        return None if (job.folder / LAST_CHECKPOINT).is_file() else "it left no checkpoint"
    if not (job.folder / FILE_NAME).exists():
        return f"it left no {FILE_NAME}"
    try:
        read_results(job.folder)
    except DataError as error:
        return str(error)
    return None


def has_result(job: Job, state: State) -> bool:
    """Whether a job is finished: its results can be read (one that does not test: it ended well)."""
    return result_error(job) is None and (job.needs.tests or state.status == "done")


def error_line(log: Path) -> str:
    """The line of a log that says what went wrong: the last that names an error, else the last there is.

    That another rank has ended is no error of a rank's own, and counts where none names another.
    """
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - 20_000))
            text = file.read().decode("utf-8", "replace")
    except OSError:
        return "it left no log"
    lines = [line.strip() for line in re.split(r"[\r\n]+", text) if line.strip()]
    named = [
        line
        for line in lines
        if re.match(r"lightning-ntk: |(\[rank\d+\]: )?(\w+\.)*\w*(Error|Exception|Interrupt)\b", line)
    ]
    own = [line for line in named if not LOST_RANK.search(line)]
    return (own or named or lines or ["it said nothing"])[-1][:500]


def lost_a_rank(job: Job, error: str) -> bool:
    """Whether a job of several processes has ended because one of them, perhaps killed, no longer answered another."""
    several = job.needs.devices != 1 or job.needs.nodes > 1
    return several and LOST_RANK.search(error) is not None


def describe_exit(code: int | None, log: Path) -> str:
    """In one line, how an attempt ended that left no result."""
    if code is None:
        return error_line(log)
    if code == -9:
        return "killed by signal 9 (SIGKILL): by hand, or because the memory was full"
    if code < 0:
        return f"killed by signal {-code}"
    return error_line(log)
