"""What a result says on the terminal."""

import dataclasses
import math

from test_results import RESULT

from lightning_ntk.running.report import report_lines


def test_a_result_is_told_with_what_its_probes_found():
    metrics = {
        "adversarial/clean/accuracy": 0.8,
        "adversarial/clean/accuracy_ci95": 0.05,
        "adversarial/pgd_linf/eps_16/accuracy": 0.1,
        "adversarial/pgd_linf/eps_8/accuracy": 0.25,
        "adversarial/simba_dct/accuracy": math.nan,
        "adversarial/simba_dct/queries": 12.0,
        "ood/source/accuracy": 0.8,
        "ood/digits/accuracy": 0.5,
        "ood/corrupted_contrast/accuracy": 0.6,
        "ood/corrupted_contrast/severity_1/accuracy": 0.7,
        "ntk/condition_number": 12345.0,
        "ntk/effective_rank": 3.14159,
    }
    result = dataclasses.replace(RESULT, metrics=metrics, episodes={"test/accuracy": [0.5, 1.0]})
    first, *others = report_lines(result)
    assert first.endswith(": test/accuracy 75.00 ± 49.00 % over 2 episodes")
    assert others == [
        "  without attack: 80.0 ± 5.0 %",
        "  under pgd_linf 8/255: 25.0 %, 16/255: 10.0 %",
        "  under simba_dct: not measured",
        "  source of ood: 80.0 %",
        "  digits: 50.0 %, contrast: 60.0 %",
        "  kernel: condition number 1.23e+04, effective rank 3.14",
    ]


def test_errors_are_numbers_and_no_probe_is_no_line():
    (line,) = report_lines(dataclasses.replace(RESULT, metrics={}, episodes={"test/mse": [0.5]}))
    assert line.endswith("test/mse 0.5000 over one episode")
    (line,) = report_lines(dataclasses.replace(RESULT, metrics={}, episodes={"test/mse": [0.5, 0.7]}))
    assert line.endswith(": test/mse 0.6000 ± 0.1960 over 2 episodes")
