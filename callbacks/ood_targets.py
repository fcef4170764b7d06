"""The data sets that a run is tested on out of distribution, built like its own, and fitted to its network."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pytorch_lightning as pl
import torch.nn.functional as F
from omegaconf import OmegaConf
from torch import Tensor

from lightning_ntk.episode import Episode, TaskSpec
from lightning_ntk.errors import ConfigError, LightningNTKError, nearest_name
from lightning_ntk.methods.base import MetaLearner
from lightning_ntk.running.run import Run
from lightning_ntk.settings.building import instantiate, takes
from lightning_ntk.settings.config import compose_config, plain

# Luminance of red, green and blue (ITU-R BT.601, as Pillow converts).
LUMINANCE = (0.299, 0.587, 0.114)
# Shares of an episode that a target takes from the run's own test, unless it says otherwise.
SHAPE = ("ways", "shots", "queries")

# Targets as they are given: names of data=, or names with settings or with data modules.
Targets = Sequence[str] | Mapping[str, Mapping[str, Any] | pl.LightningDataModule | None]


def check_targets(targets: Any) -> None:
    """Raise `ConfigError` unless targets are given as they should be, by names that are free."""
    settings = targets.values() if isinstance(targets, Mapping) else ()
    is_right = targets is None or (isinstance(targets, Sequence | Mapping) and not isinstance(targets, str))
    is_right = is_right and all(isinstance(name, str) for name in targets or ())
    if not is_right or not all(isinstance(each, Mapping | pl.LightningDataModule | None) for each in settings):
        raise ConfigError(
            f"callbacks.ood.targets must be a list of data sets, as [digits], or {{NAME: {{data: image_folder, "
            f"root: PATH}}}}, or in Python {{NAME: a data module}}, but got {targets!r}."
        )
    for name in targets or ():
        if name == "source" or name.startswith("corrupted_"):
            raise ConfigError(
                f"callbacks.ood.targets.{name}: this name is taken by the run's own data. Name it otherwise, as "
                f"{{my_{name}: {{data: NAME}}}}."
            )


def build_targets(targets: Targets, run: Run) -> dict[str, pl.LightningDataModule]:
    """The data modules of targets, those of names and settings built like the run's own; see `made_ready`."""
    found = {}
    for name, given in with_names(targets):
        if not isinstance(given, pl.LightningDataModule):
            given = build_target(name, given or {}, run)
        found[name] = made_ready(name, given, run.method)
    return found


def with_names(targets: Targets) -> list[tuple[str, Any]]:
    """Pairs of a name and what was given with it, or None."""
    return list((targets if isinstance(targets, Mapping) else dict.fromkeys(targets)).items())


def build_target(name: str, settings: Mapping[str, Any], run: Run) -> pl.LightningDataModule:
    """A target's data module, with the ways, shots, queries and the image shape of the run.

    Args:
        name: a choice of data=, unless the settings name one by `data` (or are a whole config, with `_target_`).
        settings: what differs from conf/data/NAME.yaml.

    Raises:
        ConfigError: naming the target, and what is wrong with it.
    """
    own = dict(settings)
    with _naming(name):
        chosen = target_config(own.pop("data", name), own, run)
        return instantiate(OmegaConf.create(chosen), "data", pl.LightningDataModule)


def made_ready(name: str, data: pl.LightningDataModule, method: MetaLearner) -> pl.LightningDataModule:
    """A target's data, ready to draw test tasks that the method can take.

    Raises:
        ConfigError: naming the target, and what is wrong with it.
    """
    with _naming(name):
        data.prepare_data()
        data.setup("test")
    ways = data.task_settings().get("ways", data.spec.outputs)
    check_fits(f"callbacks.ood.targets.{name}", data.spec, method.spec, ways=ways, any_ways=method.any_ways)
    return data


def split_in_training(data: pl.LightningDataModule) -> str:
    """The split that a target's tasks are from in training: "val" where it can give them, else "test"."""
    if not data.has_split("val"):
        return "test"
    try:
        data.setup("validate")
    except ConfigError:
        return "test"
    return "val"


@contextlib.contextmanager
def _naming(name: str) -> Iterator[None]:
    """Errors say which target they are of."""
    try:
        yield
    except LightningNTKError as error:
        raise ConfigError(
            f"callbacks.ood.targets.{name}: {error} (A target's own settings: callbacks.ood.targets={{{name}: "
            "{KEY: VALUE}}.)"
        ) from error


def target_config(choice: str, own: dict[str, Any], run: Run) -> dict[str, Any]:
    """A target's data config: its YAML, then what it shares with the run, then its own settings."""
    found = (
        {"_target_": own["_target_"]}
        if "_target_" in own
        else plain(compose_config("train", [f"data={choice}"], run.config_folder).data)
    )
    taken_by = OmegaConf.create(found)  # A YAML need not list what its class takes.
    for key in own if "_target_" not in own else ():
        if key not in found and not takes(taken_by, key):
            near = nearest_name(f"data.{key}", [f"data.{each}" for each in found])
            raise ConfigError(f"There is no setting 'data.{key}' of data={choice}.{near}")
    source, shape = plain(run.config.data), run.method.spec.input_shape
    # What the run's YAML leaves out is a default of its class, which only the data themselves know.
    tested = run.data.task_settings()
    shared = {key: own.get(key) or tested.get(key) or source.get(f"eval_{key}") or source.get(key) for key in SHAPE}
    shared |= {f"eval_{key}": shared[key] for key in SHAPE} | {"eval_seed": source.get("eval_seed", 0)}
    if len(shape) == 3:
        shared |= {"channels": shape[0], "image_size": max(shape[1:])}
    taken = {key: value for key, value in shared.items() if value and (key in found or takes(taken_by, key))}
    return plain(OmegaConf.merge(found, taken, own))


def check_fits(key: str, target: TaskSpec, source: TaskSpec, *, ways: int, any_ways: bool) -> None:
    """Raise `ConfigError` unless the run's network can take the target's tasks, images converted.

    `ways`: of the target's episodes in classification. `any_ways`: the method needs no output for each way.
    """
    if target.kind != source.kind:
        raise ConfigError(f"{key}: the run is {source.kind}, but the target's tasks are {target.kind}.")
    if source.kind == "classification" and ways > source.outputs and not any_ways:
        raise ConfigError(
            f"{key}: the network has {source.outputs} outputs, one for each way, but the target's tasks have "
            f"{ways} ways. Set {key}.ways (and {key}.eval_ways, where it is set) to at most {source.outputs}."
        )
    if source.kind == "regression" and target.outputs != source.outputs:
        raise ConfigError(
            f"{key}: the network has {source.outputs} outputs, but the target's tasks have {target.outputs}."
        )
    images = len(target.input_shape) == len(source.input_shape) == 3
    convertible = images and {target.input_shape[0], source.input_shape[0]} <= {1, 3}
    if target.input_shape != source.input_shape and not convertible:
        raise ConfigError(
            f"{key}: the network takes inputs of shape {source.input_shape}, and the target's are "
            f"{target.input_shape}: only images of 1 or 3 channels are converted into each other."
        )


def fitted(episode: Episode, shape: tuple[int, ...]) -> Episode:
    """An episode with its images, in [0, 1], converted to a shape `(channels, height, width)`; others as they are."""
    support_x, query_x = (as_shape(x, shape) for x in (episode.support_x, episode.query_x))
    return Episode(support_x, episode.support_y, query_x, episode.query_y, episode.index)


def as_shape(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Images `[n, c, h, w]` in other channels (grey is repeated, RGB becomes its luminance) and another size (bilinear,
    averaged where it becomes smaller)."""
    if tuple(x.shape[1:]) == tuple(shape):
        return x
    channels, *size = shape
    if x.shape[1] != channels:
        weights = x.new_tensor(LUMINANCE).view(3, 1, 1)
        x = (x * weights).sum(1, keepdim=True) if channels == 1 else x.expand(-1, channels, -1, -1)
    if list(x.shape[2:]) != size:
        # In float32 at least: on a CPU there is no such interpolation of 16-bit numbers.
        wide = x if x.dtype.itemsize >= 4 else x.float()
        x = F.interpolate(wide, size, mode="bilinear", antialias=True).clamp(0, 1).to(x.dtype)
    return x
