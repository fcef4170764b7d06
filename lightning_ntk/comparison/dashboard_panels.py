"""The panels of a W&B workspace or report, and the columns of its table, from the names of metrics that runs have."""

from collections.abc import Iterable
from typing import Any

from lightning_ntk.tracking.metric_names import CONDITION_NUMBER, EFFECTIVE_RANK, eps_text, robust_names, shifted_names
from lightning_ntk.tracking.wandb_media import eps_table_name


def panels(names: Iterable[str]) -> dict[str, list[Any]]:
    """`{section: panels}` for the metrics that runs have; those that every project can have come without a name known.

    Args:
        names: of metrics in the runs' summaries.
    """
    import wandb_workspaces.reports.v2 as wr

    names = set(names)
    score = test_score(names).removeprefix("test/")
    log_y = True if score == "mse" else None
    return {
        "Learning": [
            wr.LinePlot(title=f"{score} over meta-steps", x="step", y=[f"val/{score}"], log_y=log_y),
            wr.LinePlot(title=f"{score} over seconds of training", x="time/fit", y=[f"val/{score}"], log_y=log_y),
            wr.BarPlot(title=f"test {score}", metrics=[f"test/{score}"]),
        ],
        "Neural tangent kernel": [
            wr.LinePlot(title="condition number", x="step", y=[CONDITION_NUMBER], log_y=True),
            wr.LinePlot(title="effective rank", x="step", y=[EFFECTIVE_RANK]),
        ],
        "Robust accuracy by eps": robust_panels(names),
        "Out of distribution": shifted_panels(names),
        "Time and memory": [
            wr.ScatterPlot(title=f"test {score} against time", x="time/fit", y=f"test/{score}"),
            wr.BarPlot(title="seconds a meta-step", metrics=["time/meta_step"]),
            wr.BarPlot(title="peak memory, MiB", metrics=["memory/peak_mib"]),
        ],
    }


def robust_panels(names: Iterable[str]) -> list[Any]:
    """For each attack a curve over eps, from the table that a run logs, and bars; without a name known, all in one."""
    import wandb_workspaces.reports.v2 as wr

    found = []
    for attack, strengths in robust_names(names).items():
        texts = ", ".join(eps_text(attack, eps) for eps in strengths)
        curve = wr.CustomChart(
            query={"summaryTable": {"tableKey": eps_table_name(attack)}},
            chart_name="wandb/line/v0",
            chart_fields={"x": "eps", "y": "accuracy"},
            chart_strings={"title": f"{attack}: accuracy over eps"},
        )
        found += [curve, wr.BarPlot(title=f"{attack}, eps {texts}", metrics=[*strengths.values()])]
    pattern = "adversarial.*/eps_[^/]*/accuracy"
    return found or [wr.LinePlot(title="robust accuracy", x="step", metric_regex=pattern)]


def shifted_panels(names: Iterable[str]) -> list[Any]:
    """Bars for each data set out of distribution and each kind of corruption; without a name known, all in one."""
    import wandb_workspaces.reports.v2 as wr

    names = set(names)
    shifted = {**shifted_names(names), **shifted_names(names, corrupted=True)}
    bars = [wr.BarPlot(title=target, metrics=[name]) for target, name in shifted.items()]
    pattern = "ood/[^/]*/accuracy"
    return bars or [wr.LinePlot(title="accuracy out of distribution", x="step", metric_regex=pattern)]


def test_score(names: Iterable[str]) -> str:
    """The name of the runs' test score: of their error where they have that alone."""
    names = set(names)
    return "test/mse" if "test/mse" in names and "test/accuracy" not in names else "test/accuracy"


def columns_of_table(names: Iterable[str]) -> list[str]:
    """Columns of the runs' table: what was run, and the test score first among what came of it."""
    names = set(names)
    score = test_score(names)
    robust = [list(strengths.values())[len(strengths) // 2] for strengths in robust_names(names).values()]
    metrics = [score, f"{score}_ci95", *robust, *shifted_names(names).values(), CONDITION_NUMBER, "time/fit"]
    return [f"summary:{name}" for name in ["method", "data", "seed", *metrics]]
