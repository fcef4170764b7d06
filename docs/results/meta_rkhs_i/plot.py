"""Draw energy.png from FORM.csv, the metrics of a run each: `python docs/results/meta_rkhs_i/plot.py`."""

import csv
from pathlib import Path

from matplotlib.figure import Figure

FOLDER = Path(__file__).parent
FORMS = {
    "literal": "literal, eq. 4 (alpha 0.01)",
    "default": "10 Euler steps (alpha 1)",
    "maml": "MAML",
}

figure = Figure(figsize=(10, 4), layout="constrained")
left, right = figure.subplots(1, 2)
for form, label in FORMS.items():
    with (FOLDER / f"{form}.csv").open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    for axes, column, factor in ((left, "train/loss", 1), (right, "val/accuracy", 100)):
        points = [(int(row["step"]) + 1, factor * float(row[column])) for row in rows if row.get(column)]
        axes.plot(*zip(*points, strict=True), label=label, marker="." if axes is right else None)
left.set_yscale("symlog", linthresh=1)
left.set_ylabel("training objective (MAML: its loss)")
right.set_ylabel("validation accuracy, %")
for axes in (left, right):
    axes.set_xlabel("meta-steps")
    axes.grid(alpha=0.3)
right.legend(frameon=False)
figure.savefig(FOLDER / "energy.png", dpi=120)
