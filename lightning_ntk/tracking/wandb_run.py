"""A run in Weights & Biases: one for each job, with its name, group, tags, axis and summary.

Everything that W&B is told lies in the run folder, too: when its process dies, the run goes on without it.
"""

import importlib.util
import math
import os
import shlex
import sys
import threading
import uuid
from collections.abc import Callable, Mapping
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from pytorch_lightning.loggers import WandbLogger
from pytorch_lightning.utilities import rank_zero_only, rank_zero_warn

from lightning_ntk.errors import ConfigError
from lightning_ntk.running.results import RunResult
from lightning_ntk.tracking.media import Media
from lightning_ntk.tracking.wandb_media import episode_table, probe_tables, spectrum_media, to_wandb

SETTINGS = ("mode", "project", "entity")
# In the run folder: the run's id in W&B, for when it is resumed.
ID_FILE = "wandb_id"
# W&B waits without end for an upload when the network has gone; what is left can be synced later.
FINISH_TIMEOUT_S = 300
# Its process keeps that time itself. So much longer, in any call, and the process hangs.
GRACE_S = 30
# Bytes of a file of W&B's without a record.
EMPTY_FILE = 7
# W&B refuses longer ones.
LONGEST_TAG = 64


def check_wandb(settings: DictConfig | None) -> None:
    """Raise `ConfigError` when the W&B logger that the settings ask for cannot be made."""
    if settings is None:
        return
    if importlib.util.find_spec("wandb") is None:
        raise ConfigError("logger=wandb needs the wandb package: pip install wandb, or use logger=csv.")
    if not isinstance(settings, DictConfig) or set(settings) != set(SETTINGS):
        # The values are not repeated: one may be a key, which belongs in no message and no config.yaml.
        got = f"the keys {', '.join(map(str, settings))}" if isinstance(settings, DictConfig) else "something else"
        raise ConfigError(
            f"logger.wandb must hold mode, project and entity alone, or be null, but got {got}. An API key is no "
            "setting: use `wandb login`, or the environment variable WANDB_API_KEY."
        )
    if settings.mode not in ("offline", "online"):
        raise ConfigError(f"logger.wandb.mode must be 'offline' or 'online', but got {settings.mode!r}.")
    for name in ("project", "entity"):
        if not isinstance(settings[name], str | None):
            raise ConfigError(f"logger.wandb.{name} must be text or null, but got {settings[name]!r}.")


class WandbRun(WandbLogger):
    """The W&B logger of one run, kept in the run folder; a context that closes it. A resumed run keeps its W&B id.

    Every key is drawn over `step`, the number of finished meta-steps. Once W&B has failed, a warning has said so and
    further calls do nothing.

    Args:
        settings: `logger.wandb` of the config.
        folder: the run folder.
        config: the run's resolved config, as plain types.
        task: the settings that decide the test episodes (`task_settings` of the data).
    """

    def __init__(
        self, settings: Mapping[str, Any], folder: Path, config: dict[str, Any], task: Mapping[str, Any]
    ) -> None:
        os.environ.setdefault("WANDB_SILENT", "true")
        choices = config["choices"]
        super().__init__(
            project=settings["project"],
            entity=settings["entity"],
            offline=settings["mode"] == "offline",
            save_dir=folder,
            id=run_id(folder),
            name=folder.name,
            group=f"{choices['method']} on {choices['data']}",
            job_type="train",
            tags=tags(config, task),
            log_model=False,
        )
        self.labels = {**choices, "norm": config["network"].get("norm"), "seed": config["seed"]}
        self.labels |= {key: task[key] for key in ("ways", "shots") if key in task}
        self.config = config
        self.has_failed = False
        self.is_offline = self._offline
        self.folder: Path | None = None

    @rank_zero_only
    def start(self) -> None:
        """Start the W&B run, with the run's config.

        Raises:
            ConfigError: W&B refuses: nobody is logged in, the project is another's, there is no network, or a WANDB_
                variable of the environment has a value that it does not take.
        """
        import wandb

        settings = {"console": "off", "silent": True}
        if "finish_timeout" in getattr(wandb.Settings, "model_fields", {}):
            settings["finish_timeout"] = FINISH_TIMEOUT_S
        options = {name: value for name, value in self._wandb_init.items() if name != "anonymous"}
        if self._offline:  # Lightning's resume="allow" stays: it tells a later upload to go on, not to begin anew.
            options |= {"mode": "offline"}
        try:
            run = wandb.init(**options, config=self.config, settings=wandb.Settings(**settings))
        except (wandb.errors.Error, OSError, ValueError) as error:  # ValueError: a variable of the environment.
            reason = " ".join(str(error).split())
            instead = "leave W&B out, by logger=csv" if self._offline else "keep the run here, by logger=wandb_offline"
            raise ConfigError(f"logger.wandb: {reason} Or {instead}.") from error
        # A sweep of W&B's writes its parameter `method` over the group of that name: its settings stand beside it.
        hidden = {
            f"{group}.{name}": value
            for group, settings in self.config.items()
            if isinstance(settings, dict) and isinstance(run.config.get(group), str)
            for name, value in settings.items()
        }
        run.config.update(hidden)
        run.define_metric("step", hidden=True)
        run.define_metric("*", step_metric="step", step_sync=True)
        self._experiment = run
        # In a sweep of W&B's, the server decides the id.
        self._id = run.id
        (Path(self.save_dir) / ID_FILE).write_text(run.id, encoding="utf-8")
        self.is_offline = bool(run.offline)
        self.folder = Path(run.dir).parent

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        # Lightning counts a training step from 0 and logs a test at the number of steps.
        is_test = any(name.startswith("test/") for name in metrics)
        finished = {} if step is None else {"step": step if is_test else step + 1}
        self._guarded(lambda: self.experiment.log({**metrics, **finished}))

    @rank_zero_only
    def log_media(self, media: Mapping[str, Media], step: int) -> None:
        """Log figures, tables, histograms and lines, at a number of finished steps."""
        self._guarded(lambda: self.experiment.log({**{k: to_wandb(m) for k, m in media.items()}, "step": step}))

    @rank_zero_only
    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """The config is given at the start."""

    @rank_zero_only
    def log_result(self, result: RunResult, step: int) -> None:
        """The tables of a finished run, and the summary that a dashboard sorts by."""
        tables = {"test/by_episode": episode_table(result.episodes), **probe_tables(result)}
        self.log_media({**tables, **spectrum_media(result)}, step)
        numbers = {**result.metrics, **{f"time/{name.removesuffix('_s')}": v for name, v in result.timings.items()}}
        finite = {name: value for name, value in numbers.items() if math.isfinite(value)}
        self._guarded(lambda: self.experiment.summary.update({**self.labels, **finite}))

    def __enter__(self) -> "WandbRun":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        self._finish(0 if kind is None else 1)

    @rank_zero_only
    def _finish(self, exit_code: int) -> None:
        """Close the run; offline, say how to upload it."""
        self._guarded(lambda: self.experiment.finish(exit_code=exit_code))
        if self.is_offline and not self.has_failed:
            sys.stdout.write(f"W&B has it offline. Upload it by: {self.sync_command()}\n")

    def sync_command(self) -> str:
        """The command that uploads what W&B has kept of the run: each start of it that was not uploaded yet.

        Each in a command of its own: after a start whose file was cut by a kill, `wandb sync` leaves out the rest.
        """
        starts = sorted(self.folder.parent.glob(f"*run-*-{self._id}"))
        waiting = [start for start in starts if _has_records(start) and not list(start.glob("*.synced"))]
        return "; ".join(f"wandb sync {shlex.quote(str(start))}" for start in waiting or [self.folder])

    def _guarded(self, call: Callable[[], Any]) -> None:
        """Call W&B, unless it has failed; when it fails now, say so once and go on without it."""
        if self.has_failed or self._experiment is None:
            return
        try:
            within(FINISH_TIMEOUT_S + GRACE_S, call)
        except Exception as error:  # W&B has no common class for what its connection raises.
            if not is_failure_of_wandb(error):
                raise
            self.has_failed = True
            reason = " ".join(str(error).split())
            rank_zero_warn(
                f"W&B has stopped ({type(error).__name__}: {reason}). The run goes on without it and its folder gets "
                f"everything; what W&B had until now uploads by: {self.sync_command()}",
                stacklevel=4,
            )
            abandon_wandb()


def _has_records(start: Path) -> bool:
    """Whether W&B got to write anything of a start before it was killed."""
    return any(file.stat().st_size > EMPTY_FILE for file in start.glob("*.wandb"))


@rank_zero_only
def run_id(folder: Path) -> str | None:
    """The W&B id of a run, kept in its folder for when it is resumed; None on other ranks, which have no W&B run."""
    file = folder / ID_FILE
    if not file.exists():
        file.write_text(uuid.uuid4().hex[:12], encoding="utf-8")
    return file.read_text(encoding="utf-8")


def is_failure_of_wandb(error: Exception) -> bool:
    """Whether an exception comes from W&B's process, disk or network rather than from a mistake of ours."""
    import wandb

    is_own = type(error).__module__.startswith("wandb") and not isinstance(error, (TypeError, ValueError))
    return is_own or isinstance(error, (OSError, wandb.errors.Error))


def within(seconds: float, call: Callable[[], Any]) -> None:
    """Call W&B, which waits without end for a process that hangs: after so long, or on Ctrl+C, that process is killed.

    Raises:
        TimeoutError: it did not answer in time.
    """
    outcome: Future[Any] = Future()

    def work() -> None:
        try:
            outcome.set_result(call())
        except BaseException as error:
            outcome.set_exception(error)

    threading.Thread(target=work, daemon=True, name="wandb").start()
    try:
        wait([outcome], seconds)
    except KeyboardInterrupt:
        kill_service()
        raise
    if not outcome.done():
        kill_service()
        wait([outcome], GRACE_S)  # What waited for the process ends with it.
        raise TimeoutError(f"its process has not answered for {seconds:g} s")
    outcome.result()


def kill_service() -> None:
    """Kill W&B's process, where this one has started it: also one that is stopped, and answers to nothing else."""
    import wandb

    connection = getattr(wandb.setup(), "_connection", None)  # W&B has no public way to its process.
    process = getattr(getattr(connection, "_proc", None), "_process", None)
    if process is not None:
        process.kill()


def abandon_wandb() -> None:
    """Let go of W&B's dead process, so that the end of ours does not wait for it or complain of it."""
    import wandb

    try:
        wandb.teardown(exit_code=1)
    except SystemExit:  # How W&B tells that its process was killed.
        pass
    except Exception as error:
        if not is_failure_of_wandb(error):
            raise


def tags(config: Mapping[str, Any], task: Mapping[str, Any]) -> list[str]:
    """What a run is found by: method, data, network, its normalisation, ways and shots, seed."""
    choices, norm = config["choices"], config["network"].get("norm")
    found = [choices["method"], choices["data"], choices["network"], f"norm {norm}" if norm else ""]
    found += [f"{task['ways']}-way" if "ways" in task else "", f"{task['shots']}-shot" if "shots" in task else ""]
    found += [f"seed {config['seed']}"]
    return list(dict.fromkeys(tag[:LONGEST_TAG] for tag in found if tag))
