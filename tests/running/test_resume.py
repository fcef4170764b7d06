"""A run that was killed and resumed ends as one that was never stopped, bit for bit."""

import csv
import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from test_train import TINY, TINY_SINE, run

from lightning_ntk import evaluate, train
from lightning_ntk.errors import ConfigError
from lightning_ntk.running.checkpointing import AtomicCheckpoints
from lightning_ntk.running.results import read_results
from lightning_ntk.settings.config import conf_folder

EIGHT = ["steps=8", "val_every=2"]


def parameters(folder, name="last"):
    return torch.load(f"{folder}/checkpoints/{name}.ckpt", weights_only=True)["state_dict"]


def metric_rows(folder):
    """The rows of metrics.csv without what a clock or the memory decides."""
    with open(f"{folder}/metrics.csv", newline="") as lines:
        table = list(csv.DictReader(lines))
    return [
        {key: value for key, value in row.items() if value and not key.startswith(("time/", "memory/"))}
        for row in table
    ]


def check_equal(folder, other):
    for name in ("last", "best"):
        first, second = parameters(folder, name), parameters(other, name)
        assert first.keys() == second.keys()
        assert all(torch.equal(first[key], second[key]) for key in first)
    a, b = read_results(Path(folder)), read_results(Path(other))
    assert a.episodes == b.episodes
    assert a.episode_ids == b.episode_ids
    assert metric_rows(folder) == metric_rows(other)


def test_a_resumed_run_keeps_its_precision():
    settings = [*TINY_SINE, "trainer.precision=64-true"]
    run(*settings, "steps=3", folder="whole")
    run(*settings, "steps=2", folder="stopped")
    train.main(["ckpt=stopped", "steps=3"])
    assert read_results(Path("stopped")).episodes == read_results(Path("whole")).episodes
    first, second = parameters("stopped"), parameters("whole")
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("method", ["meta_rkhs_ii", "maml"])
def test_a_killed_run_resumes_to_the_same_end(method):
    settings = [*TINY, "val_every=4", f"method={method}", "data=glyphs", "data.queries=2", "network.filters=8"]
    command = [sys.executable, "-W", "ignore", "-m", "lightning_ntk.train", *settings, "steps=4000", "run_dir=killed"]
    environment = {**os.environ, "PYTHONPATH": str(conf_folder().parent), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 280
    while not Path("killed/checkpoints/last.ckpt").exists():
        assert time.monotonic() < deadline, "no checkpoint came"
        assert process.poll() is None
        time.sleep(0.01)
    time.sleep(0.2)  # Somewhere within a later epoch.
    process.send_signal(signal.SIGKILL)
    process.wait()
    reached = torch.load("killed/checkpoints/last.ckpt", weights_only=True)["global_step"]
    assert 0 < reached < 4000
    assert metric_rows("killed"), "what was measured before the kill must be readable"
    train.main(["ckpt=killed", f"steps={reached + 8}"])
    run(*settings, f"steps={reached + 8}", folder="whole")
    check_equal("whole", "killed")


@pytest.mark.parametrize("workers", [0, 2])
def test_training_for_longer_continues_where_a_run_ended(workers):
    run(*TINY_SINE, *EIGHT, folder="whole")
    # Workers ask for episodes ahead: those of the epoch that is to come.
    run(*TINY_SINE, "steps=4", "val_every=2", f"data.num_workers={workers}", folder="short")
    train.main(["ckpt=short/checkpoints/last.ckpt", "steps=8"])
    for key, value in parameters("whole").items():
        assert torch.equal(value, parameters("short")[key])
    assert read_results(Path("short")).episodes == read_results(Path("whole")).episodes
    assert OmegaConf.load("short/config.yaml").steps == 8


def test_timings_go_on_after_a_resume():
    run(*TINY_SINE, "steps=4", "val_every=2", folder="run")
    before = read_results(Path("run")).timings["fit_s"]
    train.main(["ckpt=run", "steps=6"])
    assert read_results(Path("run")).timings["fit_s"] > before


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["method=maml"], r"checkpoint of MetaRKHSII, but method=MAML"),
        (["val_every=2"], r"val_every=2 differs from the run's 1"),
        (["seed=5"], r"seed=5 differs from the run's 0"),
        (["steps=1"], r"steps=1: the checkpoint has 2 steps already"),
        (["run_dir=other"], r"run_dir= cannot be set with ckpt="),
        (["++run_dir=other"], r"run_dir= cannot be set with ckpt="),
        (["data=glyphs"], r"another network \(network\._target_: [\w.]+MLP there, [\w.]+Conv4 asked\)"),
        (["data=glyphs", "network=mlp"], r"data: ckpt=.*tasks of kind regression, but .* has classification"),
        (["network=conv4"], r"another network \(network\._target_: [\w.]+MLP there, [\w.]+Conv4 asked\)"),
        (["network.hidden=[7]"], r"another network \(network\.hidden: \[40, 40\] there, \[7\] asked\)"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused(overrides, message):
    train.main([*TINY_SINE, "run_dir=run", "test=false"])
    with pytest.raises(ConfigError, match=message):
        train.main(["ckpt=run", *overrides])
    assert [path.name for path in Path.cwd().iterdir()] == ["run"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.ways=4"], r"data\.ways: ckpt=.*tasks of outputs 3, but the data asked for has 4"),
        (["data.normalize=true"], r"data\.normalize differs"),
        (["data=sinusoid", "network=mlp"], r"another network"),
        (["data=sinusoid"], r"another network"),
    ],
)
def test_a_checkpoint_of_other_tasks_is_refused(overrides, message):
    settings = [*TINY, "data=glyphs", "data.ways=3", "data.queries=2", "network.filters=8"]
    train.main([*settings, "run_dir=run", "test=false"])
    before = Path("run/config.yaml").read_text()
    with pytest.raises(ConfigError, match=message):
        train.main(["ckpt=run", "steps=3", *overrides])
    assert Path("run/config.yaml").read_text() == before


def test_a_learning_rate_set_on_resuming_takes_effect():
    train.main([*TINY_SINE, "run_dir=run", "test=false"])
    before = parameters("run")
    train.main(["ckpt=run", "steps=3", "method.lr=1e-9"])
    assert all(torch.allclose(value, before[key], rtol=0, atol=1e-7) for key, value in parameters("run").items())
    train.main(["ckpt=run", "steps=4"])  # Of the run as it is now: the rate stays.
    assert all(torch.allclose(value, before[key], rtol=0, atol=1e-7) for key, value in parameters("run").items())


def test_a_schedule_that_has_ended_does_not_hold_a_constant_rate_down():
    train.main([*TINY_SINE, "lr_schedule=cosine", "method.lr=1e-2", "run_dir=run", "test=false"])
    assert rate_of("run") == pytest.approx(0.5e-2)
    train.main(["ckpt=run", "steps=3", "lr_schedule=constant"])
    assert rate_of("run") == 1e-2


def rate_of(folder):
    state = torch.load(f"{folder}/checkpoints/last.ckpt", weights_only=True)
    return state["optimizer_states"][0]["param_groups"][0]["lr"]


def test_settings_that_were_added_or_left_out_may_be_given_again():
    own = ["+trainer.benchmark=false", "~trainer.precision", "++method.ridge=0.01"]
    train.main([*TINY_SINE, *own, "run_dir=run", "test=false"])
    train.main([*TINY_SINE, *own, "ckpt=run", "steps=3"])  # As a sweep or a cluster does that starts the job again.
    assert OmegaConf.load("run/config.yaml").trainer.benchmark is False
    train.main(["ckpt=run", "steps=4", "+trainer.benchmark=true"])
    train.main(["ckpt=run", "steps=5", "trainer.benchmark=false", "++method.ridge=0.02"])
    config = OmegaConf.load("run/config.yaml")
    assert (config.trainer.benchmark, config.method.ridge, "precision" in config.trainer) == (False, 0.02, False)
    evaluate.main(["run=run", "+trainer.benchmark=true", "~trainer.precision", "name=it"])
    assert read_results(Path("run/evaluations/it")).config["trainer"]["benchmark"] is True


def test_a_run_stopped_in_its_test_ends_with_the_same_metrics(monkeypatch):
    whole = run(*TINY_SINE, folder="whole")

    def stop(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("lightning_ntk.train.run_test", stop)
        run(*TINY_SINE, folder="stopped")
    train.main(["ckpt=stopped"])
    stopped = read_results(Path("stopped"))
    assert stopped.episodes == whole.episodes
    logged = {name: value for name, value in whole.metrics.items() if not name.startswith(("time/", "memory/"))}
    assert {"train/loss", "val/mse", "val/mse_ci95", "test/mse"} <= logged.keys()
    assert {name: stopped.metrics[name] for name in logged} == logged
    assert stopped.metrics.keys() == whole.metrics.keys()


def test_results_of_an_earlier_end_do_not_stay_beside_a_run_that_goes_on(monkeypatch):
    run(*TINY_SINE)

    def stop(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("lightning_ntk.train.run_test", stop)
    with pytest.raises(KeyboardInterrupt):
        train.main(["ckpt=run", "steps=4"])
    assert not Path("run/results.json").exists()


def test_a_run_without_a_checkpoint_says_so():
    run(*TINY_SINE)
    Path("run/checkpoints/last.ckpt").unlink()
    with pytest.raises(ConfigError, match=r"ckpt=run: the run was stopped before its first checkpoint"):
        train.main(["ckpt=run"])


def test_a_moved_folder_keeps_its_best_score():
    # A learning rate that makes the later steps worse.
    settings = [*TINY_SINE, "method.lr=0.3"]
    run(*settings, "steps=6", folder="whole")
    run(*settings, "steps=4", folder="part")
    Path("part").rename("moved")
    train.main(["ckpt=moved", "steps=6"])
    check_equal("whole", "moved")
    assert not Path("part").exists()


def test_a_checkpoint_taken_out_of_its_folder_starts_a_new_run():
    run(*TINY_SINE, "steps=3", "method.lr=0.3", folder="run")
    Path("run/checkpoints/last.ckpt").rename("taken.ckpt")
    train.main(["ckpt=taken.ckpt", "steps=4", "run_dir=new"])
    # The best of the steps that this folder has seen, whatever came before.
    assert torch.load("new/checkpoints/best.ckpt", weights_only=True)["global_step"] == 4
    train.main(["ckpt=taken.ckpt", "steps=4"])
    assert len(list(Path("runs").iterdir())) == 1
    with pytest.raises(ConfigError, match=r"steps=3: the checkpoint has 3 steps already"):
        train.main(["ckpt=taken.ckpt"])


def test_a_finished_run_says_that_it_is(capsys):
    before = run(*TINY_SINE)
    capsys.readouterr()
    train.main(["ckpt=run"])
    assert "has finished its 2 steps" in capsys.readouterr().out
    assert read_results(Path("run")).episodes == before.episodes


def test_a_run_remembers_its_config_folder(monkeypatch, tmp_path, capsys):
    Path("conf/method").mkdir(parents=True)
    Path("conf/method/mine.yaml").write_text("# Mine.\n_target_: lightning_ntk.methods.maml.MAML\ninner_lr: 0.02\n")
    train.main(["--config-dir", "conf", *TINY_SINE, "method=mine", "run_dir=run"])
    Path("elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    train.main([f"ckpt={tmp_path / 'run'}", "steps=3"])
    evaluate.main([f"run={tmp_path / 'run'}"])
    capsys.readouterr()
    train.main([f"ckpt={tmp_path / 'run'}", "--cfg"])
    shown = OmegaConf.create(capsys.readouterr().out)
    assert (shown.method.inner_lr, shown.steps) == (0.02, 3)


def test_a_run_says_which_defaults_have_changed_under_it(capsys):
    Path("conf/method").mkdir(parents=True)
    mine = "# Mine.\n_target_: lightning_ntk.methods.maml.MAML\nadapt_steps: 2\n"
    Path("conf/method/mine.yaml").write_text(f"{mine}inner_lr: 0.02\n")
    train.main(["--config-dir", "conf", *TINY_SINE, "method=mine", "run_dir=run"])
    train.main(["ckpt=run", "steps=3", "method.adapt_steps=3"])
    assert "Defaults have changed" not in capsys.readouterr().out  # What is set now is no default.
    Path("conf/method/mine.yaml").write_text(f"{mine}inner_lr: 0.03\nfirst_order: true\n")
    train.main(["ckpt=run", "steps=4"])
    assert "you set nothing else (method.inner_lr: 0.02, now 0.03)." in capsys.readouterr().out
    assert OmegaConf.load("run/config.yaml").method.inner_lr == 0.03


def test_a_run_is_not_taken_up_twice_at_once():
    run(*TINY_SINE)
    before = Path("run/config.yaml").read_text()
    hold = "import sys; from pathlib import Path; from lightning_ntk.running.lock import lock\n"
    hold += "held = lock(Path('run/.lock')); print('held', flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", hold], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(ConfigError, match=rf"run is being written by another process \(process {other.pid} on "):
            train.main(["ckpt=run", "steps=3"])
        other.stdin.close()
    assert Path("run/config.yaml").read_text() == before
    train.main(["ckpt=run", "steps=3"])


def test_a_run_that_has_gone_on_while_this_one_started_is_not_taken_up(monkeypatch):
    run(*TINY_SINE)
    build, begun = train.build_data, []

    def meanwhile(config):
        if not begun:
            begun.append(True)
            train.main(["ckpt=run", "steps=4"])
        return build(config)

    monkeypatch.setattr(train, "build_data", meanwhile)
    with pytest.raises(ConfigError, match=r"ckpt=.*run: another process has gone on with the run meanwhile"):
        train.main(["ckpt=run", "steps=6"])
    assert OmegaConf.load("run/config.yaml").steps == 4
    assert Path("run/results.json").exists()


def test_a_checkpoint_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    file = tmp_path / "last.ckpt"
    AtomicCheckpoints().save_checkpoint({"step": 1}, file)
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]

    def killed(content, target):
        target.write(b"half of")
        target.flush()
        assert tmp_path in Path(target.name).parents, "another file system would make the rename a copy"
        raise KeyboardInterrupt

    monkeypatch.setattr("torch.save", killed)
    with pytest.raises(KeyboardInterrupt):
        AtomicCheckpoints().save_checkpoint({"step": 2}, file)
    assert torch.load(file, weights_only=True) == {"step": 1}


def test_a_full_disk_is_an_error_in_one_line(monkeypatch):
    run(*TINY_SINE)
    before = Path("run/checkpoints/last.ckpt").read_bytes()
    save = torch.save

    def full(checkpoint, file):
        def write(content):
            raise OSError(errno.ENOSPC, "No space left on device")

        save(checkpoint, SimpleNamespace(write=write, flush=file.flush))  # It becomes a RuntimeError.

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(ConfigError, match=r"\.ckpt cannot be written: No space left on device\. What was saved"):
        train.main(["ckpt=run", "steps=3"])
    assert Path("run/checkpoints/last.ckpt").read_bytes() == before
    assert {file.name for file in Path("run/checkpoints").iterdir()} == {"best.ckpt", "last.ckpt"}


def test_the_trainer_saves_so():
    train.main([*TINY_SINE, "test=false", "run_dir=run"])
    Path("run/checkpoints/last.tmp").mkdir()  # In the way of the file that is renamed.
    with pytest.raises(IsADirectoryError):
        train.main(["ckpt=run", "steps=3"])


@pytest.mark.parametrize("content", [b"", b"no checkpoint", None])
def test_a_file_that_is_no_checkpoint_of_ours_is_named(content):
    file = Path("strange.ckpt")
    if content is None:
        torch.save({"state_dict": {}}, file)
    else:
        file.write_bytes(content)
    with pytest.raises(ConfigError, match=r"ckpt=strange\.ckpt"):
        train.main(["ckpt=strange.ckpt"])


@pytest.mark.parametrize("split", ["train", "test"])
def test_changed_data_are_named_on_resuming(split, tmp_path, capsys):
    rng = np.random.default_rng(0)
    for part in ("train", "val", "test"):
        for name in "abc":
            (tmp_path / "images" / part / f"{part}_{name}").mkdir(parents=True)
            for number in range(4):
                picture = Image.fromarray(rng.integers(0, 256, (16, 16), dtype=np.uint8))
                picture.save(tmp_path / "images" / part / f"{part}_{name}" / f"{number}.png")
    images = ["data=image_folder", f"data.root={tmp_path / 'images'}", "data.image_size=16", "data.queries=2"]
    run(*TINY, *images, "data.ways=3", "network.filters=4", folder="run")
    train.main(["ckpt=run", "steps=3"])
    assert "data have changed" not in capsys.readouterr().out
    Image.new("L", (16, 16), 255).save(tmp_path / "images" / split / f"{split}_a" / "0.png")
    train.main(["ckpt=run", "steps=4"])
    assert "The data have changed since the run was written" in capsys.readouterr().out


def test_a_run_that_stopped_early_stays_stopped_unless_more_steps_are_asked_for(capsys):
    early = "{_target_:pytorch_lightning.callbacks.EarlyStopping,monitor:val/mse,patience:1,min_delta:1000}"
    run(*TINY_SINE, "steps=20", "val_every=2", f"+callbacks.early={early}", folder="run")
    reached = torch.load("run/checkpoints/last.ckpt", weights_only=True)["global_step"]
    assert reached < 20
    whole = read_results(Path("run"))
    Path("run/results.json").unlink()  # As when it was killed in its test.
    train.main(["ckpt=run"])
    assert "stopped early; steps=MORE" in capsys.readouterr().out
    again = read_results(Path("run"))
    assert again.episodes == whole.episodes
    assert again.timings["fit_s"] == whole.timings["fit_s"]
    assert torch.load("run/checkpoints/last.ckpt", weights_only=True)["global_step"] == reached
    train.main(["ckpt=run", "steps=24"])
    assert torch.load("run/checkpoints/last.ckpt", weights_only=True)["global_step"] > reached
