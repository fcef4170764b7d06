"""The W&B workspace and report: their definitions, built offline, and what is sent where."""

import json
import sys
from pathlib import Path

import pytest
from test_page import write_measured

from lightning_ntk import cli
from lightning_ntk.comparison import dashboard
from lightning_ntk.comparison.dashboard_panels import panels
from lightning_ntk.errors import ConfigError, MissingDependencyError


@pytest.fixture
def runs():
    write_measured("one", "meta_rkhs_ii", 0.8, 90.0)
    write_measured("two", "maml", 0.7, 9.0)
    for name in ("one", "two"):
        Path(f"all/{name}/wandb_id").write_text(f"id-{name}")
    return Path("all")


@pytest.fixture(autouse=True)
def _no_network(monkeypatch):
    """Whoever asks W&B fails at once."""
    import wandb

    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setattr(wandb, "Api", lambda *a, **k: pytest.fail("W&B was asked"))


def printed(capsys, *words: str) -> dict:
    dashboard.main([*words, "--dry-run"])
    return json.loads(capsys.readouterr().out)


def panels_of(workspace: dict) -> dict[str, list[dict]]:
    sections = workspace["spec"]["section"]["panelBankConfig"]["sections"]
    return {section["name"]: [panel["config"] for panel in section["panels"]] for section in sections}


def test_the_workspace_shows_what_the_runs_have(runs, capsys):
    workspace = printed(capsys, "me/project", f"report={runs}")["workspace"]
    assert (workspace["entity"], workspace["project"], workspace["name"]) == ("me", "project", "lightning_ntk")
    sections = panels_of(workspace)
    curves = sections["Learning"][:2]
    assert [(panel["xAxis"], panel["metrics"]) for panel in curves] == [
        ("step", ["val/accuracy"]),
        ("time/fit", ["val/accuracy"]),
    ]
    kernel = sections["Neural tangent kernel"]
    assert [panel["metrics"] for panel in kernel] == [["ntk/condition_number"], ["ntk/effective_rank"]]
    assert kernel[0]["yLogScale"] is True
    chart, bars = sections["Robust accuracy by eps"]
    assert "adversarial/pgd_linf/by_eps" in json.dumps(chart["userQuery"])
    assert bars["metrics"] == [f"adversarial/pgd_linf/eps_{eps}/accuracy" for eps in (2, 8, 16)]
    assert [panel["metrics"] for panel in sections["Out of distribution"]] == [
        ["ood/digits/accuracy"],
        ["ood/flowers/accuracy"],
        ["ood/corrupted_contrast/accuracy"],
    ]
    (runset,) = workspace["spec"]["section"]["runSets"]
    assert [key["name"] for key in runset["grouping"]] == ["group"]
    assert runset["sort"]["keys"][0] == {"key": {"section": "summary", "name": "test/accuracy"}, "ascending": False}
    assert runset["runFeed"]["columnOrder"][:5] == [
        "run:displayName",
        "summary:method",
        "summary:data",
        "summary:seed",
        "summary:test/accuracy",
    ]


def test_the_report_holds_the_table_and_the_panels_of_its_runs_alone(runs, capsys):
    report = printed(capsys, "me/project", f"report={runs}", "baseline=maml")["report"]
    assert report["name"] == "Comparison: all"
    blocks = report["spec"]["blocks"]
    (table,) = [block["content"] for block in blocks if block["type"] == "markdown-block"]
    assert "| maml | 70.00 ± 5.66 | baseline | 62.00 ± 2.00 | 55.00 | 1234 |" in table
    grids = [block["metadata"] for block in blocks if block["type"] == "panel-grid"]
    assert len(grids) == 5
    for grid in grids:
        (chosen,) = grid["runSets"][0]["filters"]["filters"]
        assert (chosen["key"]["name"], chosen["op"], chosen["value"]) == ("name", "IN", ["id-one", "id-two"])
        places = [(p["layout"]["x"], p["layout"]["y"]) for p in grid["panelBankSectionConfig"]["panels"]]
        assert len(set(places)) == len(places)


def test_without_runs_the_panels_go_by_patterns_of_names(capsys):
    built = printed(capsys, "me/project")
    assert built.keys() == {"workspace"}
    (panel,) = panels_of(built["workspace"])["Robust accuracy by eps"]
    assert panel["metricRegex"] == "adversarial.*/eps_[^/]*/accuracy"


def test_a_regression_is_shown_by_its_error():
    sections = panels(["test/mse", "val/mse"])
    assert sections["Learning"][0].y == ["val/mse"]
    assert sections["Learning"][0].log_y is True
    order = dashboard.build_workspace("me", "project", ["test/mse"]).runset_settings.order
    assert order[0].ascending is True


def test_the_workspace_is_created_and_then_updated_in_place(monkeypatch):
    import wandb
    import wandb_workspaces.workspaces.interface as interface
    import wandb_workspaces.workspaces.internal as internal

    views, sent = {}, []

    def server(api, query, variables):
        if "allViews" in query:
            found = [view for view in views.values() if view["name"] == variables["viewName"]]
            return {"project": {"allViews": {"edges": [{"node": view} for view in found]}}}
        sent.append(variables)
        number = variables.get("id", f"view{len(views)}")
        views[number] = {
            "id": number,
            "name": variables["name"],
            "displayName": variables["displayName"],
            "spec": variables["spec"],
        }
        return {"upsertView": {"view": {"id": number, "name": variables["name"]}, "inserted": True}}

    monkeypatch.setattr(wandb, "Api", lambda: None)
    monkeypatch.setattr(internal, "execute_graphql", server)
    monkeypatch.setattr(interface, "get_app_url", lambda api: "https://example.org")
    for metrics in (["test/accuracy"], ["test/accuracy", "ood/digits/accuracy"]):
        address = dashboard.save_workspace(dashboard.build_workspace("me", "project", metrics))
        assert address == "https://example.org/me/project?nw=lightningntk"
    assert len(views) == 1
    assert [variables.get("id") for variables in sent] == [None, "view0"]
    assert "ood/digits/accuracy" in views["view0"]["spec"]


def test_a_report_of_the_same_title_is_replaced(monkeypatch, runs):
    import wandb
    import wandb_workspaces.reports.v2 as wr

    class Earlier:
        def __init__(self, number, title):
            self.id, self.display_name = number, title

    class Api:
        def reports(self, path):
            assert path == "me/project"
            return [Earlier("1", "another"), Earlier("2", "Comparison: all")]

    saved = []
    monkeypatch.setattr(wandb, "Api", Api)
    monkeypatch.setattr(wr.Report, "save", lambda self: (saved.append(self.id), self)[1])
    monkeypatch.setattr(wr.Report, "url", "address")
    entries, table = dashboard.read_comparison(runs, None)
    for title in ("all", "new"):
        assert dashboard.save_report(dashboard.build_report("me", "project", title, entries, table)) == "address"
    assert saved == ["2", ""]


def test_what_cannot_be_done_is_said_in_a_line(runs, monkeypatch, capsys):
    import wandb

    for words, message in (
        (["me"], r"takes one ENTITY/PROJECT, but got me"),
        (["me/a/b"], "takes one ENTITY/PROJECT"),
        (["me/project", "reprot=all"], r"no setting 'reprot'\. Did you mean 'report'"),
        (["me/project", "baseline=maml"], "give report=FOLDER"),
        (["me/project", "report=nowhere", "--dry-run"], "nowhere is not a folder"),
    ):
        with pytest.raises(ConfigError, match=message):
            dashboard.main(words)

    def refuse(*_, **__):
        raise wandb.errors.UsageError("No API key configured. Use `wandb login` to log in.")

    monkeypatch.setattr(wandb, "Api", refuse)
    assert cli.main(["dashboard", "me/project"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    for file in runs.glob("*/wandb_id"):
        file.unlink()
    with pytest.raises(ConfigError, match="none of these runs was logged to W&B"):
        dashboard.main(["me/project", "report=all", "--dry-run"])
    monkeypatch.setitem(sys.modules, "wandb_workspaces", None)
    monkeypatch.setitem(sys.modules, "wandb_workspaces.workspaces", None)
    with pytest.raises(MissingDependencyError, match=r"pip install .wandb-workspaces"):
        dashboard.main(["me/project", "--dry-run"])
