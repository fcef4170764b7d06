"""The probe under attack, end to end: the metrics it leaves, what they mean, and what it refuses before training."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from attacked_models import images
from matplotlib.backends.backend_agg import FigureCanvasAgg
from omegaconf import OmegaConf
from plain_trainer import plain_trainer
from test_train import TINY, TINY_SINE, rows, run

from callbacks.adversarial import Adversarial, _of_simba, _Task
from callbacks.adversarial_figure import NEVER, accuracy_over_queries, draw
from datamodules.glyphs import Glyphs
from lightning_ntk import evaluate, train
from lightning_ntk.attacks.base import Attacked
from lightning_ntk.attacks.suite import Suite
from lightning_ntk.attacks.support import pgd_through_adaptation
from lightning_ntk.attacks.white_box import pgd_linf
from lightning_ntk.episode import Episode, TaskSpec
from lightning_ntk.errors import ConfigError, DataError
from lightning_ntk.methods.base import MetaLearner
from lightning_ntk.methods.maml import MAML
from lightning_ntk.methods.meta_rkhs_ii import MetaRKHSII
from lightning_ntk.methods.nearest_centroid import NearestCentroid
from lightning_ntk.methods.protonet import ProtoNet
from lightning_ntk.methods.reptile import Reptile
from lightning_ntk.networks.conv4 import Conv4
from lightning_ntk.running.run import Run
from lightning_ntk.settings.building import instantiate
from lightning_ntk.settings.config import conf_folder

CHOSEN = ["callbacks=[timing,adversarial]", "callbacks.adversarial.simba_directions=3", "callbacks.adversarial.steps=2"]
GLYPHS = [*TINY, "data=glyphs", "data.ways=3", "data.queries=3", "network.filters=8"]


def from_yaml(**settings):
    config = OmegaConf.merge(
        OmegaConf.load(conf_folder() / "callbacks" / "adversarial.yaml").adversarial, OmegaConf.create(settings)
    )
    return instantiate(config, "callbacks.adversarial")


def make_episode(ways=3, queries=5):
    """Classes of which each has its own bright column, beside noise."""
    y = torch.arange(ways).repeat_interleave(queries + 2)
    x = 0.5 * images(len(y), size=16)
    for label in range(ways):
        x[y == label, :, :, 5 * label : 5 * label + 4] += 0.35
    is_support = torch.arange(len(y)) % (queries + 2) < 2
    return Episode(x[is_support], y[is_support], x[~is_support], y[~is_support], torch.tensor(0))


def adapted(kind, norm="none", **settings):
    torch.manual_seed(0)
    spec = TaskSpec("classification", (1, 16, 16), 3)
    return kind(Conv4(spec.input_shape, 3, filters=8, norm=norm), spec, **settings)


# ---- a whole run -----------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:adversarial. the gradients may be masked")
def test_a_run_leaves_every_metric_and_the_figure(tmp_path):
    result = run(*GLYPHS, "method=meta_rkhs_ii", *CHOSEN, "callbacks.adversarial.test_episodes=2")
    linf, l2 = ("2", "4", "8", "16", "32"), ("0.25", "0.5", "1", "2")
    expected = {"adversarial/clean/accuracy"}
    expected |= {f"adversarial/{name}/eps_{e}/accuracy" for name in ("fgsm", "pgd_linf", "noise") for e in linf}
    expected |= {f"adversarial/pgd_l2/eps_{e}/accuracy" for e in l2}
    expected |= {f"adversarial_support/pgd_linf/eps_{e}/accuracy" for e in linf}
    for name in ("simba_pixel", "simba_dct"):
        expected |= {f"adversarial/{name}/{what}" for what in ("accuracy", "queries", "l2")}
        expected.add(f"adversarial/masking/{name}_wins")
    expected.add("adversarial/masking/zero_gradients")
    episodes = result.probes["adversarial"]["episodes"]
    assert episodes.keys() == expected
    assert all(len(values) == 2 for values in episodes.values())
    assert all(0 <= v <= 1 for name, values in episodes.items() if name.endswith("accuracy") for v in values)
    assert {*expected, *(f"{name}_ci95" for name in expected)} <= result.metrics.keys()
    for sign in ("rise_with_eps", "no_fall", "single_step_wins", "noise_wins"):
        assert f"adversarial/masking/{sign}" in result.metrics
    broken_after = result.probes["adversarial"]["series"]["adversarial/simba_pixel/broken_after"]
    for each, accuracy in zip(broken_after, episodes["adversarial/simba_pixel/accuracy"], strict=True):
        assert each.count(NEVER) / 9 == pytest.approx(accuracy)
    assert (tmp_path / "run/figures/adversarial/accuracy.png").stat().st_size > 10_000
    # In training: one attack, on the validation episodes.
    logged = [row for row in rows() if row["adversarial/pgd_linf/eps_8/accuracy"]]
    assert [row["step"] for row in logged] == ["0", "1", "2"]
    assert not logged[0]["adversarial/fgsm/eps_8/accuracy"]


@pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint")
def test_what_training_measured_is_no_result_of_the_test():
    chosen = [*CHOSEN, "callbacks.adversarial.test_episodes=0"]
    result = run(*GLYPHS, "method=maml", *chosen, "steps=2")
    assert rows()[-2]["adversarial/pgd_linf/eps_8/accuracy"], "measured in training"
    assert not [name for name in result.metrics if name.startswith("adversarial")]
    train.main(["ckpt=run", "callbacks=timing", "steps=3"])
    again = json.loads(Path("run/results.json").read_text())
    assert not [name for name in again["metrics"] if name.startswith("adversarial")]


def test_training_under_attack_equals_training_without_bit_for_bit():
    alone = run(*GLYPHS, "method=maml", "callbacks=timing", "test=true", folder="alone")
    chosen = [*CHOSEN, "callbacks.adversarial.test_episodes=0"]
    probed = run(*GLYPHS, "method=maml", *chosen, folder="probed")
    assert probed.episodes == alone.episodes
    first, second = (torch.load(f"{f}/checkpoints/last.ckpt", weights_only=True) for f in ("alone", "probed"))
    assert all(torch.equal(first["state_dict"][key], second["state_dict"][key]) for key in first["state_dict"])


def test_regression_is_refused_before_training(tmp_path):
    with pytest.raises(ConfigError, match=r"data=sinusoid has regression\. Leave adversarial out"):
        run(*TINY_SINE, "callbacks=[timing,adversarial]")
    assert not (tmp_path / "run").exists()


def test_arts_attacks_come_from_the_command_line():
    pytest.importorskip("art.attacks.evasion")
    art = "{square: {_target_: art.attacks.evasion.SquareAttack, eps: 8/255, max_iter: 5}}"
    only = ["callbacks.adversarial.attacks=[]", "callbacks.adversarial.support=false", "network.norm=group"]
    few = ["callbacks.adversarial.test_episodes=2", "callbacks.adversarial.fit_every=0"]
    result = run(*GLYPHS, *CHOSEN, *only, *few, f"callbacks.adversarial.art={art}")
    metrics = {name for name in result.probes["adversarial"]["episodes"]}
    square = {f"adversarial/square/eps_8/{what}" for what in ("accuracy", "queries")}
    assert metrics == {"adversarial/clean/accuracy", *square}
    with pytest.raises(ConfigError, match=r"art: ART parts the queries .* network.norm=group"):
        run(*GLYPHS, *CHOSEN, f"callbacks.adversarial.art={art}", folder="coupled")
    wrong = art.replace("max_iter: 5", "max_iterations: 5")
    with pytest.raises(ConfigError, match=r"callbacks.adversarial.art.square.max_iterations is no setting"):
        run(*GLYPHS, *CHOSEN, "network.norm=group", f"callbacks.adversarial.art={wrong}", folder="wrong")


def test_a_method_without_a_head_is_attacked_by_art_in_any_number_of_ways():
    pytest.importorskip("art.attacks.evasion")
    run(*GLYPHS, "method=protonet", "network.norm=group", "callbacks=timing")
    art = "callbacks.adversarial.art={fast: {_target_: art.attacks.evasion.FastGradientMethod, eps: 0.1}}"
    few = ["callbacks.adversarial.attacks=[]", "callbacks.adversarial.support=false", "data.eval_ways=5"]
    evaluate.main(["run=run", "callbacks=adversarial", *few, "callbacks.adversarial.test_episodes=2", art])
    (file,) = Path("run/evaluations").glob("*/results.json")
    found = json.loads(file.read_text())["probes"]["adversarial"]["episodes"]
    assert len(found["adversarial/fast/eps_25.5/accuracy"]) == 2


# ---- one episode -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "norm"), [(MetaRKHSII, "none"), (MetaRKHSII, "batch"), (MAML, "batch")])
def test_the_numbers_are_those_of_the_attacks_on_the_adapted_model(kind, norm):
    method, episode = adapted(kind, norm), make_episode()
    callback = from_yaml(
        linf_eps=[0.0, "8/255", "32/255"], simba_directions=20, steps=5, l2_eps=[0.5], through_adaptation=True
    )
    torch.manual_seed(5)
    measured = callback.probe(method, episode, "test")
    torch.manual_seed(5)
    assert callback.probe(method, episode, "test") == measured
    assert all(p.grad is None for p in method.parameters())

    predict = method.adapt(episode.support_x, episode.support_y)

    def accuracy(x, predict=predict):
        with torch.no_grad():
            return (predict(x).argmax(-1) == episode.query_y).double().mean().item()

    clean = accuracy(episode.query_x)
    assert clean > 0.5
    assert measured["adversarial/clean/accuracy"] == clean
    of_support = ("adversarial_support/pgd_linf", "adversarial_support/through_adaptation")
    for name in ("adversarial/pgd_linf", "adversarial/fgsm", "adversarial/noise", *of_support):
        assert measured[f"{name}/eps_0/accuracy"] == clean, "a perturbation of size 0 changes nothing"
    torch.manual_seed(5)
    seed = int(torch.randint(2**31, ()))
    settings = {"steps": 5, "keep": "task" if norm == "batch" else "image"}
    for eps in (8, 32):
        settings["step_size"] = 2.5 * eps / 255 / 5  # Five steps of 2/255 would not cross these cubes.
        generator = torch.Generator().manual_seed(seed)
        found = pgd_linf(predict, episode.query_x, episode.query_y, eps / 255, generator=generator, **settings)
        assert measured[f"adversarial/pgd_linf/eps_{eps}/accuracy"] == accuracy(found.images)
        generator = torch.Generator().manual_seed(seed)
        found = pgd_linf(predict, episode.support_x, episode.support_y, eps / 255, generator=generator, **settings)
        misled = method.adapt(found.images, episode.support_y)
        cheap = accuracy(episode.query_x, misled)
        assert measured[f"adversarial_support/pgd_linf/eps_{eps}/accuracy"] == cheap
        task = (episode.support_x, episode.support_y, episode.query_x, episode.query_y)
        found = pgd_through_adaptation(
            method.adapt, *task, eps / 255, steps=5, step_size=settings["step_size"], start=found.images
        )
        misled = method.adapt(found.images, episode.support_y)
        strong = accuracy(episode.query_x, misled)
        assert measured[f"adversarial_support/through_adaptation/eps_{eps}/accuracy"] == strong <= cheap
    assert strong < clean
    assert measured["adversarial/pgd_linf/eps_32/accuracy"] < clean
    assert measured["adversarial/simba_pixel/accuracy"] < clean
    assert 1 <= measured["adversarial/simba_pixel/queries"] <= 2 * 2 * 20
    assert measured["adversarial/masking/zero_gradients"] == 0


class Cheating(MetaLearner):
    """Adapts to a model whose outputs are right but whose gradients are useless: a rounding before the network."""

    def adapt(self, support_x, support_y):
        def predict(x):
            brightness = torch.stack([x[..., 7:9, 5 * k : 5 * k + 2].mean((-3, -2, -1)) for k in range(3)], dim=-1)
            rounded = (8 * brightness).round() / 8
            return rounded + 0 * x.flatten(1).sum(1, keepdim=True)  # A gradient of exactly 0.

        return predict


def test_masked_gradients_are_found_and_warned_about():
    spec = TaskSpec("classification", (1, 16, 16), 3)
    method = Cheating(Conv4(spec.input_shape, 3, filters=8, norm="none"), spec)
    callback = from_yaml(simba_step=0.9, simba_directions=256, l2_eps=[])
    episode = make_episode()
    episode = dataclasses.replace(episode, query_x=episode.query_x.clamp(0, 1))
    measured = callback.probe(method, episode, "test")
    assert measured["adversarial/masking/zero_gradients"] == 1
    assert measured["adversarial/masking/simba_pixel_wins"] > 0.2
    numbers = {name: [value] for name, value in measured.items() if not isinstance(value, list)}
    with pytest.warns(UserWarning, match=r"gradients may be masked.*zero_gradients = 1, .*simba_pixel_wins = "):
        callback.summarise(numbers, "test")


def test_a_sound_model_raises_no_warning():
    # Warnings are errors here.
    method, episode = adapted(MetaRKHSII), make_episode()
    callback = from_yaml(attacks=["fgsm", "pgd_linf", "noise", "simba_pixel"], simba_directions=20)
    numbers = {name: [v] for name, v in callback.probe(method, episode, "test").items() if not isinstance(v, list)}
    metrics = callback.summarise(numbers, "test")
    assert metrics["adversarial/masking/no_fall"] == 0
    assert metrics["adversarial/masking/noise_wins"] <= 0


def test_outputs_that_are_not_finite_are_said_to_be():
    method, episode = adapted(MetaRKHSII), make_episode()
    method.adapt = lambda x, y: lambda z: method.network(z) * torch.nan
    # The base reports it and goes on.
    with pytest.raises(FloatingPointError, match="no finite numbers"):
        from_yaml().probe(method, episode, "test")


def test_the_figure_has_a_panel_for_each_kind_of_curve():
    callback = from_yaml(simba_directions=5, steps=2)
    assert callback.figures() == {}
    method, episode = adapted(MetaRKHSII), make_episode()
    found = {0: callback.probe(method, episode, "test"), 1: callback.probe(method, episode, "test")}
    callback._order(found, [0, 1])
    callback.stage = "test"
    figure = callback.figures()["accuracy"]
    panels = [[text.get_text() for text in axes.get_legend().get_texts()] for axes in figure.axes]
    assert panels == [
        ["fgsm", "pgd_linf", "noise", "pgd_linf on the support"],
        ["pgd_l2"],
        ["simba_dct", "simba_pixel"],
    ]
    FigureCanvasAgg(figure).draw()


def test_the_figure_has_attacks_of_any_name():
    names = ("adversarial/clean/accuracy", "adversarial/my-square.2/eps_8/accuracy")
    (axes,) = draw({name: [0.5, 0.75] for name in names}, {}, names[0], set()).axes
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["my-square.2"]


def test_accuracy_over_queries_by_hand():
    queries, accuracy = accuracy_over_queries([[0.0, 3.0, NEVER, 5.0], [3.0, NEVER, NEVER, NEVER]])
    assert queries == [0.0, 3.0, 5.0]
    assert accuracy == [87.5, 62.5, 50.0]
    assert accuracy_over_queries([[NEVER, NEVER]]) == ([0.0], [100.0])


# ---- settings --------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:adversarial. the gradients may be masked")
def test_a_method_that_asks_no_network_is_not_attacked_as_if_it_did():
    measured = []
    for norm in ("batch", "none"):
        torch.manual_seed(5)
        callback = from_yaml(linf_eps=["8/255"], simba_directions=20, steps=5, support=False)
        measured.append(callback.probe(adapted(NearestCentroid, norm), make_episode(), "test"))
    assert repr(measured[0]) == repr(measured[1])  # Lengths of what was never broken are NaN in both.


def test_attacks_are_in_full_precision_whatever_the_trainers(monkeypatch):
    callback, method = from_yaml(attacks=["pgd_linf"], steps=3, support=False), adapted(MAML)
    adapt, shortened = method.adapt, []

    def watched(x, y):
        predict = adapt(x, y)
        return lambda images: (shortened.append(torch.is_autocast_enabled("cpu")), predict(images))[1]

    monkeypatch.setattr(method, "adapt", watched)
    torch.manual_seed(5)
    alone = callback.probe(method, make_episode(), "test")
    asked = len(shortened)
    torch.manual_seed(5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert callback.probe(method, make_episode(), "test") == alone
    assert len(shortened) == 2 * asked > 0
    assert not any(shortened)


def test_simbas_numbers_are_of_the_queries_that_were_right():
    """Of four queries one is wrong from the start, one is broken in 3 queries by a change of length 2, two hold."""
    x, y = torch.full((4, 1, 2, 2), 0.5), torch.tensor([0, 0, 0, 0])
    clean = torch.tensor([[0.0, 1.0], [1.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
    after = torch.tensor([[0.0, 1.0], [0.0, 1.0], [1.0, 0.0], [1.0, 0.0]])
    changed = x + torch.tensor([0.4, 0.25, 0.1, 0.1])[:, None, None, None]
    # With batch statistics a query that is wrong by itself can be asked about, too.
    found = Attacked(changed, after, torch.tensor([99, 3, 8, 10]))
    task = _Task(lambda images: images.flatten(1)[:, :2], x, y)
    measured = _of_simba("adversarial/simba_dct", Suite(steps=1), task, clean, found, 0)
    assert measured["adversarial/simba_dct/queries"] == pytest.approx(7.0)
    assert measured["adversarial/simba_dct/l2"] == pytest.approx(0.5)
    nothing_right = _of_simba("adversarial/simba_dct", Suite(steps=1), task, 1 - clean[[1, 1, 1, 1]], found, 0)
    episodes = {name: [value, measured[name]] for name, value in nothing_right.items() if isinstance(value, float)}
    metrics = from_yaml(attacks=["simba_dct"]).summarise(
        {**episodes, "adversarial/clean/accuracy": [0.0, 0.75]}, "test"
    )
    assert metrics["adversarial/simba_dct/queries"] == pytest.approx(7.0)


def test_the_yaml_holds_the_defaults():
    given, default = from_yaml(), Adversarial()
    assert (given.suite, given.fit_suite, given.counts) == (default.suite, default.fit_suite, default.counts)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"linf_eps": [-0.1]}, "callbacks.adversarial.linf_eps must be from 0 to 1"),
        ({"linf_eps": ["300/255"]}, "callbacks.adversarial.linf_eps must be from 0 to 1"),
        ({"linf_eps": ["8/0"]}, "callbacks.adversarial.linf_eps takes numbers or quotients"),
        ({"linf_eps": ["eight"]}, "callbacks.adversarial.linf_eps takes numbers or quotients"),
        ({"linf_eps": 8}, "callbacks.adversarial.linf_eps must be a list"),
        ({"l2_eps": [-1.0]}, "callbacks.adversarial.l2_eps must be finite"),
        ({"fit_eps": 2}, "callbacks.adversarial.fit_eps must be from 0 to 1"),
        ({"fit_steps": 0}, "callbacks.adversarial.fit_steps must be a whole number"),
        ({"steps": 0}, "callbacks.adversarial.steps must be a whole number"),
        ({"steps": 2.5}, "callbacks.adversarial.steps must be a whole number"),
        ({"step_size": 0}, "callbacks.adversarial.step_size must be above 0"),
        ({"loss": "hinge"}, "callbacks.adversarial.loss must be one of"),
        ({"simba_step": 0.0}, "callbacks.adversarial.simba_step must be above 0"),
        ({"simba_directions": 0}, "callbacks.adversarial.simba_directions must be"),
        ({"simba_frequencies": 2.0}, "callbacks.adversarial.simba_frequencies must be from 0 to 1"),
        ({"attacks": ["pgd"]}, "callbacks.adversarial.attacks=pgd does not exist. Did you mean"),
        ({"art": {"clean": {"_target_": "a.B"}}}, "callbacks.adversarial.art.clean: the name belongs"),
        ({"through_adaptation": True, "support": False}, "callbacks.adversarial.through_adaptation=true goes on from"),
        ({"art": 3}, "callbacks.adversarial.art must be attacks by name"),
        ({"art": {"square": 3}}, "callbacks.adversarial.art.square must be settings with a _target_"),
        ({"art": {"square": {"eps": "a/b"}}}, "callbacks.adversarial.art.square.eps takes numbers"),
        ({"art": {"square": {"eps": 8}}}, "callbacks.adversarial.art.square.eps must be from 0 to 1"),
        ({"art": {"square": {"eps": 8, "norm": 2}}}, "art.square has norm=2, .* call it square_l2"),
        ({"test_episodes": -1}, "callbacks.adversarial.test_episodes must be"),
        ({"epsilon": [0.1]}, "callbacks.adversarial.epsilon is no setting"),
        ({"attacks": [], "support": False}, "callbacks.adversarial must have something to attack at the test"),
        ({"attacks": ["pgd_l2", "noise"], "l2_eps": [], "linf_eps": []}, "must have something to attack at the test"),
    ],
)
def test_bad_settings_name_their_key(settings, message):
    with pytest.raises(ConfigError, match=message):
        from_yaml(**settings)


def test_attacks_in_training_alone_need_none_at_the_test():
    assert from_yaml(attacks=[], support=False, test_episodes=0).fit_suite.attacks == ("pgd_linf",)


class Data:
    """Floats that were normalised before the network."""

    def __init__(self, factor, ways=3):
        self.factor, self.ways = factor, ways

    def task_settings(self):
        return {"ways": self.ways}

    def draw(self, split, epoch, index):
        return dataclasses.replace(make_episode(), query_x=self.factor * make_episode().query_x)


def test_data_that_cannot_be_attacked_are_refused(tmp_path):
    config = OmegaConf.create({"choices": {"data": "mine"}, "trainer": {"precision": "32-true"}})
    callback, method = from_yaml(), adapted(MetaRKHSII)
    callback.prepare(Run(method, Data(1.0), config, tmp_path))
    with pytest.raises(DataError, match=r"images in \[0, 1\]"):
        callback.prepare(Run(method, Data(-3.0), config, tmp_path))
    config.trainer.precision = "bf16-true"
    with pytest.raises(ConfigError, match=r"trainer\.precision=bf16-true images are rounded"):
        callback.prepare(Run(method, Data(1.0), config, tmp_path))
    config.trainer.precision = None
    method.spec = TaskSpec("classification", (4,), 3)
    with pytest.raises(ConfigError, match=r"data=mine has inputs of shape \(4,\)"):
        callback.prepare(Run(method, Data(1.0), config, tmp_path))
    method.spec = TaskSpec("classification", (1, 16, 16), 2)
    with pytest.raises(ConfigError, match="dlr needs three ways"):
        from_yaml(loss="dlr").prepare(Run(method, Data(1.0), config, tmp_path))
    headless = adapted(ProtoNet)  # Its outputs are the ways of the test, whatever those of training.
    from_yaml(loss="dlr").prepare(Run(headless, Data(1.0, ways=5), config, tmp_path))
    with pytest.raises(ConfigError, match=r"adversarial\.loss=dlr needs three ways or more, but data\.eval_ways is 2"):
        from_yaml(loss="dlr").prepare(Run(headless, Data(1.0, ways=2), config, tmp_path))
    config.choices.method = "reptile"
    with pytest.raises(ConfigError, match=r"through_adaptation needs gradients .* method=reptile does not pass on"):
        from_yaml(through_adaptation=True).prepare(Run(adapted(Reptile), Data(1.0), config, tmp_path))


def test_a_trainer_of_ones_own_is_asked_for_its_precision_too():
    data, method = Glyphs(ways=3, queries=3), adapted(ProtoNet)
    with pytest.raises(ConfigError, match=r"trainer\.precision=bf16-true images are rounded"):
        plain_trainer(from_yaml(), precision="bf16-true").fit(method, data)


def test_an_answer_that_is_no_number_counts_as_wrong():
    task = _Task(lambda x: x, torch.zeros(2, 1, 4, 4), torch.tensor([0, 0]))
    assert task.accuracy(torch.tensor([[torch.nan, torch.nan], [1.0, 0.0]])) == 0.5


@pytest.mark.parametrize("norm", [1, 3, "l2"])
def test_arts_attacks_within_norms_without_a_unit_are_refused(norm):
    settings = {"_target_": "art.attacks.evasion.FastGradientMethod", "norm": norm, "eps": 0.9}
    with pytest.raises(ConfigError, match=r"adversarial\.art\.mine\.norm must be 2 or inf"):
        Adversarial(art={"mine": settings})
    Adversarial(art={"mine": {**settings, "norm": "inf"}})
