"""What every method must do, one class of tests for all of them: a new method is added to METHODS."""

import dataclasses

import pytest
import torch
from torch import nn

from lightning_ntk.episode import Episode, TaskSpec
from lightning_ntk.errors import ConfigError
from lightning_ntk.methods.anil import ANIL
from lightning_ntk.methods.from_scratch import FromScratch
from lightning_ntk.methods.imaml import IMAML
from lightning_ntk.methods.maml import MAML
from lightning_ntk.methods.meta_rkhs_i import MetaRKHSI
from lightning_ntk.methods.meta_rkhs_ii import MetaRKHSII
from lightning_ntk.methods.meta_sgd import MetaSGD
from lightning_ntk.methods.nearest_centroid import NearestCentroid
from lightning_ntk.methods.protonet import ProtoNet
from lightning_ntk.methods.reptile import Reptile
from lightning_ntk.networks.conv4 import Conv4
from lightning_ntk.networks.mlp import MLP

METHODS = {
    "meta_rkhs_i": lambda *a: MetaRKHSI(*a, adaptation="gradient_descent", adapt_lr=0.1, adapt_steps=5),
    "meta_rkhs_i_euler": lambda *a: MetaRKHSI(*a, alpha=0.05, euler_steps=3),
    "meta_rkhs_ii": lambda *a: MetaRKHSII(*a, t=10.0, ridge=1e-3),
    "meta_rkhs_ii_trace": lambda *a: MetaRKHSII(*a, t=10.0, ridge=1e-3, kernel="trace"),
    "maml": lambda *a: MAML(*a, inner_lr=0.1),
    "fomaml": lambda *a: MAML(*a, inner_lr=0.1, first_order=True),
    "maml_plus_plus": lambda *a: MAML(*a, inner_lr=0.1, multi_step_loss=10, learn_inner_lrs=True),
    "anil": lambda *a: ANIL(*a, inner_lr=0.1),
    "anil_plus_plus": lambda *a: ANIL(*a, inner_lr=0.1, multi_step_loss=10, learn_inner_lrs=True),
    "meta_sgd": lambda *a: MetaSGD(*a, inner_lr=0.1),
    "imaml": lambda *a: IMAML(*a, inner_lr=0.05),
    "reptile": lambda *a: Reptile(*a, inner_lr=1e-2),
    "reptile_serial": lambda *a: Reptile(*a, inner_lr=0.05, inner_optimizer="sgd", serial=True, lr=0.5),
    "protonet": ProtoNet,
    "nearest_centroid": NearestCentroid,
    "from_scratch": lambda *a: FromScratch(*a, adapt_steps=20, adapt_lr=1e-2),
}
# Those whose step is not the gradient of their loss, each checked against a loop of its own elsewhere.
NO_GRADIENT = ("fomaml", "imaml", "reptile", "reptile_serial")
CLASSIFIERS = ("protonet", "nearest_centroid")


def make(name, kind):
    torch.manual_seed(0)
    if kind == "regression" and name in CLASSIFIERS:
        pytest.skip(f"{name} refuses regression, see test_protonet.py")
    if kind == "regression":
        spec = TaskSpec("regression", (1,), 1)
        return METHODS[name](MLP((1,), 1), spec)
    spec = TaskSpec("classification", (1, 32, 32), 3)
    norm = "group" if name.endswith("trace") else "batch"
    return METHODS[name](Conv4((1, 32, 32), 3, filters=8, norm=norm), spec)


def tasks(kind, count=2):
    """Tasks that can be learnt: a line through the origin, or classes with a bright quarter each."""
    generator = torch.Generator().manual_seed(1)
    episodes = []
    for index in range(count):
        if kind == "regression":
            slope = torch.rand((), generator=generator) * 2 + 0.5
            x = torch.randn(14, 1, generator=generator)
            episodes.append(Episode(x[:4], slope * x[:4], x[4:], slope * x[4:], torch.tensor(index)))
            continue
        y = torch.arange(3).repeat(5)
        x = 0.3 * torch.rand(15, 1, 32, 32, generator=generator)
        for label in range(3):
            quarter = (slice(0, 16), slice(16, 32))
            x[y == label, :, quarter[label // 2], quarter[label % 2]] += 0.6
        episodes.append(Episode(x[:6], y[:6], x[6:], y[6:], torch.tensor(index)))
    return Episode.stack(episodes)


def in_double(episodes):
    """The same tasks with float64 inputs and, in regression, targets."""
    values = {
        f.name: value.double() if (value := getattr(episodes, f.name)).is_floating_point() else value
        for f in dataclasses.fields(Episode)
    }
    return Episode(**values)


@pytest.mark.parametrize("kind", ["classification", "regression"])
@pytest.mark.parametrize("name", METHODS)
class TestEveryMethod:
    def test_adapting_lowers_the_loss_on_the_task(self, name, kind):
        method = make(name, kind)
        task = next(iter(tasks(kind)))
        before = method.loss(method.network(task.support_x), task.support_y)
        after = method.loss(method.adapt(task.support_x, task.support_y)(task.support_x), task.support_y)
        assert after < before

    def test_adapting_leaves_the_method_as_it_was(self, name, kind):
        method = make(name, kind)
        before = {key: value.clone() for key, value in method.state_dict().items()}
        trainable = [key for key, p in method.named_parameters() if p.requires_grad]
        state = torch.get_rng_state()
        task = next(iter(tasks(kind)))
        method.adapt(task.support_x, task.support_y)(task.query_x)
        assert all(torch.equal(value, before[key]) for key, value in method.state_dict().items())
        assert torch.equal(torch.get_rng_state(), state)
        assert all(p.grad is None for p in method.parameters())
        assert [key for key, p in method.named_parameters() if p.requires_grad] == trainable

    def test_it_adapts_without_gradient_mode_and_to_the_same_function(self, name, kind):
        method = make(name, kind)
        task = next(iter(tasks(kind)))
        with torch.no_grad():
            quiet = method.adapt(task.support_x, task.support_y)(task.query_x)
        assert torch.allclose(quiet, method.adapt(task.support_x, task.support_y)(task.query_x), atol=1e-6)

    def test_the_predictor_is_differentiable_in_its_input(self, name, kind):
        method = make(name, kind)
        task = next(iter(tasks(kind)))
        predictor = method.adapt(task.support_x, task.support_y)
        x = task.query_x.clone().requires_grad_()
        outputs = predictor(x)
        assert outputs.shape == (task.query_x.shape[0], method.spec.outputs)
        (gradient,) = torch.autograd.grad(method.loss(outputs, task.query_y), x)
        assert torch.isfinite(gradient).all()
        assert gradient.abs().sum() > 0

    def test_a_support_that_asks_gets_its_gradient_through_the_adaptation(self, name, kind):
        method = make(name, kind).double()
        if not method.adapts_differentiably:
            pytest.skip(f"{name} does not pass gradients through its adaptation")
        task = next(iter(in_double(tasks(kind))))
        # So small that no ReLU and no maximum changes its mind on the way, in ten steps with batch statistics either.
        step = 1e-8 * torch.randn(task.support_x.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)

        def query_loss(x):
            return method.loss(method.adapt(x, task.support_y)(task.query_x), task.query_y)

        x = task.support_x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(query_loss(x), x)
        with torch.no_grad():
            change = query_loss(task.support_x + step) - query_loss(task.support_x - step)
        assert (2 * (gradient * step).sum()).item() == pytest.approx(change.item(), rel=1e-3)
        assert change != 0
        assert all(p.grad is None for p in method.parameters())

    def test_the_meta_gradient_reaches_every_parameter_and_points_downhill(self, name, kind):
        method = make(name, kind)
        if not method.meta_trains:
            pytest.skip(f"{name} has no meta-training")
        method, episodes = method.double(), in_double(tasks(kind))
        loss = method.meta_loss(episodes)
        loss.backward()
        trained = {key: p for key, p in method.named_parameters() if p.requires_grad}
        gradients = {key: p.grad for key, p in trained.items()}
        assert all(g is not None and torch.isfinite(g).all() for g in gradients.values())
        assert all(g.abs().sum() > 0 for key, g in gradients.items() if "head" in key)
        norm = sum(g.square().sum() for g in gradients.values())
        with torch.no_grad():
            for key, p in trained.items():
                p -= 1e-7 / norm.sqrt() * gradients[key]
        fall = (loss - method.meta_loss(episodes)).item()
        assert fall > 0
        if name not in NO_GRADIENT:
            assert fall == pytest.approx(1e-7 * norm.sqrt().item(), rel=0.05)

    def test_predictions_for_a_batch_of_tasks_are_those_of_each(self, name, kind):
        # In double precision: with batch statistics, many steps enlarge rounding.
        method, episodes = make(name, kind).double(), in_double(tasks(kind, count=3))
        with torch.no_grad():
            outputs = method.predict(episodes)
        assert outputs.dtype == torch.float64
        for row, task in zip(outputs, episodes, strict=True):
            alone = method.adapt(task.support_x, task.support_y)(task.query_x)
            assert torch.allclose(row, alone, rtol=1e-6, atol=1e-8)


def test_scores_are_accuracies_and_squared_errors():
    outputs = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [2.0, 1.0], [0.0, 3.0]]])
    assert make("maml", "classification").score(outputs, torch.tensor([[0, 1, 1, 1]]))["accuracy"].tolist() == [0.75]
    error = make("maml", "regression").score(torch.tensor([[[1.0], [2.0]]]), torch.tensor([[[0.0], [4.0]]]))
    assert error["mse"].tolist() == [2.5]
    # 4097 squared has more digits than a float32.
    error = make("maml", "regression").score(torch.tensor([[[4097.0]]]), torch.tensor([[[0.0]]]))
    assert error["mse"].tolist() == [4097.0**2]


class Sequence(nn.Sequential):
    """A network of somebody else's: no head, no word on whether it couples its examples."""

    def __init__(self, *more):
        super().__init__(nn.Conv2d(1, 4, 5, stride=4), *more, nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(196, 3))


SPEC = TaskSpec("classification", (1, 32, 32), 3)
HEADED = [name for name in METHODS if not name.startswith("anil") and name not in CLASSIFIERS]


@pytest.mark.parametrize("name", [name for name in HEADED if not name.endswith("trace")])
def test_any_network_will_do(name):
    torch.manual_seed(0)
    method, episodes = METHODS[name](Sequence(nn.LayerNorm((4, 7, 7))), SPEC), tasks("classification")
    assert method.predict(episodes).shape == (2, 9, 3)
    if method.meta_trains:
        method.meta_loss(episodes).backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in method.network.parameters())


@pytest.mark.parametrize("name", [name for name in HEADED if not name.endswith("trace")])
def test_frozen_parameters_stay_and_the_others_learn(name):
    torch.manual_seed(0)
    network = Sequence()
    network[0].weight.requires_grad_(False)
    if name == "meta_sgd":
        with pytest.raises(ConfigError, match=r"the network's 0\.weight is frozen\. Use method=maml"):
            METHODS[name](network, SPEC)
        return
    method, episodes = METHODS[name](network, SPEC), tasks("classification")
    before = network[0].weight.clone()
    assert method.predict(episodes).isfinite().all()
    if method.meta_trains:
        method.meta_loss(episodes).backward()
        assert network[0].weight.grad is None
        assert network[-1].weight.grad.abs().sum() > 0
    assert torch.equal(network[0].weight, before)


@pytest.mark.parametrize(
    "name", ["meta_rkhs_i", "meta_rkhs_ii", "maml", "meta_sgd", "imaml", "reptile", "from_scratch"]
)
@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (nn.Dropout(0.5), r"network: layer 1 \(Dropout\) draws random numbers"),
        (nn.BatchNorm2d(4), r"network: layer 1 \(BatchNorm2d\) keeps running averages\. Use .*BatchStatistics"),
    ],
)
def test_a_network_that_is_no_function_of_its_parameters_is_named(name, layer, message):
    with pytest.raises(ConfigError, match=message):
        METHODS[name](Sequence(layer), SPEC)
    for harmless in (nn.Dropout(0.0), nn.BatchNorm2d(4).eval(), nn.BatchNorm2d(4, track_running_stats=False)):
        METHODS[name](Sequence(harmless), SPEC)


@pytest.mark.parametrize("name", [*METHODS])
def test_inference_mode_is_refused_where_it_has_no_derivatives(name):
    method = make(name, "classification")
    with torch.inference_mode():
        task = next(iter(tasks("classification")))
        if name in ("protonet", "nearest_centroid"):
            method.adapt(task.support_x, task.support_y)
            return
        with pytest.raises(ConfigError, match=r"torch\.no_grad\(\) instead"):
            method.adapt(task.support_x, task.support_y)


def test_norms_that_would_be_compiled_wrong_are_refused():
    for kind in (MetaRKHSI, MetaRKHSII):
        with pytest.raises(ConfigError, match=r"layer 1 \(LayerNorm\) .* Set method\.compile=false"):
            kind(Sequence(nn.LayerNorm((4, 7, 7))), SPEC, compile=True)


def test_outputs_that_are_no_numbers_are_no_accuracy():
    method = make("maml", "classification")
    outputs = torch.eye(3).expand(2, 3, 3).clone()
    outputs[1, 2, 0] = float("nan")
    accuracy = method.score(outputs, torch.arange(3).expand(2, 3))["accuracy"]
    assert accuracy[0] == 1
    assert accuracy[1].isnan()


@pytest.mark.parametrize("name, setting", [("from_scratch", "adapt_lr"), ("maml", "inner_lr")])
def test_an_accuracy_that_is_no_number_names_the_step_size(name, setting, monkeypatch):
    method = make(name, "classification")
    monkeypatch.setattr(method, "_gather_scores", lambda: {"accuracy": [float("nan"), 1.0]})
    monkeypatch.setattr(method, "log", lambda *_, **__: None)
    with pytest.warns(UserWarning, match=rf"1 of 2 tasks .*method\.{setting}"):
        method._log_scores("test")


class Transformer(nn.Module):
    """A transformer's layer on the rows of small images, a head, and a temperature: a parameter without axes."""

    couples_examples = False

    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(16, 2, 8, dropout=0.0, batch_first=True)
        self.head, self.scale = nn.Linear(16, 3), nn.Parameter(torch.tensor(1.5))

    def embed(self, x):
        return self.layer(x.flatten(1)[:, :128].unflatten(1, (8, 16))).mean(1)

    def forward(self, x):
        return self.scale * self.head(self.embed(x))


@pytest.mark.parametrize("name", HEADED)
def test_a_transformer_trains_and_adapts(name):
    torch.manual_seed(0)
    method, episodes = METHODS[name](Transformer(), SPEC), tasks("classification")
    if method.meta_trains:
        with method._differentiated():
            method.meta_loss(episodes).backward()
    method.eval()
    with torch.no_grad():
        assert method.predict(episodes).isfinite().all()


def test_a_layer_without_the_derivatives_is_named_as_the_reason():
    class Recurrent(nn.Module):
        couples_examples = False

        def __init__(self):
            super().__init__()
            self.layer, self.head = nn.LSTM(16, 8, batch_first=True), nn.Linear(8, 3)

        def forward(self, x):
            return self.head(self.layer(x.flatten(1)[:, :128].unflatten(1, (8, 16)))[0][:, -1])

    method, episodes = METHODS["meta_rkhs_ii"](Recurrent(), SPEC), tasks("classification")
    with pytest.raises(ConfigError, match=r"network: MetaRKHSII takes derivatives .*lstm.* such as fomaml"):
        method.training_step(episodes, 0)


@pytest.mark.parametrize("name", ["meta_rkhs_i", "meta_rkhs_ii", "imaml", "reptile"])
def test_a_network_that_branches_on_its_numbers_is_told(name):
    class Branching(MLP):
        def forward(self, x):
            return super().forward(x / 255 if x.max() > 1 else x)

    method, episodes = METHODS[name](Branching(SPEC.input_shape, SPEC.outputs), SPEC), tasks("classification")
    with pytest.raises(ConfigError, match=r"network: Branching asks for the values of a tensor"):
        method.training_step(episodes, 0)


def test_a_network_is_not_blamed_for_what_a_method_of_ones_own_does():
    class Peeking(MetaRKHSII):
        def meta_loss(self, episodes):
            return torch.vmap(lambda x: x.sum() / x.max().item())(episodes.query_x).sum()

    method = Peeking(MLP(SPEC.input_shape, SPEC.outputs), SPEC, lr=1e-3)
    with pytest.raises(RuntimeError, match=r"vmap: It looks like you're calling .item\(\)"):
        method.training_step(tasks("classification"), 0)


class Misshapen(nn.Module):
    """A line whose outputs are brought into another shape."""

    couples_examples = False

    def __init__(self, shape):
        super().__init__()
        self.line, self.shape = nn.Linear(1, 1), shape

    def forward(self, x):
        return self.shape(self.line(x))


@pytest.mark.parametrize(
    ("shape", "message"),
    [(lambda y: (y, y), "outputs are of type tuple"), (lambda y: y.squeeze(-1), "to outputs .*a single output in")],
)
@pytest.mark.parametrize("name", [name for name in METHODS if not name.startswith("anil") and name not in CLASSIFIERS])
def test_outputs_of_another_shape_than_examples_and_numbers_are_told(name, shape, message):
    method, episodes = METHODS[name](Misshapen(shape), TaskSpec("regression", (1,), 1)), tasks("regression")
    with pytest.raises(ConfigError, match=message):
        method.predict(episodes)
    if method.meta_trains:
        with pytest.raises(ConfigError, match=message):
            method.meta_loss(episodes)


@pytest.mark.parametrize("labels", [[1, 2, 3], [0, 1, -1], [10, 20, 30]])
@pytest.mark.parametrize("name", [name for name in METHODS if name not in CLASSIFIERS])
def test_labels_without_an_output_are_refused(name, labels):
    method, episodes = make(name, "classification"), tasks("classification")
    if name.startswith("meta_rkhs"):
        with pytest.raises(ConfigError, match=r"Expected labels from 0 to 2.* but got -?\d"):
            method.adapt(episodes.support_x[0], torch.tensor(labels))
    wrong = dataclasses.replace(episodes, support_y=torch.tensor([labels] * episodes.tasks))
    with pytest.raises(ConfigError, match=r"Expected labels from 0 to 2"):
        method.test_step(wrong, 0)


@pytest.mark.parametrize("name", ["maml", "anil", "meta_sgd", "imaml"])
def test_weight_norm_is_refused_where_its_second_derivative_counts(name):
    network = Transformer() if name == "anil" else Sequence(nn.Conv2d(4, 4, 1))
    nn.utils.parametrizations.weight_norm(network.head if name == "anil" else network[1])
    with pytest.raises(ConfigError, match=r"weight_norm, whose second derivatives PyTorch gets wrong.*fomaml"):
        METHODS[name](network, SPEC)
    for other in ("fomaml", "reptile", "meta_rkhs_ii"):  # Which do without.
        METHODS[other](network, SPEC)


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning")
def test_the_older_weight_norm_is_refused_as_well():
    network = Sequence(nn.Conv2d(4, 4, 1))
    nn.utils.weight_norm(network[1])
    with pytest.raises(ConfigError, match=r"weight_norm, whose second derivatives PyTorch gets wrong"):
        METHODS["maml"](network, SPEC)


def test_a_task_of_one_class_is_refused():
    with pytest.raises(ConfigError, match=r"at least 2 classes, but it has outputs=1"):
        METHODS["meta_rkhs_i"](nn.Linear(4, 1), TaskSpec("classification", (4,), 1))


def test_meta_sgd_refuses_parameters_that_nothing_uses():
    network = MLP((1,), 1)
    network.spare = nn.Linear(2, 2)
    method, episodes = METHODS["meta_sgd"](network, TaskSpec("regression", (1,), 1)), tasks("regression")
    for work in (method.meta_loss, method.predict):
        with pytest.raises(ConfigError, match=r"every parameter.* do not depend on some.* Use method=maml"):
            work(episodes)
    METHODS["maml"](network, TaskSpec("regression", (1,), 1)).meta_loss(episodes)


def test_meta_sgd_refuses_parameters_that_stand_in_several_places():
    layer = nn.Linear(4, 4)
    network = nn.Sequential(layer, nn.Tanh(), layer)
    with pytest.raises(ConfigError, match=r"stands in several places of the network. Use method=maml"):
        METHODS["meta_sgd"](network, TaskSpec("classification", (4,), 4))
    METHODS["maml"](network, TaskSpec("classification", (4,), 4))


@pytest.mark.parametrize("kind", ["classification", "regression"])
def test_predictions_of_another_shape_are_refused(kind, monkeypatch):
    method, episodes = make("maml", kind), tasks(kind)
    whole = method.adapt

    def adapt(x, y):
        predictor = whole(x, y)
        return lambda x: predictor(x)[..., :1] if kind == "classification" else predictor(x)[:, 0]

    monkeypatch.setattr(method, "adapt", adapt)
    with pytest.raises(ConfigError, match=r"MAML\.adapt must give predictors of outputs \[queries, \d\], but for"):
        method.test_step(episodes, 0)


def test_scores_must_hold_the_one_that_runs_are_compared_by(monkeypatch):
    method = make("maml", "classification")
    monkeypatch.setattr(method, "score", lambda outputs, y: {"top2": torch.zeros(len(y))})
    method.test_step(tasks("classification"), 0)
    with pytest.raises(ConfigError, match=r"MAML\.score must give 'accuracy', .* but gave 'top2'"):
        method.on_test_epoch_end()


def test_a_mistake_about_shapes_is_not_taken_for_a_layer_without_derivatives(monkeypatch):
    method = make("maml", "classification")
    monkeypatch.setattr(method, "meta_loss", lambda episodes: torch.zeros(3).add_(torch.zeros(4, 3)))
    with pytest.raises(RuntimeError, match="match the broadcast shape"):
        method.training_step(tasks("classification"), 0)
