"""Training runs, end to end on tiny settings: what they leave, what they refuse, and that they learn."""

import csv
import datetime
import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import wandb
from lightning_fabric.strategies.launchers.subprocess_script import _ChildProcessObserver
from omegaconf import OmegaConf

from lightning_ntk import cli, evaluate, load_data, train
from lightning_ntk.episode import TaskSpec
from lightning_ntk.errors import ConfigError, DivergenceError
from lightning_ntk.running.checkpointing import checkpoint_callbacks
from lightning_ntk.running.results import RunResult, mean_and_ci95, read_results
from lightning_ntk.settings.config import conf_folder, groups

TINY = [
    "logger=csv",
    "lr_schedule=constant",  # So that a run of more steps begins as one of fewer.
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
# Data sets that others have published are trained on in datamodules/test_published.py, on small copies of their layout.
PUBLISHED = [name for name in CHOICES["data"] if "download" in OmegaConf.load(conf_folder() / "data" / f"{name}.yaml")]
CLASSIFIERS = ("protonet", "nearest_centroid")


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


def torch_dataset(small_images):
    """The training folder of `small_images` as torchvision's dataset, split by classes."""
    folder = next(o.partition("=")[2] for o in small_images if o.startswith("data.root="))
    dataset = ["data.dataset._target_=torchvision.datasets.ImageFolder", f"+data.dataset.root={folder}/train"]
    return ["data=from_dataset", *dataset, "data.fractions=[0.4,0.3,0.3]", "data.ways=2", "data.queries=2"]


@pytest.mark.parametrize("method", CHOICES["method"])
# Digits are for testing alone; published data sets are trained on in tests of their own.
@pytest.mark.parametrize("data", [name for name in CHOICES["data"] if name not in ("digits", *PUBLISHED)])
def test_every_method_trains_on_every_data_set_from_its_yaml(method, data, request):
    # The whole data set, the class's own defaults and the recipe for the pair: only sizes are cut.
    if data in ("sinusoid", "fourier") and method in CLASSIFIERS:
        pytest.skip(f"{method} refuses regression, which is tested below")
    settings = {
        "sinusoid": lambda: TINY_SINE,
        "glyphs": lambda: [*TINY, "data=glyphs", "data.queries=2", "network.filters=8"],
        "fourier": lambda: [*TINY_SINE, "data=fourier"],
        "image_folder": lambda: [*TINY, *request.getfixturevalue("small_images"), "network.filters=8"],
        "from_dataset": lambda: [*TINY, *torch_dataset(request.getfixturevalue("small_images")), "network.filters=8"],
    }[data]()
    result = run(*settings, f"method={method}")
    metric = "test/mse" if data in ("sinusoid", "fourier") else "test/accuracy"
    scores = result.episodes[metric]
    assert len(scores) == 5
    assert all(torch.isfinite(torch.tensor(scores)))
    assert (result.method, result.data) == (method, data)
    assert (result.metrics[metric], result.metrics[f"{metric}_ci95"]) == mean_and_ci95(scores)


def test_methods_without_a_head_are_tested_with_more_ways_than_they_trained_with():
    small = [*TINY, "data=glyphs", "data.queries=2", "data.ways=3", "data.eval_ways=7", "network.filters=8"]
    for method in CLASSIFIERS:
        assert run(*small, f"method={method}", folder=method).task["ways"] == 7
    for method in sorted(set(CHOICES["method"]) - set(CLASSIFIERS)):
        with pytest.raises(ConfigError, match=r"data\.eval_ways=7 exceeds data\.ways=3.*method=protonet"):
            run(*small, f"method={method}", folder="none")
    assert not Path("none").exists()


@pytest.mark.parametrize("method", CHOICES["method"])
def test_every_method_trains_resnet12_from_its_yaml(method, small_images):
    result = run(*TINY, *small_images, "network=resnet12", "network.width=4", f"method={method}")
    scores = result.episodes["test/accuracy"]
    assert len(scores) == 5
    assert all(torch.isfinite(torch.tensor(scores)))
    assert result.config["network"]["_target_"].endswith("ResNet12")


def test_a_run_folder_holds_everything():
    result = run(*TINY_SINE, "seed=3")
    names = {path.name for path in Path("run").iterdir()}
    assert names == {".lock", "config.yaml", "overrides.yaml", "checkpoints", "metrics.csv", "results.json"}
    assert {path.name for path in Path("run/checkpoints").iterdir()} == {"best.ckpt", "last.ckpt"}
    config = OmegaConf.load("run/config.yaml")
    assert (config.seed, config.data.seed, config.data.steps_per_epoch) == (3, 3, 1)
    content = json.loads(Path("run/results.json").read_text())
    assert content["schema_version"] == 2
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
        assert checkpoint["run"]["config"]["method"]["t"] == 10.0
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
    rough = [*TINY_SINE, "steps=6", "method.lr=0.3", "method.t=100"]
    result = run(*rough)
    scores = [float(row["val/mse"]) for row in rows() if row["val/mse"]]
    best = torch.load("run/checkpoints/best.ckpt", weights_only=True)
    assert scores.index(min(scores)) + 1 == best["global_step"]
    assert best["global_step"] < 6, "a learning rate that high must make the last step worse than an earlier one"
    assert result.tested == {"checkpoint": "best.ckpt", "step": best["global_step"]}
    last = run(*rough, "test_checkpoint=last", folder="other")
    assert last.episodes != result.episodes
    assert last.tested == {"checkpoint": "last.ckpt", "step": 6}


@pytest.mark.parametrize(
    ("kind", "score"), [("classification", ("val/accuracy", "max")), ("regression", ("val/mse", "min"))]
)
def test_best_means_high_accuracy_or_low_error(kind, score, tmp_path):
    data = SimpleNamespace(has_split=lambda split: True, spec=TaskSpec(kind, (1,), 1))
    best, _ = checkpoint_callbacks(tmp_path, data)
    assert (best.monitor, best.mode) == score


def test_data_without_validation_classes_trains_and_tests_the_last_checkpoint(small_images, tmp_path, capsys):
    import shutil

    shutil.rmtree(tmp_path / "images" / "val")
    result = run(*TINY, *small_images, "network.filters=8")
    assert len(result.episodes["test/accuracy"]) == 5
    assert not any("val/accuracy" in row for row in rows())
    assert [path.name for path in Path("run/checkpoints").iterdir()] == ["last.ckpt"]
    assert capsys.readouterr().out.count("no validation split") == 1


def test_a_run_gets_a_folder_of_its_own_under_runs(monkeypatch):
    moment = datetime.datetime(2030, 1, 2, 3, 4, 5)
    clock = SimpleNamespace(datetime=SimpleNamespace(now=lambda: moment))
    monkeypatch.setattr("lightning_ntk.running.run_folder.datetime", clock)
    train.main([*TINY_SINE, "test=false"])
    train.main([*TINY_SINE, "test=false"])
    name = "2030-01-02_03-04-05_sinusoid_meta_rkhs_ii_seed0"
    assert sorted(folder.name for folder in Path("runs").iterdir()) == [name, f"{name}_2"]


def test_runs_that_start_in_the_same_second_have_a_folder_each(monkeypatch):
    moment = datetime.datetime(2030, 1, 2, 3, 4, 5)
    clock = SimpleNamespace(datetime=SimpleNamespace(now=lambda: moment))
    monkeypatch.setattr("lightning_ntk.running.run_folder.datetime", clock)
    build, begun = train.build_data, []

    def meanwhile(config):
        if not begun:  # Another command begins, and ends, while this one reads its data.
            begun.append(True)
            train.main([*TINY_SINE, "test=false"])
        return build(config)

    monkeypatch.setattr(train, "build_data", meanwhile)
    train.main([*TINY_SINE, "test=false"])
    assert len(list(Path("runs").glob("2030-01-02_03-04-05_*/checkpoints/last.ckpt"))) == 2


def test_two_runs_that_start_at_once_do_not_share_a_folder(monkeypatch):
    build = train.build_data

    def meanwhile(config):
        Path("run").mkdir()
        Path("run/config.yaml").write_text("of another process")
        return build(config)

    monkeypatch.setattr(train, "build_data", meanwhile)
    with pytest.raises(ConfigError, match=r"run_dir=.*run: another process has begun a run there meanwhile"):
        run(*TINY_SINE)
    assert sorted(path.name for path in Path("run").iterdir()) == [".lock", "config.yaml"]
    assert Path("run/config.yaml").read_text() == "of another process"


def test_a_run_that_another_process_has_begun_meanwhile_is_not_deleted(monkeypatch):
    make = train.run_folder.make

    def meanwhile(folder):
        made = make(folder)
        (folder / "config.yaml").write_text("of another process")
        return made

    monkeypatch.setattr(train.run_folder, "make", meanwhile)
    with pytest.raises(ConfigError, match=r"another process has begun a run there meanwhile"):
        run(*TINY_SINE)
    assert Path("run/config.yaml").read_text() == "of another process"


def test_meta_learning_really_learns():
    # Short, but the real thing: sine waves, where 200 steps cut the error to a small part.
    settings = ["data=sinusoid", "logger=csv", "data.test_episodes=100", "lr_schedule=constant"]
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
    deadline = time.monotonic() + 120  # W&B's own process writes the file, and may do so after ours has gone on.
    while not any(file.stat().st_size > 500 for file in offline.glob("*.wandb")):
        assert time.monotonic() < deadline, "W&B wrote nothing"
        time.sleep(0.1)
    assert wandb.run is None


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["steps=5", "val_every=2"], r"steps=5 is no multiple of val_every=2.*val_every=1.*steps=4"),
        (["steps=5", "val_every=1000000000"], r"no multiple of val_every=1000000000: use val_every=5\.$"),
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
        (["trainer.log_every_n_steps=0"], r"trainer\.log_every_n_steps must be at least 1, but got 0"),
        (["trainer.gradient_clip_val=-1"], r"trainer\.gradient_clip_val must be a finite positive number, or null"),
        (["trainer.gradient_clip_val=nan"], r"trainer\.gradient_clip_val must be a finite positive number, or null"),
        (["+trainer.max_timee=1"], r"trainer settings: .*max_timee"),
        (["logger=wandb", "logger.wandb.mode=onlin"], r"logger\.wandb\.mode"),
        (["run_dir="], r"run_dir must be a path"),
        (["run_dir=[a]"], r"run_dir must be a path"),
        (["run_dir=" + 300 * "x"], r"run_dir=.*cannot be written: File name too long"),
        (["run_dir=~nobody_of_that_name/x"], r"run_dir=~nobody"),
        (["ckpt=" + 300 * "x"], r"ckpt=.*File name too long"),
        (["++ckpt=nowhere"], r"ckpt=nowhere: there is no checkpoint"),
        (["seed=1,2"], r"seed=1,2 lists several values"),
        (["seed=${nothing}"], r"seed: Interpolation key 'nothing' not found"),
        (["method.lr=???"], r"method\.lr: Missing mandatory value"),
        (["~steps"], r"~steps: this setting cannot be left out"),
        (["=5"], r"KEY=VALUE"),
        (["method=5"], r"method=5: method takes one of its choices"),
        (["method._target_=collections.OrderedDict"], r"method\._target_=collections\.OrderedDict is no MetaLearner"),
        (["data._target_=null"], r"data must have a _target_"),
        (["+callbacks.mine={_target_:collections.OrderedDict}"], r"callbacks\.mine\._target_=.* is no Callback"),
        (
            ["callbacks.timing={}", "~callbacks.timing._target_"],
            r"callbacks\.timing must have a _target_.*~callbacks\.timing",
        ),
        (
            ["+callbacks.swa={_target_:pytorch_lightning.callbacks.StochasticWeightAveraging,swa_lrs:0.1}"],
            r"callbacks\.swa: StochasticWeightAveraging .* after the last checkpoint.*WeightAveraging",
        ),
        (
            ["+callbacks.finder={_target_:pytorch_lightning.callbacks.LearningRateFinder}"],
            r"callbacks\.finder: LearningRateFinder .* begin its steps anew.*sweep search=optuna",
        ),
        (["hydra.run.dir=there"], r"hydra\.run\.dir=there: .* no effect\. Set run_dir="),
        (["hydra/launcher=basic"], r"hydra/launcher=basic: .* no effect"),
        (["logger.wandb=offline"], r"logger\.wandb must hold mode, project and entity"),
        (["logger=wandb_offline", "logger.wandb.entity=5"], r"logger\.wandb\.entity must be text or null"),
        (["method.lr=inf"], r"method\.lr must be a finite positive number"),
        (["data.steps_per_epoch=7"], r"data\.steps_per_epoch=7 differs from val_every=1"),
        (["trainer.accelerator=tpu"], r"trainer\.accelerator=tpu"),
        (["trainer.devices=0"], r"trainer\.devices=0"),
        (["trainer.devices=2", "data.tasks_per_step=3"], r"data\.tasks_per_step=3 .*trainer\.devices=2"),
        (["trainer.devices=2", "data.val_episodes=1"], r"data\.val_episodes=1 .*trainer\.devices=2"),
        (["trainer.devices=2", "data.test_episodes=1"], r"data\.test_episodes=1 .*trainer\.devices=2"),
        (["trainer.limit_test_batches=0"], r"trainer\.limit_test_batches cannot be set: use data\.test_episodes"),
        (["trainer.profilr=simple"], r"added with a plus: \+trainer\.profilr=VALUE"),
        (["+trainer.limit_test_batches=0"], r"trainer\.limit_test_batches cannot be set.*data\.test_episodes"),
        (["+trainer.fast_dev_run=true"], r"trainer\.fast_dev_run cannot be set"),
        (["+trainer.max_time=1"], r"trainer\.max_time cannot be set: use steps\.$"),
        (["+trainer.default_root_dir=x"], r"trainer\.default_root_dir cannot be set: use run_dir\.$"),
        (["+trainer.enable_model_summary=true"], r"trainer\.enable_model_summary cannot be set: a run prints none\.$"),
        (["trainer.strategy=ddp_spawn"], r"trainer\.strategy=ddp_spawn tests in processes.*Use ddp"),
        (["trainer.strategy=ddp_notebook_find_unused_parameters_true"], r"Use ddp, which starts the command"),
        (["trainer.strategy=fsdp"], r"trainer\.strategy must be auto, ddp or .*but got fsdp"),
        (["method.t=0"], r"method\.t"),
        (["method=meta_rkhs_i", "method.alpha=nan"], r"method\.alpha"),
        (["+method.loss=cross_entropy"], r"method\.loss is no setting of .*MetaRKHSII"),
        (["method.loss=cross_entropy"], r"no setting 'method\.loss'.*closed form.*method=meta_rkhs_i"),
        (["method=protonet"], r"method=protonet .*regression.*method=meta_rkhs_ii"),
        (["method=nearest_centroid"], r"method=nearest_centroid .*regression.*method=meta_rkhs_ii"),
        (["method=reptile", "method.batch_size=ten"], r"method\.batch_size must be a whole number or null"),
        (["method=imaml", "method.regularization=0"], r"method\.regularization"),
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


def test_wandb_and_the_precision_can_be_left_out():
    words = [word for word in TINY_SINE if word != "logger=csv"]
    train.main([*words, "~logger.wandb", "~trainer.precision", "run_dir=run"])
    assert read_results(Path("run")).metrics["test/mse"] > 0
    assert not Path("run/wandb").exists()
    evaluate.main(["run=run", "name=it", "data.test_episodes=3"])


@pytest.mark.parametrize("name", ["a b", "a=b", "a,b", "ünï 日本", "a(b)", "it's", 'a"b', "a&b#c;d!", "[ab]", "~x"])
def test_a_path_may_hold_what_hydra_has_a_meaning_for(name, tmp_path):
    folder = tmp_path / name / "run"
    trained = run(*TINY_SINE, folder=folder)
    train.main([f"ckpt={folder}", "steps=3"])
    assert read_results(folder).config["steps"] == 3
    evaluate.main([f"run={folder}", "data.eval_seed=0", "checkpoint=best"])
    assert trained.episode_ids == read_results(folder / "evaluations" / "data.eval_seed=0").episode_ids


@pytest.mark.parametrize(
    ("logger", "error", "message"),
    [
        ("wandb", wandb.errors.UsageError("No API key configured."), r"No API key configured.*logger=wandb_offline"),
        # A variable of the environment: WANDB_MODE=on_line.
        ("wandb", ValueError("mode\n  Input should be"), r"mode Input should be.*logger=wandb_offline"),
        ("wandb_offline", ValueError("mode\n  Input should be"), r"mode Input should be.*logger=csv"),
    ],
)
def test_a_refusal_of_wandb_leaves_no_folder(logger, error, message, monkeypatch):
    def refuse(*args, **kwargs):
        raise error

    monkeypatch.setattr(wandb, "init", refuse)
    with pytest.raises(ConfigError, match=rf"logger\.wandb: {message}"):
        run(*TINY_SINE, f"logger={logger}", folder="some/where")
    assert list(Path.cwd().iterdir()) == []


def test_a_folder_that_cannot_be_written_to_the_end_is_not_left(monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(OmegaConf, "save", full)
    with pytest.raises(ConfigError, match=r"run_dir=.*No space left on device"):
        run(*TINY_SINE, folder="some/where")
    assert list(Path.cwd().iterdir()) == []
    Path("of_others").mkdir()
    with pytest.raises(ConfigError, match=r"run_dir=.*No space left on device"):
        run(*TINY_SINE, folder="of_others")
    assert [path.name for path in Path("of_others").iterdir()] == [".lock"]


def test_a_run_is_named_by_its_choices(tmp_path):
    (tmp_path / "conf" / "method").mkdir(parents=True)
    (tmp_path / "conf" / "method" / "fomaml.yaml").write_text(
        "# FOMAML.\n_target_: lightning_ntk.methods.maml.MAML\nfirst_order: true\n"
    )
    result = run("--config-dir", "conf", *TINY_SINE, "method=fomaml")
    assert (result.method, result.data) == ("fomaml", "sinusoid")


@pytest.mark.parametrize("method", ["meta_rkhs_ii", "maml"])
def test_images_are_as_precise_as_the_network(method):
    settings = [*TINY, "data=glyphs", "data.queries=2", "network.filters=8", f"method={method}"]
    assert run(*settings, "trainer.precision=64-true").episodes["test/accuracy"]


def test_the_report_of_a_profiler_is_shown(caplog):
    run(*TINY_SINE, "+trainer.profiler=simple")
    assert "FIT Profiler Report" in caplog.text
    assert {record.levelname for record in caplog.records if "profilers" not in record.name} <= {"WARNING"}


def test_it_is_said_that_a_rank_has_died_before_the_others_are_killed(caplog, monkeypatch):
    train.quiet()
    monkeypatch.setattr(_ChildProcessObserver, "_terminate_all", lambda _: None)
    killed = SimpleNamespace(pid=4711, returncode=-9, poll=lambda: None)
    _ChildProcessObserver(main_pid=1, child_processes=[killed])._run()
    assert "Child process with PID 4711 terminated with code -9" in caplog.text


def test_a_loss_that_is_not_finite_stops_the_run():
    with pytest.raises(
        DivergenceError, match=r"meta-loss became \S+ at step \d+\. Lower method\.lr .* or method\.inner_lr"
    ):
        run(*TINY_SINE, "method=maml", "method.lr=1e30")
    assert all(row["train/loss"] not in ("nan", "inf") for row in rows())
    assert not Path("run/results.json").exists()
    with pytest.raises(DivergenceError, match=r"at step 1\."):  # At each step, however seldom one is logged.
        run(*TINY_SINE, "method=maml", "method.lr=1e30", "trainer.log_every_n_steps=1000", folder="seldom")


def test_the_scores_of_validation_do_not_stay_for_the_test():
    many = run(*TINY_SINE, "data.val_episodes=9", folder="many")
    assert len(many.episodes["test/mse"]) == 5
    few = run(*TINY_SINE, "data.val_episodes=1", "test_checkpoint=last", folder="few")
    assert len(few.episodes["test/mse"]) == 5


def test_a_kernel_that_cannot_be_decomposed_is_a_divergence(monkeypatch):
    def fail(*args):
        raise torch.linalg.LinAlgError("linalg.eigh: failed to converge.")

    monkeypatch.setattr("lightning_ntk.methods.meta_rkhs_ii.MetaRKHSII.meta_loss", fail)
    with pytest.raises(DivergenceError, match=r"step 0: .*method\.lr.*method\.ridge"):
        run(*TINY_SINE)


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
    Path("runs").write_text("in the way")
    with pytest.raises(ConfigError, match=r"run_dir=.*runs/.*cannot be written: .*runs is no folder"):
        train.main(TINY_SINE)


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


OWN_DATA = """
from datamodules.sinusoid import Sinusoid

class Follows(Sinusoid):
    pass

class Fixed(Sinusoid):
    def __init__(self, tasks_per_step: int = 4) -> None:
        super().__init__(tasks_per_step=tasks_per_step, val_episodes=2, test_episodes=2)

class FixedSeed(Sinusoid):
    def __init__(self, steps_per_epoch: int = 4) -> None:
        super().__init__(steps_per_epoch=steps_per_epoch, val_episodes=2, test_episodes=2)
"""


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("Follows", None),
        ("Fixed", r"Fixed has steps_per_epoch = 50, where the run has 2\. Let its __init__ take \*\*settings"),
        ("FixedSeed", r"FixedSeed has seed = 0, where the run has 7\."),
    ],
)
def test_data_of_ones_own_follow_the_run(kind, message, tmp_path, monkeypatch):
    Path("own_data.py").write_text(OWN_DATA)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "own_data", raising=False)
    Path("conf/data").mkdir(parents=True)
    text = "defaults:\n  - override /network@_global_.network: mlp\n"
    Path("conf/data/own.yaml").write_text(f"{text}_target_: own_data.{kind}\n")
    words = ["--config-dir", "conf", "data=own", "method=maml", "steps=4", "val_every=2", "seed=7", "logger=csv"]
    if message is None:
        train.main([*words, "+data.test_episodes=2", "+data.val_episodes=2", "run_dir=run"])
        assert torch.load("run/checkpoints/last.ckpt", weights_only=True)["global_step"] == 4
        assert load_data("run").seed == 7
        return
    with pytest.raises(ConfigError, match=message):
        train.main([*words, "run_dir=run"])
