"""What a run shows beside numbers, in types of our own: callbacks need not know W&B."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from matplotlib.figure import Figure


@dataclass(frozen=True)
class Table:
    """Rows of cells; a column holds numbers alone or text alone (None: not measured)."""

    columns: Sequence[str]
    rows: Sequence[Sequence[float | int | str | bool | None]]


@dataclass(frozen=True)
class Histogram:
    """How some numbers are spread, for example the eigenvalues of a kernel."""

    values: Sequence[float]


@dataclass(frozen=True)
class Lines:
    """Named lines over one axis: `lines` maps each name to its values at the places `x`."""

    title: str
    x_name: str
    x: Sequence[float]
    lines: Mapping[str, Sequence[float]]


Media = Figure | Table | Histogram | Lines
