"""A result in a few lines of text, as `train` and `evaluate` print it."""

from collections.abc import Mapping

from lightning_ntk.running.results import RunResult, mean_and_ci95
from lightning_ntk.tracking.metric_names import (
    CLEAN,
    CONDITION_NUMBER,
    EFFECTIVE_RANK,
    SOURCE,
    eps_text,
    known,
    names_without_eps,
    robust_names,
    shifted_names,
)


def report_lines(result: RunResult) -> list[str]:
    """The test's scores, and below them what probes found: accuracy under attack, elsewhere, and the kernel."""
    lines = []
    for name, values in result.episodes.items():
        mean, half_width = mean_and_ci95(values)
        scale, digits, unit = (100, 2, " %") if name.endswith("accuracy") else (1, 4, "")
        interval = f" ± {scale * half_width:.{digits}f}" if len(values) > 1 else ""  # One value has none.
        episodes = f"{len(values)} episodes" if len(values) > 1 else "one episode"
        lines.append(
            f"{result.method} on {result.data}: {name} {scale * mean:.{digits}f}{interval}{unit} over {episodes}"
        )
    return lines + [f"  {line}" for line in _probe_lines(result.metrics)]


def _probe_lines(metrics: Mapping[str, float]) -> list[str]:
    lines = []
    if CLEAN in metrics:
        lines.append(f"without attack: {_percent(metrics, CLEAN)}")
    for attack, names in robust_names(metrics).items():
        sizes = (f"{eps_text(attack, eps)}: {_percent(metrics, name)}" for eps, name in names.items())
        lines.append(f"under {attack} {', '.join(sizes)}")
    lines += [f"under {attack}: {_percent(metrics, name)}" for attack, name in names_without_eps(metrics).items()]
    if SOURCE in metrics:
        lines.append(f"source of ood: {_percent(metrics, SOURCE)}")
        others = {**shifted_names(metrics), **shifted_names(metrics, corrupted=True)}
        lines.append(", ".join(f"{place}: {_percent(metrics, name)}" for place, name in others.items()))
    if CONDITION_NUMBER in metrics:
        lines.append(
            f"kernel: condition number {_number(metrics, CONDITION_NUMBER)}, "
            f"effective rank {_number(metrics, EFFECTIVE_RANK)}"
        )
    return lines


def _percent(metrics: Mapping[str, float], name: str) -> str:
    value, half_width = known(metrics, name), known(metrics, f"{name}_ci95")
    if value is None:
        return "not measured"
    return f"{100 * value:.1f} %" if half_width is None else f"{100 * value:.1f} ± {100 * half_width:.1f} %"


def _number(metrics: Mapping[str, float], name: str) -> str:
    value = known(metrics, name)
    return "not measured" if value is None else f"{value:.3g}"
