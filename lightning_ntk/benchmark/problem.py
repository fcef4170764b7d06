"""The problem that is measured: episodes of one seed, and a network and methods by their names in conf/."""

import copy
import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from omegaconf import OmegaConf
from torch import Tensor, nn

from lightning_ntk.benchmark.settings import Settings
from lightning_ntk.episode import Episode, TaskSpec
from lightning_ntk.errors import MissingDependencyError
from lightning_ntk.methods.base import MetaLearner
from lightning_ntk.settings.building import instantiate
from lightning_ntk.settings.config import conf_folder


@dataclasses.dataclass(frozen=True)
class Problem:
    """What a work is measured on: a network in its initial state, T tasks, and what they have in common."""

    network: nn.Module
    episodes: Episode
    spec: TaskSpec

    def in_default_layout(self) -> "Problem":
        """The same with a network that leaves images in PyTorch's default layout: that of the peers' own examples."""
        network = copy.deepcopy(self.network)
        network.channels_last = False
        return dataclasses.replace(self, network=network)

    def method(self, name: str, **settings: Any) -> MetaLearner:
        """A method of conf/method with its defaults, and these settings over them, on a network of its own."""
        config = OmegaConf.load(conf_folder() / "method" / f"{name}.yaml")
        network = copy.deepcopy(self.network)
        device = self.episodes.support_x.device
        return instantiate(OmegaConf.merge(config, settings), "method", network=network, spec=self.spec).to(device)


def make_problem(settings: Settings, *, network: str = "conv4", norm: str = "none", **sizes: int) -> Problem:
    """The problem of the settings, with other `shots`, `queries`, `tasks` or `filters` where given.

    Raises:
        MissingDependencyError: the network is not part of this version.
    """
    settings = dataclasses.replace(settings, **sizes)
    spec = TaskSpec("classification", settings.image_shape, settings.ways)
    file = conf_folder() / "network" / f"{network}.yaml"
    if not file.exists():
        raise MissingDependencyError(f"this version has no network={network}")
    config = OmegaConf.load(file)
    if network == "conv4":
        config = OmegaConf.merge(config, {"norm": norm, "downsample": "pool", "filters": settings.filters})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        module = instantiate(config, "network", input_shape=spec.input_shape, outputs=spec.outputs, mean=None, std=None)
        episodes = Episode.stack([draw_episode(settings, spec, index) for index in range(settings.tasks)])
    return Problem(module.to(settings.device), episodes.to(settings.device), spec)


def draw_episode(settings: Settings, spec: TaskSpec, index: int) -> Episode:
    """One task of smooth random images in [0, 1]: an image of its class, mixed with one of its own and with noise.

    Smooth, as photographs are: the rank of the meta-gradient's low-rank part, and so its cost, depends on the data.
    """
    classes = _smooth(settings.ways, spec.input_shape)

    def images(number: int) -> tuple[Tensor, Tensor]:
        labels = torch.arange(settings.ways).repeat_interleave(number)
        own = _smooth(len(labels), spec.input_shape)
        noise = torch.rand(len(labels), *spec.input_shape)
        return 0.6 * classes[labels] + 0.3 * own + 0.1 * noise, labels

    support, query = images(settings.shots), images(settings.queries)
    return Episode(*support, *query, torch.tensor(index))


def _smooth(number: int, shape: tuple[int, ...]) -> Tensor:
    coarse = torch.rand(number, shape[0], 6, 6)
    return F.interpolate(coarse, shape[1:], mode="bilinear", align_corners=True)
