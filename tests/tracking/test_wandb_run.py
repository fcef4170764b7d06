"""The W&B run: what it is told, read back from its file; that no key is kept; and that its death ends no training."""

import json
import math
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from omegaconf import OmegaConf
from test_compare import result
from test_train import TINY_SINE

from lightning_ntk import train
from lightning_ntk.errors import ConfigError
from lightning_ntk.running.results import read_results
from lightning_ntk.settings.config import conf_folder
from lightning_ntk.tracking.loggers import log_media
from lightning_ntk.tracking.media import Histogram, Lines, Table
from lightning_ntk.tracking.wandb_media import probe_tables, spectrum_media, to_wandb
from lightning_ntk.tracking.wandb_run import WandbRun, check_wandb, tags

SECRET = "0123456789abcdef" * 2 + "secret42"
OFFLINE = OmegaConf.create({"mode": "offline", "project": "p", "entity": None})
CONFIG = {
    "choices": {"method": "maml", "data": "glyphs", "network": "conv4"},
    "network": {"norm": "group"},
    "seed": 3,
    "method": {"t": math.inf},
}
TASK = {"data": "Glyphs", "ways": 5, "shots": 1}


def records(folder: Path) -> list[dict]:
    """What an offline run has written, as W&B's own reader gives it."""
    (file,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    if done.returncode and "No such command" in done.stderr:
        pytest.skip("this version of wandb cannot read its files back")
    return [json.loads(line) for line in done.stdout.splitlines()]


def of_type(found: list[dict], kind: str) -> list[dict]:
    return [record[kind] for record in found if record["type"] == kind]


def test_a_run_tells_wandb_what_its_files_hold_and_no_key_is_kept(monkeypatch, capsys):
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    train.main([*TINY_SINE, "logger=wandb_offline", "method=maml", "run_dir=run", "seed=4"])
    found, saved = records(Path("run")), read_results(Path("run"))
    assert of_type(found, "run")[0]["resume"]  # A later start of the run is added to this one, not put in its place.
    (started,) = of_type(found, "run")
    assert (started["display_name"], started["run_group"]) == ("run", "maml on sinusoid")
    assert started["tags"] == ["maml", "sinusoid", "mlp", f"{saved.task['shots']}-shot", "seed 4"]
    assert started["config"]["update"]["choices"]["method"] == "maml"
    axes = [
        (metric.get("glob_name") or metric["name"], metric.get("step_metric")) for metric in of_type(found, "metric")
    ]
    assert axes == [("step", None), ("*", "step")]
    history = [record["item"] for record in of_type(found, "history")]
    validations = [(row["step"], row["val/mse"]) for row in history if "val/mse" in row]
    assert [step for step, _ in validations] == [1, 2]
    assert validations[-1][1] == pytest.approx(saved.metrics["val/mse"])
    assert [row["step"] for row in history if "test/mse" in row] == [2]
    summary = {}
    for record in of_type(found, "summary"):
        summary |= record["update"]
    assert summary["test/mse"] == saved.metrics["test/mse"]
    assert (summary["method"], summary["data"], summary["seed"]) == ("maml", "sinusoid", 4)
    (table,) = Path("run").glob("wandb/offline-run-*/files/media/table/test/by_episode*.json")
    assert json.loads(table.read_text()) == {
        "columns": ["episode", "test/mse"],
        "data": [[k, score] for k, score in enumerate(saved.episodes["test/mse"])],
    }
    assert of_type(found, "exit")[0]["exit_code"] == 0
    command = re.search(r"Upload it by: wandb sync (\S+)", capsys.readouterr().out)[1]
    assert list(Path(command).glob("run-*.wandb"))
    for file in (file for file in Path("run").rglob("*") if file.is_file()):
        assert SECRET.encode() not in file.read_bytes(), file


def test_settings_that_a_sweep_of_wandb_hides_are_kept_beside(tmp_path, monkeypatch):
    import wandb

    init = wandb.init

    def as_an_agent(**options):
        run = init(**options)
        run.config.merge_locked({"method": "maml"}, user="sweep", _allow_val_change=True)  # As W&B does it.
        return run

    monkeypatch.setattr(wandb, "init", as_an_agent)
    config = {"choices": {"method": "maml", "data": "sinusoid", "network": "mlp"}, "network": {}, "seed": 0}
    settings = {"project": "p", "entity": None, "mode": "offline"}
    with WandbRun(settings, tmp_path, {**config, "method": {"lr": 0.5, "inner_lr": 0.1}}, {}) as run:
        run.start()
        kept = dict(run.experiment.config)
    assert (kept["method"], kept["method.lr"], kept["method.inner_lr"]) == ("maml", 0.5, 0.1)
    assert not [key for key in kept if key.startswith(("choices.", "network."))]


def test_the_id_that_a_sweep_of_wandb_gives_is_the_one_that_is_kept():
    command = [sys.executable, "-m", "lightning_ntk.train", *TINY_SINE, "logger=wandb_offline", "run_dir=run"]
    given = {"WANDB_SWEEP_ID": "sweep", "WANDB_RUN_ID": "run7", "PYTHONPATH": str(conf_folder().parent)}
    environment = {name: value for name, value in os.environ.items() if name != "WANDB_SERVICE"} | given
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280, check=True)
    assert Path("run/wandb_id").read_text() == "run7"
    assert re.search(r"Upload it by: wandb sync \S*offline-run-\S+-run7\n", done.stdout)


# Signals W&B's process when the first validation has been logged: kills it, as the out-of-memory killer would, or stops
# it, so that it hangs.
SIGNALS = """
import os, signal, sys, time
from pathlib import Path
from lightning_ntk import cli
from lightning_ntk.tracking import loggers, wandb_run

wandb_run.FINISH_TIMEOUT_S, wandb_run.GRACE_S = 1, 5
number, state = {"kill": (signal.SIGKILL, ") Z "), "stop": (signal.SIGSTOP, ") T ")}[sys.argv.pop(1)]

def children():
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1])
            if parent == os.getpid() and b"wandb" in (folder / "cmdline").read_bytes():
                yield int(folder.name)
        except OSError:
            continue

log = loggers.CsvMetrics.log_metrics
def log_and_signal(self, metrics, step=None):
    log(self, metrics, step)
    if "val/mse" in metrics and not os.environ.get("SIGNALLED"):
        (service,) = children()
        os.environ["SIGNALLED"] = str(service)
        os.kill(service, number)
        while state not in Path(f"/proc/{service}/stat").read_text():
            time.sleep(0.01)
loggers.CsvMetrics.log_metrics = log_and_signal
try:
    code = cli.main(["train", *sys.argv[1:]])
finally:
    service = int(os.environ["SIGNALLED"])
    if Path(f"/proc/{service}").exists() and ") Z " not in Path(f"/proc/{service}/stat").read_text():
        os.kill(service, signal.SIGKILL)  # It would keep this process from ending.
        sys.stderr.write("W&B's process was left alone\\n")
sys.exit(code)
"""


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds W&B's process in /proc")
@pytest.mark.parametrize(
    ("how", "reason"),
    [("kill", "ConnectionResetError"), ("stop", "TimeoutError: its process has not answered for 6 s")],
)
def test_neither_death_nor_a_hang_of_wandb_costs_more_than_wandb(how, reason):
    command = [sys.executable, "-c", SIGNALS, how, *TINY_SINE, "logger=wandb_offline", "steps=4", "run_dir=run"]
    paths = os.pathsep.join(path for path in sys.path if path)
    # Not the process that another test has started here, but one of its own.
    environment = {name: value for name, value in os.environ.items() if name != "WANDB_SERVICE"} | {"PYTHONPATH": paths}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    warned = [line for line in done.stderr.splitlines() if "W&B" in line]
    assert len(warned) == 1
    assert f"W&B has stopped ({reason}" in warned[0]
    assert "wandb sync" in warned[0]
    assert "Traceback" not in done.stderr
    saved = read_results(Path("run"))
    assert len(saved.episodes["test/mse"]) == 5
    lines = Path("run/metrics.csv").read_text().splitlines()
    column = lines[0].split(",").index("val/mse")
    assert sum(bool(line.split(",")[column]) for line in lines[1:]) == 4
    assert "Upload it by" not in done.stdout


def test_media_become_the_objects_of_wandb():
    import wandb

    figure = Figure(figsize=(2, 1), dpi=50)
    figure.subplots().plot([0, 1], [0, 1])
    image = to_wandb(figure)
    assert isinstance(image, wandb.Image)
    assert image.image.size == (100, 50)
    table = to_wandb(Table(["name", "value"], [["a", 1.5], ["b", None]]))
    assert isinstance(table, wandb.Table)
    assert table.data == [["a", 1.5], ["b", None]]
    with pytest.raises(TypeError):
        to_wandb(Table(["value"], [[1.5], ["text"]]))
    histogram = to_wandb(Histogram([1.0, 2.0, 2.0, math.inf]))
    assert sum(histogram.histogram) == 3
    lines = to_wandb(Lines("spectrum", "rank", [1, 2], {"start": [3.0, 1.0], "end": [2.0, 0.5]}))
    assert sorted(lines.table.data, key=str) == [[1, "end", 2.0], [1, "start", 3.0], [2, "end", 0.5], [2, "start", 1.0]]
    with pytest.raises(TypeError, match="but got dict"):
        to_wandb({})


def test_media_go_to_the_wandb_logger_alone_and_not_at_all_without_one(tmp_path):
    logged = []

    trainer = types.SimpleNamespace(global_step=7, loggers=[object()])
    log_media(trainer, {"a": Histogram([1.0])})
    run = WandbRun(OFFLINE, tmp_path, CONFIG, TASK)
    run._experiment = type("Experiment", (), {"log": lambda self, values: logged.append(values)})()
    trainer.loggers += [run]
    log_media(trainer, {"a": Histogram([1.0])})
    ((name, step),) = [tuple(values) for values in logged]
    assert (name, step) == ("a", "step")
    assert logged[0]["step"] == 7


def test_a_mistake_of_ours_is_not_taken_for_a_failure_of_wandb(tmp_path):
    def fail(error):
        def log(self, values):
            raise error

        run = WandbRun(OFFLINE, tmp_path, CONFIG, TASK)
        run._experiment = type("Experiment", (), {"log": log})()
        run.folder = tmp_path / "wandb" / "offline-run"
        return run

    with pytest.raises(KeyError):
        fail(KeyError("ours")).log_metrics({"a": 1.0}, 0)
    run = fail(BrokenPipeError("gone"))
    with pytest.warns(UserWarning, match=r"W&B has stopped \(BrokenPipeError: gone\).*wandb sync .*offline-run"):
        run.log_metrics({"a": 1.0}, 0)
    run.log_metrics({"a": 1.0}, 1)  # Nothing more is said: a second warning would be an error here.


def test_names_groups_and_tags_tell_the_run(tmp_path):
    run = WandbRun(OFFLINE, tmp_path, CONFIG, TASK)
    assert run._wandb_init["group"] == "maml on glyphs"
    assert tags(CONFIG, TASK) == ["maml", "glyphs", "conv4", "norm group", "5-way", "1-shot", "seed 3"]
    long = {**CONFIG, "choices": {**CONFIG["choices"], "method": "m" * 100}}
    assert max(map(len, tags(long, TASK))) == 64
    assert run.labels == {**CONFIG["choices"], "norm": "group", "seed": 3, "ways": 5, "shots": 1}
    again = WandbRun(OFFLINE, tmp_path, CONFIG, TASK)
    assert again._id == run._id


def test_the_command_that_uploads_names_each_start_of_a_resumed_run(tmp_path):
    run = WandbRun(OFFLINE, tmp_path, CONFIG, TASK)
    folders = [tmp_path / "a b" / f"offline-run-2026010{day}_000000-{run._id}" for day in (1, 2, 3, 4)]
    for folder in (*folders, tmp_path / "a b" / "offline-run-20260101_000000-other"):
        folder.mkdir(parents=True)
        (folder / f"run-{run._id}.wandb").write_bytes(b"header, records")
    (folders[1] / f"run-{run._id}.wandb.synced").touch()
    (folders[2] / f"run-{run._id}.wandb").write_bytes(b":W&B...")  # Killed before its first record.
    run.folder = folders[3]
    assert run.sync_command() == f"wandb sync '{folders[0]}'; wandb sync '{folders[3]}'"


def test_tables_of_attacks_and_shifts_have_a_row_for_each():
    metrics = {
        "test/accuracy": 0.7,
        "adversarial/clean/accuracy": 0.7,
        "adversarial/pgd_linf/eps_8/accuracy": 0.5,
        "adversarial/pgd_linf/eps_8/accuracy_ci95": 0.1,
        "adversarial/pgd_linf/eps_16/accuracy": math.nan,
        "ood/source/accuracy": 0.7,
        "ood/digits/accuracy": 0.6,
        "ood/corrupted_contrast/accuracy": 0.5,
        "ood/corrupted_contrast/severity_1/accuracy": 0.6,
    }
    probes = {"adversarial": {"episodes": {"a": [0.1, math.nan]}, "series": {}}, "pictures": {}}
    tables = probe_tables(result("maml", [0.7, 0.7], metrics=metrics, probes=probes))
    assert tables["adversarial/pgd_linf/by_eps"].rows == [[0.0, 0.7, None], [8.0, 0.5, 0.1], [16.0, None, None]]
    assert tables["ood/by_target"].rows == [["source", 0.7, None], ["digits", 0.6, None], ["contrast", 0.5, None]]
    assert tables["adversarial/by_episode"] == Table(["episode", "a"], [[0, 0.1], [1, None]])
    assert len(tables) == 3


def test_the_spectrum_becomes_a_histogram_and_lines():
    series = {
        "ntk/eigenvalues": [-1.0, 10.0, 100.0],
        "steps": [0, 50],
        "eigenvalues_over_training": [[0.0, 1.0, 10.0], [1.0, 10.0, 1000.0]],
    }
    media = spectrum_media(result("maml", [0.7], probes={"ntk": {"episodes": {}, "series": series}}))
    assert media["ntk/log10_eigenvalues"].values == pytest.approx([1.0, 2.0])
    lines = media["ntk/log10_eigenvalues_over_training"]
    assert list(lines.x) == [0, 1]
    assert lines.lines == {"step 0": pytest.approx([1.0, 0.0]), "step 50": pytest.approx([3.0, 1.0])}
    assert spectrum_media(result("maml", [0.7])) == {}


def test_a_key_among_the_settings_is_refused_and_not_repeated():
    settings = OmegaConf.create({"mode": "online", "project": "p", "entity": None, "api_key": SECRET})
    with pytest.raises(ConfigError, match="WANDB_API_KEY") as refusal:
        check_wandb(settings)
    assert SECRET not in str(refusal.value)
    with pytest.raises(ConfigError, match=r"mode must be 'offline' or 'online'"):
        check_wandb(OmegaConf.create({"mode": "on", "project": "p", "entity": None}))
