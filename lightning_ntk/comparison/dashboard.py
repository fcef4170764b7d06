"""`lightning-ntk dashboard ENTITY/PROJECT`: the panels of a comparison as a W&B workspace, and one as a report.

The definitions are built from the names of metrics alone, without a network; only saving them needs one.
"""

import contextlib
import json
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from lightning_ntk.comparison.columns import further_columns
from lightning_ntk.comparison.dashboard_panels import columns_of_table, panels, test_score
from lightning_ntk.comparison.table import Entry, markdown
from lightning_ntk.errors import ConfigError, MissingDependencyError, nearest_name
from lightning_ntk.settings.paths import as_path
from lightning_ntk.tracking.wandb_run import is_failure_of_wandb

HELP = """usage: lightning-ntk dashboard ENTITY/PROJECT [report=FOLDER] [baseline=NAME] [--dry-run]

Create in W&B, or update, the workspace "lightning_ntk" of a project: learning curves over steps and seconds, the NTK's
conditioning, robust accuracy by eps, out-of-distribution bars, time and memory, and a table sorted by the test score.
Needs wandb-workspaces and `wandb login`, and runs that were logged or synced (`wandb sync`).

  report=FOLDER   also write a report of the comparison of these runs: its table, and the panels of these runs alone
  baseline=NAME   as in `lightning-ntk compare`, for the report's table
  --dry-run       print both definitions as JSON; nothing is sent and no network is needed
"""
INSTALL = 'pip install "wandb-workspaces>=0.4"'
NAME = "lightning_ntk"
# In the workspace's address; W&B updates the view of this name.
VIEW = "lightningntk"
# As many of the project's latest runs say which metrics there are.
RUNS_LOOKED_AT = 20


def main(argv: list[str] | None = None) -> None:
    """Create or update what the command line asks for; see `lightning-ntk dashboard --help`."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or "--help" in words or "-h" in words:
        sys.stdout.write(HELP)
        return
    is_dry, options, places = False, {}, []
    for word in words:
        key, is_option, value = word.partition("=")
        if word == "--dry-run":
            is_dry = True
        elif is_option:
            if key not in ("report", "baseline"):
                raise ConfigError(f"dashboard has no setting {key!r}.{nearest_name(key, ('report', 'baseline'))}")
            options[key] = value
        else:
            places.append(word)
    if len(places) != 1 or not re.fullmatch(r"[^/\s]+/[^/\s]+", places[0]):
        raise ConfigError(f"dashboard takes one ENTITY/PROJECT, but got {' '.join(places) or 'none'}.")
    if "baseline" in options and "report" not in options:
        raise ConfigError("baseline= belongs to a report's table: give report=FOLDER, too.")
    entity, project = places[0].split("/")
    dashboard(entity, project, options.get("report"), options.get("baseline"), is_dry)


def dashboard(entity: str, project: str, folder: str | None, baseline: str | None, is_dry: bool) -> None:
    """Build the workspace, and the report where a folder of runs is given; save them, or print their definitions."""
    check_installed()
    entries, text = [], ""
    if folder is not None:
        runs = as_path(folder, "report")
        entries, text = read_comparison(runs, baseline)
    names = {name for entry in entries for name in entry.result.metrics}
    if is_dry:
        built = {"workspace": definition(build_workspace(entity, project, names))}
        if entries:
            built["report"] = definition(build_report(entity, project, runs.resolve().name, entries, text))
        sys.stdout.write(json.dumps(built, indent=1) + "\n")
        return
    with explained(f"{entity}/{project}"):
        names = names or logged_names(entity, project)
        sys.stdout.write(f"{save_workspace(build_workspace(entity, project, names))}\n")
        if entries:
            report = build_report(entity, project, runs.resolve().name, entries, text)
            sys.stdout.write(f"{save_report(report)}\n")


def check_installed() -> None:
    """Raise `MissingDependencyError` with the install line where wandb-workspaces is missing."""
    try:
        import wandb_workspaces.workspaces  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError(f"lightning-ntk dashboard needs wandb-workspaces: {INSTALL}") from error


def read_comparison(folder: Path, baseline: str | None) -> tuple[list[Entry], str]:
    """The runs below a folder, and their table in Markdown."""
    from lightning_ntk.compare import check_same_episodes, find_runs, table_rows

    entries = find_runs([folder])
    metric = next(iter(entries[0].result.episodes)).removeprefix("test/")
    check_same_episodes(entries, metric)
    results = [entry.result for entry in entries]
    columns = further_columns(results)
    rows = table_rows(entries, metric, baseline, columns)
    return entries, markdown(rows, metric, results, columns)


# ---- the definitions -----------------------------------------------------------------------------------------------


def build_workspace(entity: str, project: str, names: Iterable[str]) -> Any:
    """The workspace: a section for each kind of measurement, runs grouped by method and data, sorted by test score."""
    import wandb_workspaces.workspaces as ws

    names = set(names)
    score = test_score(names)
    workspace = ws.Workspace(
        entity=entity,
        project=project,
        name=NAME,
        sections=[ws.Section(name=title, panels=each, is_open=True) for title, each in panels(names).items()],
        settings=ws.WorkspaceSettings(x_axis="step", max_runs=50),
        runset_settings=ws.RunsetSettings(
            groupby=[ws.Metric("Group")],
            order=[ws.Ordering(ws.Summary(score), ascending=score.endswith("mse"))],
            pinned_columns=columns_of_table(names),
        ),
    )
    workspace._internal_name = f"nw-{VIEW}-v"
    return workspace


def build_report(entity: str, project: str, title: str, entries: Sequence[Entry], table: str) -> Any:
    """The report of a comparison: its table, and the panels over these runs alone."""
    import wandb_workspaces.reports.v2 as wr
    from wandb_workspaces.expr import Metric

    names = {name for entry in entries for name in entry.result.metrics}
    ids = [file.read_text(encoding="utf-8") for file in (e.folder / "wandb_id" for e in entries) if file.is_file()]
    if not ids:
        raise ConfigError("report: none of these runs was logged to W&B. Train with logger=wandb or wandb_offline.")
    blocks: list[Any] = [wr.H1("Results"), wr.MarkdownBlock(table)]
    for heading, each in panels(names).items():
        for place, panel in enumerate(each):
            panel.layout = wr.Layout(x=8 * (place % 3), y=6 * (place // 3), w=8, h=6)  # Three of 24 columns' width.
        # Without a project named, the report's own: naming it would ask W&B for its number.
        runs = wr.Runset(name="runs", filters=[Metric("ID").isin(ids)])
        blocks += [wr.H2(heading), wr.PanelGrid(runsets=[runs], panels=each)]
    return wr.Report(entity=entity, project=project, title=f"Comparison: {title}"[:128], blocks=blocks, width="fluid")


def definition(built: Any) -> dict[str, Any]:
    """What W&B is sent of a workspace or a report, as plain data."""
    model = built._to_model()
    spec = model.spec.model_dump(mode="json", by_alias=True, exclude_none=True)
    return {"entity": built.entity, "project": built.project, "name": model.display_name, "spec": spec}


# ---- saving --------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def explained(place: str) -> Iterator[None]:
    """What W&B refuses (no login, no permission, no network) as a `ConfigError` of one line."""
    try:
        yield
    except Exception as error:
        if isinstance(error, ConfigError) or not is_failure_of_wandb(error):
            raise
        reason = " ".join(str(error).split())
        raise ConfigError(f"{place} cannot be reached: {reason} See what would be sent by --dry-run.") from error


def logged_names(entity: str, project: str) -> set[str]:
    """The names in the summaries of a project's latest runs."""
    import wandb

    runs = wandb.Api().runs(f"{entity}/{project}", per_page=RUNS_LOOKED_AT)
    return {name for _, run in zip(range(RUNS_LOOKED_AT), runs, strict=False) for name in run.summary_metrics}


def save_workspace(workspace: Any) -> str:
    """Save the workspace in the place of the project's earlier one, if there is one; returns its address."""
    import wandb_workspaces.workspaces as ws

    try:
        earlier = ws.Workspace.from_url(f"https://wandb.ai/{workspace.entity}/{workspace.project}?nw={VIEW}")
    except ValueError as error:  # The only sign that a view, or the project, is not there.
        if "Workspace" not in str(error):
            raise ConfigError(f"{workspace.entity}/{workspace.project}: {error}") from error
    else:
        workspace._internal_id = earlier._internal_id
    return workspace.save().url


def save_report(report: Any) -> str:
    """Save the report in the place of the project's earlier one of the same title; returns its address."""
    import wandb

    earlier = wandb.Api().reports(f"{report.entity}/{report.project}")
    report.id = next((each.id for each in earlier if each.display_name == report.title), "")
    return report.save().url
