"""The table of attacks measures what it says: the same attack at once and one by one, in passes of one model."""

from lightning_ntk.attacks.simba import simba
from lightning_ntk.benchmark import attacks
from lightning_ntk.benchmark.problem import make_problem
from lightning_ntk.benchmark.settings import QUICK, Settings

SMALL = Settings(**{**QUICK, "repeats": 1, "tables": ("attacks",)})


def test_the_table_has_every_work_and_its_figures():
    table = attacks.attacks_table(SMALL, lambda text: None)
    assert len(table.rows) == 7
    assert all(row.seconds > 0 for row in table.rows)
    figures = attacks.attacks_figures(table, {"pgd_plain": 25.0, "pgd_linear": 75.0, "simba": 20.0})
    assert [figure.goal for figure in figures] == [25.0, 75.0, 20.0, 20.0]
    assert all(figure.value > 0 for figure in figures)
    # Twenty passes each way and one forward.
    flop = {row.work: row.gflop for row in table.rows}
    assert 20 < flop[attacks.PGD_PLAIN] / flop[attacks.PASS] < 21
    assert flop[f"{attacks.ONE_BY_ONE}, {attacks.KINDS[0]}"] is None
    # Twenty passes cannot cost less than a few, even in a table of two repetitions.
    assert figures[0].value > 5


def test_simba_asks_the_same_at_once_and_one_by_one(monkeypatch):
    problem = make_problem(SMALL, tasks=1)
    x, predict, asked = problem.episodes.query_x[0], problem.network, []

    def counting(*arguments, **settings):
        found = simba(*arguments, **settings)
        asked.append(found.queries.sum().item())
        return found

    monkeypatch.setattr(attacks, "simba", counting)
    together, one_by_one = attacks._simba(problem, predict, x)
    together()
    one_by_one()
    assert asked[0] == sum(asked[1:]) > len(x)
    assert len(asked) == 1 + len(x)
