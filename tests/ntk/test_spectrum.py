"""What is said of a spectrum, against cases solved by hand, scipy and scikit-learn."""

import math

import numpy as np
import pytest
import scipy.linalg
import scipy.stats
import torch
from sklearn.preprocessing import KernelCenterer

from lightning_ntk.errors import ConfigError
from lightning_ntk.ntk import empirical_ntk, functional
from lightning_ntk.ntk import spectrum as s


def random_kernel(n=6, seed=0, rank=None):
    factor = torch.randn(n, rank or n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return factor @ factor.T


def test_a_case_solved_by_hand():
    # [[2, 1], [1, 2]] has eigenvalues 1 and 3.
    values = s.spectrum(torch.tensor([[2.0, 1.0], [1.0, 2.0]]))
    assert values.tolist() == pytest.approx([1, 3])
    assert values.dtype == torch.float64
    assert s.condition_number(values) == pytest.approx(3)
    assert s.condition_number(values, ridge=1.0) == pytest.approx(2)
    assert s.largest_step(values) == pytest.approx(2 / 3)
    # Shares 1/4 and 3/4.
    assert s.effective_rank(values) == pytest.approx(math.exp(-0.25 * math.log(0.25) - 0.75 * math.log(0.75)))
    assert s.negative_eigenvalues(values) == 0


def test_against_scipy():
    kernel = random_kernel()
    values = s.spectrum(kernel)
    expected = scipy.linalg.eigvalsh(kernel.numpy())
    assert values.numpy() == pytest.approx(expected)
    assert s.condition_number(values) == pytest.approx(np.linalg.cond(kernel.numpy()))
    assert s.effective_rank(values) == pytest.approx(math.exp(scipy.stats.entropy(expected)))


def test_the_effective_rank_reaches_its_limits():
    assert s.effective_rank(torch.full((5,), 3.0)) == pytest.approx(5)
    assert s.effective_rank(torch.tensor([-1e-9, 0.0, 0.0, 4.0])) == pytest.approx(1)
    assert s.effective_rank(torch.zeros(3)) == 0


def test_a_singular_kernel_is_conditioned_as_badly_as_its_type_can_tell():
    values = s.spectrum(random_kernel(rank=2))
    assert s.condition_number(values) == pytest.approx(1 / torch.finfo(torch.float64).eps)
    assert s.condition_number(values, dtype=torch.float32) == pytest.approx(1 / torch.finfo(torch.float32).eps)
    ridge = 0.01
    largest = float(values[-1])
    assert s.condition_number(values, ridge=ridge) == pytest.approx((largest + ridge) / ridge, rel=1e-6)
    assert s.condition_number(torch.zeros(3)) == math.inf
    assert s.largest_step(torch.zeros(3)) == math.inf


def test_negative_eigenvalues_are_counted():
    values = s.spectrum(torch.diag(torch.tensor([3.0, -1.0, -2.0, 0.0])))
    assert values.tolist() == [-2, -1, 0, 3]
    assert s.negative_eigenvalues(values) == 2


def test_a_kernel_that_is_not_finite_is_refused():
    with pytest.raises(torch.linalg.LinAlgError, match="not finite"):
        s.spectrum(torch.tensor([[1.0, math.nan], [math.nan, 1.0]]))


def test_a_full_kernel_of_a_linear_model_is_known():
    # f(x) = W x: Theta(x, x') = (x . x') I, so each eigenvalue of X X^T comes C times.
    torch.manual_seed(0)
    module = torch.nn.Linear(3, 2, bias=False).double()
    x = torch.randn(4, 3, dtype=torch.float64)
    values = s.spectrum(empirical_ntk(*functional(module), x, coupled=False))
    expected = np.sort(np.repeat(scipy.linalg.eigvalsh((x @ x.T).numpy()), 2))
    assert values.numpy() == pytest.approx(expected, abs=1e-12)


def test_steps_below_the_largest_one_converge_and_above_it_diverge():
    kernel, y = random_kernel(4), torch.tensor([1.0, -1.0, 2.0, 0.5], dtype=torch.float64)
    largest = s.largest_step(s.spectrum(kernel))

    def error_after(step):
        f = torch.zeros(4, dtype=torch.float64)
        for _ in range(2000):
            f = f - step * kernel @ (f - y)
        return float((f - y).norm())

    assert error_after(0.999 * largest) < 2
    assert not error_after(1.001 * largest) < 5


def test_alignment_by_hand():
    targets = s.centred_targets(torch.tensor([0, 0, 1, 1]), 2)
    assert targets.tolist() == [[0.5, -0.5], [0.5, -0.5], [-0.5, 0.5], [-0.5, 0.5]]
    ideal = targets @ targets.T
    assert s.alignment(ideal, targets) == pytest.approx(1)
    assert s.alignment(7 * ideal, targets) == pytest.approx(1)
    assert s.alignment(-ideal, targets) == pytest.approx(-1)
    # <I, YY^T> = trace = 2, |I| = 2, |YY^T| = 2.
    assert s.alignment(torch.eye(4), targets) == pytest.approx(0.5)
    # A constant is orthogonal to these targets: it lowers the plain alignment, not the centred one.
    shifted = ideal + 1
    assert s.alignment(shifted, targets) == pytest.approx(1 / math.sqrt(5))
    assert s.alignment(shifted, targets, centre=True) == pytest.approx(1)
    assert s.alignment(torch.ones(4, 4), targets, centre=True) == 0


def test_the_centred_alignment_against_scikit_learn():
    kernel = random_kernel(5)
    targets = torch.randn(5, 2, dtype=torch.float64)
    a, b = (KernelCenterer().fit_transform(m.numpy()) for m in (kernel, targets @ targets.T))
    expected = (a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b)
    assert s.alignment(kernel, targets, centre=True) == pytest.approx(expected)
    assert s.centred_targets(targets.float(), 2).dtype == torch.float64


def test_drift_by_hand():
    one, two = torch.diag(torch.tensor([1.0, 0.0])), torch.diag(torch.tensor([0.0, 1.0]))
    assert s.drift(one, one) == 0
    assert s.drift(3 * one, one) == 0
    assert s.drift(two, one) == 1
    assert s.drift(one + two, one) == pytest.approx(1 - 1 / math.sqrt(2))


@pytest.mark.parametrize("scale", [1e-200, 1e-20, 1e20, 1e200])
def test_nothing_overflows_or_vanishes_with_the_scale(scale):
    kernel, targets = random_kernel(4), torch.randn(4, 2, dtype=torch.float64)
    values, scaled = s.spectrum(kernel), s.spectrum(scale * kernel)
    assert s.condition_number(scaled) == pytest.approx(s.condition_number(values))
    assert s.effective_rank(scaled) == pytest.approx(s.effective_rank(values))
    for centre in (False, True):
        expected = s.alignment(kernel, targets, centre=centre)
        assert s.alignment(scale * kernel, targets, centre=centre) == pytest.approx(expected)
    other = random_kernel(4, seed=1)
    assert s.drift(scale * kernel, other) == pytest.approx(s.drift(kernel, other))


def test_a_kernel_of_two_sets_is_no_matrix_of_one():
    network, params = functional(torch.nn.Linear(3, 2))
    kernel = empirical_ntk(network, params, torch.randn(4, 3), torch.randn(5, 3))
    with pytest.raises(ConfigError, match=r"one that makes \[8, 10\]"):
        s.as_matrix(kernel)
    with pytest.raises(ConfigError, match=r"one that makes \[4, 5\]"):
        s.as_matrix(kernel[..., 0, 0])
    square = empirical_ntk(network, params, torch.randn(4, 3), torch.randn(4, 3))
    with pytest.raises(ConfigError, match=r"is not symmetric.*two sets"):
        s.as_matrix(square)
