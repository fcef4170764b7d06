"""The command: what it says, how it ends, and what it leaves; its jobs train nothing, but for the last tests."""

import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from sweeping import PROGRAM, starts, trivial

from lightning_ntk import cli
from lightning_ntk.errors import ConfigError, MissingDependencyError
from lightning_ntk.running.lock import LOCK_FILE, is_locked
from lightning_ntk.running.results import read_results
from lightning_ntk.settings.config import conf_folder, groups
from lightning_ntk.sweep import plan
from lightning_ntk.sweep.command import JobList, plain_words, sweep_folder
from lightning_ntk.sweep.grid import expand, read_overrides
from lightning_ntk.sweep.job import Job, State, read_state
from lightning_ntk.sweep.progress import Progress
from lightning_ntk.sweep.settings import Settings, load_yaml, read_settings
from lightning_ntk.sweep.wandb_sweep import is_wandb


@pytest.fixture(autouse=True)
def _trivial(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(conf_folder().parent))
    monkeypatch.setattr(plan, "TRAIN", PROGRAM)


def test_a_sweep_ends_with_the_comparison_and_does_nothing_twice(capsys):
    words = ["sweep", "method=maml,anil", "seed=range(2)", "steps=2", "val_every=1", "out=o", "baseline=maml"]
    assert cli.main(words) == 0
    said = capsys.readouterr().out
    assert "4 done" in said
    assert "maml, mean over 2 seeds" in said
    comparison = Path("o/comparison.md").read_text()
    assert "| difference to baseline |" in comparison
    assert "| maml, mean over 2 seeds |" in comparison
    assert sorted(p.name for p in Path("o").glob("method=*")) == [
        "method=anil,seed=0",
        "method=anil,seed=1",
        "method=maml,seed=0",
        "method=maml,seed=1",
    ]
    assert cli.main(words) == 0
    assert "Nothing to run: 4 of 4 jobs have their results" in capsys.readouterr().out
    assert len(Path("o/starts_method=maml,seed=0.txt").read_text().splitlines()) == 1
    assert cli.main([*words, "--rerun", "all"]) == 0
    assert len(Path("o/starts_method=maml,seed=0.txt").read_text().splitlines()) == 2


def test_a_comparison_that_cannot_be_written_is_told_by_the_status(capsys):
    words = ["sweep", "method=maml,anil", "steps=2", "val_every=1", "out=o"]
    assert cli.main(words) == 0
    Path("o/comparison.html").unlink()
    Path("o/comparison.html").mkdir()
    capsys.readouterr()
    assert cli.main(words) == 1
    said = capsys.readouterr().err
    assert re.search(r"There is no comparison: out=\S+/o cannot be written", said)
    assert "All 2 jobs are done, but they were not compared." in said


def test_a_failed_job_is_named_with_its_log_and_the_status_says_so(capsys, monkeypatch, tmp_path):
    script = tmp_path / "fails_for_seed_1.py"
    script.write_text(
        "import runpy, sys\nif 'seed=1' in sys.argv: raise MemoryError('too large')\n"
        f"sys.argv[0] = {PROGRAM[0]!r}; runpy.run_path({PROGRAM[0]!r})\n"
    )
    monkeypatch.setattr(plan, "TRAIN", (str(script),))
    words = ["sweep", "seed=range(3)", "out=o"]
    assert cli.main(words) == 1
    out, error = capsys.readouterr()
    assert "seed=1: MemoryError: too large (log: " in error
    assert "1 of 3 jobs failed; --rerun failed" in error
    assert "mean over 2 seeds" in out
    assert cli.main(words) == 1, "a failed job is not tried again unasked"
    assert read_state(Path("o/seed=1")).attempts == 1
    monkeypatch.setattr(plan, "TRAIN", PROGRAM)
    assert cli.main([*words, "--rerun", "failed"]) == 0
    assert read_state(Path("o/seed=1")).attempts == 2


def test_a_grid_whose_first_jobs_fail_with_one_error_ends(capsys, monkeypatch, tmp_path):
    script = tmp_path / "fails.py"
    script.write_text("raise MemoryError('too large')")
    monkeypatch.setattr(plan, "TRAIN", (str(script),))
    words = ["sweep", "seed=range(4)", "give_up=2", "out=o"]
    assert cli.main(words) == 1
    error = capsys.readouterr().err
    assert "The first 2 jobs failed with one error, and 2 were not started. The same command with give_up=null" in error
    assert "2 of 2 jobs failed; --rerun failed" in error
    assert [read_state(Path(f"o/seed={seed}")).attempts for seed in range(4)] == [1, 1, 0, 0]
    monkeypatch.setattr(plan, "TRAIN", PROGRAM)
    assert cli.main([*words, "--rerun", "failed"]) == 0


@pytest.mark.parametrize("errors", [["a", "b", "a"], [None, "a", "a"], ["a", None, None], ["a"]])
def test_a_grid_goes_on_where_its_first_jobs_ended_in_different_ways(errors):
    jobs = [trivial(f"{number}", Path()) for number in range(5)]
    grid = JobList(jobs, give_up=2)
    for job, error in zip(grid.take(len(errors)), errors, strict=True):
        grid.finished(job, State(error=error), Progress())
    assert grid.take(1) == [jobs[len(errors)]]


def test_bad_input_is_named_before_anything_starts(capsys):
    for words, message in {
        ("data.wayz=3",): "Did you mean 'data.ways'",
        ("method=maml,mamml",): "method=mamml does not exist",
        ("method=maml,anil", "method.t=3"): "'method.t'",
        ("seed=range(2000)",): "more than max_jobs=1000",
        ("seed=1,2", "joobs=2"): "Did you mean 'jobs'",
        ("seed=0,x",): "seed must be a whole number from 0 to 4294967295, but got 'x'",
        ("seed=0,-1",): "seed must be a whole number from 0 to 4294967295, but got -1",
        ("seed=0,4294967296",): "seed must be a whole number from 0 to 4294967295, but got 4294967296",
        ("seed=1,2", "launcher=rey"): "Did you mean 'ray'",
        ("seed=1,2", "ray.adress=x"): "Did you mean 'ray.address'",
        ("seed=1,2", "slurm.accont=x"): "Did you mean 'slurm.account'",
        ("seed=1,2", "search=grid"): "search must be optuna or null, but got 'grid'",
        ("seed=1,2", "out="): "out must be a path, but got ''",
        ("seed=1,2", "out=~nobody_of_that_name/x"): "out=~nobody_of_that_name/x: ",
        ("seed=1,2", "jobs=1,2"): "jobs=1,2: a setting of the sweep itself takes one value",
        ("seed=1,2", "jobs=two"): ": jobs must be a whole number",
        ("seed=1,2", "retries=-1"): "retries must be at least 0",
        ("seed=1,2", "slurm.minutes=0"): "slurm.minutes must be at least 1",
        ("sweep=comparizon",): "Did you mean 'comparison'",
        ("seed=1,2", "baseline=mamml"): "baseline=mamml is no method. Did you mean 'maml'",
        (
            "method=maml,anil",
            "baseline=reptile",
        ): "baseline=reptile: no job trains it. Methods of this sweep: maml, anil",
        ("seed=1,2", "baseline=seed=1"): "baseline=seed=1 is no method",
        ("seed=1,2", "trainer.devices=64", "trainer.accelerator=cpu", "data.tasks_per_step=64"): "this machine has",
        ("seed=1,2", "trainer.devices=x"): "trainer.devices must be a number",
        ("seed=1,2", "trainer.devices=[2,3]"): "trainer.devices must be a number of devices or auto, but got [2, 3]",
        (
            *("data=glyphs", "data.tasks_per_step=4,2", "trainer.devices=2", "trainer.num_nodes=2", "launcher=slurm"),
        ): "data.tasks_per_step=2 tasks cannot be shared equally by 4 processes",
        ("search=optuna", "method.lr=interval(0,1)", "launcher=ray"): "launcher=ray needs jobs=NUMBER",
        ("search=optuna", "method.lr=interval(0,1)", "launcher=slurm"): "launcher=slurm needs jobs=NUMBER",
        ("seed=1,2", "trainer.num_nodes=2"): "launcher=slurm",
        (
            "seed=1,2",
            "slurm.partition=gpu",
        ): "slurm.partition=gpu is a setting of launcher=slurm alone: add launcher=slurm",
        ("seed=1,2", "launcher=slurm", "ray.cpus=2"): "ray.cpus=2 is a setting of launcher=ray alone",
        ("seed=1,2", "trials=50"): "trials=50 is a setting of search=optuna alone",
        ("seed=1,2", "launcher=ray", "ray.address=127.0.0.1:1"): "ray.address=127.0.0.1:1 does not answer",
        ("seed=1,2", "out=/proc/nowhere"): "out=/proc/nowhere cannot be written",
        ("search=optuna", "seed=1,2"): "a seed is not tuned",
        ("seed=1,2", "-m"): "lightning-ntk sweep",
    }.items():
        assert cli.main(["sweep", *words]) == 2, words
        assert message in capsys.readouterr().err
    assert not list(Path(".").rglob("job.json"))


def test_a_baseline_of_several_settings_or_without_a_result_costs_the_differences_alone(capsys, monkeypatch, tmp_path):
    words = ["sweep", "method=maml,anil", "method.inner_lr=0.1,0.2", "out=o", "baseline=maml"]
    assert cli.main(words) == 0
    said = capsys.readouterr().err
    assert (
        "Compared without differences: baseline=maml stands for runs of different settings (method.method.inner_lr)."
        in said
    )
    assert f"(lightning-ntk compare {tmp_path / 'o'} baseline=NAME)" in said
    assert "maml" in Path("o/comparison.md").read_text()
    script = tmp_path / "maml_fails.py"
    script.write_text(
        "import runpy, sys\nif 'method=maml' in sys.argv: sys.exit('no')\n"
        f"sys.argv[0] = {PROGRAM[0]!r}; runpy.run_path({PROGRAM[0]!r})\n"
    )
    monkeypatch.setattr(plan, "TRAIN", (str(script),))
    assert cli.main(["sweep", "method=maml,anil", "out=p", "baseline=maml"]) == 1
    assert "Compared without differences: baseline=maml is none of the runs" in capsys.readouterr().err
    assert "anil" in Path("p/comparison.md").read_text()


def test_results_go_only_when_their_jobs_can_start_anew(capsys):
    words = ["sweep", "seed=0,1", "out=o"]
    assert cli.main(words) == 0
    many = ["trainer.devices=64", "data.tasks_per_step=64"]
    assert cli.main([*words, "--rerun", "all", *many, "trainer.accelerator=cpu"]) == 2
    assert "this machine has" in capsys.readouterr().err
    assert len(list(Path("o").glob("*/results.json"))) == 2


def test_ones_own_configuration_folder_belongs_to_the_command(capsys, tmp_path):
    (tmp_path / "tuned" / "recipe").mkdir(parents=True)
    (tmp_path / "tuned" / "recipe" / "maml_glyphs.yaml").write_text("# @package _global_\nmethod:\n  lr: 0.5\n")
    words, tuned = ["sweep", "method=maml", "data=glyphs", "seed=0,1"], ["--config-dir", "tuned"]
    assert cli.main([*words, "--cfg"]) == cli.main([*words, *tuned, "--cfg"]) == 0
    first, second = re.findall(r"2 jobs in (.+)", said := capsys.readouterr().out)
    assert first != second
    assert f"lightning-ntk train --config-dir {tmp_path / 'tuned'} method=maml" in said
    assert cli.main([*words, "out=o"]) == 0
    assert cli.main([*words, *tuned, "out=o"]) == 2
    assert f"made with other settings (--config-dir none and {tmp_path / 'tuned'} differ)" in capsys.readouterr().err


def test_a_command_without_words_starts_nothing(capsys):
    assert cli.main(["sweep"]) == 0
    assert "usage: lightning-ntk sweep" in capsys.readouterr().out
    assert not Path("runs").exists()


def test_two_sweeps_do_not_work_on_one_folder(capsys):
    Path("o").mkdir()
    holder = subprocess.Popen(
        [sys.executable, "-c", "import sys; from pathlib import Path; from lightning_ntk.running.lock import lock\n"
         "held = lock(Path('o/.lock')); print('held', flush=True); sys.stdin.read()"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    holder.stdout.readline()
    assert cli.main(["sweep", "seed=1,2", "out=o"]) == 2
    assert f"another sweep works on this folder (process {holder.pid} on" in capsys.readouterr().err
    holder.communicate(b"")
    assert cli.main(["sweep", "seed=1,2", "out=o"]) == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_leaves_what_is_finished_and_says_how_to_go_on(number, capsys):
    words = ["sweep", "seed=0,1", "steps=2,4000", "val_every=1", "out=o", "jobs=2"]
    code = (
        "import sys; from lightning_ntk import cli; from lightning_ntk.sweep import plan\n"
        f"plan.TRAIN = {SLOW!r}\nsys.exit(cli.main({words!r}))"
    )
    sweep = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 280
    jobs = [Job(f"seed={seed},steps=4000", (), Path(f"o/seed={seed},steps=4000")) for seed in (0, 1)]
    while not (starts(jobs[0]) and Path("o/seed=0,steps=2/results.json").exists()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    sweep.send_signal(number)
    _, error = sweep.communicate(timeout=280)
    assert sweep.returncode == 130
    assert "Go on with: lightning-ntk sweep seed=0,1 steps=2,4000" in error.decode()
    assert not any(is_locked(job.folder / LOCK_FILE) for job in jobs)
    assert read_state(Path("o/seed=0,steps=2")).status == "done"
    assert read_state(jobs[0].folder).status == "pending"
    read_results(Path("o/seed=0,steps=2"))


SLOW = ("-c", f"import runpy, sys; sys.argv.append('seconds=0.05'); runpy.run_path({PROGRAM[0]!r})")


def test_the_folder_of_a_sweep_follows_from_its_command():
    assert sweep_folder(Settings(), ["seed=1,2"], None) == sweep_folder(Settings(), ["seed=1,2"], None)
    assert sweep_folder(Settings(), ["seed=1,2"], None) != sweep_folder(Settings(), ["seed=1,3"], None)
    assert sweep_folder(Settings(sweep="sine"), [], None) == Path.cwd() / "runs" / "sweep_sine"
    assert sweep_folder(Settings(out="x"), [], None) == Path.cwd() / "x"


@pytest.mark.parametrize("name", ["a=b", "ünï", "a(b)", "/tmp/a,b", "5", "~/x"])
def test_the_folder_may_have_any_name(name, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    settings, overrides = read_settings(["seed=1,2", f"out={name}"])
    assert overrides == ["seed=1,2"]
    expected = tmp_path / "home" / "x" if name == "~/x" else Path.cwd() / name
    assert sweep_folder(settings, overrides, None) == expected


def test_options_are_settings():
    assert plain_words(["--rerun", "failed", "seed=1", "--many"]) == ["rerun=failed", "seed=1", "max_jobs=1000000000"]
    assert plain_words(["--rerun=all"]) == ["rerun=all"]
    with pytest.raises(ConfigError, match="--rerun failed"):
        plain_words(["--rerun"])


def test_a_named_sweep_gives_way_to_the_command_line():
    settings, overrides = read_settings(
        ["sweep=comparison", "seed=7", "jobs=3", "launcher=slurm", "slurm.extra.qos=high"]
    )
    assert overrides == ["method=glob(*)", "experiment=demo", "seed=7"]
    assert (settings.baseline, settings.jobs, settings.slurm.extra) == ("maml", 3, {"qos": "high"})
    assert settings.slurm.minutes == 1440
    named, _ = read_settings(["sweep=comparison", "baseline=anil"])
    assert named.baseline == "anil"


@pytest.mark.parametrize("name", [file.stem for file in (conf_folder() / "sweep").glob("*.yaml")])
def test_every_named_sweep_describes_itself_and_composes(name, tmp_path):
    file = conf_folder() / "sweep" / f"{name}.yaml"
    assert 10 < len(file.read_text().splitlines()[0]) < 120
    if is_wandb(load_yaml(file)):
        return
    settings, overrides = read_settings([f"sweep={name}"])
    known = groups([conf_folder()])
    if settings.search is None:
        assert plan.make_jobs(expand(read_overrides(overrides, known), 1000), tmp_path, known, None)


def test_sweeps_are_no_group_and_the_defaults_are_those_of_the_yaml(capsys):
    assert "sweep" not in groups([conf_folder()])
    settings, _ = read_settings([])
    assert settings == Settings()
    written = OmegaConf.load(conf_folder() / "sweep.yaml")
    assert set(written) == {field for field in Settings.__dataclass_fields__}
    assert cli.main(["sweep", "--help"]) == 0
    page = capsys.readouterr().out
    assert "--rerun failed|all" in page
    assert "launcher=local" in page
    assert max(map(len, page.splitlines())) <= 140
    assert cli.main(["sweep", "--many", "--help"]) == 0
    assert capsys.readouterr().out == page


def test_no_setting_of_a_sweep_has_the_name_of_one_of_a_run():
    own, runs = OmegaConf.load(conf_folder() / "sweep.yaml"), OmegaConf.load(conf_folder() / "train.yaml")
    assert not set(own) & {*runs, *groups([conf_folder()])}


def test_what_a_job_needs_is_read_from_its_composed_config(tmp_path):
    known = groups([conf_folder()])
    grid = {"a": ["steps=100", "trainer.devices=2"], "b": ["experiment=demo", "trainer.devices=4", "test=false"]}
    first, second = plan.make_jobs(grid, tmp_path, known, None)
    assert (first.needs.steps, first.needs.devices, first.needs.tests) == (100, 2, True)
    assert (second.needs.steps, second.needs.devices, second.needs.tests) == (300, 4, False)
    assert plan.count_devices("auto") == plan.count_devices(-1) == 0
    assert first.arguments()[-3:] == ["steps=100", "trainer.devices=2", "trainer.enable_progress_bar=false"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["steps=abc"], "steps must be a whole number of at least 1, but got 'abc'"),
        (["steps=5,6", "val_every=5"], "steps=6 is no multiple of val_every=5"),
        (["test=maybe"], "test must be true or false"),
        (["lr_schedule=constant,linear"], "lr_schedule must be one of constant, cosine, but got 'linear'"),
    ],
)
def test_a_setting_with_which_a_job_would_end_at_once_is_found_before_any_starts(words, message, capsys):
    assert cli.main(["sweep", "seed=0,1", "out=o", *words]) == 2
    assert message in capsys.readouterr().err
    assert not Path("o").exists()


@pytest.mark.parametrize(("module", "setting"), [("ray", "launcher=ray"), ("submitit", "launcher=slurm")])
def test_a_missing_extra_is_named_with_its_install_line(module, setting, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingDependencyError, match=rf"{setting} needs .*pip install 'lightning_ntk\[sweep\]'"):
        if module == "ray":
            from lightning_ntk.sweep.launchers.ray import import_ray

            import_ray()
        else:
            from lightning_ntk.sweep.launchers.slurm import import_submitit

            import_submitit()
