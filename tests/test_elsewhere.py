"""What is computed on a GPU keeps to it: no tensor is made, or left, on the CPU on the way."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from elsewhere import elsewhere
from test_contract import METHODS

from datamodules.from_arrays import FromArrays
from lightning_ntk.attacks.suite import Suite
from lightning_ntk.episode import Episode, TaskSpec
from lightning_ntk.methods.meta_rkhs_i import MetaRKHSI
from lightning_ntk.methods.meta_rkhs_ii import MetaRKHSII
from lightning_ntk.networks.conv4 import Conv4
from lightning_ntk.networks.mlp import MLP
from lightning_ntk.networks.resnet12 import ResNet12
from lightning_ntk.ntk import empirical_ntk, functional, gradient_flow

pytestmark = pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
WAYS, SHAPE = 3, (1, 32, 32)
# Choosing a rank reads a number.
KERNEL_METHODS = {
    "meta_rkhs_i": MetaRKHSI,
    "meta_rkhs_i_one_step": lambda *a: MetaRKHSI(*a, euler_steps=1),
    "meta_rkhs_i_cap": lambda *a: MetaRKHSI(*a, step_cap=0.4),
    "meta_rkhs_i_descent": lambda *a: MetaRKHSI(*a, adaptation="gradient_descent"),
    "meta_rkhs_ii": lambda *a: MetaRKHSII(*a, rank_tolerance=0.0),
    "meta_rkhs_ii_inf": lambda *a: MetaRKHSII(*a, rank_tolerance=0.0, t=float("inf"), ridge=1e-4),
    "meta_rkhs_ii_pade": lambda *a: MetaRKHSII(*a, rank_tolerance=0.0, approximation="pade22"),
    "meta_rkhs_ii_trace": lambda *a: MetaRKHSII(*a, rank_tolerance=0.0, kernel="trace"),
}
OTHERS = {name: make for name, make in METHODS.items() if not name.startswith("meta_rkhs")}


def check_keeps_to(device, method, x, y):
    """Loss, gradients and predictions of a method lie on the device of its data."""
    episodes = Episode(support_x=x, support_y=y, query_x=x + 0.1, query_y=y, index=torch.arange(2, device=device))
    if method.meta_trains:
        loss = method.meta_loss(episodes)
        loss.backward()
        gradients = [p.grad for p in method.parameters() if p.grad is not None]
        assert gradients
        assert {tensor.device for tensor in [loss, *gradients]} == {device}
    assert method.adapt(x[0], y[0])(x[1]).device == device


@pytest.mark.parametrize(
    ("name", "norm"),
    [
        (name, norm)
        for name in [*KERNEL_METHODS, *OTHERS]
        for norm in ("none", "group", "batch")
        # Meta-RKHS-I chooses a rank where examples are coupled; the trace kernel has no such networks.
        if norm != "batch"
        or name not in ("meta_rkhs_i", "meta_rkhs_i_cap", "meta_rkhs_i_descent", "meta_rkhs_ii_trace")
        if norm == "none" or name in KERNEL_METHODS
    ],
)
def test_a_method_keeps_to_the_device(name, norm, monkeypatch):
    # Without the number of classes one_hot reads it from the labels.
    one_hot = F.one_hot
    monkeypatch.setattr(F, "one_hot", lambda labels, classes=WAYS: one_hot(labels, classes))
    # On a GPU it chooses no rank, so as not to wait for it.
    monkeypatch.setattr(MetaRKHSI, "device", torch.device("cuda"))
    with elsewhere() as device:
        with device:
            spec = TaskSpec("classification", SHAPE, WAYS)
            method = {**KERNEL_METHODS, **OTHERS}[name](Conv4(SHAPE, WAYS, filters=8, norm=norm), spec)
            x, y = torch.rand(2, 2 * WAYS, *SHAPE), torch.arange(WAYS).repeat(2, 2)
        check_keeps_to(device, method, x, y)


@pytest.mark.parametrize(
    "name", [*KERNEL_METHODS, *(name for name in OTHERS if name not in ("protonet", "nearest_centroid"))]
)
def test_a_method_keeps_to_the_device_in_regression(name, monkeypatch):
    monkeypatch.setattr(MetaRKHSI, "device", torch.device("cuda"))
    with elsewhere() as device:
        with device:
            method = {**KERNEL_METHODS, **OTHERS}[name](MLP((1,), 1), TaskSpec("regression", (1,), 1))
            x, y = torch.rand(2, 4, 1), torch.rand(2, 4, 1)
        check_keeps_to(device, method, x, y)


@pytest.mark.parametrize("kind", ["full", "trace", "mean_trace"])
@pytest.mark.parametrize("norm", ["group", "batch"])
def test_the_engine_keeps_to_the_device(kind, norm):
    with elsewhere() as device:
        with device:
            network, params = functional(ResNet12((3, 32, 32), WAYS, width=16, norm=norm))
            x = torch.rand(4, 3, 32, 32)
        coupled = norm == "batch"
        kernel = empirical_ntk(network, params, x, kind=kind, coupled=coupled, chunk_size=2 if not coupled else None)
        assert kernel.device == device
        if kind == "mean_trace":
            assert gradient_flow(kernel, torch.rand(4, device=device), t=1.0).device == device


@pytest.mark.parametrize("resident", ["host", "device"])
def test_episodes_are_finished_where_they_are(resident):
    rng = np.random.default_rng(0)
    splits = {s: {f"{s}{k}": rng.integers(0, 256, (6, 3, 8, 8), np.uint8) for k in range(4)} for s in ("train", "test")}
    data = FromArrays(
        splits=splits, ways=3, queries=2, resident=resident, augment="crop_flip", jitter=0.4, rotate_train_classes=True
    )
    data.setup()
    for split in ("train", "test"):
        batch = data.draw_batch(split, [(0, 0), (0, 1)])
        with elsewhere() as device:
            episodes = data.on_after_batch_transfer(batch.to(device), 0)
            assert {tensor.device for tensor in (episodes.support_x, episodes.query_x, episodes.support_y)} == {device}
            assert episodes.query_x.shape == (2, 6, 3, 8, 8)


def test_attacks_keep_to_the_device(monkeypatch):
    # The range of the images is read, and by SimBA which are still to be attacked.
    for module in ("white_box", "noise"):
        monkeypatch.setattr(f"lightning_ntk.attacks.{module}.check_images", lambda x, y: None)
    with elsewhere() as device:
        with device:
            network = Conv4(SHAPE, WAYS, filters=8, norm="group")
            x, y = torch.rand(WAYS, *SHAPE), torch.arange(WAYS)
        suite = Suite(linf_eps=[0.1], l2_eps=[1.0], steps=3)
        attacks = {name: attack for name, attack in suite.named().items() if not name.startswith("simba")}
        assert len(attacks) == 4
        for name, attack in attacks.items():
            assert attack(network, x, y, 0).outputs.device == device, name


def test_a_tensor_left_on_the_cpu_is_found(monkeypatch):
    monkeypatch.setattr(MetaRKHSII, "meta_loss", lambda self, tasks: (tasks.query_x.flatten() + torch.zeros(8)).sum())
    with elsewhere() as device:
        with device:
            method = MetaRKHSII(MLP((1,), 1), TaskSpec("regression", (1,), 1))
            x = torch.rand(2, 4, 1)
        with pytest.raises(RuntimeError, match="meta and cpu"):
            check_keeps_to(device, method, x, x)
