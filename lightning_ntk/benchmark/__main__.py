"""`python -m lightning_ntk.benchmark`."""

import sys

from lightning_ntk.benchmark.command import main
from lightning_ntk.cli import guarded

sys.exit(guarded(main))
