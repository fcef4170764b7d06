"""The examples of docs/DATA.md run as they stand there."""

import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from test_train import TINY

from datamodules.from_arrays import FromArrays
from lightning_ntk import cli
from lightning_ntk.running.results import read_results

PAGE = (Path(__file__).resolve().parents[1] / "docs" / "DATA.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(?:python|yaml)\n# (\S+)\n(.*?)```", PAGE, re.DOTALL)
# Without CIFAR-100, which would be fetched.
COMMANDS = re.findall(r"^    (?:PYTHONPATH=\. )?lightning-ntk (train .*[^\\\n])$", PAGE, re.MULTILINE)
SIZES = [*(o for o in TINY if "data." not in o), "++data.tasks_per_step=2", "++data.val_episodes=2"]


@pytest.fixture
def files(tmp_path, monkeypatch):
    """The files that the page shows, and the images that it speaks of."""
    for name, text in BLOCKS:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(text)
    rng = np.random.default_rng(0)
    arrays = {}
    for split in ("train", "val", "test"):
        for tree in ("oak", "elm", "ash", "fir"):
            arrays[f"{split}-{tree}_{split}"] = images = rng.integers(0, 256, (6, 3, 32, 32), dtype=np.uint8)
            folder = Path("leaves") / split / f"{tree}_{split}"
            folder.mkdir(parents=True)
            for number, image in enumerate(images):
                Image.fromarray(image.transpose(1, 2, 0)).save(folder / f"{number}.png")
    np.savez("trees.npz", **arrays)
    monkeypatch.syspath_prepend(str(tmp_path))


@pytest.mark.parametrize("command", COMMANDS)
def test_every_way_to_plug_data_in_trains(command, files):
    words = command.split()
    assert cli.main([*words, *SIZES, "++data.test_episodes=3", "run_dir=run"]) == 0
    result = read_results(Path("run"))
    assert f"data={result.data}" in words
    assert all(len(scores) == 3 for scores in result.episodes.values())
    # Though not all of their YAMLs say so.
    assert result.config["data"]["seed"] == result.seed
    assert result.config["data"]["steps_per_epoch"] == result.config["val_every"]


def test_splits_of_other_names_are_told_of_by_the_example_too(files, capsys):
    with np.load("trees.npz") as arrays:
        np.savez("trees.npz", **{name.replace("val-", "valid-old-"): images for name, images in arrays.items()})
    assert cli.main(["data", "--config-dir", "my_conf", "data=npz", "out=seen"]) == 2
    assert "has the split 'valid'; expected train, val, test. Did you mean 'val'?" in capsys.readouterr().out


def test_the_page_shows_the_three_ways_and_a_yaml_is_short(files):
    assert {name for name, _ in BLOCKS if name.endswith(".py")} == {"my_npz.py", "my_signs.py", "my_parabolas.py"}
    assert [re.search(r"data=(\w+)", command).group(1) for command in COMMANDS] == [
        "leaves",
        "npz",
        "from_dataset",
        "parabolas",
    ]
    texts = dict(BLOCKS)
    assert all(len(text.strip().splitlines()) <= 8 for name, text in BLOCKS if name.endswith(".yaml"))
    assert texts["my_npz.py"].count("def ") == 2
    assert cli.main(["data", "--config-dir", "my_conf", "data=leaves", "out=seen"]) == 0
    assert Path("seen/episodes.png").stat().st_size > 10000


def test_a_loop_of_ones_own_has_other_episodes_in_each_epoch_that_it_is_told_of():
    (loop,) = re.findall(r"```python\n(data\.prepare_data.*?)```", PAGE, re.DOTALL)
    rng = np.random.default_rng(0)
    splits = {
        split: {f"{split}{k}": rng.integers(0, 256, (6, 1, 8, 8), dtype=np.uint8) for k in range(4)}
        for split in ("train", "test")
    }
    data = FromArrays(splits=splits, ways=3, queries=2, tasks_per_step=2, steps_per_epoch=3, augment="flip")

    def seen(text):
        taken = []
        exec(text, {"data": data, "method": SimpleNamespace(meta_loss=taken.append)})
        assert all(episodes.query_x.is_floating_point() for episodes in taken)
        return [float(episodes.query_x.sum()) for episodes in taken]

    assert len(set(seen(loop))) == len(seen(loop)) == 10 * 3
    untold = seen(loop.replace("loader.sampler.set_epoch(epoch)", "pass"))
    assert untold == seen(loop)[:3] * 10
