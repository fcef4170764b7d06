"""The tables: each a function of the settings that measures its works in turns."""

import dataclasses
import math
import statistics
from collections.abc import Iterator

from torch import Tensor

from lightning_ntk.benchmark import kernels, steps
from lightning_ntk.benchmark.attacks import attacks_table
from lightning_ntk.benchmark.counting import Operations, count_all
from lightning_ntk.benchmark.data import data_table
from lightning_ntk.benchmark.measure import FAILURES, Report, Work, interleave, once
from lightning_ntk.benchmark.memory import measure_memory
from lightning_ntk.benchmark.peers import neural_tangents
from lightning_ntk.benchmark.problem import make_problem
from lightning_ntk.benchmark.rows import Row, Table, quotient, timed_rows
from lightning_ntk.benchmark.scaling import scaling_tables
from lightning_ntk.benchmark.settings import Settings
from lightning_ntk.errors import LightningNTKError

SHOTS_FACTOR = 5
BATCHES = {"cpu": (1, 2, 4), "cuda": (1, 2, 4, 8, 16, 32)}
# Largest difference of two kernels, over the largest entry, that float32 explains.
EQUAL = 1e-4


def kernel_table(settings: Settings, report: Report, versions: dict[str, str], tasks: int = 1) -> Table:
    """The support NTK of `tasks` tasks at once; every implementation's kernel is checked against ours."""
    problem = make_problem(settings, tasks=tasks)
    found: dict[str, Tensor] = {}
    ours = [_kept(work, found) for work in kernels.make_kernels(problem, slow=tasks == 1)]
    with neural_tangents(problem, settings, report) as (theirs, peer):
        works = [*ours, *theirs]
        timings = interleave(works, settings.repeats, settings.limit_s, settings.device, report)
        counts = count_all([work for work in ours if timings[work.name].seconds], report)
        if peer is not None:
            versions.update(peer.versions)
            counts |= {name: Operations(int(flop), None, {}) for name, flop in peer.flop.items() if flop}
            found |= {work.name: peer.kernel(work.name) for work in theirs if timings[work.name].seconds}
    rows = timed_rows(works, timings, kernels.OURS, counts)
    expected = found.get(kernels.OURS)
    for row in rows:
        if row.work in found and expected is not None and row.work != kernels.OURS:
            error = float((found[row.work].to(expected) - expected).abs().max() / expected.abs().max())
            verdict = "equal to ours" if error <= EQUAL else "**differs from ours**"
            row.note = "; ".join(filter(None, [row.note, f"{verdict}, {error:.0e}"]))
    size = settings.ways * settings.shots
    title = f"Support NTK, {size} examples, {settings.ways} outputs" + (f", {tasks} tasks at once" * (tasks > 1))
    return Table("kernel" if tasks == 1 else "kernel_batch", title, kernels.OURS, rows)


def _kept(work: Work, results: dict[str, Tensor]) -> Work:
    """A work that keeps its latest result."""

    def run() -> None:
        results[work.name] = work.run().detach()

    return dataclasses.replace(work, run=run)


def steps_table(settings: Settings, report: Report, norm: str = "none") -> Table:
    """Meta-steps of both methods, of learn2learn's MAML and FOMAML, and the plain pass over all images; on a CPU those
    of learn2learn also with images in the layout in which our networks have them."""
    problem = make_problem(settings, norm=norm)
    names = [steps.RKHS_II, steps.RKHS_II_INF, steps.RKHS_I, steps.MAML, steps.FOMAML, steps.PASS]
    if settings.device == "cpu":
        names += steps.LAST.values()
    works = [steps.make_step(name, problem) for name in names]
    timings = interleave(works, settings.repeats, settings.limit_s, settings.device, report)
    # Counting takes a step longer than timing does, and the norms are there as information.
    counts = count_all(works, report) if norm == "none" else {}
    rows = timed_rows(works, timings, steps.PASS, counts)
    title = f"Meta-steps, {settings.tasks} tasks at once" if settings.tasks > 1 else "Meta-steps, one task"
    return Table("steps" if norm == "none" else f"steps_{norm}", f"{title}, norm={norm}", steps.PASS, rows)


def compiled_table(settings: Settings, report: Report, norm: str) -> Table:
    """Our meta-steps, compiled and not, on the same weights and tasks."""
    problem = make_problem(settings, norm=norm)
    works = []
    for name in (steps.RKHS_II, steps.RKHS_I):
        compiled = dataclasses.replace(steps.make_step(name, problem, compile=True), name=steps.COMPILED[name])
        works += [steps.make_step(name, problem), _first_step_noted(compiled, settings.device, report)]
    timings = interleave(works, settings.repeats, settings.limit_s, settings.device, report)
    rows = timed_rows(works, timings, steps.RKHS_II)
    title = f"Meta-steps with method.compile, {settings.tasks} tasks, norm={norm}"
    return Table(f"compiled_{norm}", title, steps.RKHS_II, rows)


def _first_step_noted(work: Work, device: str, report: Report) -> Work:
    """A work whose note says how long its first run took, which compiles; one that fails says so in its warm-up."""
    report(f"{work.name}: compiling")
    try:
        seconds = once(work, device) * work.tasks
    except FAILURES:
        return work
    return dataclasses.replace(work, note=f"the first step, which compiles, took {seconds:.0f} s")


def memory_table(settings: Settings, report: Report) -> Table:
    """Peak memory of one task of each method."""
    rows = []
    names = (steps.RKHS_II, steps.MAML) if settings.quick else (steps.RKHS_II, steps.RKHS_I, steps.MAML, steps.FOMAML)
    for name in names:
        report(f"{name}: memory")
        found = measure_memory(settings, name)
        rows.append(Row(name, mib=found.mib, note=found.note))
    reference = next(row for row in rows if row.work == steps.MAML)
    for row in rows:
        row.ratio = quotient(row.mib, reference.mib)
    return Table("memory", "Peak memory of one task", steps.MAML, rows)


def shots_table(settings: Settings, report: Report) -> Table:
    """The meta-step at `shots` and at 5 x `shots`, the queries fixed."""
    few, many = settings.shots, settings.shots * SHOTS_FACTOR
    works = []
    for name in (steps.RKHS_II, steps.MAML):
        for shots in (few, many):
            work = steps.make_step(name, make_problem(settings, shots=shots, tasks=1))
            works.append(dataclasses.replace(work, name=f"{name}, {shots} shots"))
    timings = interleave(works, settings.repeats, settings.limit_s, settings.device, report)
    rows = timed_rows(works, timings, works[0].name, count_all(works, report))
    for before, after in (rows[:2], rows[2:]):
        if before.seconds and after.seconds:
            after.note = f"grows as n^{math.log(after.seconds / before.seconds) / math.log(SHOTS_FACTOR):.2f}"
    return Table("shots", f"Growth from {few} to {many} shots, one task", works[0].name, rows)


def batch_table(settings: Settings, report: Report) -> Table:
    """Time a task over the number of tasks in a meta-step."""
    works = []
    for name in (steps.RKHS_II, steps.MAML):
        for tasks in BATCHES[settings.device]:
            work = steps.make_step(name, make_problem(settings, tasks=tasks))
            works.append(dataclasses.replace(work, name=f"{name}, {tasks} tasks"))
    timings = interleave(works, settings.repeats, settings.limit_s, settings.device, report)
    return Table("batch", "Time a task over the meta-batch", works[0].name, timed_rows(works, timings, works[0].name))


def resnet12_table(settings: Settings, report: Report) -> Table:
    """A meta-step of Meta-RKHS-II, and of MAML, on ResNet-12: time and peak memory, in a process each."""
    rows, title = [], f"ResNet-12, {'one task' if settings.tasks == 1 else f'{settings.tasks} tasks'}"
    names = (steps.RKHS_II, steps.MAML)
    try:
        make_problem(settings, network="resnet12", shots=1, queries=1, tasks=1)
    except LightningNTKError as error:
        rows = [Row(name, note=f"not measured: {error}") for name in names]
        return Table("resnet12", title, steps.MAML, rows)
    for name in names:
        report(f"{name} on ResNet-12")
        repeats = 2 if settings.device == "cuda" else 0
        found = measure_memory(settings, name, network="resnet12", tasks=settings.tasks, repeats=repeats)
        rows.append(
            Row(
                name,
                statistics.median(found.seconds) if found.seconds else None,
                found.seconds,
                mib=found.mib,
                note=found.note,
            )
        )
    for row in rows:
        row.ratio = quotient(row.seconds, rows[-1].seconds)
    return Table("resnet12", title, steps.MAML, rows)


def measure_tables(settings: Settings, report: Report, versions: dict[str, str]) -> Iterator[Table]:
    """The tables of the settings, one after another. `versions` receives those of the peers."""
    for name in settings.tables:
        prefixed = _prefixed(report, name)
        if name == "kernel":
            yield kernel_table(settings, prefixed, versions)
            if settings.tasks > 1:
                yield kernel_table(settings, prefixed, versions, settings.tasks)
        elif name == "norms":
            yield from (steps_table(settings, prefixed, norm) for norm in settings.norms)
        elif name == "compiled":
            yield from (compiled_table(settings, prefixed, norm) for norm in settings.norms)
        elif name == "scaling":
            yield from scaling_tables(settings, prefixed)
        else:
            yield MEASURE[name](settings, prefixed)


def _prefixed(report: Report, table: str) -> Report:
    return lambda text: report(f"{table}: {text}")


MEASURE = {
    "attacks": attacks_table,
    "steps": steps_table,
    "memory": memory_table,
    "shots": shots_table,
    "batch": batch_table,
    "resnet12": resnet12_table,
    "data": data_table,
}
