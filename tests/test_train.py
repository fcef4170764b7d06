"""Training runs, end to end on tiny settings: what they leave, what they refuse, and that they learn."""

import csv
import json
import sys
import time
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from lightning_ntk import cli, train
from lightning_ntk.config import conf_folder, groups
from lightning_ntk.errors import ConfigError, DivergenceError
from lightning_ntk.results import RunResult, mean_and_ci95, read_results

TINY = [
    "logger=csv",
    "steps=2",
    "val_every=1",
    "data.tasks_per_step=2",
    "data.val_episodes=3",
    "data.test_episodes=5",
    "trainer.accelerator=cpu",
    "trainer.enable_progress_bar=false",
    "trainer.log_every_n_steps=1",
]
TINY_SINE = [*TINY, "data=sinusoid", "data.queries=5", "data.eval_queries=5"]
CHOICES = groups([conf_folder()])


def run(*overrides, folder="run") -> RunResult:
    train.main([*overrides, f"run_dir={folder}"])
    return read_results(Path(folder))


def rows(file="run/metrics.csv"):
    with open(file, newline="") as lines:
        return list(csv.DictReader(lines))


@pytest.fixture
def small_images(tmp_path):
    """Overrides for a folder of small random images, each class with a level of brightness of its own."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    for split, base in (("train", 0), ("val", 10), ("test", 20)):
        for k in range(6):
            folder = tmp_path / "images" / split / f"class{base + k}"
            folder.mkdir(parents=True)
            for number in range(4):
                pixels = rng.integers(0, 60, (16, 16, 3)) + 12 * (base // 10 + 2 * k)
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{number}.png")
    return ["data=image_folder", f"data.root={tmp_path / 'images'}", "data.image_size=16", "data.queries=2"]


@pytest.mark.parametrize("method", CHOICES["method"])
@pytest.mark.parametrize("data", CHOICES["data"])
def test_every_method_trains_on_every_data_set_from_its_yaml(method, data, request):
    # The whole data set, the class's own defaults and the recipe for the pair: only sizes are cut.
    settings = {
        "sinusoid": lambda: TINY_SINE,
        "glyphs": lambda: [*TINY, "data=glyphs", "data.queries=2", "network.filters=8"],
        "image_folder": lambda: [*TINY, *request.getfixturevalue("small_images"), "network.filters=8"],
    }[data]()
    result = run(*settings, f"method={method}")
    metric = "test/mse" if data == "sinusoid" else "test/accuracy"
    scores = result.episodes[metric]
    assert len(scores) == 5
    assert all(torch.isfinite(torch.tensor(scores)))
    assert (result.method, result.data) == (method, data)
    assert (result.metrics[metric], result.metrics[f"{metric}_ci95"]) == mean_and_ci95(scores)


def test_a_run_folder_holds_everything():
    result = run(*TINY_SINE, "seed=3")
    names = {path.name for path in Path("run").iterdir()}
    assert names == {"config.yaml", "overrides.yaml", "checkpoints", "metrics.csv", "results.json"}
    assert {path.name for path in Path("run/checkpoints").iterdir()} == {"best.ckpt", "last.ckpt"}
    config = OmegaConf.load("run/config.yaml")
    assert (config.seed, config.data.seed, config.data.steps_per_epoch) == (3, 3, 1)
    content = json.loads(Path("run/results.json").read_text())
    assert content["schema_version"] == 1
    assert content["seed"] == 3
    assert content["config"] == OmegaConf.to_container(config)
    assert len(result.episode_ids) == 64
    assert {"meta_step_s", "fit_s", "test_s"} <= result.timings.keys()
    assert 0 < result.timings["meta_step_s"] <= result.timings["fit_s"]
    assert result.metrics["memory/peak_mib"] > 50
    assert result.versions["torch"] == torch.__version__.split("+")[0] or result.versions["torch"] == torch.__version__
    table = rows()
    assert [row["step"] for row in table if row["train/loss"]] == ["0", "1"]
    assert [row["step"] for row in table if row["val/mse"]] == ["0", "1"]
    assert all(row["time/fit"] for row in table if row["val/mse"])


def test_checkpoints_hold_plain_types_only():
    run(*TINY_SINE)
    for name in ("best", "last"):
        checkpoint = torch.load(f"run/checkpoints/{name}.ckpt", weights_only=True)
        assert checkpoint["run"]["config"]["method"]["t"] == 100.0
        assert checkpoint["run"]["spec"]["kind"] == "regression"


def test_all_methods_see_the_same_test_episodes():
    identities = {
        run(*TINY_SINE, f"method={method}", f"seed={seed}", folder=f"{method}{seed}").episode_ids
        for seed, method in enumerate(("meta_rkhs_ii", "maml", "from_scratch"))
    }
    assert len(identities) == 1


def test_the_same_command_gives_the_same_numbers_and_another_seed_others():
    first, again = (run(*TINY_SINE, folder=name) for name in ("a", "b"))
    other = run(*TINY_SINE, "seed=1", folder="c")
    assert first.episodes == again.episodes
    assert first.episodes != other.episodes
    assert first.episode_ids == other.episode_ids


def test_the_best_checkpoint_is_the_one_with_the_best_validation_score():
    result = run(*TINY_SINE, "steps=6", "method.lr=0.3")
    scores = [float(row["val/mse"]) for row in rows() if row["val/mse"]]
    best = torch.load("run/checkpoints/best.ckpt", weights_only=True)
    assert scores.index(min(scores)) + 1 == best["global_step"]
    assert best["global_step"] < 6, "a learning rate that high must make the last step worse than an earlier one"
    last = run(*TINY_SINE, "steps=6", "method.lr=0.3", "test_checkpoint=last", folder="other")
    assert last.episodes != result.episodes


def test_data_without_validation_classes_trains_and_tests_the_last_checkpoint(small_images, tmp_path, capsys):
    import shutil

    shutil.rmtree(tmp_path / "images" / "val")
    result = run(*TINY, *small_images, "network.filters=8")
    assert len(result.episodes["test/accuracy"]) == 5
    assert not any("val/accuracy" in row for row in rows())
    assert [path.name for path in Path("run/checkpoints").iterdir()] == ["last.ckpt"]
    assert capsys.readouterr().out.count("no validation split") == 1


def test_a_run_gets_a_folder_of_its_own_under_runs():
    train.main([*TINY_SINE, "test=false"])
    train.main([*TINY_SINE, "test=false"])
    folders = sorted(Path("runs").iterdir())
    assert len(folders) == 2
    assert all(folder.name.endswith(("sinusoid_meta_rkhs_ii_seed0", "seed0_2")) for folder in folders)


def test_meta_learning_really_learns():
    # Short, but the real thing: sine waves, where 200 steps cut the error to a small part.
    settings = ["data=sinusoid", "logger=csv", "data.test_episodes=100"]
    quiet = ["trainer.accelerator=cpu", "trainer.enable_progress_bar=false"]
    few, many = (
        run(*settings, *quiet, f"steps={steps}", f"val_every={steps}", folder=f"steps{steps}").metrics["test/mse"]
        for steps in (1, 200)
    )
    assert many < 0.5
    assert many < 0.2 * few


def test_wandb_runs_offline_and_ends_with_the_run(monkeypatch):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    run(*TINY_SINE, "logger=wandb_offline")
    (offline,) = Path("run/wandb").glob("offline-run-*")
    deadline = time.monotonic() + 30  # W&B's own process writes the file, and may do so after ours has gone on.
    while not any(file.stat().st_size > 500 for file in offline.glob("*.wandb")):
        assert time.monotonic() < deadline, "W&B wrote nothing"
        time.sleep(0.1)
    import wandb

    assert wandb.run is None


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["steps=5", "val_every=2"], r"steps=5 is no multiple of val_every=2.*val_every=1.*steps=4"),
        (["steps=0"], r"steps must be"),
        (["seed=-1"], r"seed must be"),
        (["seed=4294967296"], r"seed must be"),
        (["steps=true"], r"steps must be"),
        (["test=maybe"], r"test must be true or false"),
        (["method.lr=abc"], r"method\.lr must be a number"),
        (["method.t=null"], r"method\.t must be a number"),
        (["network.hidden=5"], r"network\.hidden must be"),
        (["data.shots=few"], r"data\.shots must be a whole number"),
        (["trainer.log_every_n_steps=often"], r"trainer\.log_every_n_steps must be a whole number"),
        (["+trainer.max_timee=1"], r"trainer settings: .*max_timee"),
        (["logger=wandb", "logger.wandb.mode=onlin"], r"logger\.wandb\.mode"),
        (["run_dir="], r"run_dir is empty"),
        (["method.t=0"], r"method\.t"),
        (["method=meta_rkhs_i", "method.alpha=nan"], r"method\.alpha"),
        (["network=conv4"], r"network=mlp"),
        (["trainer.devices=1000"], r"trainer\.devices=1000"),
        (["trainer.devices=1000", "trainer.accelerator=auto"], r"trainer\.devices=1000"),
        (["trainer.accelerator=gpu"], r"trainer"),
        (["trainer.precision=12"], r"trainer"),
        (["data.shots=0"], r"data\.shots"),
        (["test_checkpoint=first"], r"test_checkpoint"),
        (["ckpt=nowhere"], r"ckpt=nowhere"),
    ],
)
def test_bad_input_names_its_key_and_leaves_nothing(overrides, message):
    with pytest.raises(ConfigError, match=message):
        train.main([*TINY_SINE, *overrides])
    assert list(Path.cwd().iterdir()) == []


def test_without_wandb_only_its_logger_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match=r"pip install wandb, or use logger=csv"):
        train.main([*TINY_SINE, "logger=wandb_offline"])
    assert list(Path.cwd().iterdir()) == []
    assert run(*TINY_SINE, folder="2026").episodes["test/mse"]


def test_an_unwritable_run_folder_is_named():
    Path("file").write_text("in the way")
    with pytest.raises(ConfigError, match=r"run_dir=.*file/run cannot be written"):
        train.main([*TINY_SINE, "run_dir=file/run"])


def test_a_folder_with_a_run_is_not_overwritten():
    train.main([*TINY_SINE, "run_dir=run", "test=false"])
    before = Path("run/config.yaml").read_text()
    with pytest.raises(ConfigError, match="already holds a run"):
        train.main([*TINY_SINE, "run_dir=run", "seed=9"])
    assert Path("run/config.yaml").read_text() == before


def test_a_diverging_energy_stops_the_run_with_its_metrics_kept(capsys):
    settings = ["method=meta_rkhs_i", "method.energy=literal", "method.alpha=0.1", "method.lr=0.05", "steps=200"]
    assert cli.main(["train", *TINY_SINE, *settings, "val_every=200", "run_dir=run"]) == 2
    assert "unbounded below" in capsys.readouterr().err
    losses = [float(row["train/loss"]) for row in rows()]
    assert losses
    assert all(loss == loss for loss in losses), "no NaN may be written"
    assert not Path("run/results.json").exists()
    with pytest.raises(DivergenceError):
        train.main([*TINY_SINE, *settings, "val_every=200", "run_dir=again"])
