"""metrics.csv: wide, flushed row by row, and resumable."""

import csv

from lightning_ntk.tracking.loggers import CsvMetrics


def rows(file):
    with file.open(newline="") as lines:
        return list(csv.DictReader(lines))


def test_rows_are_readable_as_they_come_and_new_columns_fit_in(tmp_path):
    file = tmp_path / "metrics.csv"
    log = CsvMetrics(file)
    log.log_metrics({"train/loss": 1.5, "epoch": 0}, step=9)
    assert [(row["step"], row["train/loss"]) for row in rows(file)] == [("9", "1.5")]
    log.log_metrics({"train/loss": 1.25, "epoch": 0}, step=19)
    log.log_metrics({"val/accuracy": 0.5, "epoch": 0}, step=19)
    assert [row["train/loss"] for row in rows(file)] == ["1.5", "1.25", ""]
    assert [row["val/accuracy"] for row in rows(file)] == ["", "", "0.5"]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.csv"]


def test_a_resumed_file_keeps_the_rows_before_its_step_and_drops_a_cut_one(tmp_path):
    file = tmp_path / "metrics.csv"
    log = CsvMetrics(file)
    for step in (9, 19, 20, 29):  # A test is logged at the number of steps done: 20.
        log.log_metrics({"train/loss": step / 10}, step=step)
    with file.open("a") as target:
        target.write("3")  # A kill in the middle of a row.
    log = CsvMetrics(file, resume_step=20)
    log.log_metrics({"train/loss": 7.0, "val/mse": 1.0}, step=29)
    assert [(row["step"], row["train/loss"]) for row in rows(file)] == [("9", "0.9"), ("19", "1.9"), ("29", "7.0")]
    assert [row["val/mse"] for row in rows(file)] == ["", "", "1.0"]


def test_a_resumed_file_drops_a_cut_row_without_a_new_column_too(tmp_path):
    file = tmp_path / "metrics.csv"
    CsvMetrics(file).log_metrics({"train/loss": 1.0}, step=0)
    with file.open("a") as target:
        target.write("9,")
    log = CsvMetrics(file, resume_step=5)
    for step in (5, 6):
        log.log_metrics({"train/loss": 2.0}, step=step)
    assert [(row["step"], row["train/loss"]) for row in rows(file)] == [("0", "1.0"), ("5", "2.0"), ("6", "2.0")]


def test_a_new_run_starts_a_new_file(tmp_path):
    file = tmp_path / "metrics.csv"
    CsvMetrics(file).log_metrics({"train/loss": 1.0}, step=0)
    CsvMetrics(file).log_metrics({"train/loss": 2.0}, step=0)
    assert [row["train/loss"] for row in rows(file)] == ["2.0"]


def test_a_resumed_file_may_end_in_anything(tmp_path):
    file = tmp_path / "metrics.csv"
    CsvMetrics(file).log_metrics({"train/loss": 1.0}, step=0)
    for number, end in enumerate((b"\0\0\0", b"1,\xff\xfe,,", b"1,2,3,4,5,6,7\n", "\u00b2,1,1,1\n".encode())):
        damaged = tmp_path / f"{number}.csv"
        damaged.write_bytes(file.read_bytes() + end)
        CsvMetrics(damaged, resume_step=5).log_metrics({"train/loss": 2.0}, step=5)
        kept = [(row["step"], row["train/loss"]) for row in rows(damaged)]
        assert (kept[0], kept[-1]) == (("0", "1.0"), ("5", "2.0"))
    (tmp_path / "empty.csv").write_text("\n\n1\n")
    CsvMetrics(tmp_path / "empty.csv", resume_step=5).log_metrics({"train/loss": 2.0}, step=5)
    assert [row["train/loss"] for row in rows(tmp_path / "empty.csv")] == ["2.0"]
