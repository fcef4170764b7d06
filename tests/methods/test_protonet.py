"""ProtoNet and the nearest centroid: class means by hand, any number of ways, and no regression."""

import pytest
import torch
import torch.nn.functional as F
from test_contract import in_double, make, tasks
from torch import nn

from lightning_ntk.episode import TaskSpec
from lightning_ntk.errors import ConfigError
from lightning_ntk.methods.nearest_centroid import NearestCentroid
from lightning_ntk.methods.protonet import ProtoNet, class_means
from lightning_ntk.networks.mlp import MLP


def test_class_means_by_hand():
    features = torch.tensor([[1.0, 0.0], [5.0, 5.0], [3.0, 2.0]])
    assert class_means(features, torch.tensor([1, 0, 1])).tolist() == [[5.0, 5.0], [2.0, 1.0]]


@pytest.mark.parametrize("name", ["protonet", "nearest_centroid"])
def test_a_class_without_support_is_refused(name):
    method, task = make(name, "classification"), next(iter(tasks("classification")))
    kept = task.support_y != 1
    with pytest.raises(ConfigError, match="each class from 0 to 2, the largest label, but got none of class 1"):
        method.adapt(task.support_x[kept], task.support_y[kept])


def test_the_loss_and_its_gradient_are_those_of_a_loop_over_classes():
    method, episodes = make("protonet", "classification").double(), in_double(tasks("classification"))
    losses = []
    for task in episodes:
        support, query = method.network.embed(task.support_x), method.network.embed(task.query_x)
        logits = torch.stack([-((query - support[task.support_y == k].mean(0)).norm(dim=1) ** 2) for k in range(3)], 1)
        losses.append(F.cross_entropy(logits, task.query_y))
    expected, loss = sum(losses) / 2, method.meta_loss(episodes)
    trained = [p for p in method.parameters() if p.requires_grad]
    assert loss.item() == pytest.approx(expected.item(), rel=1e-9)
    for ours, theirs in zip(torch.autograd.grad(loss, trained), torch.autograd.grad(expected, trained), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-6, atol=1e-10)


def test_the_head_takes_no_part():
    method = make("protonet", "classification")
    method.meta_loss(tasks("classification")).backward()
    # Neither do optimisers and DDP wait for it.
    assert all(p.grad is None and not p.requires_grad for p in method.network.head.parameters())
    assert all(p.grad is not None for p in method.network.features.parameters())


def test_the_nearest_centroid_goes_by_the_distance_of_pixels():
    method, task = make("nearest_centroid", "classification"), next(iter(tasks("classification")))
    outputs = method.adapt(task.support_x, task.support_y)(task.query_x)
    for row, image in zip(outputs, task.query_x, strict=True):
        for k in range(3):
            centroid = sum(task.support_x[i] for i in range(6) if task.support_y[i] == k) / 2
            assert row[k].item() == pytest.approx(-((image - centroid) ** 2).mean().item(), rel=1e-4)
    assert not method.meta_trains


@pytest.mark.parametrize("name", ["protonet", "nearest_centroid"])
def test_more_and_fewer_ways_than_the_network_has_outputs(name):
    method = make(name, "classification")
    for ways in (2, 7):
        y = torch.arange(ways).repeat(2)
        x = (y / ways).view(-1, 1, 1, 1) + 0.01 * torch.rand(len(y), 1, 32, 32)
        outputs = method.adapt(x, y)(x)
        assert outputs.shape == (len(y), ways)
        assert outputs.argmax(1).tolist() == y.tolist()


@pytest.mark.parametrize("method", [ProtoNet, NearestCentroid])
def test_regression_is_refused_with_the_alternative(method):
    with pytest.raises(ConfigError, match=r"nearest class mean.*of regression.*method=meta_rkhs_ii"):
        method(MLP((1,), 1), TaskSpec("regression", (1,), 1))


def test_a_network_without_features_is_refused():
    with pytest.raises(ConfigError, match=r"method=protonet needs a network with embed.*Linear has no embed.*maml"):
        ProtoNet(nn.Linear(4, 2), TaskSpec("classification", (4,), 2))
