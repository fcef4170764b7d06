"""`lightning-ntk data`: what a data set holds, what is wrong with it, and a picture of three episodes."""

import json
import sys
from pathlib import Path

import pytorch_lightning as pl
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table

from lightning_ntk.episode_picture import draw_episodes
from lightning_ntk.errors import ConfigError, DataError, LightningNTKError
from lightning_ntk.settings.arguments import FLAGS, parse_command
from lightning_ntk.settings.building import instantiate
from lightning_ntk.settings.config import compose_config, conf_folder, groups
from lightning_ntk.settings.overrides import key_of, last_value
from lightning_ntk.settings.paths import as_path
from lightning_ntk.train import quiet

HELP = """usage: lightning-ntk data data=CHOICE [data.KEY=VALUE ...] [out=FOLDER]

Print how many classes and images each split has, and what is wrong: images that splits share, images that cannot be
read, classes too small for the task that data.ways, data.shots and data.queries ask for. Write data.json and
episodes.png, a picture of three episodes. The exit status is 2 when something is wrong.

  data=
{choices}
  out=FOLDER          where the two files go; default ./runs/data/CHOICE

Options:
{flags}

Examples:
  lightning-ntk data data=glyphs data.ways=5 data.shots=5
  lightning-ntk data data=image_folder data.root=PATH
  lightning-ntk data data=from_dataset data.dataset._target_=torchvision.datasets.CIFAR100 +data.dataset.root=PATH
"""
MOST_LINES = 20  # of findings that are printed
FILES = ("data.json", "episodes.png")


def main(argv: list[str] | None = None) -> None:
    """Survey the data set that the command line names; see `lightning-ntk data --help`."""
    words = list(sys.argv[1:] if argv is None else argv)
    if "--help" in words or "-h" in words:
        choices = groups([conf_folder()])["data"]
        lines = "\n".join(f"    {choice:<18}{text}" for choice, text in choices.items())
        sys.stdout.write(HELP.format(choices=lines, flags=FLAGS))
        return
    command = parse_command("data", words)
    overrides = [o for o in command.overrides if key_of(o) != "out"]
    config = compose_config("train", overrides, command.config_folder)
    if command.show_config:
        sys.stdout.write(OmegaConf.to_yaml(config.data))
        return
    out = last_value(command.overrides, "out")
    survey(config, Path("runs") / "data" / config.choices.data if out is None else as_path(out, "out"))


def survey(config: DictConfig, folder: Path) -> None:
    """Print the table and the findings, and write the files.

    Raises:
        ConfigError: for settings that cannot be, or a folder that cannot be written.
        DataError: something is wrong with the data; what, has been printed.
    """
    quiet()
    data = instantiate(config.data, "data", pl.LightningDataModule)
    found = data.survey()
    show(found.rows)
    show_lines(found.findings)
    if found.notes:
        sys.stdout.write("Not wrong, but to be known:\n")
        show_lines(found.notes)
    content = {"data": config.choices.data, "splits": found.rows, "findings": found.findings, "notes": found.notes}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / FILES[0]).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        (folder / FILES[1]).unlink(missing_ok=True)  # Of an earlier call.
        is_drawn = write_picture(data, folder / FILES[1], found.findings)
    except OSError as error:
        raise ConfigError(f"out={folder} cannot be written: {error}. Name another folder by out=.") from error
    sys.stdout.writelines(f"{folder / name}\n" for name in FILES[: 1 + is_drawn])
    if found.findings:
        things = "1 thing is" if len(found.findings) == 1 else f"{len(found.findings)} things are"
        raise DataError(f"{things} wrong with data={config.choices.data}, listed above.")


def show_lines(lines: list[str]) -> None:
    """Print what a survey says. A file's name may hold bytes that are no text: they become question marks."""
    sys.stdout.writelines(f"{line.encode(errors='replace').decode()}\n" for line in lines[:MOST_LINES])
    if len(lines) > MOST_LINES:
        sys.stdout.write(f"... and {len(lines) - MOST_LINES} more, in {FILES[0]}\n")


def show(rows: list[dict]) -> None:
    """Print the table of the splits."""
    if not rows:
        return
    table = Table()
    for name, value in rows[0].items():
        table.add_column(name, justify="left" if isinstance(value, str) else "right")
    for row in rows:
        table.add_row(*map(str, row.values()))
    Console(width=None if sys.stdout.isatty() else 150, markup=False, highlight=False).print(table)


def write_picture(data: pl.LightningDataModule, file: Path, findings: list[str]) -> bool:
    """Three episodes, shared out over the splits that there are; False when the findings leave none."""
    data.allow_shared_images = True  # They have been told of.
    try:
        data.setup()
        splits = [split for split in ("train", "val", "test") if data.has_split(split)]
        for split in splits:
            data.check_drawn(split)
    except LightningNTKError:
        if not findings:
            raise
        return False
    rounds = [(split, index) for index in range(3) for split in reversed(splits)]
    chosen = sorted(rounds[:3], key=lambda episode: (splits.index(episode[0]), episode[1]))
    draw_episodes(file, [(f"{split}, episode {index}", data.draw(split, 0, index)) for split, index in chosen])
    return True
