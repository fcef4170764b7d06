"""The search with Optuna, over jobs whose validation score is a known function of their learning rate."""

import dataclasses
import math
import shlex
import subprocess
from collections import Counter

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf
from sweeping import PROGRAM, Notes

from lightning_ntk.errors import ConfigError
from lightning_ntk.settings.config import compose_config, conf_folder, groups
from lightning_ntk.sweep.job import State, read_state
from lightning_ntk.sweep.launchers.local import LocalLauncher
from lightning_ntk.sweep.plan import make_jobs
from lightning_ntk.sweep.progress import Progress, read_progress
from lightning_ntk.sweep.recipe import write_recipe
from lightning_ntk.sweep.runner import Runner
from lightning_ntk.sweep.search import Search, distribution, folder_of, read_spaces
from lightning_ntk.sweep.search_command import report

KNOWN = groups([conf_folder()])
WORDS = ["method=maml,anil", "data=glyphs", "steps=3", "val_every=1", "method.lr=tag(log,interval(1e-5,10))"]


@pytest.fixture(autouse=True)
def _path(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(conf_folder().parent))


def overrides(*words):
    return OverridesParser.create().parse_overrides(list(words))


def search_in(out, words=WORDS, trials=4, prune=False):
    spaces = read_spaces(overrides(*words), KNOWN)
    jobs = make_jobs({space.name: space.first() for space in spaces}, out, KNOWN, None)
    return Search(spaces, [dataclasses.replace(job, program=PROGRAM) for job in jobs], out, trials, prune)


def run(search, board=None, at_once=2):
    launcher = LocalLauncher([study.template.needs for study in search.studies], at_once)
    return Runner(search, launcher, board or Notes()).run()


def test_each_method_has_a_study_of_its_own_with_the_same_number_of_trials(tmp_path):
    search = search_in(tmp_path)
    states = run(search)
    assert Counter(name.partition("/")[0] for name in states) == {"method=maml": 4, "method=anil": 4}
    for study in search.studies:
        assert study.count("COMPLETE") == 4
        for trial in study.trials():
            progress = read_progress(tmp_path / study.space.name / folder_of(trial))
            expected = math.exp(-((math.log10(trial.params["method.lr"]) + 2) ** 2)) * 3 / 4
            assert trial.value == pytest.approx(expected) == progress.best
            assert (
                f"method.lr={trial.params['method.lr']}"
                in read_state(tmp_path / study.space.name / folder_of(trial)).overrides
            )
        assert study.best().value == max(trial.value for trial in study.trials())
    assert not search_in(tmp_path).take(3), "there are as many trials as were asked for"
    with pytest.raises(ConfigError, match=r"other settings \(steps=3, steps=5\)"):
        search_in(tmp_path, [word.replace("steps=3", "steps=5") for word in WORDS])
    with pytest.raises(ConfigError, match=r"other settings \(method.lr\)"):
        search_in(tmp_path, [*WORDS[:-1], "method.lr=interval(0,1)"])
    more = search_in(tmp_path, trials=5).take(9)
    assert len(more) == 2, "one more for each method"


def test_a_search_that_was_stopped_goes_on_with_the_trials_it_had_begun(tmp_path):
    gate = tmp_path / "gate"  # Trials stand still after their first step until it is there.
    words = ["method=maml", *WORDS[1:]]
    (space,) = read_spaces(overrides(*words), KNOWN)
    (job,) = make_jobs({space.name: space.first()}, tmp_path, KNOWN, None)
    space.fixed.append(f"gate={gate}")
    template = [dataclasses.replace(job, program=PROGRAM)]

    class Interrupting(Notes):
        def look(self, running):
            if len(list(tmp_path.rglob("last.ckpt"))) >= 2:
                raise KeyboardInterrupt

    search = Search([space], template, tmp_path, 3, False)
    with pytest.raises(KeyboardInterrupt):
        run(search, Interrupting())
    begun = {folder_of(trial): trial.params for trial in search.studies[0].trials()}
    assert set(begun) == {"trial_000", "trial_001"}
    gate.touch()
    search = Search([space], template, tmp_path, 3, False)
    assert search.studies[0].remaining() == 3
    states = run(search)
    (study,) = search.studies
    assert len(states) == 3
    assert study.count("COMPLETE") == 3
    assert {folder: trial.params for folder, trial in zip(begun, study.trials(), strict=False)} == begun
    for folder in begun:
        starts = (tmp_path / "study" / f"starts_{folder}.txt").read_text().splitlines()
        assert [int(line.split()[0]) > 0 for line in starts] == [False, True], "it began anew"
    values = [trial.params["method.lr"] for trial in study.trials()]
    assert len(set(values)) == 3


def test_a_trial_that_falls_behind_is_stopped(tmp_path):
    class Hopeless:
        """Prunes what reports less than 0.3."""

        def prune(self, study, trial):
            return trial.intermediate_values[max(trial.intermediate_values)] < 0.3

    gate = tmp_path / "gate"  # Trials stand still after their first step until it is there.

    class Opening(Notes):
        def changed(self, job, state, progress):
            if state.status == "pruned":
                gate.touch()

    words = ["method=maml", "steps=4", "val_every=1", "method.lr=0.01,1.0"]
    search = search_in(tmp_path, words, trials=2)
    (study,) = search.studies
    study.space.fixed.append(f"gate={gate}")
    study.study.pruner = Hopeless()
    for value in ("0.01", "1.0"):
        study.study.enqueue_trial({"method.lr": value})
    states = run(search, Opening())
    ended = {trial.params["method.lr"]: trial.state.name for trial in study.trials()}
    assert ended == {"0.01": "COMPLETE", "1.0": "PRUNED"}
    assert sorted(state.status for state in states.values()) == ["done", "pruned"]
    pruned = next(trial for trial in study.trials() if trial.state.name == "PRUNED")
    assert read_progress(tmp_path / "study" / folder_of(pruned)).step == 1
    assert study.best().params == {"method.lr": "0.01"}


def test_a_deleted_journal_does_not_mix_old_trials_with_new_ones(tmp_path):
    words = ["method=maml", "steps=2", "val_every=1", "method.lr=interval(0.001,0.1)"]
    run(search_in(tmp_path, words, trials=1))
    (tmp_path / "optuna.journal").unlink()
    changed = [*words[:-1], "method.lr=interval(0.2,0.3)"]
    states = run(search_in(tmp_path, changed, trials=1))
    assert [state.status for state in states.values()] == ["done"]
    starts = (tmp_path / "study" / "starts_trial_000.txt").read_text().splitlines()
    assert [line.split()[0] for line in starts] == ["0", "0"], "it went on from the checkpoint of another trial"


def test_a_failed_trial_is_told_and_counts(tmp_path):
    search = search_in(tmp_path, ["method=maml", "method.lr=interval(0.001,0.1)"], trials=2)
    (study,) = search.studies
    study.space.fixed += ["fail_at=0"]
    states = run(search)
    assert [state.status for state in states.values()] == ["failed", "failed"]
    assert study.count("FAIL") == 2
    assert study.best() is None


def test_a_search_without_validation_scores_ends_at_its_first_trial(tmp_path):
    search = search_in(tmp_path, ["method=maml", "method.lr=interval(0.001,0.1)", "steps=1", "val_every=1"], trials=5)
    (study,) = search.studies
    job = search.take(1)[0]
    with pytest.raises(ConfigError, match=r"study/trial_000 ended without a validation score.*leave search= out"):
        search.finished(job, State(status="done"), Progress())
    assert study.count("FAIL") == 1


def test_a_trial_that_diverged_is_told_and_the_search_goes_on(tmp_path):
    search = search_in(tmp_path, ["method=maml", "method.lr=interval(0.001,0.1)"], trials=2, prune=True)
    (study,) = search.studies
    for score in (math.nan, 0.5):
        (job,) = search.take(1)
        search.finished(job, State("done"), Progress(2, "val/accuracy", ((1, score), (2, score))))
    assert (study.count("FAIL"), study.count("COMPLETE")) == (1, 1)
    assert study.best().value == 0.5
    assert not search.take(1)


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("a=interval(0,1)", "FloatDistribution(high=1.0, log=False, low=0.0, step=None)"),
        ("a=tag(log,interval(1e-4,1))", "FloatDistribution(high=1.0, log=True, low=0.0001, step=None)"),
        ("a=int(interval(1,9))", "IntDistribution(high=9, log=False, low=1, step=1)"),
        ("a=range(2,9,3)", "IntDistribution(high=8, log=False, low=2, step=3)"),
        ("a=1,b,[2]", "CategoricalDistribution(choices=('1', 'b', '[2]'))"),
    ],
)
def test_hydras_sweeps_are_optunas_distributions(word, expected):
    assert str(distribution(overrides(word)[0])) == expected


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["method=maml,anil"], "needs settings to try"),
        (["seed=range(3)", "method.lr=interval(0,1)"], "a seed is not tuned"),
        (["test=true", "method.lr=interval(0,1)"], "on validation scores alone"),
        (["method.lr=tag(log,interval(0,1))"], r"method\.lr=.*low"),
        (["method.lr=interval(1,0)"], r"method\.lr="),
    ],
)
def test_what_cannot_be_searched_is_named(words, message):
    with pytest.raises(ConfigError, match=message):
        read_spaces(overrides(*words), KNOWN)


def test_a_search_never_tests():
    (space,) = read_spaces(overrides("test=false", "method.lr=interval(0,1)"), KNOWN)
    assert space.fixed == ["test=false"]


def test_several_choices_of_a_group_are_studies():
    spaces = read_spaces(overrides("method=maml", "network=conv4,resnet12", "method.lr=interval(0,1)"), KNOWN)
    assert [space.name for space in spaces] == ["network=conv4", "network=resnet12"]
    assert [list(space.tuned) for space in spaces] == [["method.lr"]] * 2


def test_what_was_found_is_a_recipe_that_a_run_takes_before_that_of_conf(tmp_path):
    values = {"method.lr": 0.0123, "method.adapt_steps": 3, "network.hidden": "[7,8]"}
    file = write_recipe(tmp_path, "maml", "sinusoid", values, "Found for a test.", [conf_folder()])
    assert file == tmp_path / "recipe" / "maml_sinusoid.yaml"
    config = compose_config("train", ["method=maml", "data=sinusoid"], str(tmp_path))
    assert (config.method.lr, config.method.adapt_steps) == (0.0123, 3)
    assert config.method.inner_lr == 0.01, "the recipe that was in force is left behind"
    assert OmegaConf.to_container(config.network.hidden) == [7, 8]
    assert compose_config("train", ["method=maml", "data=sinusoid", "method.lr=5"], str(tmp_path)).method.lr == 5
    assert compose_config("train", ["method=maml", "data=sinusoid"]).method.lr == 3e-2
    assert groups([tmp_path])["recipe"]["maml_sinusoid"] == "Found for a test."


@pytest.mark.parametrize("own", [None, "my conf"])
def test_the_command_that_a_search_prints_has_what_it_found_and_what_was_fixed(own, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    if own is not None:
        (tmp_path / own / "network").mkdir(parents=True)
        (tmp_path / own / "network" / "tiny.yaml").write_text(
            "# Tiny.\n_target_: lightning_ntk.networks.mlp.MLP\nhidden: [3]\n"
        )
    fixed = ["++method.adapt_steps=2", f"network={'mlp' if own is None else 'tiny'}", "~method.multi_step_loss"]
    words = ["method=maml", "data=sinusoid", "steps=3", "val_every=1", "method.lr=interval(0.001,0.1)", *fixed]
    spaces = read_spaces(overrides(*words), KNOWN)
    jobs = make_jobs({space.name: space.first() for space in spaces}, tmp_path / "out", KNOWN, own)
    search = Search(spaces, jobs, tmp_path / "out", 1, False)
    (job,) = search.take(1)
    job.folder.mkdir(parents=True, exist_ok=True)
    search.finished(job, State("done"), Progress(3, "val/mse", ((1, 2.0), (3, 0.5))))
    (study,) = search.studies
    report(study, tmp_path / "out", own)
    put, _, command = capsys.readouterr().out.partition("Use it: ")[2].rpartition("lightning-ntk train ")
    subprocess.run(["sh", "-c", f"{put} true"], check=True)
    _, folder, *chosen = shlex.split(command)
    config = compose_config("train", chosen, folder)
    assert config.method.lr == study.best().params["method.lr"]
    assert config.method.adapt_steps == 2
    assert "multi_step_loss" not in config.method
    assert OmegaConf.to_container(config.network.hidden) == ([40, 40] if own is None else [3])


def test_of_errors_the_smallest_is_the_best(tmp_path):
    search = search_in(tmp_path, ["method=maml", "data=sinusoid", "method.lr=interval(0.001,0.1)"], trials=3)
    (study,) = search.studies
    for error in (0.5, 0.25, 0.75):
        (job,) = search.take(1)
        search.finished(job, State("done"), Progress(3, "val/mse", ((1, 2.0), (3, error))))
    assert study.best().value == -0.25
    assert [list(trial.intermediate_values.values()) for trial in study.trials()] == [
        [-2.0, -0.5],
        [-2.0, -0.25],
        [-2.0, -0.75],
    ]
