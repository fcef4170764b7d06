"""The further columns of a comparison, and the names of metrics that they come from."""

import csv
import html
import math
from pathlib import Path

import pytest
from test_compare import result, write_run

from lightning_ntk import compare
from lightning_ntk.comparison.columns import further_columns
from lightning_ntk.tracking.metric_names import eps_text, robust_names, severity_names, shifted_names


def run(**metrics: float):
    return result("maml", [0.5, 0.7], metrics={"test/accuracy": 0.6, **metrics})


def attacked(attack: str, *eps: float, by: str = "adversarial") -> dict[str, float]:
    return {f"{by}/{attack}/eps_{each:g}/accuracy": 0.5 - each / 100 for each in eps}


def titles(*runs) -> list[str]:
    return [column.title for column in further_columns(runs)]


def test_runs_without_further_measurements_have_no_further_columns():
    assert titles(run(), run()) == []
    assert titles(run(**{"ntk/condition_number": math.nan})) == []


def test_the_middle_eps_that_all_share_of_the_strongest_attack():
    one = run(**attacked("pgd_l2", 0.5), **attacked("fgsm", 8), **attacked("pgd_linf", 2, 4, 8, 16, 32))
    assert titles(one) == ["robust accuracy, % (pgd_linf 8/255)"]
    two = run(**attacked("pgd_linf", 4, 2, 16))
    assert titles(one, two) == ["robust accuracy, % (pgd_linf 4/255)"]
    assert titles(one, two, run()) == ["robust accuracy, % (pgd_linf 4/255)"], "one that was not attacked has no say"
    assert titles(one, run(**attacked("pgd_l2", 0.5))) == ["robust accuracy, % (pgd_l2 0.5)"]
    assert titles(two, run(**attacked("pgd_linf", 8))) == []
    noise = {**attacked("noise", 8), **attacked("pgd_linf", 8, by="adversarial_support")}
    assert titles(run(**noise)) == ["robust accuracy, % (pgd_linf on the support 8/255)"]


def test_data_sets_out_of_distribution_come_before_corruptions():
    names = {"ood/source/accuracy": 0.7, "ood/corrupted_contrast/accuracy": 0.3}
    names["ood/corrupted_contrast/severity_2/accuracy"] = 0.2
    (column,) = further_columns([run(**names)])
    assert (column.of_runs([run(**names)]), column.note) == (
        (0.3, None),
        "Out of distribution: contrast (corrupted images).",
    )
    both = {**names, "ood/digits/accuracy": 0.5, "ood/digits/accuracy_ci95": 0.1, "ood/cub/accuracy": 0.25}
    (column,) = further_columns([run(**both), run(**{"ood/digits/accuracy": 0.5})])
    assert column.of_runs([run(**both)]) == (0.5, 0.1)
    (column,) = further_columns([run(**both)])
    assert column.note == "Out of distribution: mean over cub, digits."
    assert column.of_runs([run(**both)]) == (pytest.approx(0.375), None)
    assert column.of_runs([run(**both), run()]) == (None, None)


def test_the_mean_over_seeds_has_an_interval_where_the_probes_episodes_are_known():
    name = "adversarial/pgd_linf/eps_8/accuracy"
    runs = [
        result(
            "maml", [0.5], metrics={name: sum(v) / 3}, probes={"adversarial": {"episodes": {name: v}}, "pictures": {}}
        )
        for v in ([0.2, 0.4, 0.3], [0.4, 0.4, 0.1])
    ]
    (column,) = further_columns(runs)
    # Episode by episode the mean is 0.3, 0.4, 0.2: its sample deviation is 0.1.
    assert column.of_runs(runs) == (pytest.approx(0.3), pytest.approx(1.96 * 0.1 / 3**0.5))
    runs[1].probes["adversarial"]["episodes"][name][0] = math.nan
    assert column.of_runs(runs) == (pytest.approx(0.3), None)


def test_condition_numbers_are_averaged_by_their_logarithms():
    runs = [result("maml", [0.5], metrics={"ntk/condition_number": value}) for value in (1e2, 1e6)]
    (column,) = further_columns(runs)
    assert column.of_runs(runs) == (pytest.approx(1e4), None)


def test_the_files_have_the_columns_and_an_empty_cell_where_a_run_has_none():
    metrics = {**attacked("pgd_linf", 8), "ood/digits/accuracy": 0.25, "ntk/condition_number": 123456.0}
    metrics["adversarial/pgd_linf/eps_8/accuracy_ci95"] = 0.03
    for seed in (1, 2):
        changed = {name: value + seed / 100 for name, value in metrics.items()}
        write_run(f"all/maml{seed}", "maml", [0.5, 0.7], seed=seed, metrics={"test/accuracy": 0.6, **changed})
    write_run("all/fomaml", "fomaml", [0.5, 0.7], seed=1, metrics={"test/accuracy": 0.6, **changed})
    write_run("all/anil", "anil", [0.5, 0.6])
    compare.compare([Path("all")])
    lines = Path("all/comparison.md").read_text().splitlines()
    assert "| robust accuracy, % (pgd_linf 8/255) | out of distribution, % | condition number |" in lines[0]
    assert "| 44.00 ± 5.00 | 27.00 | 1.235e+05 |" in next(line for line in lines if line.startswith("| fomaml"))
    assert "| 43.50 | 26.50 | 1.235e+05 |" in next(line for line in lines if "mean over 2 seeds" in line)
    assert "| 55.00 ± 9.80 |  |  |  |" in next(line for line in lines if line.startswith("| anil"))
    with open("all/comparison.csv", newline="") as file:
        rows = {row["name"]: row for row in csv.DictReader(file)}
    assert (
        float(rows["maml seed 2"]["adversarial_pgd_linf_eps_8_accuracy"])
        == metrics["adversarial/pgd_linf/eps_8/accuracy"] + 0.02
    )
    assert rows["anil seed 0"]["condition_number"] == ""


def test_the_caption_says_what_was_measured_with_different_settings(capsys):
    attack = {"linf_eps": ["2/255", "8/255"], "steps": 20, "loss": "margin", "fit_steps": 5, "art": None}
    ood = {"severities": [1, 3], "targets": {"digits": {"root": "a"}}}
    metrics = {"test/accuracy": 0.6, **attacked("pgd_linf", 8), "ood/digits/accuracy": 0.25, "ntk/trace": 1.0}
    callbacks = {"adversarial": attack, "ood": ood, "ntk": {"kernel": "full"}, "mine": {"steps": 1}}
    # What decides which numbers there are is in their names; what is in training alone decides none of the test.
    same = {**callbacks, "adversarial": {**attack, "linf_eps": ["8/255"], "fit_steps": 1, "art": {"x": {"eps": 1}}}}
    same["mine"] = {"steps": 2}
    for name, settings in (("a", callbacks), ("b", same)):
        write_run(f"all/{name}", name, [0.5, 0.7], metrics=metrics, config={"callbacks": settings})
    write_run("all/unmeasured", "c", [0.5, 0.7], config={"callbacks": {"adversarial": {**attack, "steps": 1}}})
    compare.compare([Path("all")])
    assert Path("all/comparison.md").read_text().endswith("over episodes. Out of distribution: digits.\n")
    other = {"adversarial": {**attack, "steps": 5}, "ood": {**ood, "severities": [5]}, "ntk": {"kernel": "trace"}}
    del other["adversarial"]["loss"]
    other["ood"]["targets"] = {"digits": {"root": "b"}, "cub": {}}
    write_run("all/d", "d", [0.5, 0.7], metrics=metrics, config={"callbacks": other})
    compare.compare([Path("all")])
    note = (
        "Measured with different settings: adversarial.steps: 20 and 5; adversarial.loss: margin and not set; "
        'ood.severities: [1, 3] and [5]; ood.targets.digits: {"root": "a"} and {"root": "b"}; '
        "ntk.kernel: full and trace."
    )
    assert Path("all/comparison.md").read_text().endswith(f"Out of distribution: digits. {note}\n")
    assert html.escape(note) in Path("all/comparison.html").read_text()
    assert note.replace(" ", "") in "".join(capsys.readouterr().out.split())


def test_what_names_say():
    names = [
        "adversarial/pgd_l2/eps_0.5/accuracy",
        "adversarial/pgd_linf/eps_16/accuracy",
        "adversarial/pgd_linf/eps_8/accuracy",
        "adversarial/pgd_linf/eps_8/accuracy_ci95",
        "adversarial/pgd_linf/eps_x/accuracy",
        "adversarial/pgd_linf/eps_1e-05/accuracy",
        "adversarial/square/eps_8/queries",
        "ood/corrupted_blur/severity_3/accuracy",
        "ood/corrupted_blur/accuracy",
        "ood/cub/drop",
    ]
    assert {attack: list(strengths) for attack, strengths in robust_names(names).items()} == {
        "pgd_linf": [1e-5, 8.0, 16.0],
        "pgd_l2": [0.5],
    }
    assert shifted_names(names) == {}
    assert shifted_names(names, corrupted=True) == {"blur": "ood/corrupted_blur/accuracy"}
    assert severity_names(names) == {3: ["ood/corrupted_blur/severity_3/accuracy"]}
    assert [eps_text("pgd_linf", 8.0), eps_text("pgd_l2", 0.5), eps_text("noise", 0.0)] == ["8/255", "0.5", "0"]
