"""How methods fit a regression task before and after they adapt: Figure 1 of Zhou et al. (2021).

python -m lightning_ntk.comparison.fit_figure RUN [RUN ...] [out=FILE] [tasks=2]
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from lightning_ntk.comparison.figures import COLOURS
from lightning_ntk.comparison.table import printable
from lightning_ntk.episode import Episode, TaskSpec
from lightning_ntk.errors import ConfigError, nearest_name
from lightning_ntk.load import load_data, load_method
from lightning_ntk.methods.base import MetaLearner
from lightning_ntk.settings.paths import as_path
from lightning_ntk.train import quiet

HELP = """usage: python -m lightning_ntk.comparison.fit_figure RUN [RUN ...] [out=FILE] [tasks=2]

Draw regression tasks of the test split: support points, the true curve, and each run's prediction before and after it
adapts. The runs stand side by side, their tasks below each other, all on the episodes of the first run.

  out=FILE   the picture, in a format that matplotlib writes (default: ./runs/fit.png)
  tasks=N    the number of tasks, one a row (default 2)
"""
DEFAULTS = {"out": "runs/fit.png", "tasks": "2"}

BEFORE, AFTER = COLOURS[4], COLOURS[0]


def main(argv: list[str] | None = None) -> None:
    """Draw the runs that the command line names."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or "--help" in words or "-h" in words:
        sys.stdout.write(HELP)
        return
    options, folders = dict(DEFAULTS), []
    for word in words:
        key, is_option, value = word.partition("=")
        if not is_option or Path(word).exists():
            folders.append(word)
        elif key in options:
            options[key] = value
        else:
            near = nearest_name(key, options)
            raise ConfigError(f"fit_figure has no setting {key!r}.{near} Nor is there a folder {word}.")
    if not folders:
        raise ConfigError("There is nothing to draw: give run folders of a regression, such as experiment=sine.")
    if not options["tasks"].isdigit() or int(options["tasks"]) < 1:
        raise ConfigError(f"tasks must be a whole number of at least 1, but got {options['tasks']!r}.")
    quiet()
    file = as_path(options["out"], "out")
    methods, episodes = load(folders, int(options["tasks"]))
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        fit_figure(methods, episodes).savefig(file, dpi=150)
    except (OSError, ValueError) as error:  # ValueError: a format that matplotlib does not write.
        raise ConfigError(f"out={file} cannot be written: {error}") from error
    sys.stdout.write(f"{printable(file)}\n")


def load(folders: Sequence[str], tasks: int) -> tuple[list[tuple[str, MetaLearner]], list[Episode]]:
    """The trained method of each run, by name, and the first test episodes of the first run's data.

    Raises:
        ConfigError: no run, or one that is not of a regression on one input.
    """
    methods: list[tuple[str, MetaLearner]] = []
    for folder in folders:
        method = load_method(folder)
        if method.dtype.itemsize < torch.float32.itemsize:
            method.float()  # Curves are no bfloat16 numbers, which numpy does not know.
        check_drawable(method.spec, f"RUN {folder}")
        methods.append((method.run["config"]["choices"]["method"], method))
    names = [name for name, _ in methods]
    if len(set(names)) < len(names):  # Several runs of one method: their folders tell them apart.
        labels = [printable(f"{name} {Path(folder).name}") for folder, name in zip(folders, names, strict=True)]
        methods = [(label, method) for label, (_, method) in zip(labels, methods, strict=True)]
    data = load_data(folders[0])
    return methods, [data.draw("test", 0, index) for index in range(tasks)]


def check_drawable(spec: TaskSpec, what: str) -> None:
    """Raise `ConfigError` unless tasks are curves: one real input, one real output."""
    if spec.kind != "regression" or spec.input_shape != (1,) or spec.outputs != 1:
        raise ConfigError(
            f"{what}: a fit can be drawn for a regression of one output on one input, such as data=sinusoid, but this "
            f"is a {spec.kind} with inputs of shape {spec.input_shape} and {spec.outputs} output(s)."
        )


def fit_figure(methods: Sequence[tuple[str, MetaLearner]], episodes: Sequence[Episode]) -> Figure:
    """A panel for each method (columns, with their names) and each task (rows)."""
    size = (3.4 * len(methods), 2.6 * len(episodes) + 0.5)
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(len(episodes), len(methods), squeeze=False, sharex=True, sharey="row")
    for number, episode in enumerate(episodes):
        for axis, (name, method) in zip(panels[number], methods, strict=True):
            before, after = draw_fit(axis, method, episode)
            errors = f"mse {before:.3g} before, {after:.3g} after"
            axis.set_title(f"{name}\n{errors}" if number == 0 else errors, fontsize=9)
    for axis in panels[-1]:
        axis.set_xlabel("x")
    for axis in panels[:, 0]:
        axis.set_ylabel("y")
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    return figure


def draw_fit(axis: Axes, method: MetaLearner, episode: Episode) -> tuple[float, float]:
    """Draw one task: its support points, the true curve through its queries, and the method before and after adapting.

    Args:
        episode: a single task with inputs `[n, 1]` and targets `[n, 1]`.

    Returns:
        The mean squared errors on the queries, before and after.
    """
    check_drawable(method.spec, "draw_fit")
    parameter = next(method.parameters())
    place = {"device": parameter.device, "dtype": parameter.dtype}
    support_x, support_y, query_x = (t.to(**place) for t in (episode.support_x, episode.support_y, episode.query_x))
    with torch.no_grad():
        before = method.network(query_x)
    after = method.adapt(support_x, support_y)(query_x).detach()
    draw_curves(axis, episode, before, after)
    y = episode.query_y.to(**place)
    return float((before - y).square().mean()), float((after - y).square().mean())


def draw_curves(axis: Axes, episode: Episode, before: Tensor, after: Tensor) -> None:
    """Draw one task and two predictions `[m, 1]` of its queries: before and after adapting."""
    order = episode.query_x[:, 0].argsort().cpu()
    x = episode.query_x[:, 0].cpu()[order]
    for values, style in (
        (episode.query_y, {"color": "0.6", "linewidth": 3, "label": "true"}),
        (before, {"color": BEFORE, "linestyle": "--", "label": "before adaptation"}),
        (after, {"color": AFTER, "label": "after adaptation"}),
    ):
        axis.plot(x, values[:, 0].cpu()[order], **style)
    axis.plot(episode.support_x[:, 0].cpu(), episode.support_y[:, 0].cpu(), "k^", markersize=5, label="support")
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    from lightning_ntk.cli import guarded

    sys.exit(guarded(main))
