"""Composition of the configuration and its errors."""

import sys
from collections.abc import Sequence
from typing import Literal

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from lightning_ntk.episode import TaskSpec
from lightning_ntk.errors import ConfigError
from lightning_ntk.networks.mlp import MLP
from lightning_ntk.settings.building import check_types, instantiate
from lightning_ntk.settings.config import compose_config, conf_folder, groups
from lightning_ntk.settings.overrides import still_valid


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.wayz=5", r"'data\.wayz'.*Did you mean 'data\.ways'"),
        ("metod=maml", r"'metod'.*Did you mean 'method'"),
        ("method=meta_rkhs_3", r"method=meta_rkhs_3 does not exist.*Did you mean 'meta_rkhs_i+'.*Choices: anil"),
        ("data=glyfs", r"Did you mean 'glyphs'"),
        ("method.inner_lr=1", r"'method\.inner_lr'"),
        ("method.lamda=1", r"'method\.lamda'\. See"),
        ("callbacks.ntk.fit_every=2", r"It belongs to callbacks=ntk, which is not chosen: callbacks=\[\.\.\.,ntk\]"),
        ("callbacks.timing._traget_=x", r"Did you mean 'callbacks\.timing\._target_'"),
        ("callbacks=timng", r"callbacks=timng does not exist.*Did you mean 'timing'"),
        ("callbacks=[default,timng]", r"callbacks=timng does not exist.*Did you mean 'timing'"),
        ("callbacks=[timing,3]", r"callbacks takes its choices, one or a list \(callbacks=\[A,B\]\)"),
        ("callbacks=default,timing", r"stand in brackets: callbacks=\[default,timing\]"),
        ("method=[maml,anil]", r"method takes one of its choices"),
        ("nonsense", r"KEY=VALUE"),
        ("data.ways=[1", r"KEY=VALUE"),
    ],
)
def test_misspelt_overrides_get_the_nearest_name(override, message):
    with pytest.raises(ConfigError, match=message):
        compose_config("train", [override])


def test_sine_waves_select_the_mlp_and_their_recipe_unless_told_otherwise():
    config = compose_config("train", ["method=maml", "data=sinusoid"])
    assert config.network._target_.endswith("MLP")
    assert config.method.inner_lr == 0.01
    assert compose_config("train", ["method=maml", "data=sinusoid", "method.inner_lr=7"]).method.inner_lr == 7
    assert compose_config("train", ["data=sinusoid", "network=conv4"]).network._target_.endswith("Conv4")
    assert compose_config("train", ["method=maml", "data=glyphs"]).method.inner_lr == 0.1


def test_several_callbacks_are_chosen_in_a_list_and_the_last_list_counts():
    default = compose_config("train", [])
    assert list(default.callbacks) == ["timing"]
    assert compose_config("train", ["callbacks=[timing]"]).callbacks == default.callbacks
    assert compose_config("train", ["callbacks=[default,timing]"]).callbacks == default.callbacks
    assert compose_config("train", ["callbacks=[]"]).get("callbacks") is None
    assert compose_config("train", ["callbacks=default"], inherited=["callbacks=[]"]).callbacks == default.callbacks


def test_an_experiment_sets_what_the_command_line_may_still_change():
    demo, plain = compose_config("train", ["experiment=demo"]), compose_config("train", [])
    assert demo.data.test_episodes < plain.data.test_episodes
    assert demo.steps < plain.steps
    assert compose_config("train", ["experiment=demo", "steps=7"]).steps == 7


def test_what_an_experiment_sets_for_a_callback_that_is_not_chosen_is_left_out_unless_asked_for():
    assert list(compose_config("train", ["experiment=demo", "callbacks=timing"]).callbacks) == ["timing"]
    # A run trained by the experiment, evaluated with other callbacks.
    assert list(compose_config("train", ["callbacks=timing"], inherited=["experiment=demo"]).callbacks) == ["timing"]
    asked = compose_config("train", ["experiment=demo", "callbacks=timing", "callbacks.ntk.test_episodes=3"])
    assert set(asked.callbacks) == {"timing", "ntk"}  # Which `train` refuses.


# What a choice cannot know.
MANDATORY = {"from_dataset": ["data.dataset._target_=my.Dataset"]}


def test_every_choice_describes_itself_in_one_line_and_composes():
    for group, choices in groups([conf_folder()]).items():
        for choice, text in choices.items():
            assert 10 < len(text) < 110, f"{group}/{choice}"
            if group not in ("recipe",):
                assert compose_config("train", [f"{group}={choice}", *MANDATORY.get(choice, [])])


def test_a_folder_of_ones_own_adds_choices(tmp_path):
    (tmp_path / "method").mkdir()
    (tmp_path / "method" / "mine.yaml").write_text("# Mine.\n_target_: my.Method\nlr: 0.5\n")
    config = compose_config("train", ["method=mine", "method.lr=2"], str(tmp_path))
    assert config.method == {"_target_": "my.Method", "lr": 2}
    with pytest.raises(ConfigError, match="--config-dir"):
        compose_config("train", [], str(tmp_path / "missing"))


def test_instantiate_names_the_key_that_a_class_does_not_take():
    config = OmegaConf.create({"_target_": "lightning_ntk.methods.maml.MAML", "inner_lrr": 0.1})
    with pytest.raises(ConfigError, match=r"method\.inner_lrr is no setting of .*MAML\. Did you mean 'inner_lr'"):
        instantiate(config, "method", network=MLP((1,), 1), spec=TaskSpec("regression", (1,), 1))
    with pytest.raises(ConfigError, match=r"method: .*no_such_module"):
        instantiate(OmegaConf.create({"_target_": "no_such_module.X"}), "method")
    with pytest.raises(ConfigError, match=r"method\.network cannot be set: the run gives it"):
        instantiate(OmegaConf.create({**config, "network": 3}), "method", network=MLP((1,), 1))


@pytest.mark.parametrize(
    ("text", "target", "message"),
    [
        ("class Net:\n    pass\n", "Net", r"must take what it is given .*, the keyword arguments input_shape, outputs"),
        ("", "Net", r"Error locating target 'my_module\.Net': my_module has no Net"),
        ("def (:\n", "Net", r"Error locating target 'my_module\.Net': SyntaxError: invalid syntax"),
        (
            "import no_such_package\n",
            "Net",
            r"No module named 'no_such_package' \(.*my_module\.py, line 1\)\. Install it",
        ),
        ("x = 1\ny = 1 / 0\n", "Net", r"ZeroDivisionError: division by zero \(.*my_module\.py, line 2\)"),
    ],
)
def test_what_is_wrong_with_a_class_of_ones_own_is_said(text, target, message, tmp_path, monkeypatch):
    (tmp_path / "my_module.py").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "my_module", raising=False)
    with pytest.raises(ConfigError, match=message):
        instantiate(OmegaConf.create({"_target_": f"my_module.{target}"}), "network", input_shape=(1,), outputs=1)


def test_a_recipe_of_ours_is_not_put_on_top_of_a_method_of_ones_own(tmp_path):
    (tmp_path / "method").mkdir()
    (tmp_path / "method" / "maml.yaml").write_text("# Mine.\n_target_: my.MAML\ninner_lr: 0.77\n")
    config = compose_config("train", ["method=maml", "data=sinusoid"], str(tmp_path))
    assert config.method == {"_target_": "my.MAML", "inner_lr": 0.77}
    asked = compose_config("train", ["method=maml", "data=sinusoid", "recipe=maml_sinusoid"], str(tmp_path))
    assert asked.method.inner_lr == compose_config("train", ["method=maml", "data=sinusoid"]).method.inner_lr != 0.77
    (tmp_path / "recipe").mkdir()
    recipe = "# @package _global_\n# Mine.\nmethod: {inner_lr: 0.5}\n"
    (tmp_path / "recipe" / "maml_sinusoid.yaml").write_text(recipe)
    assert compose_config("train", ["method=maml", "data=sinusoid"], str(tmp_path)).method.inner_lr == 0.5


@pytest.mark.parametrize("path", ["2024_01_31", "1e3", "0017", "2024_01_31/x"])
def test_a_path_that_looks_like_a_number_stays_what_it_is(path):
    config = compose_config("train", [f"run_dir={path}", "data=image_folder", f"data.root={path}"])
    assert (config.run_dir, config.data.root) == (path, path)
    assert compose_config("train", ["run_dir=null"]).run_dir is None


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["method=maml", "method.inner_lrr=1"], r"Did you mean 'method\.inner_lr'"),
        (["data=image_folder", "data.roott=x"], r"Did you mean 'data\.root'"),
        (["method=mine", "method.heigth=1"], r"Did you mean 'method\.height'"),
        (["lr=0.1"], r"Did you mean 'method\.lr'"),
        (["method=terse", "method.inner_lr=1"], r"MAML takes it, but its YAML does not list it: add it by \+method\."),
        (["method=terse", "method.inner_lrr=1"], r"There is no setting 'method\.inner_lrr'"),
        (["+choices.method=maml"], r"choices records what was chosen"),
    ],
)
def test_the_nearest_key_is_one_of_the_chosen_groups(overrides, message, tmp_path):
    (tmp_path / "method").mkdir()
    (tmp_path / "method" / "mine.yaml").write_text("# Mine.\n_target_: my.Method\nheight: 0.5\n")
    (tmp_path / "method" / "terse.yaml").write_text("# Terse.\n_target_: lightning_ntk.methods.maml.MAML\n")
    with pytest.raises(ConfigError, match=message):
        compose_config("train", overrides, str(tmp_path))
    with pytest.raises(ConfigError) as caught:  # Sine waves have no ways: nothing may say that they do.
        compose_config("train", ["data=sinusoid", "data.ways=5"])
    assert "Did you mean 'data.ways'" not in str(caught.value)


@pytest.mark.parametrize("override", ["method=null", "experiment=null", "~method", "network@x=mlp"])
def test_what_hydra_would_not_take_is_an_error_of_ours(override):
    with pytest.raises(ConfigError, match=override.strip("~").partition("=")[0]):
        compose_config("train", [override])


def test_a_choice_that_need_not_be_made_can_be_left_out():
    words = ["method=maml", "data=sinusoid"]
    tuned, plain = compose_config("train", words), compose_config("train", [*words, "~recipe"])
    assert tuned.method.inner_lr != plain.method.inner_lr
    with pytest.raises(ConfigError, match="recipe=null: recipe takes one of its choices, or choose none by ~recipe"):
        compose_config("train", ["recipe=null"])


def test_a_file_that_is_no_yaml_is_named_with_its_line(tmp_path):
    (tmp_path / "method").mkdir()
    (tmp_path / "method" / "mine.yaml").write_text("# Mine.\n_target_: my.Method\nlr: 1e-3\n\tfoo: 2\n")
    with pytest.raises(ConfigError, match=r"mine\.yaml.*, line 4 is not readable YAML: found character '\\t'"):
        compose_config("train", ["method=mine"], str(tmp_path))


@pytest.mark.parametrize("path", [r"C:\data\a(b", "it's", r"it\'s (1)", "a(\\"])
def test_a_path_arrives_as_it_was_written(path):
    assert compose_config("train", ["data=image_folder", f"data.root={path}"]).data.root == path


def test_a_composition_leaves_another_hydra_application_alone():
    with initialize_config_dir(config_dir=str(conf_folder()), version_base="1.3"):
        compose_config("train", ["seed=1"])
        with pytest.raises(ConfigError):
            compose_config("train", ["sed=1"])
        assert compose("train", overrides=["seed=2"]).seed == 2


def typed(
    whole: int = 1,
    real: float | None = None,
    on: bool = False,
    widths: Sequence[int] = (),
    kind: Literal["a"] = "a",
    unknown: "Nowhere" = None,  # noqa: F821
):
    return "built"


class Typed:
    def __init__(
        self,
        whole: int,
        real: float | None,
        on: bool,
        widths: Sequence[int],
        kind: Literal["a"],
        either: list[int] | tuple[int, ...] | None = None,
        any_number: int | float | None = None,
    ) -> None:
        """Takes what its annotations say."""


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"whole": "abc"}, r"net\.whole must be a whole number, but got 'abc'"),
        ({"whole": 1.5}, r"net\.whole must be a whole number"),
        ({"whole": True}, r"net\.whole must be a whole number"),
        ({"real": "abc"}, r"net\.real must be a number or null, but got 'abc'"),
        ({"any_number": "abc"}, r"net\.any_number must be a number or null, but got 'abc'"),
        ({"either": "abc"}, r"net\.either must be a list \(each item a whole number\) or null, but got 'abc'"),
        ({"on": "maybe"}, r"net\.on must be true or false"),
        ({"widths": 5}, r"net\.widths must be a list \(each item a whole number\), but got 5"),
        ({"widths": ["a"]}, r"net\.widths must be "),
    ],
)
def test_a_setting_of_the_wrong_type_is_named(setting, message):
    with pytest.raises(ConfigError, match=message):
        check_types(setting, Typed, "net")


def test_the_settings_that_a_class_hands_on_are_checked_too():
    class Handing(Typed):
        def __init__(self, *, own: str, **rest) -> None:
            super().__init__(**rest)

    with pytest.raises(ConfigError, match=r"data\.on must be true or false, but got 'maybe'"):
        check_types({"own": "x", "on": "maybe"}, Handing, "data")
    with pytest.raises(ConfigError, match=r"data\.own must be text"):
        check_types({"own": 5}, Handing, "data")
    check_types({"self": 5, "rest": 5, "other": 5}, Handing, "data")


def test_settings_of_the_right_types_pass():
    check_types({"whole": 1, "real": 2, "on": True, "widths": [3, 4], "kind": "b"}, Typed, "net")
    check_types({"real": None, "widths": []}, Typed, "net")
    check_types({"whole": "abc"}, typed, "net")  # Annotations that cannot be resolved check nothing.


@pytest.mark.parametrize(
    ("earlier", "later", "kept"),
    [
        (["+x=1"], ["+x=2"], []),
        (["+x=1"], ["x=2"], ["+x=1"]),
        (["+x=1"], ["++x=2"], ["+x=1"]),
        (["+x=1"], ["~x"], ["+x=1"]),
        (["++x=1"], ["+x=2"], []),
        (["++x=1"], ["++x=2"], ["++x=1"]),
        (["~steps"], ["~steps"], []),
        (["~steps"], ["steps=2"], []),
        (["~steps"], ["+steps=2"], ["~steps"]),
        (["~steps", "+steps=1"], ["~steps", "+steps=1"], []),
        (["~recipe"], ["~recipe"], []),
        (["steps=1", "+x=1"], ["steps=2", "+y=1"], ["steps=1", "+x=1"]),
    ],
)
def test_overrides_of_a_run_and_those_given_now_are_what_hydra_takes(earlier, later, kept):
    assert still_valid(earlier, later) == kept
    with initialize_config_dir(config_dir=str(conf_folder()), version_base="1.3"):
        compose("train", overrides=[*kept, *later])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"defaults: [x]\n", "defaults of the configuration lead back to where they began"),
        (b"defaults: [override /optimiser: adam]\n_target_: m.X\n", "Could not override 'optimiser"),
        (b"defaults: {logger: csv}\n", r"defaults must be a list \(got mapping\)"),
        (b"lr: ${{\n", "token recognition error at"),
        (b"# caf\xe9\n_target_: m.X\n", r"method/x\.yaml is not UTF-8 text"),
    ],
)
def test_what_is_wrong_with_a_yaml_of_ones_own_is_one_line(text, message, tmp_path):
    (tmp_path / "method").mkdir()
    (tmp_path / "method" / "x.yaml").write_bytes(text)
    with pytest.raises(ConfigError, match=message) as caught:
        compose_config("train", ["method=x"], str(tmp_path))
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("logger: csv\n", r"sets it to 'csv'.*choose by logger=csv.*`- override /logger: csv`"),
        ("data: null\n", "data must be settings, but a YAML file sets it to null"),
        ("callbacks: [ntk]\n", r"raised while composing config: Cannot merge .*`- override /GROUP: \[A, B\]`"),
        ("experiment: sine\n", r"experiment must hold .*`# @package _global_`"),
        (None, r"experiment must hold .*`# @package _global_`"),
    ],
)
def test_a_group_is_not_chosen_as_a_plain_value(text, message, tmp_path):
    (tmp_path / "experiment").mkdir()
    experiment = "logger: {wandb: null}\n" if text is None else f"# @package _global_\n{text}"
    (tmp_path / "experiment" / "mine.yaml").write_text(experiment)
    with pytest.raises(ConfigError, match=message) as caught:
        compose_config("train", ["experiment=mine"], str(tmp_path))
    assert len(str(caught.value).splitlines()) == 1


def test_a_group_of_ones_own_may_hold_settings_of_any_place(tmp_path):
    for folder in ("experiment", "speed"):
        (tmp_path / folder).mkdir()
    (tmp_path / "speed" / "fast.yaml").write_text("# @package _global_\nsteps: 50\n")
    (tmp_path / "experiment" / "mine.yaml").write_text("# @package _global_\ndefaults: [/speed: fast]\n")
    assert compose_config("train", ["experiment=mine"], str(tmp_path)).steps == 50


def test_a_package_of_ones_own_that_hides_ours_is_named(tmp_path, monkeypatch):
    (tmp_path / "callbacks").mkdir()
    (tmp_path / "callbacks" / "__init__.py").touch()
    for name in [name for name in sys.modules if name.partition(".")[0] == "callbacks"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "meta_path", [finder for finder in sys.meta_path if "editable" not in repr(finder)])
    with pytest.raises(ConfigError, match=rf"`callbacks` is {tmp_path}/callbacks/__init__\.py here, which hides"):
        instantiate(OmegaConf.create({"_target_": "callbacks.timing.Timing"}), "callbacks.timing")
    monkeypatch.delitem(sys.modules, "callbacks")


def test_numbers_of_the_environment_are_told_how_to_be_read():
    config = OmegaConf.create({"_target_": "lightning_ntk.methods.maml.MAML", "inner_lr": "0.3"})
    with pytest.raises(ConfigError, match=r"must be a number, but got '0\.3'\. \(Of an environment .*oc\.decode"):
        instantiate(config, "method", network=MLP((1,), 1), spec=TaskSpec("regression", (1,), 1))
