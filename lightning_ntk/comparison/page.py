"""comparison.html: a comparison as one page that needs nothing else, no network and no server.

The table is in the page as it comes; the script in page.html sorts and filters it and draws the figures from the JSON
beside it. All text of the user's (names of runs, folders, data) is escaped.
"""

import html
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_ntk.comparison.columns import Column
from lightning_ntk.comparison.page_figures import MOST_POINTS, masking_notes, page_figures, robust_differences
from lightning_ntk.comparison.table import Group, Row, caption, cells, data_name, has_baseline, numbers, printable
from lightning_ntk.version import __version__

TEMPLATE = Path(__file__).with_name("page.html")


def write_page(
    rows: Sequence[Row], metric: str, columns: Sequence[Column], groups: Sequence[Group], file: Path
) -> None:
    """Write the page of a comparison.

    Args:
        rows: of the table, in its order.
        metric: "accuracy" or "mse".
        columns: the further columns of the rows.
        groups: all runs, those that share a colour together.
    """
    results = [entry.result for group in groups for entry in group.members]
    data = {"labels": [group.label for group in groups], "figures": page_figures(groups, metric)}
    parts = {
        "title": html.escape(f"{printable(data_name(results[0]))}: {len(results)} runs compared"),
        "caption": html.escape(caption(results, columns)),
        "summary": summary_html(rows, metric, columns),
        "table": table_html(rows, metric, columns, groups),
        "differences": differences_html(rows, groups),
        "masking": masking_html(groups),
        "most": str(MOST_POINTS),
        "data": script_json(data),
        "version": __version__,
    }
    # In one pass: a name that looks like a place is text, too.
    text = re.sub("@@([a-z]+)@@", lambda place: parts[place[1]], TEMPLATE.read_text(encoding="utf-8"))
    file.write_text(text, encoding="utf-8")


def summary_html(rows: Sequence[Row], metric: str, columns: Sequence[Column]) -> str:
    """Who leads in what: one tile for each measurement in which runs differ."""
    _, body = cells(rows, metric, columns)
    first = 3 if has_baseline(rows) else 2  # Cells before the further columns: name, score and perhaps the difference.
    runs = [k for k, row in enumerate(rows) if not row.in_mean]  # Means, and runs that are in none.
    sign, title = (1, "highest accuracy, %") if metric == "accuracy" else (-1, "lowest mean squared error")
    scored = [k for k in runs if math.isfinite(rows[k].score)] or runs
    tiles = [(title, max(scored, key=lambda k: sign * rows[k].score), 1)]
    for place, column in enumerate(columns):
        lead = [k for k in runs if rows[k].further[place][0] is not None]
        if lead and column.percent:
            best = max(lead, key=lambda k: rows[k].further[place][0])
            tiles.append((f"highest {column.title}", best, first + place))
    trained = [k for k in runs if rows[k].fit_s]
    if trained:
        tiles.append(("fewest s of training", min(trained, key=lambda k: rows[k].fit_s), first + len(columns) + 1))
    return "\n".join(
        f"<div><dt>{html.escape(name)}</dt>"
        f"<dd><b>{html.escape(body[k][cell])}</b> {html.escape(rows[k].name)}</dd></div>"
        for name, k, cell in tiles
        if len(runs) > 1 and body[k][cell]
    )


def table_html(rows: Sequence[Row], metric: str, columns: Sequence[Column], groups: Sequence[Group]) -> str:
    """The table, with the number that each cell is sorted by and the group that each row belongs to."""
    header, body = cells(rows, metric, columns)
    labels = _names(groups) | {group.row: k for k, group in enumerate(groups)}
    heads = "".join(
        f'<th scope="col" aria-sort="none"><button type="button">{html.escape(h)}</button></th>' for h in header
    )
    lines = []
    for row, line in zip(rows, body, strict=True):
        values = [_sortable(value) for value in numbers(row, has_baseline(rows))]
        inner = "".join(
            f'<td data-value="{value}">{html.escape(text)}</td>' for value, text in zip(values, line[1:], strict=True)
        )
        kind = ' class="mean"' if row.runs > 1 else ""
        name = f'<th scope="row"><svg class="mark" width="26" height="12"></svg> {html.escape(line[0])}</th>'
        lines.append(f'<tr data-label="{labels[row.name]}"{kind}>{name}{inner}</tr>')
    return f'<table id="results"><thead><tr>{heads}</tr></thead>\n<tbody>\n' + "\n".join(lines) + "\n</tbody></table>"


def differences_html(rows: Sequence[Row], groups: Sequence[Group]) -> str:
    """A section with the paired differences under attack; empty where there is no baseline, or nothing to compare."""
    baseline = next((row for row in rows if row.is_baseline), None)
    if baseline is None:
        return ""
    reference = [e for g in groups for e in g.members if g.row == baseline.name or e.name == baseline.name]
    header, body = robust_differences(groups, reference)
    if not body:
        return ""
    heads = "".join(f'<th scope="col">{html.escape(text)}</th>' for text in header)
    lines = "\n".join("<tr>" + "".join(f"<td>{html.escape(text)}</td>" for text in line) + "</tr>" for line in body)
    title = f"Accuracy under attack, difference to {baseline.name}, in percentage points"
    note = "Paired over the same episodes, with 95 % intervals."
    table = (
        f'<div class="wide"><table id="differences"><thead><tr>{heads}</tr></thead><tbody>{lines}</tbody></table></div>'
    )
    return f"<section><h2>{html.escape(title)}</h2>\n<p>{note}</p>\n{table}</section>"


def masking_html(groups: Sequence[Group]) -> str:
    """A warning where gradients may be masked, so that accuracies under attack mean less than they seem to."""
    notes = masking_notes(groups)
    if not notes:
        return ""
    lines = "".join(f"<li>{html.escape(note)}</li>" for note in notes)
    text = "Signs of masked gradients: accuracy under FGSM and PGD may be too high (see docs/ROBUSTNESS.md)."
    return f'<p id="masking">{text}</p><ul>{lines}</ul>'


def script_json(data: Any) -> str:
    """JSON that can stand inside a script element: no tag and no comment can begin in it."""
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _names(groups: Sequence[Group]) -> dict[str, int]:
    """The number of its group for each run's name."""
    return {entry.name: k for k, group in enumerate(groups) for entry in group.members}


def _sortable(value: float | None) -> str:
    """The number, or nothing where it is missing or not finite: such rows come last."""
    return "" if value is None or not math.isfinite(value) else repr(float(value))
