"""The empirical kernel: its kinds, layers and chunks against the full Jacobian, and its care with memory."""

import pytest
import torch
from reference import dense_jacobian
from torch import nn

from lightning_ntk.errors import ConfigError
from lightning_ntk.networks.conv4 import Conv4
from lightning_ntk.networks.mlp import MLP
from lightning_ntk.ntk import kernel as kernel_module
from lightning_ntk.ntk.jacobian import Jacobian
from lightning_ntk.ntk.kernel import empirical_ntk
from lightning_ntk.ntk.network import functional


def case(name):
    torch.manual_seed(0)
    if name == "mlp":
        return *functional(MLP((3,), 2, hidden=(5,)).double()), (3,), False
    norm = name.removeprefix("conv4-")
    return *functional(Conv4((1, 32, 32), 2, filters=8, norm=norm).double()), (1, 32, 32), norm == "batch"


CASES = ["mlp", "conv4-none", "conv4-group", "conv4-batch"]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("chunk_size", [None, 1, 2, 3])
def test_every_kind_is_the_product_of_the_jacobians_in_any_chunks(name, chunk_size):
    network, params, shape, coupled = case(name)
    x1, x2 = torch.randn(5, *shape, dtype=torch.float64), torch.randn(3, *shape, dtype=torch.float64)
    j1, j2 = dense_jacobian(network, params, x1), dense_jacobian(network, params, x2)
    for second, expected in ((x2, j1 @ j2.T), (None, j1 @ j1.T)):
        expected = expected.view(5, 2, -1, 2).transpose(1, 2)
        options = {"coupled": coupled, "chunk_size": chunk_size}
        full = empirical_ntk(network, params, x1, second, **options)
        assert torch.allclose(full, expected, atol=1e-12 * expected.abs().max().item())
        trace = expected.diagonal(dim1=2, dim2=3).sum(-1)
        scale = 1e-12 * trace.abs().max().item()
        assert torch.allclose(empirical_ntk(network, params, x1, second, kind="trace", **options), trace, atol=scale)
        mean = empirical_ntk(network, params, x1, second, kind="mean_trace", **options)
        assert torch.allclose(mean, trace / 2, atol=scale)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("kind", ["full", "trace"])
def test_the_layers_are_those_with_parameters_and_sum_to_the_kernel(name, kind):
    network, params, shape, coupled = case(name)
    x = torch.randn(3, *shape, dtype=torch.float64)
    layers = empirical_ntk(network, params, x, kind=kind, coupled=coupled, by_layer=True)
    assert set(layers) == {key.rpartition(".")[0] for key in params}
    whole = empirical_ntk(network, params, x, kind=kind, coupled=coupled)
    assert torch.allclose(sum(layers.values()), whole, atol=1e-12 * whole.abs().max().item())


def test_the_kernel_of_a_linear_layer_is_known():
    module = nn.Linear(4, 3).double()
    network, params = functional(module)
    x1, x2 = torch.randn(2, 4, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64)
    expected = (x1 @ x2.T + 1)[..., None, None] * torch.eye(3, dtype=torch.float64)
    assert torch.allclose(empirical_ntk(network, params, x1, x2, coupled=False), expected)


def test_rows_that_do_not_fit_are_taken_in_chunks_or_refused_with_what_would(monkeypatch):
    network, params, shape, _ = case("mlp")
    x = torch.randn(6, *shape, dtype=torch.float64)
    whole = empirical_ntk(network, params, x, coupled=False)
    of_one = 2 * 8 * sum(p.numel() for p in params.values())
    monkeypatch.setattr(kernel_module, "available_bytes", lambda device: 2 * 5 * of_one)
    j = Jacobian(network, params, x, coupled=False)
    assert kernel_module.fitting_chunk(j, j, None) == 2
    assert torch.allclose(empirical_ntk(network, params, x, coupled=False), whole)
    with pytest.raises(ConfigError, match="chunk_size=2 would fit"):
        empirical_ntk(network, params, x, coupled=False, chunk_size=6)
    monkeypatch.setattr(kernel_module, "available_bytes", lambda device: of_one)
    with pytest.raises(ConfigError, match="Not even one"):
        empirical_ntk(network, params, x, coupled=False)


@pytest.mark.parametrize(
    ("option", "message"), [({"kind": "nonsense"}, "mean_trace"), ({"chunk_size": 0}, "chunk_size")]
)
def test_bad_arguments_are_named(option, message):
    network, params, shape, _ = case("mlp")
    with pytest.raises(ConfigError, match=message):
        empirical_ntk(network, params, torch.randn(2, *shape, dtype=torch.float64), **option)


def test_many_kernels_at_once_by_vmap():
    network, params, shape, _ = case("conv4-none")
    sets = torch.randn(3, 4, *shape, dtype=torch.float64)
    at_once = torch.func.vmap(lambda x: empirical_ntk(network, params, x, coupled=False))(sets)
    for kernel, x in zip(at_once, sets, strict=True):
        assert torch.allclose(kernel, empirical_ntk(network, params, x, coupled=False))


def test_inputs_may_be_whole_numbers():
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Embedding(5, 4), torch.nn.Flatten(), torch.nn.Linear(12, 2)).double()
    network, params = functional(module)
    tokens = torch.randint(0, 5, (3, 3))
    kernel = empirical_ntk(network, params, tokens, coupled=False)
    rows = dense_jacobian(network, params, tokens)
    assert kernel.dtype == torch.float64
    assert torch.allclose(kernel.transpose(1, 2).flatten(2).flatten(0, 1), rows @ rows.T)


@pytest.mark.parametrize("empty", ["x1", "x2"])
def test_no_examples_are_an_error(empty):
    network, params = functional(MLP((3,), 2))
    x = torch.randn(4, 3)
    sets = {"x1": x, "x2": x} | {empty: x[:0]}
    with pytest.raises(ConfigError, match=rf"`{empty}` to hold an example or more, but its shape is \[0, 3\]"):
        empirical_ntk(network, params, **sets)


def test_chunks_of_a_set_with_itself_are_two_in_memory(monkeypatch):
    network, params = functional(MLP((3,), 2))
    x = torch.randn(8, 3)
    of_one = 2 * sum(4 * p.numel() for p in params.values())
    monkeypatch.setattr("lightning_ntk.ntk.kernel.available_bytes", lambda device: 2 * 8 * of_one)
    whole = empirical_ntk(network, params, x)
    monkeypatch.setattr("lightning_ntk.ntk.kernel.available_bytes", lambda device: 2 * 4 * of_one)
    with pytest.raises(ConfigError, match="chunk_size=2 would fit"):
        empirical_ntk(network, params, x, chunk_size=4)
    assert torch.allclose(empirical_ntk(network, params, x), whole, rtol=1e-4, atol=1e-5)


class Shifted(nn.Module):
    """A layer, and two parameters outside of any."""

    def __init__(self):
        super().__init__()
        self.layer, self.scale, self.shift = nn.Linear(3, 2), nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))

    def forward(self, x):
        return self.scale * self.layer(x) + self.shift


def test_parameters_outside_of_layers_stand_under_their_own_names():
    network, params = functional(Shifted())
    layers = empirical_ntk(network, params, torch.randn(4, 3), coupled=False, by_layer=True)
    assert set(layers) == {"layer", "scale", "shift"}
    assert torch.equal(layers["shift"], torch.eye(2).expand(4, 4, 2, 2))


@pytest.mark.parametrize("coupled", [True, False])
def test_a_parameter_may_be_a_single_number(coupled):
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(2.0))

        def forward(self, x):
            return self.scale * x

    x = torch.randn(4, 3)
    kernel = empirical_ntk(*functional(Scaled()), x, coupled=coupled)
    assert torch.allclose(kernel, x[:, None, :, None] * x[None, :, None, :])
