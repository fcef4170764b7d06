"""The figures to reach, read off the tables.

Goals are for the standard problem on two CPU cores or one data-centre GPU.
"""

import math
from collections.abc import Sequence

from lightning_ntk.benchmark import data, kernels, steps
from lightning_ntk.benchmark.attacks import attacks_figures
from lightning_ntk.benchmark.rows import Figure, Row, Table, best, quotient
from lightning_ntk.benchmark.runs import runs_figure
from lightning_ntk.benchmark.scaling import ddp_figure, sweep_figure
from lightning_ntk.benchmark.settings import Settings
from lightning_ntk.benchmark.tables import BATCHES, SHOTS_FACTOR

ATTACKS = {"pgd_plain": 25.0, "pgd_linear": 75.0, "simba": 20.0}
SCALING = {"ddp": 1.6, "sweep": 3.0}
GOALS = {
    "cpu": {"kernel_nt": 0.15, "kernel_torch": 0.8, "rkhs_ii": 1.3, "rkhs_i": 1.5, "runs": 0.6, "memory": 1.0}
    | {"shots": 1.3, "fused": 1.5, "plain": 10.0, "indices": 20000.0, "data_share": 0.02}
    | {"resnet12": 24.0}  # GiB of one task
    | ATTACKS
    | SCALING,
    "cuda": {"kernel_nt": 0.5, "kernel_torch": 0.5, "rkhs_ii": 0.1, "rkhs_i": 0.2, "runs": 0.2, "memory": 1.0}
    | {"batch": 8.0, "indices": 20000.0, "resident": 20000.0, "data_share": 0.02}
    | {"resnet12": 80.0}  # GiB of 16 tasks at once
    | ATTACKS
    | SCALING,
}


def figures(tables: Sequence[Table], settings: Settings) -> list[Figure]:
    """One figure for each question that the tables answer."""
    goals = GOALS[settings.device] if settings.is_standard else {}
    found = []
    for table in tables:
        if table.name.startswith("kernel"):
            found += _kernel(table, goals)
        elif table.name.startswith("steps"):
            found += _steps(table, goals if table.name == "steps" else {})
        elif table.name.startswith("compiled"):
            found += _compiled(table)
        elif table.name == "memory":
            value = quotient(table.row(steps.RKHS_II).mib, table.row(steps.MAML).mib)
            found.append(Figure("Peak memory: Meta-RKHS-II over MAML, one task", value, goals.get("memory")))
        elif table.name == "shots":
            found += _shots(table, goals)
        elif table.name == "batch":
            found += _batch(table, goals, settings)
        elif table.name == "resnet12":
            found += _resnet12(table, goals)
        elif table.name == "data":
            found += _data(table, goals)
        elif table.name == "scaling_ddp":
            found.append(ddp_figure(table, goals.get("ddp")))
        elif table.name == "scaling_sweep":
            found.append(sweep_figure(table, goals.get("sweep")))
        elif table.name == "attacks":
            found += attacks_figures(table, goals)
        elif table.name == "runs":
            found.append(runs_figure(table, GOALS[settings.device]["runs"]))
    return found


def _kernel(table: Table, goals: dict[str, float]) -> list[Figure]:
    ours = best(table.rows, kernels.OURS)
    at_once = ", tasks at once" if table.name == "kernel_batch" else ""
    found = []
    for peer, key in (("neural-tangents", "kernel_nt"), ("torch.func", "kernel_torch")):
        other = best(table.rows, peer)
        value = quotient(ours and ours.seconds, other and other.seconds)
        note = f"against {other.work}" if other else _why(table.rows, peer)
        # Each goal is stated for one of the two tables where there are two: one task, or many at once.
        other_table = goals.get("batch") and (key == "kernel_torch") != (table.name == "kernel_batch")
        goal = None if other_table else goals.get(key)
        found.append(Figure(f"Support NTK{at_once}: ours over {peer}'s best", value, goal, note=note))
    return found


def _why(rows: Sequence[Row], prefix: str) -> str:
    return next((row.note for row in rows if row.work.startswith(prefix)), "")


def _steps(table: Table, goals: dict[str, float]) -> list[Figure]:
    norm = table.title.rpartition("=")[2]
    pairs = [
        (steps.RKHS_II, steps.MAML, "rkhs_ii"),
        (steps.RKHS_II_INF, steps.MAML, "rkhs_ii"),
        (steps.RKHS_I, steps.FOMAML, "rkhs_i"),
    ]
    measured = {row.work for row in table.rows}
    pairs += [(ours, steps.LAST[name], key) for ours, name, key in pairs if steps.LAST[name] in measured]
    found = []
    for ours, theirs, key in pairs:
        a, b = table.row(ours), table.row(theirs)
        operations = quotient(a.gflop, b.gflop)
        note = f"{operations:.2f} x its operations" if operations else a.note if a.seconds is None else b.note
        what = f"Meta-step, norm={norm}: {ours} over {theirs.removeprefix('learn2learn ')}"
        found.append(Figure(what, quotient(a.seconds, b.seconds), goals.get(key), note=note))
    return found


def _compiled(table: Table) -> list[Figure]:
    norm = table.title.rpartition("=")[2]
    found = []
    for name, compiled in steps.COMPILED.items():
        value = quotient(table.row(compiled).seconds, table.row(name).seconds)
        what = f"Meta-step, norm={norm}: {name} compiled over uncompiled"
        found.append(Figure(what, value, note=table.row(compiled).note))
    return found


def _shots(table: Table, goals: dict[str, float]) -> list[Figure]:
    found = []
    for name, (few, many) in ((steps.RKHS_II, table.rows[:2]), (steps.MAML, table.rows[2:])):
        growth = quotient(many.seconds, few.seconds)
        value = math.log(growth) / math.log(SHOTS_FACTOR) if growth else None
        goal = goals.get("shots") if name == steps.RKHS_II else None
        found.append(Figure(f"Exponent of time in shots: {name}", value, goal, note="" if growth else many.note))
    return found


def _batch(table: Table, goals: dict[str, float], settings: Settings) -> list[Figure]:
    sizes = BATCHES[settings.device]
    found = []
    for number, name in enumerate((steps.RKHS_II, steps.MAML)):
        rows = table.rows[number * len(sizes) : (number + 1) * len(sizes)]
        value = quotient(rows[0].seconds, rows[-1].seconds)
        what = f"Time a task falls from {sizes[0]} to {sizes[-1]} tasks by: {name}"
        goal = goals.get("batch") if name == steps.RKHS_II else None
        found.append(Figure(what, value, goal, more_is_better=True, note="" if value else rows[-1].note))
    return found


def _resnet12(table: Table, goals: dict[str, float]) -> list[Figure]:
    ours, maml = table.row(steps.RKHS_II), table.row(steps.MAML)
    peak = quotient(ours.mib, 1024.0)
    return [
        Figure(f"{table.title}: peak memory of Meta-RKHS-II, GiB", peak, goals.get("resnet12"), note=ours.note),
        Figure(f"{table.title}: Meta-RKHS-II over MAML", quotient(ours.seconds, maml.seconds), note=maml.note),
    ]


def _data(table: Table, goals: dict[str, float]) -> list[Figure]:
    seconds = {row.work: row.seconds for row in table.rows}
    drawing = seconds.get(data.ON_GPU) or seconds[data.OURS]
    found = []
    for theirs, key in ((data.FUSED, "fused"), (data.PLAIN, "plain")):
        value = quotient(seconds[theirs], seconds[data.ALONE])  # learn2learn gives them one by one, too.
        most = quotient(seconds[theirs], seconds[data.FLOOR])
        note = f"copying as many bytes would be {most:.3g} times" if value else table.row(theirs).note
        what = f"Episodes a second: ours over {theirs}"
        found.append(Figure(what, value, goals.get(key), more_is_better=True, note=note))
    batched = quotient(seconds[data.ALONE], seconds[data.OURS])
    found.append(Figure("Episodes a second: a loader's batches over one at a time", batched, more_is_better=True))
    for ours, key, what in (
        (data.INDICES, "indices", "Episodes a second: which images alone"),
        (data.ON_GPU, "resident", "Episodes a second: images gathered on the GPU"),
    ):
        if ours in seconds:
            found.append(Figure(what, quotient(1.0, seconds[ours]), goals.get(key), more_is_better=True))
    share = quotient(drawing, seconds[steps.RKHS_II])
    return [*found, Figure("Data time over a meta-step of Meta-RKHS-II", share, goals.get("data_share"))]
