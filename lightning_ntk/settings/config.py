"""Configuration: conf/ composed with the user's overrides by Hydra, and errors that name the nearest key.

Hydra's compose API is used rather than `@hydra.main`: see docs/ARCHITECTURE.md.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from lightning_ntk.errors import ConfigError, nearest_name
from lightning_ntk.settings.building import takes
from lightning_ntk.settings.overrides import OPTIONAL, SEVERAL, check_choices, key_of, readable
from lightning_ntk.settings.paths import as_path

# Folders that hold no choices of a config group.
NOT_GROUPS = ("splits", "sweep")
# What one may look for, and why it is no setting.
NOT_SETTINGS = {
    "method.loss": "the loss is cross-entropy in classification and the squared error in regression. Meta-RKHS-II's is "
    "the squared error in both, for which alone its closed form holds: for cross-entropy use method=meta_rkhs_i.",
}
# Arguments of the Trainer that would change what a step, a test or a run folder is, and what to set instead.
TRAINER_DECIDED = {
    "max_epochs": "use steps and val_every",
    "min_epochs": "use steps",
    "max_steps": "use steps",
    "min_steps": "use steps",
    "max_time": "use steps",
    "limit_train_batches": "use steps and val_every",
    "limit_val_batches": "use data.val_episodes",
    "limit_test_batches": "use data.test_episodes",
    "overfit_batches": "use steps",
    "fast_dev_run": "use steps=1 val_every=1 data.val_episodes=4 data.test_episodes=4",
    "barebones": "use trainer.enable_progress_bar=false logger=csv",
    "accumulate_grad_batches": "use data.tasks_per_step",
    "val_check_interval": "use val_every",
    "check_val_every_n_epoch": "use val_every",
    "num_sanity_val_steps": "use val_every",
    "enable_checkpointing": "use test_checkpoint",
    "default_root_dir": "use run_dir",
    "enable_model_summary": "a run prints none",
    "inference_mode": "adaptation needs gradients",
    "use_distributed_sampler": "episodes shard themselves",
    "sync_batchnorm": "a task's batch statistics are its own, and second-order gradients do not pass through "
    "statistics that processes exchange. network.norm=group has none",
    "logger": "use the group logger",
    "callbacks": "use the group callbacks",
    "plugins": "a run has its own, for its checkpoints and for SLURM",
}
# Groups whose choices a run is known by.
NAMED = ("method", "data", "network")
# All of ours; a user may have more, whose settings go anywhere.
GROUPS = (*NAMED, "trainer", "logger", *SEVERAL, *OPTIONAL)
# Settings of a data set that follow the run's, also where its YAML does not say so.
FOLLOWED = {"steps_per_epoch": "val_every", "seed": "seed"}


class UnknownSettingError(ConfigError):
    """There is no setting of this key."""

    def __init__(self, message: str, key: str) -> None:
        super().__init__(message)
        self.key = key


def conf_folder() -> Path:
    """The folder of the configuration: inside the package when installed, at the top of a checkout."""
    package = Path(__file__).resolve().parents[1]
    installed = package / "conf"
    return installed if installed.is_dir() else package.parent / "conf"


def own_folder(name: str) -> Path:
    """The user's own configuration folder."""
    folder = as_path(name, "--config-dir").resolve()
    if not folder.is_dir():
        raise ConfigError(f"--config-dir={name} is not a folder.")
    return folder


def groups(folders: list[Path]) -> dict[str, dict[str, str]]:
    """`{group: {choice: one-line description}}` of all config groups in the given folders, later folders added."""
    found: dict[str, dict[str, str]] = {}
    for folder in folders:
        for group in sorted(path for path in folder.iterdir() if path.is_dir() and path.name not in NOT_GROUPS):
            for file in sorted(group.glob("*.yaml")):
                found.setdefault(group.name, {})[file.stem] = describe(file)
    return found


def describe(file: Path) -> str:
    """The first comment line of a YAML file that is not a Hydra directive."""
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        if line.startswith("#") and not line.startswith("# @"):
            return line.lstrip("# ").strip()
    return ""


def compose_config(
    name: str, overrides: list[str], extra_folder: str | None = None, inherited: Sequence[str] = ()
) -> DictConfig:
    """conf/NAME.yaml with the overrides applied, in Hydra's override grammar; `choices` holds the names in NAMED.

    Args:
        extra_folder: a folder of the user's own config groups, searched before conf/.
        inherited: overrides of an earlier run, which come first. One that the choices now asked for have no setting
            for is left out.

    Raises:
        ConfigError: for a misspelt key, group or choice (with the nearest name), or anything Hydra refuses.
    """
    folders, search = [conf_folder()], []
    if extra_folder is not None:
        extra = own_folder(extra_folder)
        folders.append(extra)
        search = [f"hydra.searchpath={json.dumps([f'file://{extra}'], ensure_ascii=False)}"]
    for override in overrides:
        if key_of(override).partition(".")[0] == "choices":
            raise ConfigError(f"{override}: choices records what was chosen. Choose by method=, data= and network=.")
        if key_of(override).startswith(("hydra.", "hydra/")) and key_of(override) != "hydra.searchpath":
            raise ConfigError(
                f"{override}: Hydra composes the settings and does not run the command, so it has no effect. Set "
                "run_dir= for the folder, and see lightning-ntk sweep --help for several runs."
            )
    first, known = [readable(o) for o in inherited], groups(folders)
    while True:
        words = [*first, *(readable(o) for o in overrides), *search]
        chosen = check_choices(words, known)
        try:
            config = _compose(name, words, folders[1:])
            if extra_folder is not None and _recipe_is_of_another(config.choices, words, folders[1]):
                config = _compose(name, [*words, "~recipe"], folders[1:])
            _leave_out_unchosen_callbacks(config, overrides)
            return config
        except RecursionError as error:
            raise ConfigError(
                "The defaults of the configuration lead back to where they began: look at the `defaults` of your YAML "
                "files, of which one names itself, or two each other."
            ) from error
        except UnicodeDecodeError as error:
            raise ConfigError(f"{_not_utf8(folders)} is not UTF-8 text. Save it as UTF-8.") from error
        except yaml.YAMLError as error:
            place = getattr(error, "problem_mark", None)
            where = f"{place.name}, line {place.line + 1}" if place else "a file of the configuration"
            what = getattr(error, "problem", None) or str(error).splitlines()[0]
            raise ConfigError(f"{where} is not readable YAML: {what}.") from error
        except ConfigError:
            raise
        except (HydraException, OmegaConfBaseException, ValueError) as error:
            explained = explain(error, name, chosen, folders[1:])
            unfit = [o for o in first if isinstance(explained, UnknownSettingError) and key_of(o) == explained.key]
            if not unfit:
                raise explained from error
            first = [o for o in first if o not in unfit]


def _leave_out_unchosen_callbacks(config: DictConfig, overrides: Sequence[str]) -> None:
    """Take out what an experiment sets for callbacks that were not chosen, but for what was asked for now.

    Such settings are all that the entry of a callback of ours holds: without its YAML it has no `_target_`.
    """
    for name, entry in list((config.get("callbacks") or {}).items()):
        ours = (conf_folder() / "callbacks" / f"{name}.yaml").exists()
        asked = any(key_of(o).startswith(f"callbacks.{name}.") for o in overrides)
        if ours and not asked and isinstance(entry, DictConfig) and "_target_" not in entry:
            with open_dict(config):
                del config.callbacks[name]


def _not_utf8(folders: Sequence[Path]) -> str:
    """The first file of configuration folders that cannot be read as text."""
    for file in (file for folder in folders for file in sorted(folder.rglob("*.yaml"))):
        try:
            file.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            return str(file)
    return "A file of the configuration"


def _recipe_is_of_another(choices: DictConfig, words: list[str], own: Path) -> bool:
    """Whether the recipe for a method and data is not for the user's own ones, which have the names of ours."""
    if any(key_of(word) == "recipe" for word in words):
        return False
    recipe = f"recipe/{choices.method}_{choices.data}.yaml"
    replaced = any((own / group / f"{choices[group]}.yaml").exists() for group in ("method", "data"))
    return replaced and (conf_folder() / recipe).exists() and not (own / recipe).exists()


def _compose(name: str, overrides: list[str], own: Sequence[Path] = ()) -> DictConfig:
    # A composition inside another program's Hydra application must not disturb it, nor be disturbed.
    outer = GlobalHydra.instance().hydra
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(config_dir=str(conf_folder()), version_base="1.3"):
            for folder in own:  # hydra.searchpath alone would put it behind conf/, whose choices would hide its own.
                GlobalHydra.instance().config_loader().get_search_path().prepend("own", f"file://{folder}", "main")
            config = compose(config_name=name, overrides=overrides, return_hydra_config=True)
    finally:
        GlobalHydra.instance().hydra = outer
    choices = OmegaConf.to_container(config.hydra.runtime.choices)
    with open_dict(config):
        del config["hydra"]
        check_groups(config, [group for group in GROUPS if group in choices])
        config.choices = {group: choices[group] for group in NAMED}
        for key, of_run in FOLLOWED.items():
            if "data" in config and key not in config.data and takes(config.data, key):
                config.data[key] = f"${{{of_run}}}"
    OmegaConf.to_container(config, resolve=True, throw_on_missing=True)  # Now, rather than in the middle of a run.
    return config


def check_groups(config: DictConfig, chosen: Sequence[str]) -> None:
    """Raise `ConfigError` where a YAML file of the user's own sets a group that is chosen to a name or to null."""
    for group in chosen:
        value = config.get(group)
        if group in OPTIONAL and group in config:  # What they set has no place of its own.
            raise ConfigError(
                f"{group} must hold settings of the whole run, but a YAML file sets the key {group!r} itself. Begin "
                f"each file of {group}/ by the line `# @package _global_`, and choose one by {group}=NAME."
            )
        if group in OPTIONAL or isinstance(value, DictConfig) or (value is None and group in SEVERAL):
            continue
        name = value if isinstance(value, str) else "NAME"
        raise ConfigError(
            f"{group} must be settings, but a YAML file sets it to {'null' if value is None else repr(value)}. Leave "
            f"that out, and choose by {group}={name}, or in the file's `defaults` by `- override /{group}: {name}`."
        )


def explain(error: Exception, name: str, chosen: list[str], own: Sequence[Path] = ()) -> ConfigError:
    """Hydra's message in one line, with the nearest key of the chosen groups where a key is misspelt."""
    if not str(error) and error.__cause__:
        return explain(error.__cause__, name, chosen, own)
    text = str(error)
    match = re.search(r"Could not override '([^']+)'", text) or re.search(r"Key '([^']+)' is not in struct", text)
    if match:
        key = match.group(1)
        if key in NOT_SETTINGS:
            return UnknownSettingError(f"There is no setting {key!r}: {NOT_SETTINGS[key]}", key)
        group, _, argument = key.partition(".")
        if group == "trainer" and argument in TRAINER_DECIDED:
            return UnknownSettingError(f"{key} cannot be set: {TRAINER_DECIDED[argument]}.", key)
        try:
            config = _compose(name, chosen, own)
        except (HydraException, OmegaConfBaseException):  # It is not what was asked that fails.
            return ConfigError(first_line(text))
        near = what_was_meant(key, config, groups([conf_folder(), *own]))
        see = "See --help, or --cfg for all settings."
        place, _, last = key.rpartition(".")
        node = OmegaConf.select(config, place, throw_on_missing=False) if place else None
        if takes(node, last):
            near, see = "", f"{node['_target_']} takes it, but its YAML does not list it: add it by +{key}=VALUE."
        if group == "trainer":
            see = f"Further arguments of Lightning's Trainer are added with a plus: +{key}=VALUE."
        return UnknownSettingError(f"There is no setting {key!r}.{near} {see}", key)
    line = first_line(text)
    if "Cannot merge DictConfig with ListConfig" in line:
        line += ", a list where settings stand. Choose several in its `defaults`, by `- override /GROUP: [A, B]`."
    full_key = getattr(error, "full_key", None)
    return ConfigError(f"{full_key}: {line}" if full_key else line)


def first_line(text: str) -> str:
    """The first line of Hydra's message, and the one that it announces by a colon."""
    first, _, rest = text.strip().partition("\n")
    return f"{first} {rest.strip().partition(chr(10))[0]}" if first.endswith(":") else first


def what_was_meant(key: str, config: DictConfig, known: dict[str, dict[str, str]]) -> str:
    """A clause for an error about a key that a config lacks: its choice is not made, or the nearest key beside it."""
    place, _, last = key.rpartition(".")
    group, _, choice = place.partition(".")
    if group in SEVERAL and choice in known[group] and choice not in (config.get(group) or {}):
        return f" It belongs to {group}={choice}, which is not chosen: {group}=[...,{choice}]."
    keys = dotted_keys(config)
    beside = [each.rpartition(".")[2] for each in keys if place and each.rpartition(".")[0] == place]
    if not beside:
        same = [each for each in keys if each.rpartition(".")[2] == key]
        return f" Did you mean {same[0]!r}?" if same else nearest_name(key, keys)
    # Compared without what they have in common, which would make any two alike.
    return nearest_name(last, beside).replace("'", f"'{place}.", 1)


def dotted_keys(config: Any, prefix: str = "") -> list[str]:
    """All keys of a config, nested ones with dots."""
    keys = []
    for key in config:
        keys.append(prefix + str(key))
        node = OmegaConf.select(config, str(key), throw_on_missing=False)
        if isinstance(node, DictConfig):
            keys += dotted_keys(node, f"{prefix}{key}.")
    return keys


def plain(config: DictConfig) -> dict[str, Any]:
    """The resolved config as plain dicts, lists and scalars."""
    return OmegaConf.to_container(config, resolve=True)
