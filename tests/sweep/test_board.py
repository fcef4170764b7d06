"""What a person sees: lines, the table, the time left."""

from pathlib import Path

from rich.console import Console

from lightning_ntk.sweep.board import Board, time_left
from lightning_ntk.sweep.job import Job, Needs, State
from lightning_ntk.sweep.progress import Progress, read_progress

DONE = State("done", 1, 0, None, None, 100.0, 160.0)
SCORED = Progress(300, "val/accuracy", ((150, 0.4), (300, 0.534)))


def job(name: str, steps: int = 300) -> Job:
    return Job(name, (), Path("nowhere"), Needs(steps=steps))


def test_each_change_is_a_line_where_there_is_no_terminal(capsys):
    board = Board(3)
    board.changed(job("a"), State("running", 1, started=100.0), Progress())
    board.changed(job("a"), DONE, SCORED)
    board.changed(job("b"), State("pending", 1, -9, "killed", None, 100.0, 130.0), Progress())
    board.changed(job("b"), State("failed", 2, 1, "ValueError: no", None, 100.0, 130.0), Progress())
    assert capsys.readouterr().out.splitlines() == [
        "[0/3] running a",
        "[1/3] done a in 60 s, validation 53.40 %",
        "[1/3] again b in 30 s: killed",
        "[2/3] failed b in 30 s (attempt 2): ValueError: no",
    ]
    assert board.summary().startswith("1 done, 1 failed; 1 to go, about ")


def test_the_table_shows_scores_errors_and_what_waits(capsys, tmp_path):
    board = Board(4, finished=2)
    board.changed(job("a"), DONE, SCORED)
    (tmp_path / "log_1.txt").touch()
    running = State("running", 1, log=str(tmp_path / "log_1.txt"), started=100.0)
    waiting = State("running", 1, log=str(tmp_path / "log_2.txt"), started=100.0)
    board.look([(job("[b]"), running, Progress(30, "val/mse", ((30, 1.25),))), (job("c"), waiting, Progress())])
    console = Console(width=120, markup=False)
    with console.capture() as shown:
        console.print(board.table())
    text = shown.get()
    assert "53.40 %" in text
    assert "mse 1.2500" in text
    assert "[b]" in text, "a name is no markup"
    assert ("queued" in text, "running" in text, "30/300" in text) == (True, True, True)
    assert "(and 2 before)" in text


def test_the_time_left_follows_the_speed_of_this_attempt():
    assert time_left(job("a"), State(started=0.0), Progress(100), now=50.0) == 100.0
    assert time_left(job("a"), State(started=0.0, first_step=200), Progress(250), now=50.0) == 50.0
    assert time_left(job("a"), State(started=0.0, first_step=100), Progress(100), now=50.0) is None
    assert time_left(job("a"), State(started=0.0), Progress(310), now=50.0) == 0.0


def test_progress_is_read_from_what_a_training_writes(tmp_path):
    assert read_progress(tmp_path) == Progress()
    file = tmp_path / "metrics.csv"
    file.write_text("step,epoch,val/accuracy\n10,,\n20,0,0.5\n30,,\n40,1,0.25\n60,2,nan\n5")
    progress = read_progress(tmp_path)
    assert (progress.step, progress.metric, progress.scores[:2]) == (5, "val/accuracy", ((20, 0.5), (40, 0.25)))
    assert progress.best == 0.5
    file.write_text("step,val/mse\n10,2.0\n20,1.5\n30,1.75\n")
    assert (read_progress(tmp_path).step, read_progress(tmp_path).best) == (30, 1.5)
    file.write_bytes(b"\xff\xfe\x00")
    assert read_progress(tmp_path).best is None
