"""The comparison of runs: the numbers, what may be compared, and the files it writes."""

import csv
import math
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from lightning_ntk import compare
from lightning_ntk.compare import find_runs
from lightning_ntk.comparison.figures import learning_curves, read_curve
from lightning_ntk.comparison.grouping import all_unlike
from lightning_ntk.comparison.table import data_name
from lightning_ntk.errors import ConfigError
from lightning_ntk.running.results import RunResult, write_results

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


def test_the_figure_of_scores_has_a_line_for_each_of_the_table(runs, monkeypatch):
    drawn = keep_figures(monkeypatch)
    compare.compare([runs], baseline="maml")
    (scores, differences), names = drawn["scores"].axes, ["meta_rkhs_ii", "maml", "anil"]
    assert [label.get_text() for label in scores.get_yticklabels()] == names
    assert scores.yaxis_inverted()
    # Each interval is one line container: its point, its caps, its bar.
    assert [drawn.lines[0].get_xdata()[0] for drawn in scores.containers] == pytest.approx([75.0, 60.0, 55.0])
    assert [drawn.lines[0].get_xdata()[0] for drawn in differences.containers] == pytest.approx([15.0, 0.0, -5.0])
    (_, _, (bar,)) = scores.containers[0].lines
    assert np.ptp(bar.get_segments()[0][:, 0]) == pytest.approx(2 * 12.65, abs=0.01)


def test_runs_of_other_episodes_are_refused_with_what_differs(runs):
    write_run("other", "maml", [0.5], episode_ids="b" * 64, task={**TASK, "shots": 5})
    with pytest.raises(ConfigError, match=r"different episodes: shots: 1 and 5"):
        compare.compare([runs, Path("other")])
    write_run("third", "maml", [0.5], episode_ids="c" * 64)
    with pytest.raises(ConfigError, match=r"the data differ \(images, or settings"):
        compare.compare([runs / "anil", Path("third")])


def test_several_seeds_get_a_row_for_their_mean(runs):
    write_run("seeds/one", "maml", [0.5, 0.7, 0.6, 0.6], seed=1)
    write_run("seeds/two", "maml", [0.7, 0.7, 0.8, 0.6], seed=2)
    write_run("seeds/three", "anil", [0.6, 0.7, 0.7, 0.6], seed=1)
    rows = compare.compare([Path("seeds")], baseline="maml")
    assert [row.name for row in rows] == ["maml seed 2", "anil seed 1", "maml seed 1", "maml, mean over 2 seeds"]
    assert rows[-1].score == pytest.approx(0.65)
    assert rows[-1].is_baseline
    assert rows[1].difference == pytest.approx(0.0)
    table = Path("seeds/comparison.md").read_text()
    assert re.findall(r"^\| ((?:maml|anil)[^|]*) \|", table, re.MULTILINE) == ["maml, mean over 2 seeds", "anil seed 1"]
    assert "maml seed 2" in Path("seeds/comparison.csv").read_text()
    compare.compare([Path("seeds")], baseline="maml seed 1")
    table = Path("seeds/comparison.md").read_text()
    assert table.index("| maml, mean over 2 seeds | 65.00") < table.index("| maml seed 1 | 60.00 ± ")
    assert "| baseline |" in table


def test_runs_of_different_settings_are_never_averaged(runs, capsys):
    for t in (1.0, 10.0):
        for seed in (0, 1):
            config = {"seed": seed, "run_dir": f"{seed}", "method": {"t": t}, "data": {"seed": seed, "ways": 5}}
            write_run(f"flows/t{t:.0f}_{seed}", "meta_rkhs_ii", [t / 20, 0.2, 0.3], seed=seed, config=config)
    rows = compare.compare([Path("flows")])
    assert [(row.name, row.runs) for row in rows[4:]] == [
        ("meta_rkhs_ii, mean over 2 seeds (t10_0, t10_1)", 2),
        ("meta_rkhs_ii, mean over 2 seeds (t1_0, t1_1)", 2),
    ]
    with pytest.raises(ConfigError, match=r"baseline=meta_rkhs_ii stands for runs of different settings.*t1_0"):
        compare.compare([Path("flows")], baseline="meta_rkhs_ii")
    by_name = compare.compare([Path("flows")], baseline="meta_rkhs_ii t1_0")
    assert [row.name for row in by_name if row.is_baseline] == ["meta_rkhs_ii t1_0"]


def test_what_a_run_ran_on_does_not_keep_it_from_a_mean(runs):
    machines = {"trainer": {"devices": 2, "enable_progress_bar": False}}, {"trainer": {"devices": 1}}
    for seed, machine in enumerate(machines):
        data = {"num_workers": seed, "download": seed == 0, "resident": ["host", "device"][seed]}
        write_run(f"two/{seed}", "maml", [0.5, 0.7], seed=seed, config={**machine, "data": data})
    write_run("two/clipped", "maml", [0.5, 0.7], seed=2, config={"trainer": {"gradient_clip_val": 1.0}})
    names = [row.name for row in compare.compare([Path("two")])]
    assert sum("mean over 2 seeds" in name for name in names) == 1


def test_runs_that_were_attacked_differently_are_never_averaged():
    attack = {"linf_eps": ["2/255"], "steps": 20, "fit_steps": 5}
    variants = {
        "a": {"adversarial": attack, "timing": {"_target_": "x"}},
        "b": {"adversarial": {**attack, "fit_steps": 1}, "pictures": {"steps": 3}},  # Neither decides the test.
        "c": {"adversarial": {**attack, "steps": 5}},
        "d": {"adversarial": {**attack, "steps": 5}},
    }
    for seed, (name, callbacks) in enumerate(variants.items()):
        write_run(f"attacked/{name}", "maml", [0.5, 0.7], seed=seed, config={"callbacks": callbacks})
    names = [row.name for row in compare.compare([Path("attacked")]) if row.runs > 1]
    assert names == ["maml, mean over 2 seeds (a, b)", "maml, mean over 2 seeds (c, d)"]
    for name in "cd":  # What is left out cannot differ.
        write_run(f"some/{name}", "maml", [0.5, 0.7], seed=ord(name), config={"callbacks": variants["c"]})
    write_run("some/without", "maml", [0.5, 0.7], seed=0, config={"callbacks": None})
    assert [row.name for row in compare.compare([Path("some")]) if row.runs > 1] == ["maml, mean over 3 seeds"]


def test_means_whose_folders_are_called_alike_are_told_apart_by_their_paths(runs):
    for lr in ("small", "big"):
        for seed in (0, 1):
            config = {"method": {"lr": lr}}
            write_run(f"search/lr_{lr}/seed_{seed}", "maml", [0.5, 0.7], seed=seed, config=config)
    write_run("search/other/a", "anil", [0.5, 0.7])
    write_run("search/other/b", "anil", [0.5, 0.7], seed=1)
    rows = compare.compare([Path("search")])
    assert {row.name for row in rows if row.runs > 1} == {
        "maml, mean over 2 seeds (lr_small/seed_0, lr_small/seed_1)",
        "maml, mean over 2 seeds (lr_big/seed_0, lr_big/seed_1)",
        "anil, mean over 2 seeds",
    }
    for method in ("anil", "anil, mean over 2 seeds"):
        write_run(f"named/{method}", method, [0.5, 0.7])
    write_run("named/again", "anil", [0.5, 0.7], seed=1)
    write_run("named/third", "anil, mean over 2 seeds", [0.5, 0.7], config={"method": {"lr": 1}})
    names = [row.name for row in compare.compare([Path("named")])]
    assert len(set(names)) == len(names)


def test_no_two_names_are_alike():
    assert all_unlike(["a", "b", "a", "a"], ["b"]) == ["a", "b_2", "a_2", "a_3"]
    assert all_unlike(["a", "a_2", "a"]) == ["a", "a_2", "a_3"]


def test_a_run_that_began_with_a_copied_checkpoint_is_never_averaged_with_one_from_scratch(tmp_path):
    began = {
        "scratch": {"ckpt": None, "run_dir": "x"},
        "copied": {"ckpt": "copy.ckpt", "run_dir": "y"},
        "copied_by_name": {"ckpt": "stage_1/copied_by_name/checkpoints/last.ckpt", "run_dir": "z"},
        "went_on": {"ckpt": "somewhere/else/went_on", "run_dir": None},
        "went_on_from_file": {"ckpt": "went_on_from_file/checkpoints/best.ckpt", "run_dir": None},
        "went_on_from_here": {"ckpt": ".", "run_dir": None},
        "went_on_by_link": {"ckpt": str(tmp_path / "link"), "run_dir": None},
    }
    for seed, (name, config) in enumerate(began.items()):
        write_run(f"began/{name}", "maml", [0.5, 0.7], seed=seed, config=config)
    (tmp_path / "link").symlink_to(Path("began/went_on_by_link").resolve())
    (mean,) = (row.name for row in compare.compare([Path("began")]) if row.runs > 1)
    assert mean == ("maml, mean over 5 seeds (scratch, went_on, went_on_by_link, went_on_from_file, went_on_from_here)")


def test_two_tests_of_one_training_are_never_averaged():
    for seed in (0, 1):
        write_run(f"all/{seed}", "maml", [0.5, 0.7], seed=seed)
        for name, score in (("best", 0.5), ("last", 0.7)):
            write_run(f"all/{seed}/evaluations/{name}", "maml", [score + seed / 10, score], seed=seed)
    tests = sorted(Path("all").glob("*/evaluations/*"))
    means = {row.name: row.score for row in compare.compare(tests) if row.runs > 1}
    assert means == {
        "maml, mean over 2 seeds (best)": pytest.approx(0.525),
        "maml, mean over 2 seeds (last)": pytest.approx(0.725),
    }
    assert [row.runs for row in compare.compare(tests[:2])] == [1, 1]
    assert [row.runs for row in compare.compare([Path("all/0"), tests[0]])] == [1, 1]
    assert [row.runs for row in compare.compare([Path("all/0"), tests[2]])] == [1, 1, 2], "each its own training"
    with pytest.raises(ConfigError, match=r"stands for several tests of one run. Name one of them: 'maml best'"):
        compare.compare(tests[:2], baseline="maml")


def test_a_regression_of_which_every_run_diverged():
    for method in ("anil", "maml"):
        scores = [math.nan, math.nan]
        metrics = {"test/mse": math.nan, "val/mse": math.nan}
        write_run(f"sine/{method}", method, scores, episodes={"test/mse": scores}, metrics=metrics)
        Path(f"sine/{method}/metrics.csv").write_text("step,epoch,time/fit,val/mse\n9,0,1,nan\n19,1,2,nan\n")
    assert [row.name for row in compare.compare([Path("sine")])] == ["anil", "maml"]
    assert "| anil | nan ± nan |" in Path("sine/comparison.md").read_text()
    assert Path("sine/figures/scores.png").exists()


def test_a_folder_whose_name_is_not_utf_8(capsys):
    strange = Path(os.fsdecode(b"all/caf\xe9"))
    try:
        write_run(strange, "maml", [0.5, 0.7], config={"method": {"lr": 1}})
    except OSError:
        pytest.skip("no such name can be given here")
    write_run("all/plain", "maml", [0.5, 0.7], config={"method": {"lr": 2}})
    rows = compare.compare([Path("all")], out=strange / "out")
    assert {row.name for row in rows} == {"maml caf\\udce9", "maml plain"}
    assert "maml caf\\udce9" in (strange / "out" / "comparison.csv").read_text(encoding="utf-8")
    assert "caf\\udce9/out/comparison.html" in capsys.readouterr().out
    assert [row.name for row in compare.compare([Path("all")], baseline=str(strange)) if row.is_baseline] == [
        "maml caf\\udce9"
    ]


def test_repeats_of_one_seed_are_called_runs(runs):
    write_run("twice/a", "maml", [0.5, 0.7])
    write_run("twice/b", "maml", [0.7, 0.7])
    rows = compare.compare([Path("twice")], baseline="maml")
    assert [(row.name, row.is_baseline) for row in rows] == [
        ("maml b", False),
        ("maml a", False),
        ("maml, mean over 2 runs", True),
    ]


def test_mean_squared_errors_are_sorted_upwards_and_nan_comes_last():
    for method, scores in {"anil": [0.3, 0.5], "maml": [math.nan, 1.0], "meta_rkhs_ii": [0.01, 0.03]}.items():
        metrics = {"test/mse": sum(scores) / 2, "memory/peak_mib": 1.0}
        write_run(f"sine/{method}", method, scores, episodes={"test/mse": scores}, metrics=metrics)
    rows = compare.compare([Path("sine")], baseline="anil")
    assert [row.name for row in rows] == ["meta_rkhs_ii", "anil", "maml"]
    assert "| meta_rkhs_ii | 0.0200 ± 0.0196 | -0.3800 ± " in Path("sine/comparison.md").read_text()


def test_a_folder_of_a_sweep_that_is_not_there_is_named():
    with pytest.raises(ConfigError, match=r"no setting 'method'.* Nor is there a folder method=maml,seed=0"):
        compare.main(["method=maml,seed=0"])


def test_runs_tested_on_fewer_of_the_episodes_are_refused(runs):
    write_run("short", "maml", [0.5, 0.7], episode_ids="a" * 64)
    with pytest.raises(ConfigError, match=r"was tested on 4 episodes, .*short\) on 2 of the same"):
        compare.compare([runs, Path("short")])


def test_a_run_without_training_has_no_times_and_is_a_line_in_the_figure(runs, capsys, monkeypatch):
    drawn = keep_figures(monkeypatch)
    timings = {"meta_step_s": math.nan, "fit_s": 0.0, "test_s": 3.0}
    write_run("all/from_scratch", "from_scratch", [0.3, 0.3, 0.3, 0.2], curve=(), timings=timings)
    rows = compare.compare([runs])
    assert rows[-1].meta_step_s is None
    assert "| from_scratch | 27.50 ± 4.90 |  |  | 1000 |" in Path("all/comparison.md").read_text()
    for axes in drawn["learning_curves"].axes:
        (line,) = (line for line in axes.get_lines() if line.get_label() == "from_scratch (test)")
        assert line.get_ydata() == pytest.approx([27.5, 27.5])


def test_methods_without_training_are_lines_that_can_be_told_apart(monkeypatch):
    drawn = keep_figures(monkeypatch)
    write_run("all/maml", "maml", [0.5, 0.7])
    for method, score in (("from_scratch", 0.3), ("nearest_centroid", 0.4)):
        for seed in (0, 1):
            scores = [score + seed / 10, score]
            write_run(f"all/{method}_{seed}", method, scores, curve=(), timings={"test_s": 3.0}, seed=seed)
    compare.compare([Path("all")])
    lines = drawn["learning_curves"].axes[0].get_lines()
    levels = {line.get_label(): line.get_ydata()[0] for line in lines}
    assert levels["from_scratch, mean over 2 seeds (test)"] == pytest.approx(32.5)
    assert levels["nearest_centroid, mean over 2 seeds (test)"] == pytest.approx(42.5)
    assert len({(line.get_color(), line.get_linestyle()) for line in lines}) == len(lines) == 3


def test_the_legend_of_many_runs_lies_within_the_figure(monkeypatch):
    drawn = keep_figures(monkeypatch)
    for k in range(40):
        write_run(f"all/{k}", f"method{k}", [0.5])
    compare.compare([Path("all")])
    figure = drawn["learning_curves"]
    legend = figure.legends[0].get_window_extent()
    assert 0 <= legend.y0 <= legend.y1 <= figure.bbox.height


def keep_figures(monkeypatch) -> dict[str, Figure]:
    """The figures that are saved from now on, by file name."""
    figures, save = {}, Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, file, **k: (figures.update({Path(file).stem: self}), save(self, file, **k))
    )
    return figures


def test_the_curves_are_what_metrics_csv_holds(runs, monkeypatch):
    drawn = keep_figures(monkeypatch)
    compare.compare([runs])
    over_steps, over_seconds = drawn["learning_curves"].axes
    for axes, places in ((over_steps, [50, 100]), (over_seconds, [10.0, 20.0])):
        lines = axes.get_lines()
        assert [line.get_label() for line in lines] == ["anil", "maml", "meta_rkhs_ii"]
        assert len({line.get_color() for line in lines}) == 3
        for line in lines:
            assert line.get_xdata() == pytest.approx(places)
            assert line.get_ydata() == pytest.approx([40, 60])
    # The legend stands beside the curves, not over them.
    legend, right = drawn["learning_curves"].legends[0].get_window_extent(), over_seconds.get_window_extent().x1
    assert legend.x0 >= right


def test_seeds_share_a_colour_and_ten_methods_differ_in_looks(monkeypatch):
    drawn = keep_figures(monkeypatch)
    for seed in (1, 2):
        write_run(f"seeds/maml{seed}", "maml", [0.5], seed=seed)
    for k in range(9):
        write_run(f"seeds/other{k}", f"other{k}", [0.5])
    compare.compare([Path("seeds")])
    lines = drawn["learning_curves"].axes[0].get_lines()
    looks = [(line.get_color(), line.get_linestyle()) for line in lines]
    assert looks[0] == looks[1]
    assert len(set(looks)) == 10
    names = [text.get_text() for text in drawn["learning_curves"].legends[0].get_texts()]
    assert len(names) == 10
    assert names[0] == "maml, 2 seeds", "two curves, not their mean"


def test_the_files_go_into_the_folder_of_runs_or_beside_the_other_runs(runs):
    write_run("far/away/maml", "maml", SCORES["maml"])
    compare.compare([runs / "anil", Path("far/away/maml")])
    assert Path("runs/comparison/comparison.csv").exists()
    compare.compare([runs])
    assert Path("all/comparison.csv").exists()
    Path("file").write_text("")
    with pytest.raises(ConfigError, match="out=file cannot be written"):
        compare.compare([runs], out=Path("file"))


def test_seeds_of_a_setting_are_named_by_what_their_folders_share():
    for lr in (0.1, 0.2):
        for seed in (0, 1):
            config = {"method": {"lr": lr}}
            write_run(f"all/method=maml,seed={seed},method.lr={lr}", "maml", [lr, 0.7], config=config, seed=seed)
            write_run(f"two/{lr}/seed={seed}", "maml", [lr, 0.7], config=config, seed=seed)
    names = [row.name for row in compare.compare([Path("all")]) if row.runs > 1]
    assert names == [f"maml, mean over 2 seeds (method=maml,method.lr={lr})" for lr in (0.2, 0.1)]
    names = [row.name for row in compare.compare([Path("two")]) if row.runs > 1]
    assert names == ["maml, mean over 2 seeds (0.2)", "maml, mean over 2 seeds (0.1)"]
    write_run("two/0.1/lone", "maml", [0.5, 0.5])
    names = [row.name for row in compare.compare([Path("two/0.1")]) if row.runs > 1]
    assert names == ["maml, mean over 2 seeds (seed=0, seed=1)"]


def test_long_names_leave_the_numbers_their_place(capsys):
    for lr in (0.1, 0.2):
        write_run(f"all/{'a_long_name_' * 12}{lr}", "maml", [lr, 0.7], config={"method": {"lr": lr}})
    compare.compare([Path("all")])
    lines = capsys.readouterr().out.splitlines()
    (line,) = (line for line in lines if "45.00 ± 49.00" in line)
    assert [cell.strip() for cell in line.split("│")[2:]] == ["45.00 ± 49.00", "0.250", "40", "1000", ""]
    assert max(map(len, lines[:4])) <= 120


def test_square_brackets_in_a_folder_are_shown(runs, capsys):
    write_run("all/[red]maml", "maml", SCORES["maml"], config={"method": {"lr": 0.5}})
    compare.compare([runs])
    assert "maml [red]maml" in capsys.readouterr().out


def test_runs_may_be_named_one_by_one_and_evaluations_are_not_runs(runs):
    write_run("all/maml/evaluations/again", "maml", [0.1, 0.1, 0.1, 0.1])
    assert len(compare.compare([runs])) == 3
    assert len(compare.compare([runs / "maml", runs / "anil"], out=Path("out"))) == 2
    assert Path("out/comparison.md").exists()
    assert [row.score for row in compare.compare([runs / "maml/evaluations/again"])] == [pytest.approx(0.1)]


def test_links_to_runs_are_followed_and_a_run_counts_once(runs):
    collected = Path("collected")
    collected.mkdir()
    for run in runs.iterdir():
        (collected / run.name).symlink_to(run.resolve())
        (collected / f"{run.name} again").symlink_to(run.resolve())
    (collected / "round").symlink_to(collected.resolve())
    expected = [(row.name, row.score, row.difference) for row in compare.compare([runs])]
    assert [(row.name, row.score, row.difference) for row in compare.compare([collected])] == expected
    assert len(expected) == 3


def test_an_unfinished_run_is_named_and_left_out(runs, capsys):
    Path("all/broken").mkdir()
    Path("all/broken/config.yaml").write_text("seed: 0\n")
    assert len(compare.compare([runs])) == 3
    assert "left out: all/broken (without results; stopped before its first checkpoint)" in capsys.readouterr().err
    Path("all/broken/checkpoints").mkdir()
    Path("all/broken/checkpoints/last.ckpt").touch()
    compare.compare([runs])
    assert "(without results; lightning-ntk train ckpt=all/broken test=true)" in capsys.readouterr().err


def test_paths_below_the_home_folder_and_what_is_no_path(runs, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    compare.main(["~/all", "out=~/there", "baseline=~/all/maml"])
    assert (tmp_path / "there" / "comparison.csv").exists()
    for words in (["~nobody_of_that_name/x"], ["all", "out="], ["all", "baseline=~nobody_of_that_name"]):
        with pytest.raises(
            ConfigError, match=r"^(RUN|out|baseline)(=~nobody_of_that_name.*:| must be a path, but got '')"
        ):
            compare.main(words)


def test_the_command_line(runs, capsys):
    compare.main(["all", "baseline=anil", "out=there"])
    assert "baseline" in capsys.readouterr().out
    assert Path("there/comparison.csv").exists()
    with pytest.raises(ConfigError, match=r"baseline=mmal is none of the runs\. Did you mean 'maml'"):
        compare.main(["all", "baseline=mmal"])
    with pytest.raises(ConfigError, match=r"no setting 'basline'\. Did you mean 'baseline'"):
        compare.main(["all", "basline=maml"])
    with pytest.raises(ConfigError, match="nothing to compare: give run folders"):
        compare.main(["baseline=maml"])
    for words in (["nowhere"], ["all/method=nowhere"], ["all", "./method=nowhere"]):
        with pytest.raises(ConfigError, match="nowhere is not a folder"):
            compare.main(words)
    with pytest.raises(ConfigError, match="baseline= names a method"):
        compare.main(["all", "baseline="])
    Path("empty").mkdir()
    with pytest.raises(ConfigError, match="No finished run"):
        compare.main(["empty"])


def test_a_data_set_of_ones_own_stands_under_its_own_name():
    assert data_name(result("maml", [0.5])) == "Glyphs"
    assert data_name(result("maml", [0.5], data="tiny_imagenet", task={"data": "TinyImageNet"})) == "TinyImageNet"
    assert data_name(result("maml", [0.5], data="leaves", task={"data": "ImageFolder"})) == "ImageFolder (leaves)"
    assert data_name(result("maml", [0.5], task={})) == "glyphs"


def test_what_was_trained_is_no_reference_and_has_a_curve_without_a_clock(monkeypatch):
    drawn = []
    monkeypatch.setattr(compare, "learning_curves", lambda *arguments: drawn.append(arguments))
    write_run("all/a", "maml", [0.4, 0.6], timings={}, tested={"checkpoint": "best.ckpt", "step": 9})
    Path("all/a/metrics.csv").write_text("step,epoch,val/accuracy\n49,0,0.4\n99,1,0.5\n")
    write_run("all/b", "anil", [0.4, 0.6])
    write_run("all/c", "protonet", [0.4, 0.6], timings={})
    compare.compare([Path("all")])
    assert [name for name, _ in drawn[0][2]] == ["protonet"]
    steps, seconds, values = read_curve(Path("all/a"), "val/accuracy")
    assert (steps, values) == ([50, 100], [0.4, 0.5])
    assert all(map(math.isnan, seconds))
    assert learning_curves(drawn[0][0], "accuracy", [], Path("curves.png")) == Path("curves.png")


def test_a_training_that_two_sweeps_made_counts_once(capsys):
    callbacks = {"callbacks": {"timing": {}}}
    write_run("all/a", "maml", [0.4, 0.6], seed=1, timings={"fit_s": 10.0}, config=callbacks)
    write_run("all/b", "maml", [0.4, 0.6], seed=1, timings={"fit_s": 12.0}, config={**callbacks, "run_dir": "all/b"})
    write_run("all/c", "maml", [0.4, 0.6], seed=2, timings={"fit_s": 10.0}, config=callbacks)
    write_run("all/d", "maml", [0.4, 0.7], seed=1, timings={"fit_s": 10.0}, config=callbacks)
    write_run("all/e", "maml", [0.4, 0.6], seed=1, timings={"fit_s": 10.0}, config={"callbacks": {"ntk": {}}})
    assert [entry.folder.name for entry in find_runs([Path("all")])] == ["a", "c", "d", "e"]
    assert "all/b (the same training as " in capsys.readouterr().err


def test_a_copy_of_a_run_counts_once(capsys):
    for seed in (0, 1):
        write_run(f"all/{seed}", "maml", [0.4 + seed / 10, 0.6], seed=seed)
    shutil.copytree("all/0", "all/copy")
    shutil.copytree("all/0", "all/0/evaluations/other")  # Of the same numbers, but under a name of its own.
    entries = find_runs([Path("all")])
    assert [entry.folder.name for entry in entries] == ["0", "1"]
    assert "left out: " in (said := capsys.readouterr().err)
    assert "all/copy (the same training as " in said
    assert len(find_runs([Path("all/0"), Path("all/0/evaluations/other")])) == 2


def test_a_run_that_did_not_train_has_no_seconds_and_no_memory(runs):
    untrained = {"timings": {"meta_step_s": None, "fit_s": 0.0}}
    write_run("all/nearest_centroid", "nearest_centroid", [0.3, 0.3, 0.4, 0.4], **untrained)
    (row,) = (row for row in compare.compare([runs]) if row.method == "nearest_centroid")
    assert (row.meta_step_s, row.fit_s) == (None, None)
