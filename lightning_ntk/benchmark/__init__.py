"""`lightning-ntk benchmark`: what the engine costs beside its peers, side by side in one run.

Measuring (`measure`, `counting`, `memory`), what is measured (`kernels`, `steps`, `attacks`, `data`, `scaling`,
`tables`, and `peers`), and what comes of it
(`goals`, `report`, `command`) are files of their own; `runs` reads trainings instead. docs/BENCHMARKS.md says what the
tables mean.
"""

from lightning_ntk.benchmark.command import main

__all__ = ["main"]
