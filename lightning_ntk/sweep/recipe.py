"""What a search found, as a recipe: settings of a method on a data set that `--config-dir OUT` brings into a run."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from lightning_ntk.settings.overrides import key_of, parse


def write_recipe(
    folder: Path, method: str, data: str, values: dict[str, Any], comment: str, searched: Sequence[Path] = ()
) -> Path:
    """Write FOLDER/recipe/METHOD_DATA.yaml.

    Args:
        searched: configuration folders whose recipe for this pair, if there is one, was in force: the last one counts.
        values: `{key: value}` of plain settings: a recipe cannot choose from a group.
        comment: the line that --help shows.
    """
    before = [file for root in searched if (file := root / "recipe" / f"{method}_{data}.yaml").is_file()]
    settings = OmegaConf.load(before[-1]) if before else OmegaConf.create()
    for key, value in values.items():
        # A value from a list is written as in an override.
        plain = parse(f"{key_of(key)}={value}").value() if isinstance(value, str) else value
        OmegaConf.update(settings, key_of(key), plain, force_add=True)
    file = folder / "recipe" / f"{method}_{data}.yaml"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f"# @package _global_\n# {comment}\n{OmegaConf.to_yaml(settings)}", encoding="utf-8")
    return file
