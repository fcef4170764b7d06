"""What `train`, `evaluate`, `sweep` and `data` understand on the command line besides overrides, and their --help."""

import dataclasses
import sys

from lightning_ntk.errors import ConfigError
from lightning_ntk.settings.config import conf_folder, describe, groups, own_folder

EXAMPLES = {
    "train": """  lightning-ntk train method=meta_rkhs_ii data=sinusoid
  lightning-ntk train method=maml data=glyphs data.ways=20 data.shots=5 trainer.devices=2
  lightning-ntk train data=image_folder data.root=PATH data.image_size=84 network.downsample=pool
  lightning-ntk train 'callbacks=[timing,ntk,ood]'          (measure the kernel, and out of distribution)
  lightning-ntk train ckpt=RUN_FOLDER                       (go on with an unfinished run)
  lightning-ntk train ckpt=RUN_FOLDER steps=800             (train a finished one for longer)""",
    "evaluate": """  lightning-ntk evaluate run=RUN_FOLDER data.eval_shots=5
  lightning-ntk evaluate run=RUN_FOLDER 'callbacks=[ntk,ood]'
  lightning-ntk evaluate run=RUN_FOLDER method.t=inf method.ridge=1e-4
  lightning-ntk evaluate run=RUN_FOLDER data=image_folder data.root=PATH data.image_size=28 data.channels=1""",
    "sweep": """  lightning-ntk sweep 'method=glob(*)' 'seed=range(3)' data=glyphs jobs=2
  lightning-ntk sweep sweep=comparison                      (a named sweep, conf/sweep/comparison.yaml)
  lightning-ntk sweep method=maml,anil seed=0,1 launcher=ray ray.address=HOST:6379 out=SHARED_FOLDER
  lightning-ntk sweep method=maml seed=0,1 trainer.devices=8 data.tasks_per_step=8 launcher=slurm slurm.partition=gpu
  lightning-ntk sweep search=optuna trials=20 method=maml 'method.lr=tag(log, interval(1e-4, 1e-1))'
  The same command again does what is missing. Values: a,b,c  range(3)  glob(*), in quotes for the shell.""",
}
FLAGS = """  --cfg               print the composed configuration and stop
  --config-dir PATH   a folder with your own choices: PATH/method/mine.yaml makes method=mine
  --help              this page"""
SWEEP_FLAGS = """  --rerun failed|all  take up failed jobs again, or begin everything anew
  --many              allow more than max_jobs jobs
  --cfg               print the jobs and stop"""


@dataclasses.dataclass(frozen=True)
class Command:
    """The overrides of a command line, the user's own configuration folder, and whether only to show the config."""

    overrides: list[str]
    config_folder: str | None = None
    show_config: bool = False


def parse_command(name: str, argv: list[str] | None) -> Command | None:
    """Split a command line; None when it asked for --help, which is answered here."""
    words = list(sys.argv[1:] if argv is None else argv)
    overrides, folder, show, needs_help = [], None, False, False
    while words:
        word = words.pop(0)
        if word in ("-h", "--help"):
            needs_help = True
        elif word == "--cfg":
            show = True
        elif word.partition("=")[0] == "--config-dir":
            folder = word.partition("=")[2] if "=" in word else next(iter(words), "")
            words = words if "=" in word else words[1:]
            if not folder:
                raise ConfigError("--config-dir needs a folder: --config-dir PATH.")
        elif word in ("-m", "--multirun"):
            raise ConfigError(
                f"{word} is not offered: several jobs in one process confuse each other's devices and loggers. Use "
                "`lightning-ntk sweep` with the same overrides: it starts one process a job."
            )
        elif word.startswith("-") and not {"-h", "--help"} & {*words}:
            raise ConfigError(f"There is no option {word}. See lightning-ntk {name} --help.")
        else:
            overrides.append(word)
    if needs_help:
        sys.stdout.write(help_page(name, folder))
        return None
    return Command(overrides, folder, show)


def help_page(name: str, config_folder: str | None = None) -> str:
    """Every group with its choices (the user's own folder added), the settings beside them, and examples."""
    folders = [conf_folder()] if config_folder is None else [conf_folder(), own_folder(config_folder)]
    lines = [f"usage: lightning-ntk {name} [GROUP=CHOICE ...] [KEY=VALUE ...]", ""]
    lines += [describe(conf_folder() / f"{name}.yaml"), "", "Groups, and their choices:"]
    listed = groups(folders)
    if name == "sweep":
        files = [file for folder in folders for file in sorted((folder / "sweep").glob("*.yaml"))]
        listed["sweep"] = {file.stem: describe(file) for file in files}
    for group, choices in listed.items():
        lines.append(f"  {group}=")
        width = max(23, *map(len, choices))
        lines += [f"    {choice:<{width}} {text}" for choice, text in choices.items()]
    lines += ["", "Settings beside the groups (KEY=VALUE; those of a group as GROUP.KEY=VALUE, listed by --cfg):"]
    for line in (conf_folder() / f"{name}.yaml").read_text(encoding="utf-8").splitlines():
        key, _, rest = line.partition(":")
        if key.isidentifier() and key != "defaults":
            value, _, text = rest.partition("#")
            lines.append(f"  {f'{key}={value.strip()}':<24}  {text.strip()}")
    flags = f"{SWEEP_FLAGS}\n{FLAGS.partition(chr(10))[2]}" if name == "sweep" else FLAGS
    lines += ["", "Options:", flags, "", "Examples:", EXAMPLES[name], ""]
    return "\n".join(lines)
