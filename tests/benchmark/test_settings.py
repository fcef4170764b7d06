"""The benchmark's command line."""

import subprocess
import sys
from pathlib import Path

import pytest

from lightning_ntk import cli
from lightning_ntk.benchmark.settings import LEAST, TABLES, Settings, help_page, parse_settings
from lightning_ntk.errors import ConfigError


def test_words_become_settings():
    settings = parse_settings(
        ["device=cuda", "tables=steps,memory", "norms=group,batch", "threads=3", "level=0.5", "runs=x"]
    )
    assert settings.tables == ("steps", "memory")
    assert settings.norms == ("group", "batch")
    assert (settings.threads, settings.level) == (3, 0.5)
    assert settings.tasks == 16, "a GPU takes a meta-batch"
    assert parse_settings(["device=cuda", "tasks=2"]).tasks == 2
    assert parse_settings([]) == Settings()
    assert parse_settings([]).is_standard


def test_quick_is_small_and_gives_way_to_words():
    quick = parse_settings(["--quick", "image_size=20"])
    assert quick.quick
    assert not quick.is_standard
    assert quick.repeats == 2
    assert quick.image_shape == (3, 20, 20)
    assert quick.out == Path("runs/benchmark_quick")
    assert parse_settings(["runs=r"]).out == Path("runs/benchmark_runs")
    assert parse_settings(["runs=r", "out=runs/benchmark"]).out == Path("runs/benchmark")
    assert not parse_settings(["channels=1"]).is_standard


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("devise=cpu", "no setting 'devise'. Did you mean 'device'"),
        ("device=gpu", "device must be cpu or cuda, but got 'gpu'"),
        ("tables=kernel,step", "tables=step does not exist. Did you mean 'steps'"),
        ("norms=none", "norms=none does not exist"),
        ("repeats=0", "repeats must be a whole number of at least 1, but got '0'"),
        ("repeats=2.5", "repeats must be a whole number"),
        ("image_size=8", "image_size must be a whole number of at least 16"),
        ("level=0.7", r"level= is read off finished runs: .* runs=FOLDER"),
        ("level=70", r"level must be an accuracy in \(0, 1\], but got '70'"),
        ("seed=99999999999999999999999", "seed must be a whole number of at most 2147483647"),
        ("--tables=steps", r"no option --tables=steps\. Write tables=steps\."),
        ("limit_s=soon", "limit_s must be a positive number of seconds, but got 'soon'"),
        ("--quik", "no option --quik. Did you mean '--quick'"),
        ("quick=true", "no setting 'quick'"),
        ("repeats", "KEY=VALUE, but got 'repeats'"),
        ("filters=12", "filters=12 is no multiple of 8"),
    ],
)
def test_a_bad_word_is_named(word, message):
    with pytest.raises(ConfigError, match=message):
        parse_settings([word])


def test_bad_values_are_one_line_and_status_2(capsys, monkeypatch):
    assert cli.main(["benchmark", "peers=/nowhere"]) == 2
    assert capsys.readouterr().err.startswith("lightning-ntk: peers=/nowhere is no Python")
    Path("file").touch()
    assert cli.main(["benchmark", "out=file/folder"]) == 2
    assert "out=file/folder cannot be written" in capsys.readouterr().err
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert cli.main(["benchmark", "device=cuda"]) == 2
    assert "torch sees no GPU" in capsys.readouterr().err


def test_help_names_every_setting_and_needs_no_torch():
    page = help_page()
    assert all(f"  {name}=" in page or f" {name}=" in page for name in ["device", "out", "runs", "norms", *LEAST])
    assert all(name in page for name in TABLES)
    assert max(map(len, page.splitlines())) <= 140
    code = (
        "import sys; from lightning_ntk.cli import main; assert main(['benchmark', '--help']) == 0;"
        "bad = {'torch', 'numpy', 'omegaconf', 'rich'} & sys.modules.keys(); sys.exit(str(bad) if bad else 0)"
    )
    top = Path(cli.__file__).resolve().parents[1]
    run = subprocess.run([sys.executable, "-c", code], cwd=top, check=True, capture_output=True, text=True)
    assert run.stdout == page
