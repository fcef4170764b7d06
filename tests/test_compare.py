"""The comparison of runs: the numbers, what may be compared, and the files it writes."""

import csv
import dataclasses
from pathlib import Path

import pytest

from lightning_ntk import compare
from lightning_ntk.errors import ConfigError, DataError
from lightning_ntk.results import RunResult, read_results, write_results

TASK = {"data": "Glyphs", "ways": 5, "shots": 1, "queries": 15}
SCORES = {"maml": [0.5, 0.7, 0.6, 0.6], "meta_rkhs_ii": [0.6, 0.9, 0.7, 0.8], "anil": [0.5, 0.6, 0.6, 0.5]}


def result(method, scores, **changes) -> RunResult:
    return RunResult(
        **{
            "method": method,
            "data": "glyphs",
            "seed": 0,
            "metrics": {"test/accuracy": sum(scores) / len(scores), "memory/peak_mib": 1000.0},
            "episodes": {"test/accuracy": scores},
            "episode_ids": "a" * 64,
            "task": TASK,
            "timings": {"meta_step_s": 0.25, "fit_s": 40.0, "test_s": 3.0},
            "versions": {"torch": "2"},
            "config": {},
            **changes,
        }
    )


def write_run(folder, method, scores, curve=(0.4, 0.6), **changes):
    path = Path(folder)
    path.mkdir(parents=True)
    (path / "config.yaml").write_text("seed: 0\n")
    write_results(path, result(method, scores, **changes))
    lines = [f"{50 * k + 49},{k},{10.0 * (k + 1)},{value}" for k, value in enumerate(curve)]
    (path / "metrics.csv").write_text("\n".join(["step,epoch,time/fit,val/accuracy", *lines]) + "\n")


@pytest.fixture
def runs():
    for method, scores in SCORES.items():
        write_run(f"all/{method}", method, scores)
    return Path("all")


def test_the_table_is_sorted_and_its_differences_are_paired(runs, capsys):
    rows = compare.compare([runs], baseline="maml")
    assert [row.name for row in rows] == ["meta_rkhs_ii", "maml", "anil"]
    first, baseline, last = rows
    # By hand: scores 0.6 0.9 0.7 0.8 have mean 0.75 and sample deviation sqrt(0.05 / 3).
    assert first.score == pytest.approx(0.75)
    assert first.ci95 == pytest.approx(1.96 * (0.05 / 3) ** 0.5 / 2)
    # Differences 0.1 0.2 0.1 0.2: mean 0.15, sample deviation sqrt(0.01 / 3).
    assert first.difference == pytest.approx(0.15)
    assert first.difference_ci95 == pytest.approx(1.96 * (0.01 / 3) ** 0.5 / 2)
    assert baseline.is_baseline
    assert baseline.difference is None
    assert last.difference == pytest.approx(-0.05)
    out = capsys.readouterr().out
    assert "75.00 ± 12.65" in out
    assert "+15.00 ± 5.66" in out
    assert "learning_curves.png" in out


def test_the_files_hold_the_same_numbers(runs):
    rows = compare.compare([runs], baseline="maml")
    with open("all/comparison.csv", newline="") as lines:
        table = list(csv.DictReader(lines))
    for written, row in zip(table, rows, strict=True):
        assert written["metric"] == "accuracy"
        assert written["name"] == row.name
        assert float(written["score"]) == row.score
        assert written["difference"] == ("" if row.difference is None else repr(row.difference))
    text = Path("all/comparison.md").read_text()
    assert "| meta_rkhs_ii | 75.00 ± 12.65 | +15.00 ± 5.66 | 0.250 | 40 | 1000 |" in text
    assert "| maml | 60.00 ± 8.00 | baseline |" in text
    assert "ways 5, shots 1, queries 15" in text
    assert Path("all/figures/learning_curves.png").stat().st_size > 10_000


def test_runs_of_other_episodes_are_refused_with_what_differs(runs):
    write_run("other", "maml", [0.5], episode_ids="b" * 64, task={**TASK, "shots": 5})
    with pytest.raises(ConfigError, match=r"different episodes: shots: 1 and 5"):
        compare.compare([runs, Path("other")])
    write_run("third", "maml", [0.5], episode_ids="c" * 64)
    with pytest.raises(ConfigError, match="the images of the data differ"):
        compare.compare([runs / "anil", Path("third")])


def test_several_seeds_get_a_row_for_their_mean(runs):
    write_run("seeds/one", "maml", [0.5, 0.7, 0.6, 0.6], seed=1)
    write_run("seeds/two", "maml", [0.7, 0.7, 0.8, 0.6], seed=2)
    write_run("seeds/three", "anil", [0.6, 0.7, 0.7, 0.6], seed=1)
    rows = compare.compare([Path("seeds")], baseline="maml")
    assert [row.name for row in rows] == ["maml seed 2", "anil seed 1", "maml seed 1", "maml, mean of 2 runs"]
    assert rows[-1].score == pytest.approx(0.65)
    assert rows[-1].is_baseline
    assert rows[1].difference == pytest.approx(0.0)


def test_runs_may_be_named_one_by_one_and_evaluations_are_not_runs(runs):
    write_run("all/maml/evaluations/again", "maml", [0.1, 0.1, 0.1, 0.1])
    assert len(compare.compare([runs])) == 3
    assert len(compare.compare([runs / "maml", runs / "anil"], out=Path("out"))) == 2
    assert Path("out/comparison.md").exists()
    assert [row.score for row in compare.compare([runs / "maml/evaluations/again"])] == [pytest.approx(0.1)]


def test_an_unfinished_run_is_named_and_left_out(runs, capsys):
    Path("all/broken").mkdir()
    Path("all/broken/config.yaml").write_text("seed: 0\n")
    assert len(compare.compare([runs])) == 3
    assert "left out: all/broken" in capsys.readouterr().err


def test_the_command_line(runs, capsys):
    compare.main(["all", "baseline=anil", "out=there"])
    assert "baseline" in capsys.readouterr().out
    assert Path("there/comparison.csv").exists()
    with pytest.raises(ConfigError, match=r"baseline=mmal is none of the runs\. Did you mean 'maml'"):
        compare.main(["all", "baseline=mmal"])
    with pytest.raises(ConfigError, match=r"no setting 'basline'\. Did you mean 'baseline'"):
        compare.main(["all", "basline=maml"])
    with pytest.raises(ConfigError, match="nowhere is not a folder"):
        compare.main(["nowhere"])
    Path("empty").mkdir()
    with pytest.raises(ConfigError, match="No finished run"):
        compare.main(["empty"])


def test_results_come_back_as_they_were_written():
    write_run("run", "maml", SCORES["maml"])
    assert read_results(Path("run")) == result("maml", SCORES["maml"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "holds no results.json"),
        ("{", "cannot be read as JSON"),
        ('{"schema_version": 2}', "schema_version 2, but this version of lightning_ntk reads 1"),
        ("[]", "schema_version None"),
        ('{"schema_version": 1, "method": "maml"}', "lacks the fields config, data, episode_ids"),
    ],
)
def test_results_that_cannot_be_read_are_explained(text, message):
    Path("run").mkdir()
    if text is not None:
        Path("run/results.json").write_text(text)
    with pytest.raises(DataError, match=message):
        read_results(Path("run"))


def test_the_result_has_exactly_the_published_fields():
    assert {field.name for field in dataclasses.fields(RunResult)} == {
        *("schema_version", "method", "data", "seed", "metrics", "episodes", "episode_ids"),
        *("task", "timings", "versions", "config"),
    }
