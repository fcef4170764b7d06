"""The command line: help, dispatch, one-line errors."""

import io
import os
import platform
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

import lightning_ntk
from lightning_ntk import cli
from lightning_ntk.errors import ConfigError
from lightning_ntk.settings.arguments import Command, help_page, parse_command
from lightning_ntk.settings.config import conf_folder, groups


def test_help_lists_every_choice_of_every_group(capsys):
    assert cli.main(["train", "--help"]) == 0
    page = capsys.readouterr().out
    for group, choices in groups([conf_folder()]).items():
        assert f"  {group}=\n" in page
        assert all(choice in page for choice in choices)
    recipes = page.partition("  recipe=\n")[2].partition("  trainer=")[0].splitlines()
    assert len({re.match(r" +\w+ +", line).end() for line in recipes}) == 1, "one column of explanations"
    assert "steps=400" in page
    assert "--config-dir" in page
    assert max(map(len, page.splitlines())) <= 140


def test_the_help_of_sweep_lists_the_named_sweeps_and_those_of_ones_own_folder(tmp_path):
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / "mine.yaml").write_text("# What I compare.\noverrides: [seed=0]\n")
    named = help_page("sweep", str(tmp_path)).partition("  sweep=\n")[2].partition("\n\n")[0]
    for file in (conf_folder() / "sweep").glob("*.yaml"):
        assert f"    {file.stem} " in named
    assert named.splitlines()[-1].split() == ["mine", "What", "I", "compare."]


def test_each_level_has_its_help(capsys):
    for argv in ([], ["-h"], ["--help"]):
        assert cli.main(argv) == 0
        page = capsys.readouterr().out
        assert all(f"  {command}" in page for command in cli.COMMANDS)
    for command in cli.COMMANDS:
        for option in ("-h", "--help"):
            assert cli.main([command, option]) == 0
            assert capsys.readouterr().out.startswith(f"usage: lightning-ntk {command}")


def test_the_versions_are_one_line(capsys):
    assert cli.main(["--version"]) == 0
    packages = ("lightning-ntk", lightning_ntk.__version__), ("torch", version("torch"))
    packages += ("pytorch-lightning", version("pytorch-lightning")), ("python", platform.python_version())
    assert capsys.readouterr().out == ", ".join(f"{name} {number}" for name, number in packages) + "\n"


def test_errors_are_one_line_and_status_2(capsys):
    assert cli.main(["train", "data.wayz=3"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("lightning-ntk: There is no setting 'data.wayz'")
    assert error.count("\n") == 1
    assert cli.main(["trian"]) == 2
    assert "Did you mean 'train'" in capsys.readouterr().err


@pytest.mark.parametrize("buffering", [1, -1])
@pytest.mark.parametrize("error", [None, ConfigError("it is wrong")])
def test_output_that_nobody_reads_ends_a_command(buffering, error, monkeypatch, capsys):
    def command():
        sys.stdout.write("a line\n")
        if error is not None:
            raise error

    read, write = os.pipe()
    os.close(read)
    with open(write, "w", buffering=buffering) as unread:
        monkeypatch.setattr(sys, "stdout", unread)
        assert cli.guarded(command) == 1
    assert "Broken pipe" not in capsys.readouterr().err


def test_a_rank_whose_other_has_ended_says_so_in_one_line(capsys):
    def after(message):
        def command():
            raise RuntimeError(message)

        return command

    gloo = "[gloo/transport/tcp/pair.cc:561] Connection closed by peer [127.0.0.1]:34182. GLHF!"
    assert cli.guarded(after(gloo)) == 1
    error = capsys.readouterr().err
    assert error.startswith("lightning-ntk: another process of this run has ended (Connection closed by peer)")
    assert error.count("\n") == 1
    with pytest.raises(RuntimeError, match="of its own"):
        cli.guarded(after("of its own"))


def test_another_broken_pipe_is_not_taken_for_the_outputs():
    def command():
        raise BrokenPipeError("of a worker")

    with pytest.raises(BrokenPipeError, match="of a worker"):
        cli.guarded(command)


def test_unknown_options_and_multirun_are_refused():
    with pytest.raises(ConfigError, match="no option --foo"):
        parse_command("train", ["--foo"])
    with pytest.raises(ConfigError, match="lightning-ntk sweep"):
        parse_command("train", ["-m", "seed=1,2"])
    with pytest.raises(ConfigError, match="no option --config-dirr"):
        parse_command("train", ["--config-dirr=x"])


@pytest.mark.parametrize("words", [["--config-dir", "PATH"], ["--config-dir=PATH"]])
def test_a_config_folder_is_one_word_or_two(words):
    assert parse_command("train", [*words, "seed=1"]) == Command(["seed=1"], "PATH")
    with pytest.raises(ConfigError, match="needs a folder"):
        parse_command("train", ["seed=1", "--config-dir"])


def test_cfg_prints_the_composed_configuration(capsys):
    assert cli.main(["train", "--cfg", "method=maml", "seed=3"]) == 0
    assert not Path("runs").exists()
    text = capsys.readouterr().out
    assert "lightning_ntk.methods.maml.MAML" in text
    assert "seed: 3" in text


def test_help_lists_the_choices_of_ones_own_folder(tmp_path, capsys):
    (tmp_path / "method").mkdir()
    (tmp_path / "method" / "mine.yaml").write_text("# Mine alone.\n_target_: my.Method\n")
    assert cli.main(["train", "--help", "--config-dir", str(tmp_path)]) == 0
    page = capsys.readouterr().out
    assert "mine                    Mine alone." in page
    assert "maml " in page
    assert cli.main(["train", "--config-dir=nowhere", "--help"]) == 2
    assert "--config-dir=nowhere is not a folder" in capsys.readouterr().err


def test_evaluate_help_lists_its_own_settings():
    page = help_page("evaluate")
    assert "run=" in page
    assert "checkpoint=best" in page


def test_import_is_light_and_needs_neither_lightning_nor_learn2learn_nor_torchvision():
    code = (
        "import sys, lightning_ntk, lightning_ntk.ntk, lightning_ntk.energy.meta_rkhs_ii; lightning_ntk.Episode;"
        "bad = {'pytorch_lightning', 'learn2learn', 'torchvision', 'wandb', 'hydra'} & sys.modules.keys();"
        "sys.exit(str(bad) if bad else 0)"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, cwd=conf_folder().parent)


def test_signs_that_an_output_cannot_write_do_not_end_a_command(monkeypatch):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    assert cli.guarded(lambda: sys.stdout.write("5 \u2022 0:01")) == 0
    assert written.getvalue() == b"5 ? 0:01"
