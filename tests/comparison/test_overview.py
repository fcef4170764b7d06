"""Runs on several tasks: a comparison of each, and one table over all."""

import math
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from test_compare import TASK, write_run

from lightning_ntk import compare
from lightning_ntk.comparison.figures import scores_over_tasks
from lightning_ntk.comparison.overview import compare_tasks, task_names
from lightning_ntk.errors import ConfigError


def of_task(letter, **settings):
    task = {**TASK, **settings}
    return {"episode_ids": letter * 64, "data": task["data"].lower(), "task": task}


@pytest.fixture
def runs():
    write_run("all/maml_1", "maml", [0.5, 0.7, 0.6, 0.6], **of_task("a"))
    write_run("all/anil_1", "anil", [0.5, 0.6, 0.6, 0.5], **of_task("a"))
    write_run("all/maml_5", "maml", [0.7, 0.9, 0.8, 0.8], **of_task("b", shots=5))
    write_run("all/reptile_5", "reptile", [0.7, 0.7, 0.7, 0.7], **of_task("b", shots=5))
    return Path("all")


def test_one_table_has_all_tasks(runs):
    compare.main([str(runs), "by_task=true", "baseline=maml"])
    lines = (runs / "overview.md").read_text().splitlines()
    assert lines[0] == (
        "| method | 1 shot: accuracy, % | difference to baseline | 5 shots: accuracy, % | difference to baseline |"
    )
    assert lines[2:5] == [
        "| maml | 60.00 ± 8.00 | baseline | 80.00 ± 8.00 | baseline |",
        "| anil | 55.00 ± 5.66 | -5.00 ± 5.66 |  |  |",
        "| reptile |  |  | 70.00 ± 0.00 | -10.00 ± 8.00 |",
    ]
    assert (runs / "overview.png").stat().st_size > 10_000
    assert "maml" in (runs / "comparison_1_shot" / "comparison.md").read_text()
    assert "reptile" in (runs / "comparison_5_shots" / "comparison.md").read_text()


def test_seeds_are_one_row_and_a_task_without_the_baseline_has_no_differences(runs):
    write_run("all/again", "maml", [0.7, 0.7, 0.8, 0.6], seed=1, **of_task("a"))
    compare_tasks([runs], "anil")
    lines = (runs / "overview.md").read_text().splitlines()
    assert lines[0] == "| method | 1 shot: accuracy, % | difference to baseline | 5 shots: accuracy, % |"
    assert lines[2].startswith("| maml, runs: 2, 1 | 65.00 ± ")
    assert lines[2].endswith("| 80.00 ± 8.00 |")
    assert lines[3] == "| anil seed 0 | 55.00 ± 5.66 | baseline |  |"


def test_tasks_are_in_the_order_of_their_numbers_and_data_in_that_of_the_runs():
    for k, (data, shots) in enumerate([("Omniglot", 10), ("Omniglot", 5), ("Glyphs", 5), ("Omniglot", [1, 2])]):
        write_run(f"all/run_{k}", "maml", [0.5, 0.7], **of_task("abcd"[k], data=data, shots=shots))
    compare_tasks([Path("all")])
    columns = (Path("all") / "overview.md").read_text().splitlines()[0].split(" | ")[1:]
    assert [column.partition(":")[0] for column in columns] == [
        "Omniglot, [1, 2] shots",
        "Omniglot, 5 shots",
        "Omniglot, 10 shots",
        "Glyphs, 5 shots",
    ]


def test_a_single_task_gets_its_comparison_alone(runs):
    compare_tasks([runs / "maml_1", runs / "anil_1"], None, Path("out"))
    assert (Path("out") / "comparison.md").exists()
    assert not (Path("out") / "overview.md").exists()


def test_accuracy_and_errors_share_a_table_but_no_figure(runs):
    sine = of_task("c", data="Sinusoid")
    write_run("all/sine", "maml", [0.25, 0.75], **sine, episodes={"test/mse": [0.25, 0.75]}, metrics={"test/mse": 0.5})
    compare_tasks([runs])
    lines = (runs / "overview.md").read_text().splitlines()
    assert "| Sinusoid, 1 shot: mean squared error |" in lines[0]
    assert not (runs / "overview.png").exists()


def test_means_called_alike_are_rows_of_their_own():
    for task, shots in (("a", 1), ("b", 5)):
        for lr in ("small", "big"):
            for seed in (0, 1):
                settings = {"seed": seed, "config": {"method": {"lr": lr}}}
                scores = [0.5, 0.7] if lr == "small" else [0.2, 0.4]
                write_run(f"all/{task}/{lr}/{seed}", "maml", scores, **settings, **of_task(task, shots=shots))
    compare_tasks([Path("all")])
    rows = [line for line in Path("all/overview.md").read_text().splitlines() if line.startswith("| maml")]
    assert rows == [
        "| maml, mean over 2 seeds (small/0, small/1) | 60.00 ± 19.60 | 60.00 ± 19.60 |",
        "| maml, mean over 2 seeds (big/0, big/1) | 30.00 ± 19.60 | 30.00 ± 19.60 |",
    ]


def test_names_however_long_leave_the_axes_their_place():
    for task, shots in (("a", 1), ("b", 5)):
        for lr in ("small", "big"):
            for seed in range(5):
                settings = {"seed": seed, "config": {"method": {"lr": lr}}}
                folder = f"all/{task}/learning_rate_{lr}/with_seed_{seed}"
                write_run(folder, "maml", [0.5, 0.7], **settings, **of_task(task, shots=shots))
    compare_tasks([Path("all")])  # A warning, which matplotlib gives, is an error here.
    assert Path("all/overview.png").exists()


def test_equal_scores_stand_side_by_side_and_nearest_to_their_task(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.append(figure.axes[0]))
    scores = {f"{number}": [(0.5, 0.01), (0.6, 0.01)] for number in range(20)}
    scores_over_tasks(scores, ["a", "b"], "accuracy", tmp_path / "overview.png")
    places = [container.lines[0].get_xdata() for container in drawn[0].containers]
    assert len({tuple(each) for each in places}) == 20
    assert all(abs(place - task) < 0.25 for each in places for task, place in enumerate(each))
    assert sum(place for place, _ in places) == pytest.approx(0)


def test_each_task_has_a_folder_of_its_own():
    for letter, phase in (("a", -0.5), ("b", 0.5), ("c", "x y"), ("d", "x+y")):
        write_run(f"all/{letter}", "maml", [0.5, 0.7], **of_task(letter, phase=phase))
    compare_tasks([Path("all")], None, Path("out"))
    names = {"comparison_phase_-0.5", "comparison_phase_0.5", "comparison_phase_x_y", "comparison_phase_x_y_2"}
    assert {path.name for path in Path("out").iterdir() if path.is_dir()} == names


def test_errors_of_which_none_is_finite_are_drawn():
    for letter, shots in (("a", 1), ("b", 5)):
        scores = {"episodes": {"test/mse": [math.nan] * 2}, "metrics": {"test/mse": math.nan}}
        write_run(f"all/{letter}", "maml", [math.nan] * 2, **scores, **of_task(letter, shots=shots))
    compare_tasks([Path("all")])
    assert Path("all/overview.png").exists()


def test_tasks_are_named_by_what_differs():
    assert task_names([TASK, {**TASK, "data": "Omniglot", "ways": 20}]) == ["Glyphs, 5 ways", "Omniglot, 20 ways"]
    assert task_names([TASK, {**TASK, "eval_seed": 3}]) == ["task", "eval_seed 3"]
    split = [{**TASK, "split": "glyphs"}, {**TASK, "data": "Cub", "split": "cub", "crop": True}]
    assert task_names(split) == ["Glyphs", "Cub"]
    shots = [{**TASK, "data": name, "shots": n, "split": f"{name}{n % 2}"} for name in "AB" for n in (1, 2, 3)]
    assert task_names(shots)[:2] == ["A, 1 shot", "A, 2 shots"]
    assert task_names([TASK, TASK]) == ["task (1)", "task (2)"]


def test_bad_settings_are_named(runs):
    with pytest.raises(ConfigError, match=r"baseline=mmal is none of the runs\. Did you mean 'maml'\?"):
        compare_tasks([runs], "mmal")
    with pytest.raises(ConfigError, match="by_task must be true or false, but got 'yes'"):
        compare.main([str(runs), "by_task=yes"])
    with pytest.raises(ConfigError, match="by_task=true"):
        compare.main([str(runs)])
    Path("file").write_text("")
    with pytest.raises(ConfigError, match="out=file"):
        compare.main([str(runs), "by_task=true", "out=file"])


def test_data_sets_of_one_class_are_told_apart_by_their_names(runs):
    for letter, name in (("c", "leaves"), ("d", "roots")):
        write_run(f"own/{name}", "maml", [0.5, 0.7], **{**of_task(letter, data="ImageFolder"), "data": name})
    compare_tasks([Path("own")])
    header = (Path("own") / "overview.md").read_text().splitlines()[0]
    assert "ImageFolder (leaves): accuracy" in header
    assert "ImageFolder (roots): accuracy" in header
