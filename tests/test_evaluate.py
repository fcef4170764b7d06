"""A finished run tested again under other settings."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from test_train import TINY, TINY_SINE, run

from lightning_ntk import evaluate, train
from lightning_ntk.errors import ConfigError, DataError
from lightning_ntk.evaluate import evaluation_name
from lightning_ntk.running.results import read_results


def evaluated(*overrides, name="it"):
    evaluate.main(["run=run", f"name={name}", *overrides])
    return read_results(Path("run/evaluations") / name)


def test_the_same_settings_give_the_same_scores():
    trained = run(*TINY_SINE)
    again = evaluated()
    assert (again.episodes, again.tested) == (trained.episodes, trained.tested)
    assert read_results(Path("run")) == trained, "the run's own results must stay"


def test_weights_of_another_precision_are_not_rounded():
    trained = run(*TINY_SINE, "method.t=inf", "trainer.precision=64-true")
    assert evaluated().episodes == trained.episodes
    rounded = evaluated("trainer.precision=32-true", name="rounded")
    assert rounded.episodes != trained.episodes, "as precise as it is asked for"


def test_test_time_settings_and_shots_can_change():
    trained = run(*TINY_SINE)
    later = evaluated("method.t=5")
    assert later.episodes != trained.episodes
    assert later.episode_ids == trained.episode_ids
    assert later.config["method"]["t"] == 5
    more = evaluated("data.eval_shots=20", name="more")
    assert more.episode_ids != trained.episode_ids
    assert more.task["shots"] == 20


def test_several_settings_of_the_method_at_once_change_too():
    run(*TINY_SINE, "method=maml")
    result = evaluated("method={test_adapt_steps: 7, inner_lr: 0.05}")
    assert (result.config["method"]["test_adapt_steps"], result.config["method"]["inner_lr"]) == (7, 0.05)
    assert result.episodes == evaluated("method.test_adapt_steps=7", "method.inner_lr=0.05", name="each").episodes
    with pytest.raises(ConfigError, match=r"another network \(network\.hidden"):
        evaluated("network={hidden: [7]}")


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("meta_rkhs_i", ["euler_steps=3"]),
        ("meta_rkhs_ii", ["approximation=pade22"]),
        ("maml", ["test_adapt_steps=3"]),
        ("fomaml", ["inner_lr=0.02"]),
        ("meta_sgd", ["test_adapt_steps=3"]),
        ("reptile", ["test_adapt_steps=3", "inner_optimizer=adam"]),
        ("imaml", ["test_adapt_steps=3", "regularization=0.7"]),
        ("from_scratch", ["adapt_steps=3"]),
    ],
)
def test_every_methods_test_time_settings_can_change(method, settings):
    trained = run(*TINY_SINE, f"method={method}")
    seen = [trained.episodes]
    for number, setting in enumerate(settings):
        later = evaluated(f"method.{setting}", name=str(number))
        assert later.episode_ids == trained.episode_ids
        assert later.episodes not in seen
        seen.append(later.episodes)


def test_methods_without_a_head_can_be_tested_with_other_ways():
    run(*TINY, "data=glyphs", "data.queries=2", "network.filters=8", "method=protonet", "data.ways=4")
    assert evaluated("data.eval_ways=6").task["ways"] == 6
    assert evaluated("data.ways=7", name="more").task["ways"] == 7


def test_splits_that_are_not_tested_on_may_be_too_small():
    settings = ["data=glyphs", "data.queries=2", "network.filters=8", "method=protonet", "data.ways=4"]
    run(*TINY, *settings)
    assert evaluated("data.eval_ways=50").task["ways"] == 50, "of 41 validation classes and 57 test classes"
    with pytest.raises(ConfigError, match=r"eval_ways=60 .* the test split has 57"):
        evaluated("data.eval_ways=60", name="more")


def test_settings_that_change_the_parameters_are_refused():
    run(*TINY_SINE, "method=maml", "method.learn_inner_lrs=true", "method.adapt_steps=2")
    assert evaluated("method.test_adapt_steps=5").config["method"]["test_adapt_steps"] == 5
    with pytest.raises(ConfigError, match=r"run=.*parameters are not those.*inner_lrs: \(2,\) there"):
        evaluated("method.learn_inner_lrs=false", name="other")
    with pytest.raises(ConfigError, match=r"ckpt=.*inner_lrs: \(2,\) there, none now"):
        train.main(["ckpt=run", "steps=3", "method.learn_inner_lrs=false"])


def test_a_run_of_reptile_goes_on_with_its_own_optimiser():
    run(*TINY_SINE, "method=reptile")
    train.main(["ckpt=run", "steps=3", "method.lr=0.5"])
    state = torch.load("run/checkpoints/last.ckpt", weights_only=True)
    assert (state["global_step"], state["optimizer_states"][0]["param_groups"][0]["lr"]) == (3, 0.5)
    with pytest.raises(ConfigError, match=r"method\.outer_optimizer=adam cannot go on.*sgd"):
        train.main(["ckpt=run", "steps=4", "method.outer_optimizer=adam"])


def test_other_data_keep_the_trained_network_and_method():
    run(*TINY, "data=glyphs", "data.queries=2", "network.filters=8", "method.t=3", "data.ways=4")
    result = evaluated("data.eval_ways=3", "data.eval_shots=2")
    assert result.task["ways"] == 3
    assert result.config["method"]["t"] == 3


def write_images(folder):
    """A folder of 28x28 images, with enough classes for 3 ways."""
    for split, offset in (("train", 0), ("test", 4)):
        for k in range(offset, offset + 4):
            (folder / split / f"{k}").mkdir(parents=True)
            for number in range(4):
                grey = np.full((28, 28), 20 * k + number, dtype=np.uint8)
                Image.fromarray(grey).save(folder / split / f"{k}" / f"{number}.png")


def test_other_data_leave_the_settings_behind_that_they_do_not_have(tmp_path):
    write_images(tmp_path / "images")
    images = ["data=image_folder", f"data.root={tmp_path / 'images'}", "data.image_size=28", "data.channels=1"]
    run(*TINY, "data=glyphs", "data.queries=2", "network.filters=8", "data.ways=3", "data.cache_dir=null")
    assert evaluated(*images).task["ways"] == 3
    settings = ["data.split_file=null", "data.ways=3", "data.queries=2", "network.filters=8"]
    run(*TINY, "experiment=omniglot_small", *images, *settings, folder="other")
    evaluate.main(["run=other", "data=glyphs", "name=glyphs"])
    result = read_results(Path("other/evaluations/glyphs"))
    assert (result.data, result.task["ways"], len(result.episodes["test/accuracy"])) == ("glyphs", 3, 5)


def test_where_the_runs_data_lie_says_nothing_of_others(tmp_path, monkeypatch):
    write_images(tmp_path / "images")
    split = "\n".join(
        ["split,class", *(f"train,train/{k}" for k in range(4)), *(f"test,test/{k}" for k in range(4, 8))]
    )
    (tmp_path / "own.csv").write_text(split)
    of_images = [f"data.root={tmp_path / 'images'}", f"data.split_file={tmp_path / 'own.csv'}"]
    images = ["data=image_folder", *of_images, "data.image_size=28", "data.channels=1"]
    run(*TINY, *images, "data.queries=2", "network.filters=8", "data.ways=3")
    monkeypatch.setenv("LIGHTNING_NTK_DATA", str(tmp_path / "sets"))
    message = r"data\.root=.*/cifar_100 \(there is no such folder\) has no cifar-100-python"
    with pytest.raises(DataError, match=message):
        evaluate.main(["run=run", "data=cifar_fs", "data.image_size=28", "data.channels=1"])
    assert evaluated("data=image_folder").config["data"]["split_file"] == str(tmp_path / "own.csv")


def test_the_recipe_of_the_data_asked_for_changes_nothing_of_what_was_trained(tmp_path):
    write_images(tmp_path / "images")
    (tmp_path / "conf" / "recipe").mkdir(parents=True)
    (tmp_path / "conf" / "recipe" / "meta_rkhs_ii_image_folder.yaml").write_text(
        "# @package _global_\n# Mine.\nmethod: {t: 77.0}\nnetwork: {filters: 24}\n"
    )
    own = ["--config-dir", str(tmp_path / "conf")]
    run(*own, *TINY, "data=glyphs", "data.queries=2", "data.ways=3", "network.filters=8", "method.ridge=0.5")
    images = ["data=image_folder", f"data.root={tmp_path / 'images'}", "data.image_size=28", "data.channels=1"]
    config = evaluated(*images, "data.normalize=false").config
    assert (config["method"]["t"], config["method"]["ridge"], config["network"]["filters"]) == (10.0, 0.5, 8)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["ckpt=run"], r"run=FOLDER names what is evaluated"),
        (["run_dir=x"], r"run=FOLDER names what is evaluated"),
        (["++network.hidden=[7]"], r"another network \(network\.hidden"),
        (["network=conv4"], r"another network"),
        (["trainer.devices=2", "data.test_episodes=1"], r"data\.test_episodes=1 "),
        (["+trainer.limit_test_batches=0"], r"trainer\.limit_test_batches cannot be set"),
        (["data=glyphs", "data.queries=2"], r"trained for regression"),
        (["method=maml"], r"checkpoint of MetaRKHSII"),
        (["method.t=-1"], r"method\.t"),
        (["checkpoint=middle"], r"checkpoint must be"),
        (["steps=3"], r"steps= belongs to training, which is over: train ckpt=RUN"),
        (["seed=5"], r"seed= belongs to training.*data\.eval_seed=N"),
        (["recipe=maml_sinusoid"], r"recipe= belongs to training, which is over: set what the test takes by itself"),
    ],
)
def test_what_cannot_be_evaluated_is_said(overrides, message):
    run(*TINY_SINE)
    with pytest.raises(ConfigError, match=message):
        evaluated(*overrides)
    assert not Path("run/evaluations").exists()


@pytest.mark.parametrize("method", ["maml", "reptile", "imaml", "meta_sgd"])
def test_settings_of_a_methods_training_are_refused(method):
    run(*TINY_SINE, f"method={method}")
    with pytest.raises(ConfigError, match=r"method\.adapt_steps= belongs to training.*: method\.test_adapt_steps=N is"):
        evaluated("method.adapt_steps=50")
    with pytest.raises(ConfigError, match=r"method\.lr= belongs to training, which is over: leave it out"):
        evaluated("method={lr: 1, test_adapt_steps: 50}")


def test_a_result_has_the_names_and_the_seed_of_what_was_trained():
    run(*TINY_SINE, "method=fomaml", "seed=3")
    result = evaluated("method=maml")  # The same class: its settings are those of the run.
    assert (result.method, result.seed, result.config["method"]["first_order"]) == ("fomaml", 3, True)


def test_other_ways_than_the_head_has_point_to_eval_ways():
    run(*TINY, "data=glyphs", "data.queries=2", "network.filters=8")
    with pytest.raises(ConfigError, match=r"data\.ways=7.*5 outputs.*data\.eval_ways"):
        evaluated("data.ways=7")
    with pytest.raises(ConfigError, match=r"data\.eval_ways=7 exceeds data\.ways=5.*method=protonet"):
        evaluated("data.eval_ways=7")


def test_without_a_run_it_says_what_is_missing():
    with pytest.raises(ConfigError, match="run=FOLDER is missing"):
        evaluate.main([])
    with pytest.raises(ConfigError, match="run=nowhere"):
        evaluate.main(["run=nowhere"])


def test_results_are_plain_json():
    run(*TINY_SINE)
    evaluated()
    assert json.loads(Path("run/evaluations/it/results.json").read_text())["schema_version"] == 2


def test_each_evaluation_has_a_folder_of_its_own():
    run(*TINY_SINE)
    for words in (
        ["name=null"],
        ["checkpoint=last"],
        ["method.t=5"],
        ["data.eval_shots=20"],
        ["name=true"],
        ["name=1e-3"],
        ["method.t=5", "data.eval_shots=20"],
    ):
        evaluate.main(["run=run", *words])
    names = {path.name for path in Path("run/evaluations").iterdir()}
    assert names == {
        "again", "checkpoint=last", "method.t=5", "data.eval_shots=20", "true", "1e-3", "method.t=5_data.eval_shots=20",
    }  # fmt: skip
    long = [f"data.eval_queries={'0' * 130}{n}" for n in (3, 4)]
    shortened = {evaluation_name({}, [words]) for words in long}
    assert len(shortened) == 2
    assert max(map(len, shortened)) <= 120, "file systems allow 255 bytes"


def test_each_checkpoint_has_results_of_its_own():
    run(*TINY_SINE, "method.lr=0.3")
    checkpoints = Path("run/checkpoints")
    shutil.copy(checkpoints / "last.ckpt", checkpoints / "mine.ckpt")
    for file in ("run", "run/checkpoints/last.ckpt", "run/checkpoints/best.ckpt", "run/checkpoints/mine.ckpt"):
        evaluate.main([f"run={file}"])
    assert {path.name for path in Path("run/evaluations").iterdir()} == {"again", "checkpoint=last", "checkpoint=mine"}
    (checkpoints / "best.ckpt").unlink()  # As in a run without validation, whose last is its best.
    evaluate.main(["run=run"])
    assert read_results(Path("run/evaluations/again")).tested["checkpoint"] == "last.ckpt"


def test_lone_checkpoints_of_one_name_have_folders_of_their_own():
    run(*TINY_SINE)
    for folder in ("x", "y", "x"):
        Path(folder).mkdir(exist_ok=True)
        shutil.copy("run/checkpoints/best.ckpt", f"{folder}/model.ckpt")
        evaluate.main([f"run={folder}/model.ckpt"])
    results = list(Path("runs").glob("model_*/evaluations/again/results.json"))
    assert len(results) == 2, "the second time, x is in the folder of the first"


@pytest.mark.parametrize("name", ["../../outside", "/tmp/x", "..", "a/b", ""])
def test_an_evaluation_stays_in_its_folder(name):
    run(*TINY_SINE)
    with pytest.raises(ConfigError, match="name="):
        evaluate.main(["run=run", f"name={name}"])


def test_an_unwritable_folder_is_found_before_the_test():
    run(*TINY_SINE)
    Path("run/evaluations").write_text("in the way")
    with pytest.raises(ConfigError, match=r"run=.*cannot be written"):
        evaluate.main(["run=run", "data=glyphs"])  # Would be refused, too, but only once there is data.


def test_the_config_of_an_evaluation_can_be_shown(capsys):
    run(*TINY_SINE)
    capsys.readouterr()
    evaluate.main(["run=run", "data.eval_shots=3", "--cfg"])
    shown = OmegaConf.create(capsys.readouterr().out)
    assert (shown.data.eval_shots, shown.data.test_episodes) == (3, 5)
    assert not Path("run/evaluations").exists()
