"""`lightning-ntk sweep search=optuna`: the command of search.py, and the recipes that come of it."""

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from lightning_ntk.errors import ConfigError, JobsFailedError
from lightning_ntk.settings.arguments import Command
from lightning_ntk.settings.config import compose_config, conf_folder
from lightning_ntk.settings.overrides import key_of, prefix_of
from lightning_ntk.sweep.board import Board, shown_score
from lightning_ntk.sweep.command import build_launcher, held, show_jobs, stoppable
from lightning_ntk.sweep.grid import read_overrides
from lightning_ntk.sweep.plan import make_jobs
from lightning_ntk.sweep.progress import read_progress
from lightning_ntk.sweep.recipe import write_recipe
from lightning_ntk.sweep.runner import Runner
from lightning_ntk.sweep.search import Search, Study, folder_of, read_spaces
from lightning_ntk.sweep.settings import Settings

# Settings that a recipe holds.
OF_RECIPES = ("method.", "network.")


def run_search(
    overrides: Sequence[str],
    known: dict[str, dict[str, str]],
    out: Path,
    settings: Settings,
    command: Command,
    again: str,
) -> None:
    """Run the trials that are missing, and write a recipe for each study.

    Raises:
        JobsFailedError: a study has no finished trial.
    """
    if settings.rerun != "missing":
        raise ConfigError(f"rerun={settings.rerun}: a search has no grid to run again. Delete {out} to begin anew.")
    spaces = read_spaces(read_overrides(overrides, known), known)
    templates = make_jobs({space.name: space.first() for space in spaces}, out, known, command.config_folder)
    if command.show_config:
        show_jobs(templates)
        return
    with held(out), stoppable(again):
        search = Search(spaces, templates, out, settings.trials, settings.prune)
        launcher = build_launcher(settings, templates, out)
        left = sum(study.remaining() for study in search.studies)
        try:
            with Board(left, settings.trials * len(spaces) - left) as board:
                Runner(search, launcher, board, settings.retries).run()
        finally:
            launcher.close()
        sys.stdout.write(f"{board.summary()}, in {board.spent()}\n")
    found = [study for study in search.studies if study.best() is not None]
    # Of studies of one method and data, which differ in another choice, the best makes the recipe.
    for study in sorted(found, key=lambda study: study.best().value):
        report(study, out, command.config_folder)
    unfit = [study.space.name for study in search.studies if study not in found]
    if unfit:
        raise JobsFailedError(f"No trial of {', '.join(unfit)} came to its end; the logs are in {out}.")


def report(study: Study, out: Path, config_folder: str | None) -> None:
    """Say what a study found and write its recipe."""
    best = study.best()
    choices = compose_config("train", study.space.overrides(best.params), config_folder).choices
    used = shlex.join(
        [f"method={choices.method}", f"data={choices.data}"]
        + [word for word in study.space.fixed if key_of(word) in ("network", "experiment") or _leaves_out(word)]
    )
    score = shown_score(read_progress(study.template.folder / folder_of(best)))
    comment = f"Found for {used}: validation {score}, the best of {len(study.trials())} trials."
    # What was set for all trials belongs to what was found.
    fixed = {
        key_of(word): word.partition("=")[2]
        for word in study.space.fixed
        if key_of(word).startswith(OF_RECIPES) and not _leaves_out(word)
    }
    searched = [conf_folder(), *([Path(config_folder)] if config_folder else [])]
    file = write_recipe(out, choices.method, choices.data, {**fixed, **best.params}, comment, searched)
    values = ", ".join(f"{key}={value}" for key, value in best.params.items())
    counts = f"{study.count('COMPLETE')} finished, {study.count('PRUNED')} pruned, {study.count('FAIL')} failed"
    sys.stdout.write(f"{comment} {values} ({counts})\n{file}\n")
    if config_folder:  # --config-dir takes one folder: the recipe joins what else the command needs.
        own = shlex.quote(config_folder)
        put = f"mkdir -p {own}/recipe && cp {shlex.quote(str(file))} {own}/recipe && "
    else:
        own, put = shlex.quote(str(out)), ""
    sys.stdout.write(f"  Use it: {put}lightning-ntk train --config-dir {own} {used}\n")


def _leaves_out(word: str) -> bool:
    """Whether an override deletes a setting, which a recipe cannot."""
    return prefix_of(word) == "~" and key_of(word).startswith(OF_RECIPES)
