"""search=optuna: settings are tried by their validation score, through Optuna's ask and tell.

One study for each combination of choices (method=a,b ...), each with the same number of trials. The studies live in a
journal file of the sweep's folder: it is all that is needed to go on. Scores of which less is better are told with a
minus.
"""

import dataclasses
import itertools
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from hydra.core.override_parser.types import IntervalSweep, Override, RangeSweep

from lightning_ntk.errors import ConfigError, MissingDependencyError
from lightning_ntk.settings.overrides import last_value
from lightning_ntk.sweep.grid import assignment, folder_name, values_of
from lightning_ntk.sweep.job import Job, State, read_state
from lightning_ntk.sweep.plan import check_ours, start_anew
from lightning_ntk.sweep.progress import SCORES, Progress

JOURNAL = "optuna.journal"


def import_optuna() -> Any:
    """Optuna, which is an extra."""
    try:
        import optuna
    except ImportError as error:
        raise MissingDependencyError(
            "search=optuna needs Optuna: pip install 'lightning_ntk[sweep]', or pip install 'optuna>=4'."
        ) from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def distribution(override: Override) -> Any:
    """Optuna's distribution of a setting.

    interval(a, b) is continuous, int(interval(a, b)) the whole numbers from a to b, range() whole numbers in steps, a
    list its values. tag(log, ...) makes an interval logarithmic.
    """
    kinds = import_optuna().distributions
    value = override.value()
    log = "log" in getattr(value, "tags", ())
    try:
        if isinstance(value, IntervalSweep):
            whole = isinstance(value.start, int) and isinstance(value.end, int)
            return (kinds.IntDistribution if whole else kinds.FloatDistribution)(value.start, value.end, log=log)
        if isinstance(value, RangeSweep):
            steps = list(value.range())
            if steps and all(isinstance(step, int) for step in steps):
                step = 1 if log else abs(int(value.step or 1))
                return kinds.IntDistribution(min(steps), max(steps), step=step, log=log)
        return kinds.CategoricalDistribution(values_of(override))
    except ValueError as error:
        raise ConfigError(f"{override.input_line}: {error}") from error


@dataclasses.dataclass
class Space:
    """What one study fixes and what it tunes: overrides of every trial, and `{key: distribution}`."""

    name: str
    fixed: list[str]
    tuned: dict[str, Any]

    def overrides(self, values: dict[str, Any]) -> list[str]:
        """The overrides of a trial."""
        return [*self.fixed, *(f"{key}={value}" for key, value in values.items())]

    def first(self) -> list[str]:
        """The overrides of some trial, to look its keys up."""
        return self.overrides({key: d.choices[0] if hasattr(d, "choices") else d.low for key, d in self.tuned.items()})


def read_spaces(overrides: Sequence[Override], groups: Collection[str]) -> list[Space]:
    """One space for each combination of choices of the groups.

    Raises:
        ConfigError: nothing is left to tune, a seed is to be tuned, or a test is asked for.
    """
    tuned = {o.get_key_element(): o for o in overrides if o.is_sweep_override() and o.key_or_group not in groups}
    if "seed" in tuned:
        raise ConfigError(
            f"{tuned['seed'].input_line}: a seed is not tuned. Search with one seed, then run the winner over several."
        )
    if not tuned:
        raise ConfigError(
            "search=optuna needs settings to try: 'method.lr=tag(log, interval(1e-4, 1e-1))', 'method.t=1,10,100' or "
            "'method.adapt_steps=int(interval(1, 10))'."
        )
    if last_value([o.input_line for o in overrides], "test") not in (None, False):
        raise ConfigError("test=true: a search is made on validation scores alone. Leave test= out.")
    space = {key: distribution(override) for key, override in tuned.items()}
    fixed = [o for o in overrides if o.get_key_element() not in tuned and o.key_or_group != "test"]
    spaces = []
    for combination in itertools.product(*(values_of(o) for o in fixed)):
        words = [assignment(o, value) for o, value in zip(fixed, combination, strict=True)]
        varying = [word for word, o in zip(words, fixed, strict=True) if o.is_sweep_override()]
        spaces.append(Space(folder_name(varying) if varying else "study", [*words, "test=false"], space))
    return spaces


class Study:
    """The trials of one space, in Optuna's storage."""

    def __init__(self, space: Space, template: Job, storage: Any, trials: int, prune: bool) -> None:
        optuna = self._optuna = import_optuna()
        self.space, self.template, self.wanted = space, template, trials
        self.study = optuna.create_study(
            storage=storage,
            study_name=space.name,
            direction="maximize",
            load_if_exists=True,
            pruner=optuna.pruners.MedianPruner() if prune else optuna.pruners.NopPruner(),
        )
        self._check_same()
        earlier = self.study.get_trials(deepcopy=False)
        # Another seed each time it is taken up: the same one would try the same values again.
        self.study.sampler = optuna.samplers.TPESampler(seed=len(earlier), constant_liar=True)
        for trial in earlier:
            if trial.state == optuna.trial.TrialState.RUNNING:  # An earlier command was stopped: take it up again.
                self.study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
                self.study.enqueue_trial(trial.params, user_attrs={"folder": folder_of(trial)})
        self.asked: dict[str, Any] = {}
        self.reported: dict[str, set[int]] = {}

    def _check_same(self) -> None:
        """Raise `ConfigError` when the folder holds a study of other settings."""
        fixed = [*self.space.fixed, f"--config-dir {self.template.config_folder or 'none'}"]
        now = {"fixed": sorted(fixed), "tuned": {key: str(d) for key, d in self.space.tuned.items()}}
        made = self.study.user_attrs
        if not made:
            for key, value in now.items():
                self.study.set_user_attr(key, value)
        elif made != now:
            changed = sorted(set(made["fixed"]) ^ set(now["fixed"])) or sorted(self.space.tuned)
            raise ConfigError(
                f"{self.template.folder} holds a search with other settings ({', '.join(changed)}). Name another "
                "folder by out=."
            )

    def remaining(self) -> int:
        """How many trials are still to be run: new ones, and those that were interrupted."""
        waiting = self.study.get_trials(deepcopy=False, states=(self._optuna.trial.TrialState.WAITING,))
        return max(0, self.wanted - len(self.trials())) + len(waiting)

    def trials(self) -> list[Any]:
        """The last trial of each folder that was started: one taken up again counts once."""
        states = self._optuna.trial.TrialState
        started = [t for t in self.study.get_trials(deepcopy=False) if t.state != states.WAITING]
        return list({folder_of(trial): trial for trial in started}.values())

    def ask(self) -> Job | None:
        """The next trial, or None when there have been enough."""
        if not self.remaining():
            return None
        trial = self.study.ask(self.space.tuned)
        folder = folder_of(trial)
        job = dataclasses.replace(
            self.template,
            name=f"{self.space.name}/{folder}",
            folder=self.template.folder / folder,
            overrides=tuple(self.space.overrides(trial.params)),
        )
        check_ours(job)
        if read_state(job.folder).overrides not in ([], list(job.overrides)):
            start_anew(job)  # Of a study whose journal was deleted.
        self.asked[job.name], self.reported[job.name] = trial, set()
        return job

    def is_hopeless(self, job: Job, progress: Progress) -> bool:
        """Report the new validation scores; whether Optuna would prune the trial."""
        trial, reported = self.asked[job.name], self.reported[job.name]
        for step, value in progress.scores:
            if step not in reported:
                reported.add(step)
                trial.report(as_gain(value, progress), step)
        return bool(reported) and trial.should_prune()

    def finished(self, job: Job, state: State, progress: Progress) -> None:
        """Tell Optuna how a trial ended."""
        states = self._optuna.trial.TrialState
        self.is_hopeless(job, progress)
        trial = self.asked.pop(job.name)
        if state.status == "done" and progress.best is not None:
            self.study.tell(trial, as_gain(progress.best, progress))
            return
        self.study.tell(trial, state=states.PRUNED if state.status == "pruned" else states.FAIL)
        if state.status == "done" and progress.metric is None:  # Else none of its scores was finite: it diverged.
            raise ConfigError(
                f"{job.name} ended without a validation score, by which a search chooses: its data has no validation "
                "classes, or its method does not learn. Give the data a validation split, or leave search= out."
            )

    def best(self) -> Any:
        """The best finished trial, or None."""
        finished = [t for t in self.trials() if t.state == self._optuna.trial.TrialState.COMPLETE]
        return max(finished, key=lambda trial: trial.value) if finished else None

    def count(self, state: str) -> int:
        """How many trials ended in a state: COMPLETE, PRUNED or FAIL."""
        return sum(trial.state.name == state for trial in self.trials())


class Search:
    """All studies of a search, as the source of the runner's jobs: their trials take turns."""

    def __init__(self, spaces: Sequence[Space], templates: Sequence[Job], out: Path, trials: int, prune: bool) -> None:
        optuna = import_optuna()
        out.mkdir(parents=True, exist_ok=True)
        backend = optuna.storages.journal.JournalFileBackend(str(out / JOURNAL))
        storage = optuna.storages.JournalStorage(backend)
        self.studies = [Study(s, t, storage, trials, prune) for s, t in zip(spaces, templates, strict=True)]
        self._of: dict[str, Study] = {}

    def take(self, number: int) -> list[Job]:
        jobs: list[Job] = []
        while len(jobs) < number:
            # The study that has asked least is next.
            for study in sorted(self.studies, key=lambda study: len(study.trials())):
                job = study.ask()
                if job is not None:
                    self._of[job.name] = study
                    jobs.append(job)
                    break
            else:
                break
        return jobs

    def is_hopeless(self, job: Job, progress: Progress) -> bool:
        return self._of[job.name].is_hopeless(job, progress)

    def finished(self, job: Job, state: State, progress: Progress) -> None:
        self._of[job.name].finished(job, state, progress)


def folder_of(trial: Any) -> str:
    """The folder of a trial: that of the interrupted one that it takes up again, or its own."""
    return trial.user_attrs.get("folder", f"trial_{trial.number:03d}")


def as_gain(score: float, progress: Progress) -> float:
    """A validation score as something of which more is better."""
    return score if progress.metric is None or SCORES[progress.metric] else -score
