"""`method.compile`: the numbers that come without it, one compilation a shape, and an error that says what to do."""

import copy
import dataclasses

import pytest
import torch
from test_resume import check_equal, parameters
from test_train import TINY_SINE, run
from torch import nn
from torch._dynamo.utils import counters

from lightning_ntk import evaluate, train
from lightning_ntk.episode import Episode, TaskSpec
from lightning_ntk.errors import ConfigError
from lightning_ntk.methods.meta_rkhs_i import MetaRKHSI
from lightning_ntk.methods.meta_rkhs_ii import MetaRKHSII
from lightning_ntk.networks.base import EpisodeNetwork
from lightning_ntk.networks.conv4 import BLOCKS, Conv4
from lightning_ntk.networks.mlp import MLP
from lightning_ntk.networks.normalisation import normalisation_layers

SINE = [*TINY_SINE, "method=meta_rkhs_ii"]


@pytest.fixture
def compiler():
    """A process that has compiled nothing; what it compiles is counted."""
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def classify(norm, blocks=1):
    """A small convolutional network, or Conv4, and two tasks of it."""
    torch.manual_seed(0)
    spec = TaskSpec("classification", (1, 20, 20), 3)
    x, y = torch.randn(2, 9, 1, 20, 20), torch.arange(3)
    labels = [y.repeat(count).expand(2, -1) for count in (1, 2)]
    episodes = Episode(x[:, :3], labels[0], x[:, 3:], labels[1], torch.arange(2))
    if blocks == BLOCKS:
        return Conv4((1, 20, 20), 3, filters=8, norm=norm), spec, episodes
    layers = [nn.Conv2d(1, 8, 3, stride=2, padding=1), *normalisation_layers(norm, 8), nn.ReLU(), nn.Flatten()]
    network = EpisodeNetwork(nn.Sequential(*layers), 8 * 10 * 10, 3)
    network.couples_examples = norm == "batch"
    return network, spec, episodes


def regress(dtype):
    """A small MLP and two tasks of it."""
    torch.manual_seed(0)
    x, y = torch.randn(2, 9, 1, dtype=dtype), torch.randn(2, 9, 1, dtype=dtype)
    episodes = Episode(x[:, :4], y[:, :4], x[:, 4:], y[:, 4:], torch.arange(2))
    return MLP((1,), 1, hidden=(8,)).to(dtype), TaskSpec("regression", (1,), 1), episodes


CASES = {
    "II": (MetaRKHSII, lambda: classify("batch"), 1e-5),
    "I": (MetaRKHSI, lambda: classify("group"), 1e-5),
    "II-float64": (MetaRKHSII, lambda: regress(torch.float64), 1e-12),
    "II-conv4": (MetaRKHSII, lambda: classify("batch", BLOCKS), 1e-5),
}


@pytest.mark.parametrize("case", [pytest.param(c, marks=[pytest.mark.slow] * (c == "II-conv4")) for c in CASES])
def test_loss_and_gradient_are_those_without_compilation(case, compiler):
    make, tasks, tolerance = CASES[case]
    network, spec, episodes = tasks()

    def loss_and_gradient(**settings):
        network.zero_grad()
        method = make(network, spec, **settings)
        method.meta_loss(episodes).backward()
        loss = copy.deepcopy(method).meta_loss(episodes)
        return loss.item(), torch.cat([p.grad.flatten() for p in network.parameters()])

    expected, gradient = loss_and_gradient()
    assert counters["stats"]["unique_graphs"] == 0
    for tasks_per_chunk in (1, 2):
        loss, found = loss_and_gradient(compile=True, tasks_per_chunk=tasks_per_chunk)
        assert loss == pytest.approx(expected, rel=tolerance)
        assert (found - gradient).norm() < tolerance * gradient.norm()
    # Once, for all methods, copies and ways of working: the shape is one.
    assert counters["stats"]["unique_graphs"] == 1


def test_it_trains_resumes_and_evaluates_as_without(compiler):
    plain = run(*SINE, folder="plain")
    assert counters["stats"]["unique_graphs"] == 0
    whole = run(*SINE, "method.compile=true", folder="whole")
    assert counters["stats"]["unique_graphs"] == 1
    for name in ("train/loss", "test/mse"):
        assert whole.metrics[name] == pytest.approx(plain.metrics[name], rel=1e-5)
    assert parameters("whole").keys() == parameters("plain").keys()
    run(*SINE, "method.compile=true", "steps=1", folder="parted")
    train.main(["ckpt=parted", "steps=2"])
    check_equal("parted", "whole")
    evaluate.main(["run=whole", "method.compile=false"])


def test_without_a_compiler_it_says_what_to_do(compiler, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))  # Nothing compiled earlier will do.
    network, spec, episodes = regress(torch.float32)
    patch = torch._inductor.config.patch({"cpp.cxx": (None, "no-such-compiler")})
    message = r"method.compile=true needs a C\+\+ compiler .*InvalidCxxCompiler.*Set method.compile=false"
    with patch, pytest.raises(ConfigError, match=message):
        MetaRKHSII(network, spec, compile=True).meta_loss(episodes)


@torch._dynamo.config.patch(recompile_limit=1)
def test_too_many_shapes_are_an_error_with_a_remedy(compiler):
    network, spec, episodes = regress(torch.float32)
    method = MetaRKHSII(network, spec, compile=True)
    method.meta_loss(episodes)
    fewer = dataclasses.replace(episodes, query_x=episodes.query_x[:, 1:], query_y=episodes.query_y[:, 1:])
    with pytest.raises(ConfigError, match=r"eight shapes of query sets.*Set method.compile=false"):
        method.meta_loss(fewer)


def test_what_has_no_compiled_part_is_refused():
    network, spec, _ = classify("group")
    with pytest.raises(ConfigError, match=r"method.kernel=full"):
        MetaRKHSII(network, spec, kernel="trace", compile=True)
    for settings in ({"energy": "cross"}, {"energy": "literal"}, {"euler_steps": 1}):
        with pytest.raises(ConfigError, match=r"method.energy=euler"):
            MetaRKHSI(network, spec, compile=True, **settings)
