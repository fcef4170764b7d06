"""What the base promises of every probe: fixed episodes, the same on any number of ranks, and training untouched."""

import contextlib
import math
import os
import random
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from plain_trainer import plain_trainer
from probe_examples import Disturbing, write_conf
from test_train import TINY, TINY_SINE, rows, run

from callbacks import base
from callbacks.ntk import NTK
from callbacks.ood import OutOfDistribution
from callbacks.pictures import Pictures
from callbacks.probing import episode_seed, undisturbed
from datamodules.glyphs import Glyphs
from lightning_ntk import evaluate
from lightning_ntk.episode import Episode, TaskSpec
from lightning_ntk.errors import ConfigError
from lightning_ntk.methods.maml import MAML
from lightning_ntk.networks.conv4 import Conv4
from lightning_ntk.networks.mlp import MLP
from lightning_ntk.running.results import read_results
from lightning_ntk.settings.config import conf_folder


@pytest.fixture
def own(tmp_path):
    return write_conf(tmp_path / "own_conf")


def weights(folder):
    return torch.load(f"{folder}/checkpoints/last.ckpt", weights_only=True)


def test_training_with_a_probe_equals_training_without_bit_for_bit(own):
    # Adam's moments too; from_scratch's and MAML's ways through the network are covered by the real callbacks' tests.
    alone = run(*TINY_SINE, "method=maml", "callbacks=timing", folder="alone")
    probed = run(*own, *TINY_SINE, "method=maml", "callbacks=[timing,disturbing]", folder="probed")
    assert probed.episodes == alone.episodes
    first, second = weights("alone"), weights("probed")
    assert all(torch.equal(first["state_dict"][key], second["state_dict"][key]) for key in first["state_dict"])
    states = [content["optimizer_states"][0]["state"] for content in (first, second)]
    assert all(torch.equal(states[0][p][k], states[1][p][k]) for p in states[0] for k in states[0][p])


def test_what_was_measured_is_logged_and_written(own):
    result = run(*own, *TINY_SINE, "callbacks=[timing,disturbing]", "callbacks.disturbing.test_episodes=5")
    table = [row for row in rows() if row["disturbing/loss"]]
    assert [row["step"] for row in table] == ["0", "1", "2"], "two validations, and the test"
    assert 0 < float(table[0]["time/disturbing"]) < float(table[1]["time/disturbing"])
    probe = result.probes["disturbing"]
    assert len(probe["episodes"]["disturbing/loss"]) == 5
    assert result.metrics["disturbing/loss"] == math.fsum(probe["episodes"]["disturbing/loss"]) / 5
    assert result.metrics["disturbing/loss_ci95"] > 0
    assert [sum(draws) for draws in probe["series"]["disturbing/draws"]] == probe["episodes"]["disturbing/draw"]
    assert len(set(probe["episodes"]["disturbing/draw"])) == 5, "each episode has random numbers of its own"
    assert result.timings["disturbing_fit_s"] == pytest.approx(float(table[1]["time/disturbing"]), rel=1e-5)
    assert result.timings["disturbing_test_s"] > 0
    again = run(*own, *TINY_SINE, "seed=1", "callbacks=[timing,disturbing]", folder="again")
    assert again.probes["disturbing"]["episodes"]["disturbing/draw"] == probe["episodes"]["disturbing/draw"][:4]


def test_the_cadence_counts_validations_and_goes_on_after_a_restart(own):
    chosen = [*own, *TINY_SINE, "callbacks=[timing,disturbing]", "callbacks.disturbing.fit_every=2", "test=false"]
    from lightning_ntk import train

    train.main([*chosen, "steps=3", "run_dir=run"])
    train.main([*own, "ckpt=run", "steps=5"])
    assert [row["step"] for row in rows() if row["disturbing/loss"]] == ["1", "3"]
    for words in (["callbacks.disturbing.fit_every=0"], ["callbacks.disturbing.fit_episodes=0"]):
        result = run(*chosen, "test=true", *words, folder=words[0])
        assert not [row for row in rows(f"{words[0]}/metrics.csv") if row.get("disturbing/loss") and row["val/mse"]]
        assert result.probes["disturbing"]["episodes"]


def test_the_seconds_go_on_after_a_restart():
    before, after = Disturbing(), Disturbing()
    before.seconds["fit"] = 5.0
    after.load_state_dict(before.state_dict())
    assert after.seconds == {"fit": 5.0, "test": 0.0}


def test_an_evaluation_probes_alone_and_two_processes_give_what_one_gives(own):
    trained = run(*TINY, "data=glyphs", "data.queries=2", "data.ways=3", "network.filters=8", "callbacks=[]")
    assert (trained.probes, trained.timings) == ({}, {})
    names = ["disturbing", "ntk", "ood"]
    chosen = ["run=run", f"callbacks=[{','.join(names)}]", *(f"callbacks.{name}.test_episodes=3" for name in names)]
    evaluate.main([*own, *chosen, "name=one"])
    command = [sys.executable, "-m", "lightning_ntk.evaluate", *own, *chosen, "trainer.devices=2", "name=two"]
    path = f"{conf_folder().parent}{os.pathsep}{Path(__file__).resolve().parents[1]}"
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    subprocess.run(command, check=True, env=environment, capture_output=True, timeout=280)
    one, two = (read_results(Path("run/evaluations") / name) for name in ("one", "two"))
    assert two.probes == one.probes
    assert one.probes.keys() == set(names)
    assert all(len(values) == 3 for probe in one.probes.values() for values in probe["episodes"].values())
    measured = [{k: v for k, v in r.metrics.items() if k.partition("/")[0] in names} for r in (one, two)]
    assert measured[0] == measured[1]
    assert len(measured[0]) > 50


def test_processes_share_out_the_episodes(monkeypatch):
    monkeypatch.setattr(base, "on_device", lambda trainer, episode: episode)
    x = torch.ones(2, 1)
    method = MAML(MLP((1,), 1), TaskSpec("regression", (1,), 1))
    shares = []
    for rank in range(2):
        data = SimpleNamespace(eval_seed=0, draw=lambda split, epoch, index: Episode(x, x, x, x, torch.tensor(index)))
        trainer = SimpleNamespace(global_rank=rank, world_size=2, datamodule=data)
        trainer.precision_plugin = SimpleNamespace(forward_context=contextlib.nullcontext)
        shares.append(Disturbing(test_episodes=5)._probe_own_share(trainer, method, "test")[0])
    assert [list(share) for share in shares] == [[0, 2, 4], [1, 3]]


def test_numbers_that_are_not_finite_are_reported_and_the_run_goes_on(own):
    with pytest.warns(UserWarning, match=r"failing: 1 of \d probe episodes.*Episode 1: _?LinAlgError"):
        result = run(*own, *TINY_SINE, "callbacks=[timing,failing]")
    values = result.probes["failing"]["episodes"]["failing/one"]
    assert values[0] == values[2] == values[3] == 1
    assert math.isnan(values[1])
    assert result.metrics["failing/failed_episodes"] == 1
    assert math.isnan(result.metrics["failing/one"])


def test_another_mistake_is_not_swallowed(own):
    with pytest.raises(KeyError, match="a mistake"):
        run(*own, *TINY_SINE, "callbacks=wrong")


def test_a_method_and_the_random_generators_are_as_they_were():
    method = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2), torch.nn.Dropout())
    method.device = torch.device("cpu")
    method[1].eval()
    gradient = torch.ones(2, 2)
    method[0].weight.grad = gradient
    buffers = {name: buffer.clone() for name, buffer in method.named_buffers()}
    torch.manual_seed(5), np.random.seed(5), random.seed(5)
    expected = (float(torch.rand(())), float(np.random.rand()), random.random())
    torch.manual_seed(5), np.random.seed(5), random.seed(5)
    with torch.no_grad(), undisturbed(method):
        assert not method.training
        method.train()(torch.randn(4, 2)).sum().backward()
        np.random.rand(), random.random()
    assert (float(torch.rand(())), float(np.random.rand()), random.random()) == expected
    assert [module.training for module in method.modules()] == [True, True, False, True]
    assert method[0].weight.grad is gradient
    assert torch.equal(gradient, torch.ones(2, 2))
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in method.named_buffers())
    assert torch.is_grad_enabled()


def test_episodes_have_seeds_of_their_own():
    seeds = {episode_seed(e, split, i) for e in (0, 1) for split in ("val", "test") for i in range(50)}
    assert len(seeds) == 200
    assert all(0 <= seed < 2**32 for seed in seeds)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"fit_every": -1}, r"callbacks\.disturbing\.fit_every must be a whole number of at least 0, but got -1"),
        ({"test_episodes": True}, r"callbacks\.disturbing\.test_episodes"),
        ({"fit_episodes": 1.5}, r"callbacks\.disturbing\.fit_episodes"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ConfigError, match=message):
        Disturbing(**settings)


def test_images_reach_the_probe_as_the_network_sees_them(own):
    result = run(*own, *TINY, "data=glyphs", "data.queries=2", "network.filters=8", "callbacks=disturbing")
    assert result.probes["disturbing"]["episodes"]["disturbing/shots"] == [5.0] * 4


DOCS = (conf_folder().parent / "docs" / "CALLBACKS.md").read_text()


def test_a_callback_is_added_as_the_docs_say(monkeypatch, tmp_path):
    for name, text in re.findall(r"```(?:python|yaml)\n# (\S+)\n(.*?)```", DOCS, re.DOTALL):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    own = ["--config-dir", "my_conf", "callbacks=[timing,margin]", "method=maml"]
    result = run(*own, *TINY, "data=glyphs", "data.queries=2", "network.filters=8")
    assert len(result.probes["margin"]["episodes"]["margin/mean"]) == 40
    assert math.isfinite(result.metrics["margin/mean_ci95"])
    with pytest.raises(ConfigError, match=r"callbacks\.margin is of classes, but data=sinusoid has none"):
        run(*own, *TINY_SINE, folder="refused")
    assert not Path("refused").exists()


def test_the_docs_define_every_number_of_the_kernel(own):
    result = run(*TINY_SINE, "callbacks=[timing,ntk]", "callbacks.ntk.test_episodes=1")
    logged = set(rows()[-1]) | result.metrics.keys()
    assert {name for name in logged if name.startswith("ntk/") and f"`{name}`" not in DOCS} == set()
    assert all(f"`{name}`" in DOCS for name in logged if name.startswith(("time/meta", "memory/")))


@pytest.mark.parametrize("measured", [3, {"mine/x": None}, {"mine/x": torch.ones(3)}, {"mine/x": "0.5"}])
def test_what_a_probe_returns_is_checked(measured):
    class Mine(base.ProbeCallback):
        name = "mine"

    with pytest.raises(ConfigError, match=r"Mine\.probe must return (numbers by name|a number or a list for mine/x)"):
        Mine()._checked(measured)
    assert Mine()._checked({"mine/x": torch.tensor(1.0), "mine/y": [1.0], "mine/z": np.float32(2)})


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ({"mine/x": 1.0}, "mine/y is missing in episode 2, unlike episode 0"),
        ({"mine/x": 1.0, "mine/y": [1.0], "mine/z": 1.0}, "mine/z is new in episode 2"),
        ({"mine/x": [1.0], "mine/y": [1.0]}, "mine/x is of another type in episode 2"),
    ],
)
def test_a_probe_returns_the_same_names_for_every_episode(second, message):
    class Mine(base.ProbeCallback):
        name = "mine"

    first = {"mine/x": 1.0, "mine/y": [1.0]}
    with pytest.raises(ConfigError, match=rf"Mine\.probe must return the same names.*{message}"):
        Mine()._order({2: second, 0: first}, [0, 1, 2])
    mine = Mine()
    mine._order({2: {"mine/y": [], "mine/x": math.inf}, 0: first}, [0, 1, 2])  # Episode 1 has failed.
    assert (mine.episodes["mine/x"][::2], mine.series) == ([1.0, math.inf], {"mine/y": [[1.0], [], []]})


def test_a_probe_without_a_name_is_told_so():
    class Nameless(base.ProbeCallback):
        pass

    with pytest.raises(ConfigError, match="Nameless needs a name for its metrics"):
        Nameless()


def test_a_probe_that_writes_to_a_parameter_is_stopped():
    method = MAML(MLP((1,), 1), TaskSpec("regression", (1,), 1))
    message = r"written to the parameter network\..*deepcopy"
    with pytest.raises(ConfigError, match=message), undisturbed(method), torch.no_grad():
        next(method.parameters()).add_(1.0)


def test_two_callbacks_of_one_name_are_refused(tmp_path):
    (tmp_path / "callbacks").mkdir()
    (tmp_path / "callbacks" / "mine.yaml").write_text("mine:\n  _target_: callbacks.ntk.NTK\n")
    with pytest.raises(ConfigError, match=r"callbacks: several have the name 'ntk'"):
        run(*TINY_SINE, "--config-dir", str(tmp_path), "callbacks=[ntk,mine]")


@pytest.mark.filterwarnings("ignore::lightning_fabric.utilities.warnings.PossibleUserWarning")
def test_a_second_test_under_a_trainer_of_ones_own_probes_its_own_data():
    first, second = (
        Glyphs(ways=3, shots=1, eval_shots=shots, queries=2, test_episodes=2, eval_seed=shots) for shots in (1, 2)
    )
    for data in (first, second):
        data.prepare_data()
        data.setup()
    method = MAML(Conv4(first.spec.input_shape, 3, filters=4, mean=None, std=None), first.spec)

    def probed(*tested):
        few = {"test_episodes": 2}
        probes = NTK(**few), OutOfDistribution(corruptions=["gaussian_noise"], **few), Pictures(eps=None, **few)
        for data in tested:
            plain_trainer(*probes).test(method, data, verbose=False)
        ntk, ood, pictures = probes
        return ntk.metrics, ood.metrics, pictures._drawn(0).query_x

    *expected, drawn = probed(second)
    *found, drawn_again = probed(first, second)
    assert found == expected
    assert torch.equal(drawn_again, drawn)
