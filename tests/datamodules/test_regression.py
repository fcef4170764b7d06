"""A family of regression tasks is one method; random Fourier series are one."""

import numpy as np
import pytest
import torch

from datamodules.base import rounded
from datamodules.fourier import Fourier
from datamodules.regression import RegressionDataModule
from lightning_ntk.errors import ConfigError, DataError


class Planes(RegressionDataModule):
    """y = (a . x, b . x) in three dimensions."""

    inputs, outputs = 3, 2
    low, high = 0.0, 1.0

    def sample_task(self, rng):
        slopes = rng.standard_normal((3, 2))
        return lambda x: x @ slopes


def test_a_family_in_one_method_gives_tasks_of_its_dimensions():
    data = Planes(shots=4, queries=6, eval_queries=9, tasks_per_step=2, steps_per_epoch=1)
    assert (data.spec.kind, data.spec.input_shape, data.spec.outputs) == ("regression", (3,), 2)
    task = data.draw("train", 0, 0)
    assert (task.support_x.shape, task.query_y.shape) == ((4, 3), (6, 2))
    x = torch.cat([task.support_x, task.query_x])
    assert 0 <= x.min() < x.max() <= 1
    y = torch.cat([task.support_y, task.query_y])
    slopes = torch.linalg.lstsq(x, y).solution
    assert torch.allclose(x @ slopes, y, atol=1e-5), "one function for support and query"
    assert not torch.allclose(torch.linalg.lstsq(*(data.draw("train", 0, 1).support_x, y[:4])).solution, slopes)
    (batch,) = data.train_dataloader()
    assert torch.equal(batch.support_y[0], task.support_y)


def test_a_function_of_the_wrong_dimension_is_named():
    class Wrong(Planes):
        def sample_task(self, rng):
            return lambda x: x[:, 0]

    with pytest.raises(DataError, match=r"A task of Wrong must map \(60, 3\) to \(60, 2\), but gave \(60,\)"):
        Wrong().draw("train", 0, 0)


@pytest.mark.parametrize("function", [lambda x: x[:, ::-1], lambda x: x.astype(np.longdouble), lambda x: x > 0])
def test_targets_may_lie_in_memory_as_they_like_and_be_of_any_real_type(function):
    class Any(RegressionDataModule):
        inputs, outputs = 2, 2

        def sample_task(self, rng):
            return function

    task = Any().draw("train", 0, 0)
    assert task.query_y.dtype == torch.float32
    expected = torch.from_numpy(function(task.query_x.double().numpy()).astype(np.float32, order="C"))
    assert torch.allclose(task.query_y, expected)


@pytest.mark.parametrize("function", [np.log, lambda x: np.sqrt(x.astype(complex)), lambda x: x / 0])
@pytest.mark.filterwarnings("ignore:(invalid value|divide by zero):RuntimeWarning")
def test_a_function_without_finite_values_is_named(function):
    class Wrong(RegressionDataModule):
        def sample_task(self, rng):
            return function

    with pytest.raises(DataError, match=r"A task of Wrong must give finite real numbers for x from -5\.0 to 5\.0"):
        Wrong().draw("train", 0, 0)
    assert len(Wrong().survey().findings) == 1


def test_fourier_tasks_are_series_of_unit_variance():
    data = Fourier(shots=40, queries=40, terms=3)
    values = []
    for index in range(300):
        task = data.draw("train", 0, index)
        x = torch.cat([task.support_x, task.query_x]).double()
        y = torch.cat([task.support_y, task.query_y]).double()
        angles = torch.pi * x * torch.arange(1, 4) / 5
        design = torch.cat([angles.cos(), angles.sin()], dim=1)
        fit = torch.linalg.lstsq(design, y).solution
        assert torch.allclose(design @ fit, y, atol=1e-5)
        values.append(fit.squeeze())
    variances = torch.stack(values).square().mean(0)
    weights = 1 / np.arange(1, 4) ** 2
    expected = torch.from_numpy(np.tile(weights / weights.sum(), 2))
    # 300 squares of normal numbers: a relative deviation of 8 %.
    assert torch.allclose(variances, expected, rtol=0.35)
    assert abs(float(torch.stack(values).mean())) < 0.05


@pytest.mark.parametrize(
    ("value", "kind"), [(np.arange(3), "ndarray"), (np.int64(3), "int64"), ({1, 2}, "set"), ({"a": [1j]}, "dict")]
)
def test_settings_that_are_no_plain_values_are_named_before_a_training(value, kind):
    class Named(Planes):
        def family(self):
            return {"slope": 1, "grid": value}

    message = f"Named must have plain values in its task_settings, but 'grid' is {kind} "
    for ask in (lambda data: data.check_shared(1), lambda data: data.train_dataloader()):
        with pytest.raises(DataError, match=message):
            ask(Named())
    (finding,) = Named().survey().findings
    assert finding.startswith(message)


def test_the_settings_of_a_family_are_part_of_the_episodes_identity():
    identities = {Fourier(**s).episode_ids() for s in ({}, {"terms": 6}, {"decay": 2.0}, {"shots": 5}, {"queries": 7})}
    assert len(identities) == 4, "all but the training queries"


class Slopes(RegressionDataModule):
    """y = slope a x + noise, with settings that nothing names."""

    def __init__(self, *, slope=1.0, noise=0.0, **rest):
        super().__init__(**rest)
        self.slope, self.noise = slope, noise

    def sample_task(self, rng):
        a = self.slope * rng.standard_normal()
        return lambda x: a * x * (1 + self.noise)


def test_settings_of_ones_own_make_other_episodes_and_rounding_does_not():
    state = torch.get_rng_state(), np.random.get_state()[1].copy()
    identity = Slopes().episode_ids()
    assert identity == Slopes(seed=1, queries=3).episode_ids()
    others = [Slopes(**s).episode_ids() for s in ({"slope": 1.01}, {"slope": 2.0}, {"eval_seed": 1}, {"shots": 9})]
    assert len({identity, *others}) == 5
    assert identity == Slopes(noise=1e-13).episode_ids()
    torch.set_default_dtype(torch.float64)
    try:
        assert identity == Slopes().episode_ids()
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(state[0], torch.get_rng_state())
    assert (state[1] == np.random.get_state()[1]).all()


def test_rounded_numbers_agree_beside_powers_of_two():
    values = np.array([1.0, 0.0, 3.0, -8.0, 1e-30, 1e30])
    for other in (values * (1 + 1e-7), values * (1 - 1e-7)):
        assert rounded(other).tobytes() == rounded(values).tobytes()
    assert rounded(np.array([-0.0])).tobytes() == rounded(np.array([0.0])).tobytes()
    assert (rounded(values[2:] * 1.01) != rounded(values[2:])).all()


@pytest.mark.parametrize(
    ("settings", "key"), [({"terms": 0}, "data.terms"), ({"decay": 0.0}, "data.decay"), ({"shots": 0}, "data.shots")]
)
def test_bad_settings_name_their_key(settings, key):
    with pytest.raises(ConfigError, match=key):
        Fourier(**settings)
