"""The README's examples run as they stand there."""

import re
from pathlib import Path

import pytest
from test_train import TINY

from lightning_ntk import train
from lightning_ntk.running.results import read_results

README = (Path(__file__).resolve().parents[1] / "README.md").read_text()
BLOCKS = re.findall(r"```(?:python|yaml)\n(.*?)```", README, re.DOTALL)


def write_named_blocks():
    for block in BLOCKS:
        first, _, rest = block.partition("\n")
        if match := re.fullmatch(r"# (\S+\.(?:py|yaml))", first):
            file = Path(match.group(1))
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(rest)


@pytest.mark.parametrize("choice", ["method=bias_only", "network=one_layer", "data=stripes"])
def test_a_method_a_network_and_a_data_set_are_added_as_the_readme_says(choice, monkeypatch, tmp_path):
    write_named_blocks()
    monkeypatch.syspath_prepend(str(tmp_path))
    # The group first: the sizes below belong to its settings.
    train.main(["--config-dir", "my_conf", choice, *(o for o in TINY if "data." not in o), "run_dir=run", *SIZES])
    result = read_results(Path("run"))
    assert len(result.episodes["test/accuracy"]) == 3
    assert choice.partition("=")[2] in (result.method, result.data, result.config["choices"]["network"])
    assert len(re.findall(r"```python\n# my_\w+\.py\n(?:.*\n){1,22}```", README)) == 3, "twenty lines or so each"


SIZES = [
    "++data.tasks_per_step=2",
    "++data.val_episodes=2",
    "++data.test_episodes=3",
    "data.queries=3",
    "network.filters=8",
]


def test_the_functions_are_used_as_the_readme_says():
    (block,) = [block for block in BLOCKS if "gradient_flow" in block]
    names = {}
    exec(block, names)
    assert names["coefficients"].shape == (8,)


@pytest.mark.filterwarnings("ignore::UserWarning")  # Advice of Lightning on loggers and workers.
def test_the_parts_are_put_into_a_trainer_as_the_readme_says():
    (block,) = [block for block in BLOCKS if "pl.Trainer" in block]
    for many, few in (("max_epochs=6", "max_epochs=1"), ("steps_per_epoch=50", "steps_per_epoch=2, test_episodes=3")):
        assert many in block
        block = block.replace(many, few)
    names = {}
    exec(block, names)
    assert len(names["method"].scores["accuracy"]) == 3
    assert "ntk/condition_number" in names["trainer"].callback_metrics


def test_a_run_is_loaded_as_the_readme_says():
    train.main([*TINY, "data=glyphs", "network.filters=8", "run_dir=runs/NAME", "data.queries=3"])
    (block,) = [block for block in BLOCKS if "load_method" in block]
    names = {}
    exec(block, names)
    assert names["method"].how.t == 100.0
    assert names["episodes"].support_x.shape == (8, 25, 1, 28, 28)
    assert names["accuracy"].shape == (8,)
    assert names["probabilities"].shape == (15, 5)


@pytest.mark.parametrize("name", ["demo", "omniglot", "sine"])
@pytest.mark.parametrize("page", ["README.md", "docs/RESULTS.md"])
def test_the_tables_are_those_of_the_result_files(name, page):
    repository = Path(__file__).resolve().parents[1]
    table = (repository / "docs" / "results" / name / "comparison.md").read_text().strip()
    assert table in (repository / page).read_text()


@pytest.mark.parametrize("file", ["tiny_imagenet/overview.md", "sine/overview.md"])
def test_the_further_results_have_the_tables_of_their_files(file):
    docs = Path(__file__).resolve().parents[1] / "docs"
    assert (docs / "results" / file).read_text().strip() in (docs / "RESULTS.md").read_text()
