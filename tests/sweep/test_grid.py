"""A grid in Hydra's grammar: against Hydra's own sweeper, and by hand."""

import pytest
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser

from lightning_ntk.errors import ConfigError
from lightning_ntk.settings.config import conf_folder, groups
from lightning_ntk.sweep.grid import expand, read_overrides

KNOWN = groups([conf_folder()])


def grid(*words, most=1000):
    return expand(read_overrides(words, KNOWN), most)


@pytest.mark.parametrize(
    "words",
    [
        ["seed=0,1,2", "data=glyphs"],
        ["seed=range(3)", "method=maml,anil", "steps=4"],
        ["method.lr=1e-3,0.1", "seed=range(1,8,3)"],
        ["network.hidden=[40,40],[20]", "method.t=inf,1"],
        ["method.lr=choice(1,2)", "+trainer.max_time='a,b'"],
        ["data.name='a b','c=d'"],
        ["seed=range(3,0,-1)"],
    ],
)
def test_the_jobs_are_those_of_hydras_own_sweeper(words):
    parsed = OverridesParser.create().parse_overrides(words)
    (expected,) = BasicSweeper.split_arguments(parsed, max_batch_size=None)
    assert list(grid(*words).values()) == expected


def test_names_say_what_varies_and_nothing_else():
    jobs = grid("method=maml,anil", "seed=range(2)", "data=glyphs")
    assert list(jobs) == ["method=maml,seed=0", "method=maml,seed=1", "method=anil,seed=0", "method=anil,seed=1"]
    assert jobs["method=anil,seed=1"] == ["method=anil", "seed=1", "data=glyphs"]
    assert list(grid("seed=3")) == ["job"]


def test_glob_takes_the_choices_of_a_group_ones_own_too(tmp_path):
    assert set(grid("method=glob(meta_rkhs*)")) == {"method=meta_rkhs_i", "method=meta_rkhs_ii"}
    assert len(grid("method=glob(*)")) == len(KNOWN["method"])
    assert "method=meta_rkhs_i" not in grid("method=glob([*],exclude=meta_rkhs*)")
    (tmp_path / "method").mkdir()
    (tmp_path / "method" / "mine.yaml").write_text("# Mine.\n_target_: my.Method\n")
    own = groups([conf_folder(), tmp_path])
    assert "method=mine" in expand(read_overrides(["method=glob(*)"], own), 1000)


def test_two_jobs_never_share_a_folder():
    jobs = grid("data.root='a b','a_b','a?b','A_B'")
    assert len({name.lower() for name in jobs}) == 4
    long = grid(f"data.root={'x' * 200}1,{'x' * 200}2")
    assert len(long) == 2
    assert max(map(len, long)) < 140
    assert grid("data.root='a b','a_b'") == grid("data.root='a b','a_b'")


def test_a_value_given_twice_is_one_job_and_the_last_override_of_a_key_counts():
    assert list(grid("seed=1,1,2")) == ["seed=1", "seed=2"]
    assert grid("seed=1,2", "seed=5") == {"job": ["seed=5"]}


def test_values_that_hydras_grammar_has_no_place_for_are_still_parted_by_commas():
    jobs = grid("data.root=/tmp/a=b,/tmp/é,/tmp/c", "seed=1")
    assert [words[0] for words in jobs.values()] == ["data.root='/tmp/a=b'", "data.root='/tmp/é'", "data.root=/tmp/c"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["seed=range(1001)"], r"1001 jobs.*max_jobs=1000.*--many"),
        (["seed=range(40)", "method.lr=range(30)"], r"1200 jobs \(40 x 30\)"),
        (["method.lr=interval(0,1)"], "search=optuna"),
        (["seed=range(0)"], "no value at all"),
        (["method=glob(nothing*)"], "no value at all"),
        (["seed=glob(*)"], "'seed' is none"),
        (["seed=[1"], "KEY=VALUE"),
        (["seed"], "KEY=VALUE"),
        (["run_dir=x"], "out=FOLDER"),
        (["ckpt=x"], "out=FOLDER"),
    ],
)
def test_what_makes_no_grid_is_named(words, message):
    with pytest.raises(ConfigError, match=message):
        grid(*words)


def test_a_large_grid_is_made_when_it_is_asked_for():
    assert len(grid("seed=range(1001)", most=2000)) == 1001
