"""A module as a function of its parameters: what it is, and which modules are none."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from lightning_ntk.errors import ConfigError
from lightning_ntk.ntk.jacobian import Jacobian
from lightning_ntk.ntk.kernel import empirical_ntk
from lightning_ntk.ntk.network import functional
from lightning_ntk.ntk.params import unflatten


def test_a_module_without_trainable_parameters_is_refused():
    with pytest.raises(ConfigError, match=r"Linear has none, and 2 that are frozen\. Call requires_grad_"):
        functional(nn.Linear(3, 2).requires_grad_(False))


class Attention(nn.Module):
    """Self-attention on sequences `[n, 3, 4]`, and a head."""

    def __init__(self, dropout=0.0):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=dropout, batch_first=True)
        self.head = nn.Linear(12, 2)

    def forward(self, x):
        return self.head(self.layer(x).flatten(1))


class Multihead(nn.Module):
    """Attention whose dropout is a number of its own."""

    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.MultiheadAttention(4, 2, dropout=0.5, batch_first=True), nn.Linear(12, 2)

    def forward(self, x):
        return self.head(self.layer(x, x, x)[0].flatten(1))


def normalised():
    return nn.Sequential(nn.Flatten(), nn.BatchNorm1d(12), nn.Linear(12, 2))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Attention(0.5), r"layer layer\.self_attn \(MultiheadAttention\) draws random numbers"),
        (Multihead, r"layer layer \(MultiheadAttention\) draws random numbers"),
        (lambda: nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(12, 2)), r"layer 1 \(Dropout\) draws"),
        (normalised, r"layer 1 \(BatchNorm1d\) keeps running averages"),
        (
            lambda: nn.Sequential(nn.Flatten(), parametrizations.spectral_norm(nn.Linear(12, 2))),
            r"layer 1\.parametrizations\.weight\.0 \(_SpectralNorm\) goes on estimating a norm",
        ),
    ],
)
def test_a_module_that_is_no_function_is_refused_while_it_trains(make, message):
    module, x = make(), torch.randn(5, 3, 4)
    network, params = functional(module)
    for work in (empirical_ntk, lambda *a: Jacobian(*a, coupled=False).dense()):
        with pytest.raises(ConfigError, match=message):
            work(network, params, x)
    module.eval()
    assert torch.equal(empirical_ntk(network, params, x), empirical_ntk(network, params, x))


@pytest.mark.parametrize("training", [True, False])
def test_attention_has_both_modes_of_derivatives(training):
    torch.manual_seed(0)
    module = Attention().double().train(training)
    network, params = functional(module)
    x = torch.randn(5, 3, 4, dtype=torch.float64)
    outputs = module(x)
    rows = [torch.autograd.grad(y, module.parameters(), retain_graph=True) for y in outputs.flatten()]
    expected = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])
    j = Jacobian(network, params, x, coupled=False)
    assert torch.allclose(j.outputs, outputs)
    assert torch.allclose(j.dense().flatten(0, 1), expected, atol=1e-10)
    v = torch.randn(expected.shape[1], dtype=torch.float64)
    assert torch.allclose(j.jvp(unflatten(v, params)).flatten(), expected @ v, atol=1e-10)


@pytest.mark.parametrize("training", [True, False])
def test_a_random_slope_is_refused_in_either_mode(training):
    network, params = functional(nn.Sequential(nn.Linear(4, 2), nn.RReLU()).train(training))
    with pytest.raises(ConfigError, match=r"layer 1 \(RReLU\) draws random numbers.* Use nn\.LeakyReLU"):
        empirical_ntk(network, params, torch.randn(3, 4))


def shared(tied):
    """A layer that stands in two places, or two layers of one weight."""
    first, second = nn.Linear(3, 3), nn.Linear(3, 3)
    second.weight = first.weight
    return nn.Sequential(first, nn.Tanh(), second if tied else first, nn.Tanh(), nn.Linear(3, 2)).double()


@pytest.mark.parametrize("coupled", [True, False])
@pytest.mark.parametrize("tied", [True, False])
def test_a_shared_part_is_differentiated_in_all_its_places_and_stays_a_parameter(tied, coupled):
    module, x = shared(tied), torch.randn(4, 3, dtype=torch.float64)
    weight = module[0].weight
    network, params = functional(module)
    moved = {name: 1.5 * p.detach() for name, p in params.items()}
    found = Jacobian(network, moved, x, coupled=coupled).dense().flatten(0, 1)
    assert module[0].weight is weight
    assert module[2].weight is weight
    with torch.no_grad():
        for p in module.parameters():
            p.mul_(1.5)
    rows = [torch.autograd.grad(y, module.parameters(), retain_graph=True) for y in module(x).flatten()]
    assert torch.allclose(found, torch.stack([torch.cat([g.flatten() for g in row]) for row in rows]))


class Dropping(nn.Module):
    def __init__(self, drop):
        super().__init__()
        self.first, self.last, self.drop = nn.Linear(4, 8), nn.Linear(8, 2), drop

    def forward(self, x):
        return self.last(self.drop(self.first(x), self.training))


@pytest.mark.parametrize("coupled", [True, False])
@pytest.mark.parametrize(
    "drop",
    [lambda x, on: F.dropout(x, 0.5, on), lambda x, on: x * torch.empty(len(x), 1).bernoulli_(0.5) if on else x],
)
def test_random_numbers_in_a_forward_pass_of_ones_own_are_refused(drop, coupled):
    module, x = Dropping(drop), torch.randn(3, 4)
    network, params = functional(module)
    with pytest.raises(ConfigError, match=r"Dropping draws random numbers.*eval\(\)"):
        empirical_ntk(network, params, x, coupled=coupled)
    with pytest.raises(ConfigError, match=r"Dropping draws random numbers"):
        Jacobian(network, params, x, coupled=coupled).jvp(params)
    several = {name: torch.stack([p.detach()] * 2) for name, p in params.items()}
    with pytest.raises(ConfigError, match=r"Dropping draws random numbers"):
        torch.func.vmap(lambda theta: network(theta, x))(several)
    module.eval()
    assert torch.equal(empirical_ntk(network, params, x), empirical_ntk(network, params, x))


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.spectral_norm` is deprecated:FutureWarning")
def test_an_older_spectral_norm_is_refused_while_it_trains():
    network, params = functional(nn.Sequential(nn.utils.spectral_norm(nn.Linear(4, 2))))
    with pytest.raises(ConfigError, match=r"layer 0 \(Linear\) goes on estimating a norm"):
        empirical_ntk(network, params, torch.randn(3, 4))


def embedded(make, **settings):
    """Tokens `[n, 3]`, by 4 numbers each, and a head."""
    return nn.Sequential(make(6, 4, **settings), nn.Flatten(), nn.Linear(12 if make is nn.Embedding else 4, 2))


@pytest.mark.parametrize("make", [nn.Embedding, nn.EmbeddingBag])
@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"max_norm": 1.0}, "writes to its weight"),
        ({"sparse": True}, "has other gradients .* or sparse ones"),
        ({"scale_grad_by_freq": True}, "has other gradients"),
    ],
)
def test_an_embedding_without_the_gradients_of_its_function_is_refused(make, setting, message):
    network, params = functional(embedded(make, **setting))
    with pytest.raises(ConfigError, match=rf"layer 0 \({make.__name__}\) {message}"):
        empirical_ntk(network, params, torch.randint(6, (2, 3)))


@pytest.mark.parametrize("padding", [1, -5])
@pytest.mark.parametrize("coupled", [True, False])
def test_the_padding_of_an_embedding_is_a_constant_in_both_modes_of_derivatives(padding, coupled):
    torch.manual_seed(0)
    module, x = embedded(nn.Embedding, padding_idx=padding).double(), torch.randint(3, (5, 3))
    network, params = functional(module)
    rows = [torch.autograd.grad(y, module.parameters(), retain_graph=True) for y in module(x).flatten()]
    expected = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])
    assert torch.allclose(Jacobian(network, params, x, coupled=coupled).dense().flatten(0, 1), expected)
    tangent = {name: torch.randn_like(p) for name, p in params.items()}
    by_hand = expected @ torch.cat([v.flatten() for v in tangent.values()])
    assert torch.allclose(Jacobian(network, params, x, coupled=coupled).jvp(tangent).flatten(), by_hand)


@pytest.mark.parametrize("hook", ["register_full_backward_hook", "register_full_backward_pre_hook"])
def test_backward_hooks_are_refused(hook):
    module = nn.Sequential(nn.Linear(4, 2), nn.Tanh())
    handle = getattr(module[1], hook)(lambda *given: None)
    network, params = functional(module)
    with pytest.raises(ConfigError, match=r"layer 1 \(Tanh\) has backward hooks"):
        Jacobian(network, params, torch.randn(3, 4)).jvp(params)
    handle.remove()
    Jacobian(network, params, torch.randn(3, 4)).jvp(params)


def test_complex_parameters_are_refused():
    with pytest.raises(ConfigError, match=r"real parameters, but weight are complex"):
        functional(nn.Linear(3, 2, bias=False, dtype=torch.complex64))


def test_no_parameters_are_told():
    network, _ = functional(nn.Linear(3, 2))
    with pytest.raises(ConfigError, match=r"parameters to differentiate by.* there are none"):
        empirical_ntk(network, {}, torch.randn(4, 3))


class Forbidden(nn.Module):
    """Does something between its layers; keeps a count."""

    def __init__(self, what):
        super().__init__()
        self.first, self.last, self.what = nn.Linear(4, 8), nn.Linear(8, 2), what
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x):
        return self.last(self.what(self, torch.tanh(self.first(x))))


def branching(module, x):
    return 2 * x if x.max() > 0 else x


def read(module, x):
    return x / x.max().item()


def masked(module, x):
    return x + x[x > 0].mean()


def written(module, x):
    result = torch.zeros(x.shape, dtype=x.dtype)
    result[:, :3] = x[:, :3]
    return result


def counted(module, x):
    module.count += 1
    return x


def sloped(module, x):
    moved = x.detach().requires_grad_()
    return x + torch.autograd.grad((moved**2).sum(), moved)[0]


class Squared(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    def backward(ctx, cotangent):
        return 2 * ctx.saved_tensors[0] * cotangent


class SquaredInParts(Squared):
    @staticmethod
    def forward(x):
        return x**2

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)


class SquaredWhole(SquaredInParts):
    generate_vmap_rule = True

    @staticmethod
    def jvp(ctx, tangent):
        return 2 * ctx.saved_tensors[0] * tangent


@pytest.mark.parametrize(
    ("what", "message"),
    [
        (branching, "Forbidden asks for the values of a tensor"),
        (read, "Forbidden asks for the values of a tensor"),
        (masked, "Forbidden asks for the values of a tensor"),
        (written, r"Forbidden writes into a tensor that PyTorch's vmap .* has only one of"),
        (counted, "Forbidden writes into a tensor of its own"),
        (lambda module, x: Squared.apply(x), "Forbidden calls an autograd.Function .* setup_context, jvp and"),
        (lambda module, x: SquaredInParts.apply(x), "Forbidden calls an autograd.Function .* setup_context, jvp and"),
        (lambda module, x: checkpoint(torch.tanh, x, use_reentrant=True), r"leave torch\.utils\.checkpoint out"),
        (lambda module, x: checkpoint(torch.tanh, x, use_reentrant=False), "Forbidden has hooks on the tensors"),
        (sloped, r"Forbidden takes derivatives by torch\.autograd .* torch\.func\.grad"),
    ],
)
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True:UserWarning")
def test_what_goes_through_no_transform_is_told(what, message):
    network, params = functional(Forbidden(what))
    x = torch.randn(2, 3, 4)
    with pytest.raises(ConfigError, match=message):
        torch.func.vmap(lambda x: Jacobian(network, params, x).vjp(torch.ones(3, 2)))(x)


def test_a_function_without_a_forward_derivative_is_told():
    network, params = functional(Forbidden(lambda module, x: SquaredInParts.apply(x)))
    with pytest.raises(ConfigError, match=r"Forbidden calls an autograd\.Function"):
        Jacobian(network, params, torch.randn(3, 4)).jvp(params)


@pytest.mark.parametrize("pairs", [1, None])
@pytest.mark.parametrize("coupled", [True, False])
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True:UserWarning")
def test_rows_of_a_checkpointed_part_are_refused(coupled, pairs):
    network, params = functional(Forbidden(lambda module, x: checkpoint(torch.tanh, x, use_reentrant=True)))
    with pytest.raises(ConfigError, match=r"torch\.utils\.checkpoint"):
        Jacobian(network, params, torch.randn(3, 4), coupled=coupled).rows(pairs_at_once=pairs)


@pytest.mark.parametrize("coupled", [True, False])
def test_what_the_refusals_advise_has_derivatives(coupled):
    torch.manual_seed(0)
    plain, x = Forbidden(lambda module, x: x**2).double(), torch.randn(3, 4, dtype=torch.float64)
    expected = empirical_ntk(*functional(plain), x)
    summed = Forbidden(lambda module, x: torch.func.grad(lambda y: (y**3).sum() / 3)(x)).double()
    for module in (Forbidden(lambda module, x: SquaredWhole.apply(x)).double(), summed):
        module.load_state_dict(plain.state_dict())
        network, params = functional(module)
        j = Jacobian(network, params, x, coupled=coupled)
        assert torch.allclose(empirical_ntk(network, params, x, coupled=coupled), expected)
        assert torch.allclose(j.jvp(params), Jacobian(*functional(plain), x).jvp(params))
