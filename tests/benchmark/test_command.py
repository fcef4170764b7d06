"""The benchmark from its command line to its files, and the time to a validation accuracy."""

import csv
import json
import re
from pathlib import Path

import pytest
import torch

from lightning_ntk import benchmark, cli
from lightning_ntk.benchmark import data, kernels, steps
from lightning_ntk.benchmark import tables as benchmark_tables
from lightning_ntk.benchmark.goals import figures
from lightning_ntk.benchmark.rows import Row, Table
from lightning_ntk.benchmark.runs import seconds_to_level
from lightning_ntk.benchmark.settings import QUICK, Settings
from lightning_ntk.errors import ConfigError
from lightning_ntk.running.results import RunResult, write_results


def rows_of(content, name):
    (table,) = [table for table in content["tables"] if table["name"] == name]
    return {row["work"]: row for row in table["rows"]}


def test_quick_measures_prints_and_writes(capsys):
    assert cli.main(["benchmark", "--quick", "peers=none", "tables=kernel,steps", "out=out"]) == 0
    shown, content = capsys.readouterr().out, json.loads(Path("out/benchmark.json").read_text())
    text = Path("out/benchmark.md").read_text()
    for name in (kernels.OURS, kernels.CONTRACTION, kernels.PRODUCTS):
        row = rows_of(content, "kernel")[name]
        assert len(row["rounds"]) == 2
        assert row["gflop"] > 0
        assert "differs" not in row["note"]
    absent = rows_of(content, "kernel")["neural-tangents, structured derivatives"]
    assert absent["seconds"] is None
    assert absent["note"] == "not measured: left out by peers=none"
    for name in (steps.RKHS_II, steps.RKHS_II_INF, steps.RKHS_I, *steps.LAST, *steps.LAST.values()):
        row = rows_of(content, "steps")[name]
        assert row["ratio"] > 0, row
        assert row["gflop"] > rows_of(content, "steps")[steps.PASS]["gflop"]
    ratio = next(f for f in content["figures"] if f["what"].endswith("Meta-RKHS-II over MAML"))
    found = rows_of(content, "steps")
    assert ratio["value"] == pytest.approx(found[steps.RKHS_II]["seconds"] / found[steps.MAML]["seconds"])
    assert ratio["goal"] is None, "goals are for the standard problem"
    for output in (shown, text):
        assert content["machine"]["cpu"] in output
        assert torch.__version__.split("+")[0] in output
        assert "not measured" in output
    assert content["machine"]["threads"] == torch.get_num_threads()


def test_the_data_table_has_every_row_and_the_same_images_for_all(capsys):
    pytest.importorskip("learn2learn")
    assert cli.main(["benchmark", "--quick", "tables=data", "out=out"]) == 0
    rows = rows_of(json.loads(Path("out/benchmark.json").read_text()), "data")
    assert list(rows) == [data.OURS, data.ALONE, data.INDICES, data.FLOOR, data.FUSED, data.PLAIN, steps.RKHS_II]
    assert all(row["seconds"] > 0 and row["ratio"] > 0 and "a second" in row["note"] for row in rows.values())
    settings = Settings(image_size=16, shots=1, queries=2)
    arrays = data.Arrays(4, 9, (3, 16, 16), 0)
    task = data.make_data(settings, arrays, ways=3, eval_ways=3).draw("train", 0, 0)
    theirs = data.LabelledImages(arrays)
    assert len(theirs) == 36
    for x, _ in [theirs[0], theirs[35], (task.support_x[0], 0)]:
        assert any(torch.equal(x, torch.from_numpy(image)) for image in arrays.images)


@pytest.mark.slow
def test_quick_measures_every_table():
    content = benchmark.command.benchmark(
        benchmark.command.parse_settings(["--quick", "peers=none", "norms=group,batch", "out=out"])
    )
    assert [table["name"] for table in content["tables"]] == list(QUICK["tables"])
    for table in content["tables"]:
        assert all(row["ratio"] for row in table["rows"] if "neural-tangents" not in row["work"]), table


def test_tables_are_written_as_they_come(monkeypatch):
    def stop(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("lightning_ntk.benchmark.tables.kernel_table", lambda *a: Table("kernel", "K", "a", [Row("a")]))
    monkeypatch.setitem(benchmark_tables.MEASURE, "shots", stop)
    assert cli.main(["benchmark", "--quick", "tables=kernel,shots", "peers=none"]) == 130
    assert [t["name"] for t in json.loads(Path("runs/benchmark_quick/benchmark.json").read_text())["tables"]] == [
        "kernel"
    ]


def made_up(device):
    """Tables with numbers that are easily divided."""
    kernel = [Row(kernels.OURS, 1.0), Row(kernels.CONTRACTION, 2.0), Row(kernels.PRODUCTS, 8.0)]
    kernel += [Row("neural-tangents, a", 10.0), Row("neural-tangents, b", 20.0)]
    step = [Row(steps.RKHS_II, 3.0, gflop=2.0), Row(steps.RKHS_II_INF, 2.0), Row(steps.RKHS_I, 1.0)]
    step += [Row(steps.MAML, 2.0, gflop=1.0), Row(steps.FOMAML, 1.0), Row(steps.PASS, 1.0)]
    if device == "cpu":
        step += [Row(steps.LAST[steps.MAML], 1.0, gflop=1.0), Row(steps.LAST[steps.FOMAML], 0.5)]
    memory = [Row(steps.RKHS_II, mib=10.0), Row(steps.MAML, mib=20.0)]
    shots = [Row("", 1.0), Row("", 5.0), Row("", 1.0), Row("", 25.0)]
    sizes = 3 if device == "cpu" else 6
    batch = [Row("", 8.0), *[Row("", 1.0)] * (sizes - 1), *[Row("", 1.0)] * sizes]
    batched = [Row(kernels.OURS, 2.0), Row(kernels.OURS_VMAP, 1.0), Row(kernels.CONTRACTION, 4.0)]
    named = {"steps": step, "memory": memory, "shots": shots, "batch": batch, "steps_group": step, "kernel": kernel}
    named["data"] = [Row(data.OURS, 2.0), Row(data.ALONE, 1.0), Row(data.INDICES, 1e-4), Row(data.FUSED, 3.0)]
    named["data"] += [Row(data.FLOOR, 0.1), Row(data.PLAIN, 30.0), Row(steps.RKHS_II, 100.0)]
    named["resnet12"] = [Row(steps.RKHS_II, 8.0, mib=12 * 1024.0), Row(steps.MAML, 2.0)]
    if device == "cuda":
        named["kernel_batch"] = batched
        named["data"].append(Row(data.ON_GPU, 1e-5))
    return [
        Table(name, f"{name}, norm=group" if "_g" in name else f"{name}, norm=none", "", r) for name, r in named.items()
    ]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_figures_are_read_off_the_right_rows(device):
    found = {f.what: f for f in figures(made_up(device), Settings(device=device))}
    cpu = device == "cpu"
    expected = {
        "Support NTK: ours over neural-tangents's best": (0.1, 0.15 if cpu else 0.5),
        "Support NTK: ours over torch.func's best": (0.5, 0.8 if cpu else None),
        "Meta-step, norm=none: Meta-RKHS-II over MAML": (1.5, 1.3 if cpu else 0.1),
        "Meta-step, norm=none: Meta-RKHS-II, t = inf over MAML": (1.0, 1.3 if cpu else 0.1),
        "Meta-step, norm=none: Meta-RKHS-I over FOMAML": (1.0, 1.5 if cpu else 0.2),
        "Meta-step, norm=group: Meta-RKHS-II over MAML": (1.5, None),
        "Peak memory: Meta-RKHS-II over MAML, one task": (0.5, 1.0),
        "Exponent of time in shots: Meta-RKHS-II": (1.0, 1.3 if cpu else None),
        "Exponent of time in shots: learn2learn MAML": (2.0, None),
        f"Time a task falls from 1 to {4 if cpu else 32} tasks by: Meta-RKHS-II": (8.0, None if cpu else 8.0),
    }
    expected |= {
        "Episodes a second: ours over learn2learn, fused transforms": (3.0, 1.5 if cpu else None),
        "Episodes a second: ours over learn2learn, plain transforms": (30.0, 10.0 if cpu else None),
        "Episodes a second: a loader's batches over one at a time": (0.5, None),
        "Episodes a second: which images alone": (1e4, 2e4),
        "resnet12, norm=none: peak memory of Meta-RKHS-II, GiB": (12.0, 24.0 if cpu else 80.0),
        "resnet12, norm=none: Meta-RKHS-II over MAML": (4.0, None),
        "Data time over a meta-step of Meta-RKHS-II": (0.02 if cpu else 1e-7, 0.02),
    }
    if cpu:
        expected |= {
            "Meta-step, norm=none: Meta-RKHS-II over MAML, channels last": (3.0, 1.3),
            "Meta-step, norm=none: Meta-RKHS-I over FOMAML, channels last": (2.0, 1.5),
        }
    if not cpu:
        expected["Episodes a second: images gathered on the GPU"] = (1e5, 2e4)
        expected["Support NTK, tasks at once: ours over torch.func's best"] = (0.25, 0.5)
    for what, (value, goal) in expected.items():
        assert found[what].value == pytest.approx(value), what
        assert found[what].goal == goal, what
    plain = found["Episodes a second: ours over learn2learn, plain transforms"]
    assert plain.note == "copying as many bytes would be 300 times"
    assert found["Meta-step, norm=none: Meta-RKHS-II over MAML"].note == "2.00 x its operations"
    assert all(f.goal is None for f in figures(made_up(device), Settings(device=device, image_size=32)))


# ---- seconds to a validation accuracy ------------------------------------------------------------------------------


def test_the_level_is_reached_between_two_validations():
    assert seconds_to_level([10, 20, 40], [0.4, 0.6, 0.8], 0.7) == pytest.approx(30)
    assert seconds_to_level([10, 20, 40], [0.4, 0.7, 0.6], 0.7) == 20
    assert seconds_to_level([10, 20], [0.8, 0.9], 0.7) == 10
    assert seconds_to_level([10, 20], [0.4, 0.6], 0.7) is None
    assert seconds_to_level([], [], 0.7) is None
    assert seconds_to_level([10, 20, 30], [0.4, float("nan"), 0.8], 0.7) == pytest.approx(25)


def make_run(folder, method, points, task=None):
    folder.mkdir(parents=True)
    result = RunResult(
        method=method, data="glyphs", seed=0, metrics={"test/accuracy": 0.5}, episodes={"test/accuracy": [0.5]},
        episode_ids="x", task=task or {"ways": 5}, timings={"fit_s": points[-1][0]}, versions={}, config={},
    )  # fmt: skip
    write_results(folder, result)
    with (folder / "metrics.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["step", "time/fit", "train/loss", "val/accuracy"])
        for step, (seconds, accuracy) in enumerate(points):
            writer.writerow([step, seconds, "", accuracy])
            writer.writerow([step, seconds + 1, 0.5, ""])


def test_runs_are_compared_by_their_seconds_to_the_level(capsys):
    make_run(Path("r/a"), "meta_rkhs_ii", [(10, 0.5), (20, 0.9)])
    make_run(Path("r/b"), "meta_rkhs_ii", [(10, 0.5), (30, 0.9)])
    make_run(Path("r/c"), "maml", [(30, 0.6), (50, 0.8)])
    assert cli.main(["benchmark", "runs=r", "level=0.7", "out=out"]) == 0
    content = json.loads(Path("out/benchmark.json").read_text())
    (figure,) = content["figures"]
    assert [row["seconds"] for row in content["tables"][0]["rows"]] == pytest.approx([15, 20, 40])
    assert figure["value"] == pytest.approx(17.5 / 40)
    assert figure["goal"] == 0.6
    text = Path("out/benchmark.md").read_text()
    assert "| work | s | over maml | note |\n| --- | ---: | ---: | --- |\n| meta_rkhs_ii | 15.0 | 0.38 | " in text
    assert "take turns" not in text

    assert cli.main(["benchmark", "runs=r", "level=0.85", "out=out"]) == 0
    (figure,) = json.loads(Path("out/benchmark.json").read_text())["figures"]
    assert figure["value"] is None
    assert figure["note"] == "no run of maml that reaches it"
    assert "level not reached" in capsys.readouterr().out


def test_a_run_without_a_clock_says_so(capsys):
    make_run(Path("r/a"), "maml", [(10, 0.5), (20, 0.9)])
    make_run(Path("r/b"), "meta_rkhs_ii", [(10, 0.5), (20, 0.9)])
    Path("r/b/metrics.csv").write_text("step,val/accuracy\n1,0.5\n2,0.9\n")
    assert cli.main(["benchmark", "runs=r", "level=0.7", "out=out"]) == 0
    assert "meta_rkhs_ii: no time/fit in its metrics.csv" in Path("out/benchmark.md").read_text()


def test_runs_of_different_tasks_are_refused():
    make_run(Path("r/a"), "meta_rkhs_ii", [(10, 0.5)])
    make_run(Path("r/b"), "maml", [(10, 0.5)], {"ways": 20})
    with pytest.raises(ConfigError, match="runs of different tasks"):
        benchmark.main(["runs=r"])
    with pytest.raises(ConfigError, match="nowhere is not a folder"):
        benchmark.main(["runs=nowhere"])


def test_the_documentation_names_commands_that_parse():
    page = (Path(benchmark.__file__).resolve().parents[2] / "docs" / "BENCHMARKS.md").read_text()
    commands = re.findall(r"lightning-ntk benchmark([^`\n#]*)", page)
    assert len(commands) >= 4
    for command in commands:
        benchmark.command.parse_settings([w for w in command.split() if w != "--help"])
