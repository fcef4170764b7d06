"""Out of distribution: scores against scikit-learn and a naive loop, targets, and what cannot be measured."""

import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from plain_trainer import plain_trainer
from sklearn.metrics import brier_score_loss
from test_evaluate import write_images
from test_train import TINY, TINY_SINE, rows, run
from torch.utils.data import Dataset

from callbacks.ood import OutOfDistribution
from callbacks.ood_scores import calibration_error, difference_of_sets, scores
from callbacks.ood_targets import as_shape, target_config
from datamodules.digits import Digits
from datamodules.glyphs import Glyphs
from datamodules.image_folder import ImageFolder
from lightning_ntk import evaluate, load_data, load_method
from lightning_ntk.episode import TaskSpec
from lightning_ntk.errors import ConfigError
from lightning_ntk.methods.maml import MAML
from lightning_ntk.methods.meta_rkhs_ii import MetaRKHSII
from lightning_ntk.networks.conv4 import Conv4
from lightning_ntk.networks.mlp import MLP
from lightning_ntk.running.results import mean_and_ci95, read_results
from lightning_ntk.running.run import Run

TINY_GLYPHS = [*TINY, "data=glyphs", "data.queries=2", "network.filters=8", "data.ways=3"]
FEW = ["callbacks.ood.test_episodes=4", "callbacks.ood.corruptions=[contrast,gaussian_noise]"]
SPEC = TaskSpec("classification", (2,), 3)


def test_a_run_reports_every_target_its_drop_and_its_calibration():
    result = run(*TINY_GLYPHS, "method=meta_rkhs_ii", "callbacks=[timing,ood]", *FEW)
    metrics, episodes = result.metrics, result.probes["ood"]["episodes"]
    clean = episodes["ood/source/accuracy"]
    assert clean == result.episodes["test/accuracy"][:4], "the source's scores are those of the test"
    for place in ("digits", "corrupted_contrast", "corrupted_gaussian_noise"):
        values = episodes[f"ood/{place}/accuracy"]
        assert (metrics[f"ood/{place}/accuracy"], metrics[f"ood/{place}/accuracy_ci95"]) == mean_and_ci95(values)
        assert metrics[f"ood/{place}/drop"] == pytest.approx(np.mean(clean) - np.mean(values))
        # Corruptions are of the same episodes, digits of others.
        paired = mean_and_ci95([a - b for a, b in zip(clean, values, strict=True)])[1]
        apart = math.hypot(mean_and_ci95(clean)[1], mean_and_ci95(values)[1])
        assert metrics[f"ood/{place}/drop_ci95"] == pytest.approx(apart if place == "digits" else paired)
        assert 0 <= metrics[f"ood/{place}/ece"] <= 1
        assert 0 <= metrics[f"ood/{place}/brier"] <= 2
    by_severity = [episodes[f"ood/corrupted_contrast/severity_{s}/accuracy"] for s in range(1, 6)]
    assert episodes["ood/corrupted_contrast/accuracy"] == pytest.approx(np.mean(by_severity, axis=0).tolist())
    curve = result.probes["ood"]["series"]["corrupted_contrast"]
    assert curve == pytest.approx([np.mean(clean), *(np.mean(values) for values in by_severity)])
    assert Path("run/figures/ood/corruptions.png").stat().st_size > 5000
    in_training = [row for row in rows() if row["ood/digits/accuracy"] and row["val/accuracy"]]
    assert len(in_training) == 2
    assert all(row["ood/corrupted_contrast/severity_3/accuracy"] for row in in_training)
    assert not any(row["ood/corrupted_contrast/severity_1/accuracy"] for row in in_training)


def test_a_method_without_a_head_takes_targets_of_more_ways():
    run(*TINY_GLYPHS, "method=protonet", "callbacks=[]")
    words = ["data.eval_ways=5", "callbacks=[ntk,ood]", "callbacks.ntk.test_episodes=2", *FEW]
    evaluate.main(["run=run", "name=it", *words])
    result = read_results(Path("run/evaluations/it"))
    assert len(result.probes["ood"]["episodes"]["ood/digits/accuracy"]) == 4
    assert np.isfinite(result.probes["ntk"]["episodes"]["ntk/alignment"]).all()


def test_the_noise_of_a_corruption_does_not_depend_on_the_others():
    run(*TINY_GLYPHS, "method=maml", "callbacks=[]")
    found = []
    for kinds in ("[gaussian_noise]", "[shot_noise,gaussian_noise]"):
        words = ["callbacks=ood", f"callbacks.ood.corruptions={kinds}", "callbacks.ood.targets=[]"]
        evaluate.main(["run=run", f"name=it{len(found)}", *words, "callbacks.ood.test_episodes=3"])
        found.append(read_results(Path(f"run/evaluations/it{len(found)}")).probes["ood"]["episodes"])
    shared = [name for name in found[0] if "gaussian_noise" in name]
    assert len(shared) == 7
    assert all(found[0][name] == found[1][name] for name in shared)
    assert "ood/corrupted_shot_noise/accuracy" in found[1]


@pytest.mark.parametrize(("channels", "targets"), [(1, {"digits"}), (3, {"digits"}), (13, set())])
def test_digits_are_the_default_where_they_can_be_shown(channels, targets, tmp_path):
    spec = TaskSpec("classification", (channels, 28, 28), 3)
    method = MAML(Conv4(spec.input_shape, 3, filters=8, mean=None, std=None), spec)
    settings = {"data": {"_target_": "my_data.Mine"}, "choices": {"data": "mine"}}
    shown = OutOfDistribution()
    data = SimpleNamespace(task_settings=lambda: {"ways": 3, "shots": 1, "queries": 2}, eval_seed=0)
    shown.prepare(Run(method, data, OmegaConf.create(settings), tmp_path))
    assert set(shown.data) == targets
    assert shown.kinds


def test_images_of_ones_own_are_a_target_and_become_what_the_network_takes(tmp_path):
    write_images(tmp_path / "images")  # Grey, 28x28, written as they are; read in colour and larger here.
    own = f"{{mine: {{data: image_folder, root: '{tmp_path / 'images'}', channels: 3, image_size: 40}}}}"
    words = ["callbacks=ood", f"callbacks.ood.targets={own}", "callbacks.ood.corruptions=[]"]
    result = run(*TINY_GLYPHS, "method=maml", *words, "callbacks.ood.test_episodes=3")
    assert len(result.probes["ood"]["episodes"]["ood/mine/accuracy"]) == 3
    assert "ood/digits/accuracy" not in result.metrics


@pytest.mark.parametrize(("images_of_val", "split"), [(1, "test"), (4, "val")])
def test_a_target_needs_its_test_split_alone(images_of_val, split, tmp_path, monkeypatch):
    write_images(tmp_path / "images")
    for number in (0, 1):  # Two classes to train on: too few for three ways.
        shutil.rmtree(tmp_path / "images" / "train" / str(number))
    for k in range(8, 11):
        (tmp_path / "images" / "val" / str(k)).mkdir(parents=True)
        for number in range(images_of_val):
            grey = np.full((28, 28), 20 * k + number, dtype=np.uint8)
            Image.fromarray(grey).save(tmp_path / "images" / "val" / str(k) / f"{number}.png")
    drawn = set()
    plain = ImageFolder.draw
    monkeypatch.setattr(ImageFolder, "draw", lambda self, *key: (drawn.add(key[0]), plain(self, *key))[1])
    words = ["callbacks=ood", f"callbacks.ood.targets={{mine: {{data: image_folder, root: '{tmp_path / 'images'}'}}}}"]
    result = run(*TINY_GLYPHS, "method=maml", *words, "callbacks.ood.corruptions=[]")
    assert result.probes["ood"]["episodes"]["ood/mine/accuracy"]
    assert drawn == {split, "test"}


def test_a_targets_own_shape_is_the_one_that_is_drawn(tmp_path, monkeypatch):
    drawn = []
    plain = MAML.adapt
    monkeypatch.setattr(MAML, "adapt", lambda self, x, y: (drawn.append(len(x)), plain(self, x, y))[1])
    target = "{digits: {ways: 2, shots: 2}}"
    words = ["callbacks=ood", f"callbacks.ood.targets={target}", "callbacks.ood.corruptions=[]"]
    run(*TINY_GLYPHS, "data.shots=3", "method=maml", *words, "callbacks.ood.test_episodes=2")
    assert set(drawn) == {9, 4}, "three ways of three shots, and two of two"


def test_what_the_runs_yaml_leaves_to_its_class_is_shared_too(tmp_path):
    config = OmegaConf.create({"data": {"_target_": "my_data.Mine", "queries": 7}})
    data = SimpleNamespace(task_settings=lambda: {"ways": 3, "shots": 2, "queries": 4})
    found = target_config("digits", {"shots": 6}, Run(linear(MAML), data, config, tmp_path))
    assert [found[key] for key in ("eval_ways", "eval_shots", "eval_queries")] == [3, 6, 4]


def test_a_target_that_leaves_its_shape_to_its_class_takes_the_runs(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "mine.yaml").write_text("_target_: datamodules.digits.Digits\nqueries: 10\n")
    config = OmegaConf.create({"data": {"queries": 7, "eval_seed": 5}})
    data = SimpleNamespace(task_settings=lambda: {"ways": 3, "shots": 2, "queries": 4})
    started = Run(linear(MAML), data, config, tmp_path, str(tmp_path))
    whole = {"_target_": "datamodules.digits.Digits", "shots": 6}
    for choice, own in (("mine", {"shots": 6}), ("digits", whole)):
        found = target_config(choice, own, started)
        assert [found[key] for key in ("ways", "shots", "queries", "eval_shots")] == [3, 6, 4, 6]
    with pytest.raises(ConfigError, match=r"no setting 'data\.shotz' of data=mine"):
        target_config("mine", {"shotz": 6}, started)


def test_a_severity_that_is_named_twice_counts_once():
    assert OutOfDistribution(severities=[5, 1, 5]).severities["test"] == (5, 1)
    with pytest.raises(ConfigError, match=r"whole number from 1 to 5, but got 3\.0"):
        OutOfDistribution(severities=[3.0])


class Signs(Dataset):
    targets = tuple(range(10)) * 9

    def __init__(self, *, size: int) -> None:
        self.size = size

    def __len__(self):
        return 90

    def __getitem__(self, number):
        return np.random.default_rng(number).integers(0, 256, (self.size, self.size), dtype=np.uint8), number % 10


def test_a_torch_dataset_and_a_whole_config_are_targets(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    signs = "{signs: {data: from_dataset, dataset: {_target_: test_ood.Signs, size: 12}, fractions: [0.5, 0, 0.5]}}"
    words = ["callbacks=ood", f"callbacks.ood.targets={signs}", "callbacks.ood.corruptions=[]"]
    result = run(*TINY_GLYPHS, "method=maml", *words, "callbacks.ood.test_episodes=2", folder="images")
    assert len(result.probes["ood"]["episodes"]["ood/signs/accuracy"]) == 2
    words = ["callbacks=ood", "callbacks.ood.targets={noisy: {_target_: datamodules.fourier.Fourier}}"]
    result = run(*TINY_SINE, *words, "callbacks.ood.test_episodes=2", folder="functions")
    assert len(result.probes["ood"]["episodes"]["ood/noisy/mse"]) == 2


def test_regression_has_errors_and_their_rise(tmp_path):
    (tmp_path / "conf" / "data").mkdir(parents=True)
    chosen = ["callbacks=ood", "callbacks.ood.targets={other: {data: sinusoid, eval_seed: 1}}"]
    result = run(*TINY_SINE, *chosen, "callbacks.ood.test_episodes=3")
    episodes = result.probes["ood"]["episodes"]
    assert episodes["ood/source/mse"] == result.episodes["test/mse"][:3]
    assert episodes["ood/other/mse"] != episodes["ood/source/mse"]
    difference = np.mean(episodes["ood/other/mse"]) - np.mean(episodes["ood/source/mse"])
    assert result.metrics["ood/other/rise"] == pytest.approx(difference)
    assert "ood/other/brier" not in result.metrics


@pytest.mark.parametrize(
    ("settings", "words", "message"),
    [
        (TINY_SINE, [], r"callbacks\.ood has nothing to measure"),
        (TINY_SINE, ["callbacks.ood.targets=[digits]"], r"targets\.digits: the run is regression, but .* classif"),
        (TINY_SINE, ["callbacks.ood.corruptions=[contrast]"], r"callbacks\.ood\.corruptions are of images"),
        (TINY_GLYPHS, ["callbacks.ood.targets=[digitz]"], r"targets\.digitz: data=digitz .* Did you mean 'digits'"),
        (TINY_GLYPHS, ["callbacks.ood.targets=digits"], r"callbacks\.ood\.targets must be a list"),
        (TINY_GLYPHS, ["callbacks.ood.targets=[3]"], r"callbacks\.ood\.targets must be a list"),
        (TINY_GLYPHS, ["callbacks.ood.targets={digits: 3}"], r"callbacks\.ood\.targets must be a list"),
        (TINY_GLYPHS, ["callbacks.ood.fit_severities=[]"], r"fit_severities must name at least one"),
        (TINY_GLYPHS, ["callbacks.ood.targets={digits: {wayz: 3}}"], r"targets\.digits: .*'data\.ways'"),
        (TINY_GLYPHS, ["callbacks.ood.targets={digits: {ways: 4}}"], r"digits: the network has 3 outputs.*4 ways"),
        (
            [*TINY_GLYPHS, "method=maml"],
            ["callbacks.ood.targets={digits: {eval_ways: 8}}"],
            r"digits: the network has 3 outputs.*8 ways. Set .*digits\.eval_ways.* at most 3",
        ),
        (TINY_GLYPHS, ["callbacks.ood.targets=[image_folder]"], r"targets\.image_folder: data\.root is missing"),
        (TINY_GLYPHS, ["callbacks.ood.targets=[sinusoid]"], r"is classification, but the target's tasks are regr"),
        (TINY_GLYPHS, ["callbacks.ood.targets={source: {data: digits}}"], r"targets\.source: this name is taken"),
        (TINY_GLYPHS, ["callbacks.ood.corruptions=[contrst]"], r"'contrst'\. Did you mean 'contrast'"),
        (TINY_GLYPHS, ["callbacks.ood.severities=[0]"], r"callbacks\.ood\.severities: .*from 1 to 5, but got 0"),
        (
            [*TINY_GLYPHS, "data.ways=12", "data.queries=2"],
            ["callbacks.ood.targets=[digits]"],
            r"targets\.digits: .*ways=12 classes .* the test split has 10.*targets={digits: {KEY: VALUE}}",
        ),
    ],
)
def test_what_cannot_be_measured_is_said_before_training(settings, words, message):
    with pytest.raises(ConfigError, match=message):
        run(*settings, "callbacks=ood", *words)
    assert not Path("run").exists()


@pytest.mark.filterwarnings("ignore::lightning_fabric.utilities.warnings.PossibleUserWarning")
def test_a_trainer_of_ones_own_gets_the_same_numbers():
    expected = run(*TINY_GLYPHS, "method=maml", "callbacks=ood", "callbacks.ood.test_episodes=4")
    method, data = load_method("run"), load_data("run")
    shown = OutOfDistribution(targets={"digits": Digits(ways=3, shots=1, queries=2)}, test_episodes=4)
    plain_trainer(shown).test(method, data, verbose=False)
    found = expected.probes["ood"]["episodes"]
    assert len([name for name in found if "/severity_" in name]) == 25, "five corruptions by default, five times"
    assert shown.episodes == found
    plain_trainer(shown).fit(method, data)
    assert shown.stage == "fit"
    assert 0 <= shown.metrics["ood/digits/accuracy"] <= 1


@pytest.fixture
def untrained():
    """A method, and its data."""
    data = Glyphs(ways=3, shots=1, queries=2, val_episodes=2, test_episodes=4, steps_per_epoch=2)
    data.prepare_data()
    data.setup()
    return MAML(Conv4(data.spec.input_shape, 3, filters=8, mean=None, std=None), data.spec), data


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"targets": ["digits"]}, r"targets\.digits: .*a Trainer of your own needs the data modules.*{'digits': DATA}"),
        ({"targets": {"digits": {"shots": 1}}}, r"targets\.digits: .*needs the data modules"),
        ({"corruptions": []}, "callbacks.ood has nothing to measure"),
        ({"targets": {"digits": Digits(ways=4, queries=2)}}, r"digits: the network has 3 outputs.*4 ways"),
        ({"targets": {"digits": Digits(ways=12)}}, r"targets\.digits: .*12.* classes"),
    ],
)
def test_a_trainer_of_ones_own_says_what_it_cannot_measure(settings, message, untrained):
    method, data = untrained
    with pytest.raises(ConfigError, match=message):
        plain_trainer(OutOfDistribution(**settings)).test(method, data)


def test_loaders_alone_are_not_enough_for_a_probe(untrained):
    method, data = untrained
    with pytest.raises(ConfigError, match=r"callbacks\.ood draws .* trainer\.fit\(method, datamodule=data\)"):
        plain_trainer(OutOfDistribution()).test(method, data.test_dataloader())


def linear(kind):
    torch.manual_seed(0)
    return kind(MLP((2,), 3, hidden=(4,)), SPEC)


def test_the_brier_score_is_scikit_learns_and_probabilities_are_the_methods():
    outputs, y = torch.randn(40, 3), torch.randint(0, 3, (40,))
    for method in (linear(MAML), linear(MetaRKHSII)):
        found = scores(method, lambda x: outputs, torch.zeros(40, 2), y, "it")
        probabilities = method.probabilities(outputs.double())
        assert torch.allclose(probabilities.sum(-1), torch.ones(40).double())
        assert probabilities.min() >= 0
        expected = np.mean(((probabilities - torch.nn.functional.one_hot(y, 3)) ** 2).sum(-1).numpy())
        assert found["it/brier"] == pytest.approx(expected, rel=1e-6)
        assert found["it/accuracy"] == pytest.approx(float((outputs.argmax(-1) == y).double().mean()))
        assert found["it/confidence"] == pytest.approx(probabilities.max(-1).values.tolist(), rel=1e-6)
    two = torch.tensor([[0.9, 0.1], [0.4, 0.6], [0.2, 0.8]])
    method = MAML(MLP((2,), 2), TaskSpec("classification", (2,), 2))
    labels = torch.tensor([0, 1, 0])
    found = scores(method, lambda x: two.log(), torch.zeros(3, 2), labels, "it")
    # Scikit-learn's is over one of the two classes.
    assert found["it/brier"] == pytest.approx(2 * brier_score_loss([0, 1, 0], [0.1, 0.6, 0.8]))


def test_outputs_of_least_squares_are_probabilities_already():
    method = linear(MetaRKHSII)
    shifted = torch.tensor([[0.7, 0.2, 0.1], [1.0, 0.0, 0.0]]) - 1 / 3
    assert torch.allclose(method.probabilities(shifted), shifted + 1 / 3, atol=1e-6)
    assert torch.allclose(method.probabilities(torch.tensor([[2.0, -1.0, -1.0]]) - 1 / 3), torch.eye(3)[:1], atol=1e-6)
    assert torch.allclose(method.probabilities(torch.full((1, 3), -9.0)), torch.full((1, 3), 1 / 3))


def test_the_calibration_error_by_a_naive_loop():
    rng = np.random.default_rng(0)
    confidence = rng.uniform(0.2, 1, 300)
    right = (rng.uniform(size=300) < confidence**2).astype(float)
    expected = 0.0
    for low in np.arange(15) / 15:
        inside = (confidence > low) & (confidence <= low + 1 / 15)
        if inside.any():
            expected += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    found = calibration_error([confidence[:100].tolist(), confidence[100:].tolist()], [right.tolist()])
    assert found == pytest.approx(expected, abs=1e-6)
    assert calibration_error([[1.0, 1.0]], [[1.0, 1.0]]) == pytest.approx(0, abs=1e-6)
    assert calibration_error([[0.75] * 4], [[1.0, 1.0, 1.0, 0.0]]) == pytest.approx(0, abs=1e-7)
    assert math.isnan(calibration_error([[math.nan]], [[0.0]]))
    assert math.isnan(calibration_error([[0.75], []], [[1.0], []])), "an episode is missing"


def test_full_confidence_is_in_the_last_of_fifteen_bins():
    # |9/10 - 0.975| of one bin, (14/15, 1].
    confidence, right = [1.0] * 5 + [0.95] * 5, [1.0] * 4 + [0.0] + [1.0] * 5
    assert calibration_error([confidence], [right]) == pytest.approx(0.075, abs=1e-6)
    # Sums of probabilities may exceed 1 by rounding.
    assert calibration_error([[1 + 1e-15, 0.6]], [[1.0, 1.0]]) == pytest.approx(0.2, abs=1e-6)


def test_outputs_that_are_not_finite_are_a_failed_episode(break_outputs):
    y = torch.tensor([0, 1])
    for bad in (math.nan, math.inf):
        with pytest.raises(FloatingPointError, match="no finite numbers"):
            scores(linear(MAML), lambda x, bad=bad: torch.full((2, 3), bad), torch.zeros(2, 2), y, "it")
    break_outputs(OutOfDistribution)
    words = ["callbacks=ood", "callbacks.ood.targets=[]", "callbacks.ood.corruptions=[contrast]"]
    words += ["callbacks.ood.fit_every=0", "callbacks.ood.test_episodes=3"]
    with pytest.warns(UserWarning, match=r"ood: 1 of 3 probe episodes could not be measured.*no finite numbers"):
        result = run(*TINY_GLYPHS, "method=maml", *words)
    assert result.metrics["ood/failed_episodes"] == 1
    for name in ("accuracy", "brier", "ece"):
        assert math.isnan(result.metrics[f"ood/source/{name}"])
    accuracies = result.probes["ood"]["episodes"]["ood/source/accuracy"]
    assert [math.isnan(value) for value in accuracies] == [False, True, False]


def test_the_interval_of_a_difference_of_independent_means():
    # Deviations sqrt(2) and 0 over 2 episodes each.
    assert difference_of_sets([1.0, 3.0], [1.0, 1.0]) == pytest.approx((1.0, 1.96 * math.sqrt(2 / 2)))
    # sqrt(2) and sqrt(8): variances of means add up.
    assert difference_of_sets([1.0, 3.0], [0.0, 4.0]) == pytest.approx((0.0, 1.96 * math.sqrt(2 / 2 + 8 / 2)))


def test_images_become_those_that_the_network_takes():
    grey = torch.rand(2, 1, 20, 20)
    colour = as_shape(grey, (3, 20, 20))
    assert all(torch.equal(colour[:, k], grey[:, 0]) for k in range(3))
    assert torch.allclose(as_shape(colour, (1, 20, 20)), grey, atol=1e-6)
    red = torch.zeros(1, 3, 4, 4)
    red[:, 0] = 1
    assert as_shape(red, (1, 4, 4)).unique().tolist() == pytest.approx([0.299])
    smaller = as_shape(grey, (1, 10, 10))
    assert smaller.shape == (2, 1, 10, 10)
    assert float(smaller.mean()) == pytest.approx(float(grey.mean()), abs=0.02)
    assert as_shape(grey, (1, 20, 20)) is grey
    for short in (torch.bfloat16, torch.float16):
        resized = as_shape(grey.to(short), (1, 10, 10))
        assert resized.dtype == short
        assert torch.allclose(resized.float(), smaller, atol=0.01)


def test_settings_are_checked_by_their_types():
    with pytest.raises(ConfigError, match=r"callbacks\.ood\.corruptions must be "):
        run(*TINY_GLYPHS, "callbacks=ood", "callbacks.ood.corruptions=contrast")
    with pytest.raises(ConfigError, match="from 1 to 5"):
        OutOfDistribution(severities=[7])
