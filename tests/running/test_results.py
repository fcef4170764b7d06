"""results.json: it comes back as it was written, is strict JSON, and a bad one is explained; the statistics."""

import dataclasses
import importlib.metadata
import json
import math
import platform
from pathlib import Path

import numpy
import pytest

from lightning_ntk.errors import DataError
from lightning_ntk.running import results
from lightning_ntk.running.results import RunResult, mean_and_ci95, package_versions, paired_difference, read_results
from lightning_ntk.version import __version__

RESULT = RunResult(
    method="maml",
    data="glyphs",
    seed=3,
    metrics={"test/accuracy": 0.6, "test/accuracy_ci95": 0.08},
    episodes={"test/accuracy": [0.5, 0.7, 0.6, 0.6]},
    episode_ids="a" * 64,
    task={"data": "Glyphs", "ways": 5},
    timings={"meta_step_s": 0.25, "fit_s": 40.0, "test_s": 3.0},
    versions={"torch": "2"},
    config={"method": {"lr": 1e-3, "names": ["a", None]}},
    probes={"ntk": {"episodes": {"ntk/trace": [1.0, 2.0]}, "series": {"steps": [1, 2]}}},
    tested={"checkpoint": "best.ckpt", "step": 40},
)


def test_results_come_back_as_they_were_written(tmp_path):
    assert results.write_results(tmp_path, RESULT) == tmp_path / "results.json"
    assert read_results(tmp_path) == RESULT
    assert [file.name for file in tmp_path.iterdir()] == ["results.json"]


def test_the_result_has_exactly_the_published_fields(tmp_path):
    results.write_results(tmp_path, RESULT)
    published = {"schema_version", "method", "data", "seed", "metrics", "episodes", "episode_ids", "task", "timings"}
    published |= {"versions", "config", "probes", "tested"}
    assert json.loads((tmp_path / "results.json").read_text()).keys() == published


def test_results_of_version_1_are_read_without_probes(tmp_path):
    old = dataclasses.asdict(RESULT) | {"schema_version": 1}
    del old["probes"]
    (tmp_path / "results.json").write_text(json.dumps(old))
    assert read_results(tmp_path) == dataclasses.replace(RESULT, probes={}, schema_version=1)


def test_results_that_do_not_say_what_was_tested_are_read(tmp_path):
    old = dataclasses.asdict(RESULT)
    del old["tested"]
    (tmp_path / "results.json").write_text(json.dumps(old))
    assert read_results(tmp_path) == dataclasses.replace(RESULT, tested={})


def test_numbers_that_are_not_finite_are_written_as_strict_json(tmp_path):
    result = dataclasses.replace(
        RESULT,
        metrics={"test/mse": math.inf},
        episodes={"test/mse": [0.5, math.inf]},
        timings={"meta_step_s": math.nan},
        config={"method": {"t": math.inf}},
        probes={"ntk": {"episodes": {"ntk/condition_number": [2.0, math.inf]}, "series": {"a": [math.nan]}}, "x": {}},
    )
    results.write_results(tmp_path, result)
    content = json.loads((tmp_path / "results.json").read_text(), parse_constant=pytest.fail)
    assert content["metrics"] == {"test/mse": None}
    assert content["config"] == {"method": {"t": "inf"}}
    back = read_results(tmp_path)
    assert math.isnan(back.metrics["test/mse"])
    assert math.isnan(back.timings["meta_step_s"])
    values = back.probes["ntk"]["episodes"]["ntk/condition_number"]
    assert values == [2.0, pytest.approx(math.nan, nan_ok=True)]
    assert back.probes["ntk"]["series"] == {"a": [None]}
    assert back.episodes["test/mse"] == [0.5, pytest.approx(math.nan, nan_ok=True)]


def test_a_write_that_fails_leaves_the_earlier_results(tmp_path, monkeypatch):
    results.write_results(tmp_path, RESULT)

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(results.os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        results.write_results(tmp_path, dataclasses.replace(RESULT, seed=4))
    assert read_results(tmp_path) == RESULT


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "holds no results.json"),
        (
            "{",
            r"cannot be read as JSON: .* `lightning-ntk evaluate run=run` \(`lightning-ntk train ckpt=run` ",
        ),
        ('{"schema_version": 3}', "schema_version 3, but this version of lightning_ntk reads 1 and 2"),
        ("[]", "schema_version None"),
        ('{"schema_version": 1, "method": "maml"}', "lacks the fields config, data, episode_ids"),
        ('{"schema_version": 2, "method": "maml"}', "lacks the fields .* probes, seed"),
    ],
)
def test_results_that_cannot_be_read_are_explained(text, message):
    Path("run").mkdir()
    if text is not None:
        Path("run/results.json").write_text(text)
    with pytest.raises(DataError, match=message):
        read_results(Path("run"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"metrics": []}, "another type than it should, metrics: "),
        ({"method": 3}, "another type than it should, method: .*Test the run again .* or leave it out"),
        ({"seed": [1]}, "another type than it should, seed: "),
        ({"metrics": {"test/mse": "x"}, "timings": {"fit_s": "x"}}, "another type than it should, metrics, timings: "),
        ({"episodes": {"test/mse": ["a"]}}, "another type than it should, episodes: "),
        ({"episodes": {"test/mse": 3}}, "another type than it should, episodes: "),
        ({"probes": {"ood": 3}}, "another type than it should, probes: "),
        ({"probes": {"ood": {"episodes": {"a": 3}}}}, "another type than it should, probes: "),
        ({"config": {"data": 3}}, "another type than it should, config.data: "),
        ({"config": {"callbacks": [1]}}, "another type than it should, config.callbacks: "),
        ({"config": {"callbacks": {"ood": 3, "ntk": None}}}, "another type than it should, config.callbacks.ood: "),
        ({"episodes": {}}, "no scores of episodes"),
        ({"episodes": {"test/mse": []}}, "no scores of episodes"),
    ],
)
def test_results_without_their_content_are_explained(tmp_path, changes, message):
    results.write_results(tmp_path, dataclasses.replace(RESULT, **changes))
    with pytest.raises(DataError, match=message):
        read_results(tmp_path)


def test_results_of_an_evaluation_that_cannot_be_read_name_its_run(tmp_path):
    folder = tmp_path / "run" / "evaluations" / "again"
    folder.mkdir(parents=True)
    (folder / "results.json").write_text("{")
    with pytest.raises(DataError, match=f"evaluate run={tmp_path / 'run'}`"):
        read_results(folder)


def test_the_versions_name_what_results_depend_on(monkeypatch):
    versions = package_versions()
    assert {"python", "lightning_ntk", "torch", "pytorch-lightning", "numpy"} <= versions.keys()
    assert versions["python"] == platform.python_version()
    assert versions["lightning_ntk"] == __version__
    assert versions["numpy"] == numpy.__version__
    assert versions["torch"] == importlib.metadata.version("torch")
    monkeypatch.setattr(results, "REPORTED_PACKAGES", ("numpy", "no-such-package"))
    assert package_versions().keys() == {"python", "lightning_ntk", "numpy"}


def test_the_statistics_by_hand():
    assert mean_and_ci95([2.0]) == (2.0, 0.0)
    # 1, 2, 3, 6: mean 3, squared deviations 4 + 1 + 0 + 9 over 3.
    assert mean_and_ci95([1.0, 2.0, 3.0, 6.0]) == pytest.approx((3.0, 1.96 * math.sqrt(14 / 3) / 2))
    # Differences 1 and 3: mean 2, sample deviation sqrt(2).
    assert paired_difference([2.0, 4.0], [1.0, 1.0]) == pytest.approx((2.0, 1.96))
    with pytest.raises(ValueError, match="shorter"):
        paired_difference([1.0, 2.0], [1.0])
