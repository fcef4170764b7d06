"""Training from scratch, and descents side by side, against loops written out."""

import copy
import functools

import pytest
import torch
from test_contract import in_double, make, tasks

from lightning_ntk.episode import TaskSpec
from lightning_ntk.methods.descent import descend
from lightning_ntk.methods.from_scratch import FromScratch
from lightning_ntk.networks.mlp import MLP


@pytest.mark.parametrize("side_by_side", [True, False])
@pytest.mark.parametrize("kind", ["classification", "regression"])
def test_it_is_a_plain_loop_of_adam_on_each_task(kind, side_by_side, monkeypatch):
    if not side_by_side:
        monkeypatch.setattr("lightning_ntk.methods.descent.SHARED_PART", 0.0)
    method, episodes = make("from_scratch", kind).double(), in_double(tasks(kind, count=3))
    assert len(list(method.chunks(episodes.support_x, episodes.support_y))) == (1 if side_by_side else 3)
    outputs = method.predict(episodes)
    for row, task in zip(outputs, episodes, strict=True):
        network = copy.deepcopy(method.network)
        optimizer = torch.optim.Adam(network.parameters(), lr=method.adapt_lr)
        for _ in range(method.adapt_steps):
            optimizer.zero_grad()
            method.loss(network(task.support_x), task.support_y).backward()
            optimizer.step()
        assert torch.allclose(row, network(task.query_x), rtol=1e-7, atol=1e-9)


def test_a_descent_by_hand():
    # (p - x)^2 / 2 has slope p - x: with step 1/2, each step halves the distance to x.
    start = {"p": torch.tensor([1.0])}
    x = torch.tensor([[5.0], [-3.0]])

    def objective(params, x, y):
        return ((params["p"] - x) ** 2 / 2).sum()

    half = functools.partial(torch.optim.SGD, lr=0.5)
    found, values = descend(objective, start, 2, [(x, x)] * 2, half)
    assert found["p"].tolist() == [[4.0], [-2.0]]
    assert values.tolist() == [[8.0, 8.0], [2.0, 2.0]]
    assert start["p"].tolist() == [1.0]
    still, nothing = descend(objective, start, 2, [], half)
    assert still["p"].tolist() == [[1.0], [1.0]]
    assert nothing.shape == (0, 2)


def test_without_steps_it_is_the_network_itself():
    episodes = tasks("regression")
    method = FromScratch(MLP((1,), 1), TaskSpec("regression", (1,), 1), adapt_steps=0)
    assert torch.equal(method.predict(episodes)[1], method.network(episodes.query_x[1]))
