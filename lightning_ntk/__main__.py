"""`python -m lightning_ntk`: the same as `lightning-ntk`."""

import sys

from lightning_ntk.cli import main

if __name__ == "__main__":
    sys.exit(main())
