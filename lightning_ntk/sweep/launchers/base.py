"""What a launcher is: it takes attempts at jobs, and gives a handle for each."""

import dataclasses
from collections.abc import Sequence
from typing import Protocol

from lightning_ntk.sweep.job import Job

# How a training ends that was asked to (130: by SIGINT, or by SIGTERM, which a machine sends before it goes), and what
# a shell makes of SIGKILL and SIGTERM.
EXITS_BY_SIGNAL = (130, 137, 143)


@dataclasses.dataclass(frozen=True)
class Exit:
    """How an attempt ended.

    Attributes:
        code: the exit status; negative: the signal that ended it; None: its machine or worker is gone.
        lost: what the launcher says about a worker that is gone.
    """

    code: int | None
    lost: str | None = None

    @property
    def was_lost(self) -> bool:
        """The attempt was ended from outside, so that another one may do better."""
        return self.code is None or self.code < 0 or self.code in EXITS_BY_SIGNAL


class Handle(Protocol):
    """One attempt that was handed over."""

    def poll(self) -> Exit | None:
        """How it ended, or None while it waits or runs."""

    def stop(self) -> None:
        """Ask it to stop; `poll` tells when it has."""

    def kill(self) -> None:
        """End it at once."""


class Launcher(Protocol):
    """Where jobs run.

    Attributes:
        slots: how many attempts may be handed over at once.
        interval_s: how often it is worth asking.
    """

    slots: int
    interval_s: float

    def submit(self, attempts: Sequence[tuple[Job, int]]) -> list[Handle]:
        """Hand over attempts (a job and the attempt's number)."""

    def close(self) -> None:
        """Give back what it holds."""
