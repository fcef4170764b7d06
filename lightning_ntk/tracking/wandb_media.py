"""What a finished run shows in W&B: tables by episode, by eps and by data set, and the spectrum of its kernel."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from lightning_ntk.running.results import RunResult
from lightning_ntk.tracking.media import Histogram, Lines, Media, Table
from lightning_ntk.tracking.metric_names import CLEAN, SOURCE, known, robust_names, shifted_names


def to_wandb(media: Media) -> Any:
    """The W&B object of a figure, a table, a histogram or lines."""
    import wandb

    if isinstance(media, Figure):
        canvas = FigureCanvasAgg(media)
        canvas.draw()
        return wandb.Image(np.asarray(canvas.buffer_rgba())[..., :3])
    if isinstance(media, Table):
        return wandb.Table(columns=list(media.columns), data=[list(row) for row in media.rows], allow_mixed_types=False)
    if isinstance(media, Histogram):
        finite = [value for value in media.values if math.isfinite(value)]
        return wandb.Histogram(finite or [0.0])
    if isinstance(media, Lines):
        names, values = list(media.lines), [list(line) for line in media.lines.values()]
        return wandb.plot.line_series(list(media.x), values, keys=names, title=media.title, xname=media.x_name)
    raise TypeError(f"Expected a Figure, Table, Histogram or Lines, but got {type(media).__name__}.")


def episode_table(episodes: Mapping[str, Sequence[float]]) -> Table:
    """Per-episode numbers by metric as a table: a row for each episode, None where a number is not finite."""
    columns = zip(*episodes.values(), strict=True)
    rows = [[k, *(float(v) if math.isfinite(v) else None for v in values)] for k, values in enumerate(columns)]
    return Table(["episode", *episodes], rows)


def probe_tables(result: RunResult) -> dict[str, Table]:
    """What callbacks measured at the test: by episode; by eps for each attack; by data set out of distribution."""
    tables = {
        f"{callback}/by_episode": episode_table(probe["episodes"])
        for callback, probe in result.probes.items()
        if probe.get("episodes")
    }
    for attack, names in robust_names(result.metrics).items():
        rows = [[eps, *_with_interval(result, name)] for eps, name in {0.0: CLEAN, **names}.items()]
        tables[eps_table_name(attack)] = Table(["eps", "accuracy", "ci95"], rows)
    shifted = {**shifted_names(result.metrics), **shifted_names(result.metrics, corrupted=True)}
    if shifted:
        rows = [[target, *_with_interval(result, name)] for target, name in {"source": SOURCE, **shifted}.items()]
        tables["ood/by_target"] = Table(["target", "accuracy", "ci95"], rows)
    return tables


def spectrum_media(result: RunResult) -> dict[str, Media]:
    """The NTK's eigenvalues at the test as a histogram, and over training as lines, as far as positive."""
    series = result.probes.get("ntk", {}).get("series", {})
    media: dict[str, Media] = {}
    logarithms = [math.log10(value) for value in series.get("ntk/eigenvalues", []) if value > 0]
    if logarithms:
        media["ntk/log10_eigenvalues"] = Histogram(logarithms)
    steps, spectra = series.get("steps", []), series.get("eigenvalues_over_training", [])
    if spectra and len({len(spectrum) for spectrum in spectra}) == 1:
        # From the largest down, as far as all are positive.
        descending = [sorted(spectrum, reverse=True) for spectrum in spectra]
        ranks = range(sum(min(values) > 0 for values in zip(*descending, strict=True)))
        lines = {f"step {s}": [math.log10(v[k]) for k in ranks] for s, v in zip(steps, descending, strict=True)}
        media["ntk/log10_eigenvalues_over_training"] = Lines("log10 of the eigenvalues", "rank", [*ranks], lines)
    return media


def _with_interval(result: RunResult, name: str) -> list[float | None]:
    return [known(result.metrics, name), known(result.metrics, f"{name}_ci95")]


def eps_table_name(attack: str) -> str:
    """Under which name a run logs the robust accuracy by eps of one attack."""
    return f"adversarial/{attack.replace(' ', '_')}/by_eps"
