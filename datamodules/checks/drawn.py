"""Whether the episodes and settings of a data set of one's own are what methods and results take."""

import json
from typing import Any

import torch
from torch import Tensor

from lightning_ntk.episode import Episode, TaskSpec
from lightning_ntk.errors import DataError


def check_episode(episode: Episode, spec: TaskSpec, ways: int, what: str) -> None:
    """Raise `DataError` unless a single task has the shapes, types and finite numbers that `Episode` and a spec ask.

    Args:
        ways: in classification, class numbers are below it.
        what: names the episode in errors, "Episode 0 of the test split of MyData".
    """
    if not isinstance(episode, Episode):
        raise DataError(f"{what} must be an Episode, but `draw` returned {type(episode).__name__}.")
    if not isinstance(episode.index, Tensor) or episode.index.dtype != torch.int64 or episode.index.dim():
        raise DataError(f"{what} must have its number as index, an int64 tensor: torch.tensor(index). See `draw`.")
    for part in ("support", "query"):
        x, y = _tensor(episode, f"{part}_x", what), _tensor(episode, f"{part}_y", what)
        count = max(1, len(x)) if x.dim() else 1  # None at all are too few.
        pixels = x.dtype == torch.uint8
        _check(
            x, f"{part}_x", (count, *spec.input_shape), x.is_floating_point() or pixels, "floats (images: uint8)", what
        )
        if spec.kind == "regression":
            _check(y, f"{part}_y", (count, spec.outputs), y.is_floating_point(), "floats", what)
            continue
        _check(y, f"{part}_y", (count,), y.dtype == torch.int64, "int64", what)
        if y.min() < 0 or y.max() >= ways:
            raise DataError(
                f"{what} has class numbers from {y.min()} to {y.max()} in its {part}_y, but in tasks of {ways} ways "
                f"they must be from 0 to {ways - 1}. Number the classes of each episode from 0 on."
            )


def check_settings(settings: dict[str, Any], what: str) -> None:
    """Raise `DataError` unless all settings can be written to results.json; `what` names the data set's class."""
    for key, value in settings.items():
        try:
            json.dumps({key: value}, sort_keys=True)
        except (TypeError, ValueError) as error:
            raise DataError(
                f"{what} must have plain values in its task_settings, but {key!r} is {type(value).__name__} ({error}). "
                "See `task_settings`, or `family`, of the class: int(...), .tolist() and sorted(...) make plain values."
            ) from error


def _tensor(episode: Episode, name: str, what: str) -> Tensor:
    values = getattr(episode, name, None)
    if not isinstance(values, Tensor):
        raise DataError(f"{what} must be an Episode of tensors, but its {name} is {type(values).__name__}. See `draw`.")
    return values


def _check(values: Tensor, name: str, shape: tuple[int, ...], fits: bool, kind: str, what: str) -> None:
    if tuple(values.shape) != shape or not fits:
        raise DataError(
            f"{what} must have a {name} of shape {shape}, {kind}, but has {tuple(values.shape)}, {values.dtype}. See "
            "`draw` and `spec` of the class."
        )
    if values.is_floating_point() and not values.isfinite().all():
        bad = int((~values.isfinite()).sum())
        raise DataError(
            f"{what} has {bad} of {values.numel()} numbers in its {name} that are not finite. See `draw` of the class."
        )
