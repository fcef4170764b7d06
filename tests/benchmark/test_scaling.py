"""The scaling tables: real trainings and a real sweep in the quick form, and the figures by made-up numbers."""

import json
import os
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from lightning_ntk import cli
from lightning_ntk.benchmark import scaling
from lightning_ntk.benchmark.goals import figures
from lightning_ntk.benchmark.rows import Row, Table
from lightning_ntk.benchmark.settings import Settings
from lightning_ntk.errors import LightningNTKError
from lightning_ntk.sweep.job import State, write_state


@pytest.mark.slow
@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="needs two cores")
@pytest.mark.timeout(900)
def test_the_quick_form_measures_both():
    assert cli.main(["benchmark", "--quick", "tables=scaling", "repeats=1", "out=out"]) == 0
    content = json.loads(Path("out/benchmark.json").read_text())
    rows = {row["work"]: row for table in content["tables"] for row in table["rows"]}
    assert list(rows) == [scaling.ONE, scaling.TWO, scaling.TO_FIRST_STEP, scaling.IMPORTS]
    assert all(row["seconds"] > 0 for row in rows.values()), rows
    assert "episodes a second" in rows[scaling.TWO]["note"]
    assert rows[scaling.TO_FIRST_STEP]["seconds"] > rows[scaling.IMPORTS]["seconds"] / 2
    assert [figure["value"] is not None for figure in content["figures"]] == [True, True]


def test_a_sweep_is_measured_from_the_end_of_a_job_to_the_first_step_of_the_next(monkeypatch):
    def sweep(arguments):
        assert arguments[2:] == ["sweep", "data=glyphs", "seed=range(3)", "jobs=1", arguments[-1]]
        # Jobs of 10 s; the second waits 4 s for its first step, the third 6 s, the first 100 s, which are not counted.
        for seed, (first, ended) in enumerate([(100.0, 110.0), (114.0, 124.0), (130.0, 140.0)]):
            folder = Path(arguments[-1].removeprefix("out=")) / f"seed={seed}"
            folder.mkdir(parents=True)
            (folder / scaling.STARTED).write_text(str(first))
            write_state(folder, State("done", ended=ended))

    monkeypatch.setattr(scaling, "_call", sweep)
    assert scaling._seconds_to_first_step(["data=glyphs"]) == 5.0


def test_the_first_step_alone_is_noted(tmp_path):
    trainer = SimpleNamespace(loggers=[SimpleNamespace(file=tmp_path / "metrics.csv")])
    before = time.time()
    scaling.FirstStep().on_train_batch_start(trainer, None, None, 0)
    noted = (tmp_path / scaling.STARTED).read_text()
    assert before <= float(noted) <= time.time()
    scaling.FirstStep().on_train_batch_start(trainer, None, None, 1)
    assert (tmp_path / scaling.STARTED).read_text() == noted


def test_figures_come_of_the_medians_and_meet_their_goals():
    ddp = Table("scaling_ddp", "", scaling.ONE, [Row(scaling.ONE, 0.3), Row(scaling.TWO, 0.15, note="two")])
    sweep = Table("scaling_sweep", "", "", [Row(scaling.TO_FIRST_STEP, 9.0), Row(scaling.IMPORTS, 5.0)])
    first, second = figures([ddp, sweep], Settings())
    assert (first.value, first.goal, first.reached, first.note) == (2.0, 1.6, True, "two")
    assert (second.value, second.goal, second.reached) == (4.0, 3.0, False)
    ddp.row(scaling.TWO).seconds = sweep.row(scaling.IMPORTS).seconds = None
    assert [figure.value for figure in figures([ddp, sweep], Settings())] == [None, None]


def test_one_core_has_no_second_process(monkeypatch):
    monkeypatch.setattr(scaling.os, "cpu_count", lambda: 1)
    monkeypatch.setattr(scaling, "_seconds_an_episode", lambda words, devices: 0.5 / devices)
    table = scaling.ddp_table(Settings(), lambda text: None)
    assert table.row(scaling.ONE).note == "2.0 episodes a second"
    assert table.row(scaling.TWO).note == "not measured: there is one core"
    assert table.row(scaling.TWO).seconds is None


def test_a_process_that_fails_is_told_with_its_last_line():
    with pytest.raises(LightningNTKError, match=r"^-c import sys.* ended with status 3: the reason$"):
        scaling._call(["-c", "import sys; sys.stderr.write('before\\nthe reason\\n'); sys.exit(3)"])
