"""The kernel's numbers against the full Jacobian, for every kind of network, and over a training run."""

import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from plain_trainer import plain_trainer
from reference import dense_jacobian
from test_train import TINY, TINY_SINE, rows, run

from callbacks.ntk import NTK, mean_spectrum
from callbacks.ntk_kernels import evenly
from datamodules.sinusoid import Sinusoid
from lightning_ntk import evaluate, train
from lightning_ntk.episode import Episode, TaskSpec
from lightning_ntk.errors import ConfigError, DivergenceError
from lightning_ntk.methods.maml import MAML
from lightning_ntk.methods.meta_rkhs_ii import MetaRKHSII
from lightning_ntk.methods.protonet import ProtoNet
from lightning_ntk.networks.conv4 import Conv4
from lightning_ntk.networks.mlp import MLP
from lightning_ntk.ntk import functional
from lightning_ntk.running.results import read_results
from lightning_ntk.settings.config import conf_folder

TINY_GLYPHS = [*TINY, "data=glyphs", "data.queries=2", "network.filters=8", "data.ways=3"]
SPEC = TaskSpec("classification", (1, 20, 20), 3)


def probed(norm, *, method=MAML, stage="test", settings=None, change=None, **options):
    """A probe of one episode, and the matrix H by the full Jacobian in float64."""
    torch.manual_seed(0)
    learner = method(Conv4((1, 20, 20), 3, filters=8, norm=norm), SPEC, **(settings or {}))
    callback = NTK(**options)
    callback.setup(SimpleNamespace(datamodule=object()), learner, "fit")
    if change is not None:
        with torch.no_grad():
            change(learner)
    x, y = torch.rand(6, 1, 20, 20), torch.arange(3).repeat_interleave(2)
    measured = callback.probe(learner, Episode(x, y, x, y, torch.tensor(0)), stage)
    network, params = functional(learner.network.double())
    jacobian = dense_jacobian(network, params, x.double())
    return measured, (jacobian @ jacobian.T).detach().numpy()


@pytest.mark.parametrize("norm", ["batch", "group", "none"])
def test_the_numbers_are_those_of_the_full_jacobian(norm):
    measured, kernel = probed(norm, method=MetaRKHSII, settings={"ridge": 0.5})
    values = np.linalg.eigvalsh(kernel)
    assert measured["ntk/lambda_max"] == pytest.approx(values[-1], rel=1e-4)
    assert measured["ntk/lambda_min"] == pytest.approx(values[0], rel=1e-2)
    assert measured["ntk/trace"] == pytest.approx(np.trace(kernel), rel=1e-4)
    assert measured["ntk/condition_number"] == pytest.approx(np.linalg.cond(kernel), rel=1e-2)
    with_ridge = (values[-1] + 0.5) / (values[0] + 0.5)
    assert measured["ntk/condition_number_ridge"] == pytest.approx(with_ridge, rel=1e-3), "the method's own ridge"
    assert measured["ntk/largest_step"] == pytest.approx(2 / values[-1], rel=1e-4)
    shares = values / values.sum()
    assert measured["ntk/effective_rank"] == pytest.approx(np.exp(-(shares * np.log(shares)).sum()), rel=1e-3)
    assert measured["ntk/negative_eigenvalues"] == 0
    # Summed over outputs: H's blocks are of one example's outputs.
    pairs = kernel.reshape(6, 3, 6, 3).trace(axis1=1, axis2=3)
    one_hot = np.eye(3)[np.arange(3).repeat(2)] - 1 / 3
    ideal = one_hot @ one_hot.T
    aligned = (pairs * ideal).sum() / np.linalg.norm(pairs) / np.linalg.norm(ideal)
    assert measured["ntk/alignment"] == pytest.approx(aligned, rel=1e-3)
    assert measured["ntk/drift_from_start"] == pytest.approx(0, abs=1e-9)
    assert "ntk/drift" not in measured, "a test has no probe before it"


@pytest.mark.parametrize("norm", ["batch", "group", "none"])
def test_parameters_of_16_bits_and_frozen_ones_beside_them_are_taken_to_32(norm):
    measured, kernel = probed(norm, method=ProtoNet, change=lambda method: method.bfloat16())  # Its head is frozen.
    assert measured["ntk/trace"] == pytest.approx(np.trace(kernel), rel=1e-4)
    assert measured["ntk/lambda_max"] == pytest.approx(np.linalg.eigvalsh(kernel)[-1], rel=1e-4)


def test_the_trace_kernel_and_a_ridge_of_ones_own():
    measured, kernel = probed("group", kernel="trace", ridge=2.0)
    pairs = kernel.reshape(6, 3, 6, 3).trace(axis1=1, axis2=3) / 3  # The mean, as the method solves with.
    values = np.linalg.eigvalsh(pairs)
    assert measured["ntk/lambda_max"] == pytest.approx(values[-1], rel=1e-4)
    assert measured["ntk/condition_number_ridge"] == pytest.approx((values[-1] + 2) / (values[0] + 2), rel=1e-3)
    full, _ = probed("group")
    assert measured["ntk/alignment"] == pytest.approx(full["ntk/alignment"], rel=1e-5)
    assert measured["ntk/trace"] == pytest.approx(full["ntk/trace"] / 3, rel=1e-5)


def test_layers_add_up():
    measured, kernel = probed("none", by_layer=True)
    shares = [value for name, value in measured.items() if name.endswith("/share")]
    assert len(shares) == 5  # Four convolutions and the head.
    assert sum(shares) == pytest.approx(1)
    traces = [value for name, value in measured.items() if name.startswith("ntk/layer/") and name.endswith("/trace")]
    assert sum(traces) == pytest.approx(np.trace(kernel), rel=1e-4)
    assert 1 <= measured["ntk/layer/head/effective_rank"] <= 18


def test_a_scaled_head_moves_the_kernel():
    def change(learner):
        learner.network.head.weight.mul_(3)

    measured, kernel = probed("none", change=change)
    before = probed("none")[1]
    cosine = (kernel * before).sum() / np.linalg.norm(kernel) / np.linalg.norm(before)
    assert measured["ntk/drift_from_start"] == pytest.approx(1 - cosine, rel=1e-3)
    assert measured["ntk/drift_from_start"] > 0.001


def test_a_kernel_that_is_not_finite_is_reported_with_its_layers():
    def broken(learner):
        learner.network.features[2].weight[0] = math.nan

    with pytest.raises(DivergenceError, match=r"the parameters of features\.2 are not"):
        probed("none", change=broken)

    def huge(learner):  # Finite parameters, derivatives that overflow.
        for name, parameter in learner.network.named_parameters():
            parameter.mul_(1e20 if name.endswith("weight") else 1)

    with pytest.raises(DivergenceError, match=r"the derivatives by .*features\.0.* are not"):
        probed("none", change=huge)


def test_a_run_goes_on_past_a_kernel_that_is_not_finite():
    run(*TINY_SINE, "method=maml", "callbacks=[]")
    file = Path("run/checkpoints/best.ckpt")
    content = torch.load(file, weights_only=True)
    content["state_dict"]["network.head.bias"][0] = math.nan
    content["state_dict"]["network.features.1.weight"][0] = math.nan
    torch.save(content, file)
    words = ["run=run", "callbacks=ntk", "name=it", "callbacks.ntk.test_episodes=3"]
    with pytest.warns(UserWarning, match=r"ntk: 3 of 3 probe episodes.*the parameters of features\.1, head are not"):
        evaluate.main(words)
    result = read_results(Path("run/evaluations/it"))
    assert result.metrics["ntk/failed_episodes"] == 3
    assert "ntk/condition_number" not in result.metrics


@pytest.mark.parametrize("method", ["from_scratch", "maml", "anil", "meta_rkhs_i", "meta_rkhs_ii"])
def test_every_method_has_a_kernel(method):
    result = run(*TINY_SINE, f"method={method}", "callbacks=[timing,ntk]", "callbacks.ntk.test_episodes=3")
    probe = result.probes["ntk"]
    assert all(len(values) == 3 and np.isfinite(values).all() for values in probe["episodes"].values())
    logs = [math.log(value) for value in probe["episodes"]["ntk/condition_number"]]
    assert result.metrics["ntk/condition_number"] == pytest.approx(math.exp(sum(logs) / 3))
    assert result.metrics["ntk/trace"] == pytest.approx(sum(probe["episodes"]["ntk/trace"]) / 3)
    assert (result.metrics["ntk/drift_from_start"] > 1e-9) == (method != "from_scratch")
    assert len(probe["series"]["ntk/eigenvalues"]) == 10
    assert Path("run/figures/ntk/spectrum.png").stat().st_size > 5000
    assert "ntk/drift" not in result.metrics, "a number of training's must not stand among the test's"
    if method != "from_scratch":
        assert probe["series"]["steps"] == [0, 1, 2]
        assert len(probe["series"]["eigenvalues_over_training"]) == 3
        assert Path("run/figures/ntk/spectrum_over_training.png").stat().st_size > 5000
        drifts = [float(row["ntk/drift"]) for row in rows() if row["ntk/drift"]]
        starts = [float(row["ntk/drift_from_start"]) for row in rows() if row["ntk/drift"]]
        assert drifts[0] == starts[0], "the first probe is compared with initialisation"
        assert drifts[1] != starts[1]


@pytest.mark.filterwarnings("ignore::lightning_fabric.utilities.warnings.PossibleUserWarning")
def test_methods_that_share_a_callback_have_starts_of_their_own():
    data = Sinusoid(shots=3, queries=3, tasks_per_step=2, steps_per_epoch=2, val_episodes=2, test_episodes=2)
    data.prepare_data()
    data.setup()
    shared = NTK(test_episodes=2)

    def method(width):
        torch.manual_seed(0)
        return MAML(MLP((1,), 1, hidden=[width]), data.spec, lr=1e-2)

    def drift(callback, width, tested=None):
        learner, trainer = method(width), plain_trainer(callback)
        trainer.fit(learner, data)
        trainer.test(tested or learner, data, verbose=False)
        return callback.episodes["ntk/drift_from_start"], callback.steps, callback.spectra

    assert drift(shared, 4) == drift(NTK(test_episodes=2), 4)
    assert drift(shared, 8) == drift(NTK(test_episodes=2), 8)
    assert drift(shared, 8, tested=method(8))[0] == pytest.approx([0, 0]), "what was trained, loaded anew"
    alone = NTK(test_episodes=2)
    for width in (4, 8):
        plain_trainer(alone).test(method(width), data, verbose=False)
        assert alone.metrics["ntk/drift_from_start"] == pytest.approx(0)


def test_a_restart_goes_on_with_the_kernels_it_had():
    chosen = [*TINY_SINE, "callbacks=[timing,ntk]", "test=false"]
    train.main([*chosen, "steps=4", "run_dir=whole"])
    train.main([*chosen, "steps=2", "run_dir=parts"])
    train.main(["ckpt=parts", "steps=4"])
    columns = ("ntk/drift", "ntk/drift_from_start", "ntk/trace")
    whole, parts = ([[row[c] for c in columns] for row in rows(f"{n}/metrics.csv")] for n in ("whole", "parts"))
    assert whole == parts
    states = [
        torch.load(f"{n}/checkpoints/last.ckpt", weights_only=True)["callbacks"]["NTK"] for n in ("whole", "parts")
    ]
    assert states[0]["steps"] == states[1]["steps"] == [0, 1, 2, 3, 4]
    assert states[0]["spectra"] == states[1]["spectra"]


@pytest.mark.parametrize("changed", ["callbacks.ntk.kernel=trace", "callbacks.ntk.fit_examples=3"])
def test_a_restart_with_kernels_of_another_size_begins_anew(changed):
    glyphs = [*TINY_GLYPHS, "callbacks=[timing,ntk]", "callbacks.ntk.test_episodes=1"]
    train.main([*glyphs, "data.shots=2", "test=false", "run_dir=run"])
    train.main(["ckpt=run", "steps=4", "test=true", changed])
    probed = [row for row in rows() if row["ntk/drift"]]
    assert probed[2]["ntk/drift"] == probed[2]["ntk/drift_from_start"], "nothing before it is of this size"
    assert probed[3]["ntk/drift"] != probed[3]["ntk/drift_from_start"]
    series = read_results(Path("run")).probes["ntk"]["series"]
    assert series["steps"] == [0, 3, 4]
    assert {len(values) for values in series["eigenvalues_over_training"]} == {6 if "trace" in changed else 9}
    assert Path("run/figures/ntk/spectrum_over_training.png").stat().st_size > 5000


def test_a_spectrum_that_is_thinned_to_the_same_length_begins_anew_too():
    callback = NTK()
    for step, side in ((1, 60), (2, 60), (3, 70), (4, 70)):
        eigenvalues = [list(range(side))]
        callback.series = {
            "ntk/kernel": [[0.0] * side**2],
            "ntk/eigenvalues": eigenvalues,
            "ntk/eigenvalues_at_start": eigenvalues,
        }
        callback.step = step
        callback._remember()
    assert callback.steps == [0, 3, 4]


def test_double_precision_probes_a_network_that_normalises():
    words = [*TINY_GLYPHS, "data.normalize=true", "trainer.precision=64-true", "callbacks=[timing,ntk]"]
    result = run(*words, "callbacks.ntk.test_episodes=1")
    assert 0 < result.metrics["ntk/drift_from_start"] < 1


def test_an_evaluation_knows_the_drift_from_initialisation():
    trained = run(*TINY_SINE, "method=maml", "callbacks=ntk", "callbacks.ntk.test_episodes=2")
    evaluate.main(["run=run", "name=it"])
    again = read_results(Path("run/evaluations/it"))
    drifts = again.probes["ntk"]["episodes"]["ntk/drift_from_start"]
    assert drifts == trained.probes["ntk"]["episodes"]["ntk/drift_from_start"]
    assert min(drifts) > 1e-9


@pytest.mark.parametrize("method", ["maml", "meta_rkhs_ii"])
def test_training_with_all_callbacks_equals_training_with_none_bit_for_bit(method):
    words = [*TINY_GLYPHS, "steps=3", f"method={method}", "test=false"]
    every = sorted(path.stem for path in (conf_folder() / "callbacks").glob("*.yaml"))
    assert {"ntk", "ood", "timing"} <= set(every)
    train.main([*words, "callbacks=[]", "run_dir=none"])
    train.main([*words, f"callbacks=[{','.join(every)}]", "run_dir=all"])
    none, all_on = (torch.load(f"{n}/checkpoints/last.ckpt", weights_only=True) for n in ("none", "all"))
    assert all(torch.equal(none["state_dict"][k], all_on["state_dict"][k]) for k in none["state_dict"])
    moments = [content["optimizer_states"][0]["state"] for content in (none, all_on)]
    assert all(torch.equal(moments[0][p][k], moments[1][p][k]) for p in moments[0] for k in moments[0][p])


def test_examples_are_spread_over_the_classes():
    y = torch.arange(5).repeat_interleave(5)
    assert evenly(y, 10).tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    assert evenly(y, 5).tolist() == [0, 1, 2, 3, 4]
    assert evenly(y, 100) is y
    assert evenly(y, None) is y


def test_a_long_spectrum_is_thinned_and_keeps_its_ends():
    spectra = [list(np.linspace(0, 1, 200)), [], list(np.linspace(0, 3, 200))]
    kept = mean_spectrum(spectra)
    assert len(kept) == 50
    assert (kept[0], kept[-1]) == (0, 2)
    assert mean_spectrum([[1.0, 2.0]]) == [1.0, 2.0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kernel": "mean"}, r"callbacks\.ntk\.kernel must be 'full' or 'trace', but got 'mean'"),
        ({"ridge": -1.0}, r"callbacks\.ntk\.ridge must be zero or positive"),
        ({"fit_examples": 0}, r"callbacks\.ntk\.fit_examples must be at least 1, or null"),
        ({"test_episodes": -1}, r"callbacks\.ntk\.test_episodes"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ConfigError, match=message):
        NTK(**settings)
