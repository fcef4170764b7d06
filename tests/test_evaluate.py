"""A finished run tested again under other settings."""

import json
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from test_train import TINY, TINY_SINE, run

from lightning_ntk import evaluate
from lightning_ntk.errors import ConfigError
from lightning_ntk.evaluate import evaluation_name
from lightning_ntk.results import read_results


def evaluated(*overrides, name="it"):
    evaluate.main(["run=run", f"name={name}", *overrides])
    return read_results(Path("run/evaluations") / name)


def test_the_same_settings_give_the_same_scores():
    trained = run(*TINY_SINE)
    assert evaluated().episodes == trained.episodes
    assert read_results(Path("run")) == trained, "the run's own results must stay"


def test_test_time_settings_and_shots_can_change():
    trained = run(*TINY_SINE)
    later = evaluated("method.t=5")
    assert later.episodes != trained.episodes
    assert later.episode_ids == trained.episode_ids
    assert later.config["method"]["t"] == 5
    more = evaluated("data.eval_shots=20", name="more")
    assert more.episode_ids != trained.episode_ids
    assert more.task["shots"] == 20


def test_other_data_keep_the_trained_network_and_method():
    run(*TINY, "data=glyphs", "data.queries=2", "network.filters=8", "method.t=3", "data.ways=4")
    result = evaluated("data.eval_ways=3", "data.eval_shots=2")
    assert result.task["ways"] == 3
    assert result.config["method"]["t"] == 3


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data=glyphs", "data.queries=2"], r"trained for regression"),
        (["method=maml"], r"checkpoint of MetaRKHSII"),
        (["method.t=-1"], r"method\.t"),
        (["checkpoint=middle"], r"checkpoint must be"),
    ],
)
def test_what_cannot_be_evaluated_is_said(overrides, message):
    run(*TINY_SINE)
    with pytest.raises(ConfigError, match=message):
        evaluated(*overrides)
    assert not Path("run/evaluations").exists()


def test_other_ways_than_the_head_has_point_to_eval_ways():
    run(*TINY, "data=glyphs", "data.queries=2", "network.filters=8")
    with pytest.raises(ConfigError, match=r"data\.ways=7.*5 outputs.*data\.eval_ways"):
        evaluated("data.ways=7")


def test_without_a_run_it_says_what_is_missing():
    with pytest.raises(ConfigError, match="run=FOLDER is missing"):
        evaluate.main([])
    with pytest.raises(ConfigError, match="run=nowhere"):
        evaluate.main(["run=nowhere"])


def test_results_are_plain_json():
    run(*TINY_SINE)
    evaluated()
    assert json.loads(Path("run/evaluations/it/results.json").read_text())["schema_version"] == 1


def test_each_evaluation_has_a_folder_of_its_own():
    run(*TINY_SINE)
    for words in (
        [],
        ["checkpoint=last"],
        ["method.t=5"],
        ["data.eval_shots=20"],
        ["method.t=5", "data.eval_shots=20"],
    ):
        evaluate.main(["run=run", *words])
    names = {path.name for path in Path("run/evaluations").iterdir()}
    assert names == {"again", "checkpoint=last", "method.t=5", "data.eval_shots=20", "method.t=5_data.eval_shots=20"}
    long = [f"data.eval_queries={'0' * 130}{n}" for n in (3, 4)]
    assert len({evaluation_name({}, [words]) for words in long}) == 2


@pytest.mark.parametrize("name", ["../../outside", "/tmp/x", "..", "a/b", ""])
def test_an_evaluation_stays_in_its_folder(name):
    run(*TINY_SINE)
    with pytest.raises(ConfigError, match="name="):
        evaluate.main(["run=run", f"name={name}"])


def test_an_unwritable_folder_is_found_before_the_test():
    run(*TINY_SINE)
    Path("run/evaluations").write_text("in the way")
    with pytest.raises(ConfigError, match=r"run=.*cannot be written"):
        evaluate.main(["run=run", "data=glyphs"])  # Would be refused, too, but only once there is data.


def test_the_config_of_an_evaluation_can_be_shown(capsys):
    run(*TINY_SINE)
    capsys.readouterr()
    evaluate.main(["run=run", "data.eval_shots=3", "--cfg"])
    shown = OmegaConf.create(capsys.readouterr().out)
    assert (shown.data.eval_shots, shown.data.test_episodes) == (3, 5)
    assert not Path("run/evaluations").exists()
