"""Ctrl+C and SIGTERM during a run or a test, whatever they become on their way up."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import pytorch_lightning as pl

# The signals, and the handlers that Python has for them: a process that has others is left alone.
PLAIN = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}


class Interruption(pl.Callback):
    """Ends a run on the first of these signals with a `KeyboardInterrupt` that says what can be done.

    Lightning makes a `SystemExit` of Ctrl+C, and `torch.save` a `RuntimeError` in the middle of a write; so the signal
    decides, not the exception. Of SIGTERM Lightning would make an end with status 0, and between several processes a
    broadcast inside of the handler, which may wait for ever: as a callback of the Trainer, this takes it back.
    """

    def __init__(self) -> None:
        self.came = False
        self.handled: list[signal.Signals] = []

    @contextlib.contextmanager
    def saying(self, advice: Callable[[], str]) -> Iterator[None]:
        """Inside, the signals end with a `KeyboardInterrupt` of what `advice` then returns."""
        if threading.current_thread() is threading.main_thread():  # No other may set handlers.
            self.handled = [number for number, plain in PLAIN.items() if signal.getsignal(number) is plain]
        for number in self.handled:
            signal.signal(number, self._interrupt)
        try:
            yield
        except (Exception, SystemExit, KeyboardInterrupt):
            if not self.came:
                raise
            raise KeyboardInterrupt(advice()) from None
        finally:
            for number in self.handled:
                signal.signal(number, PLAIN[number])  # Lightning ignores Ctrl+C once it has come.

    def on_train_start(self, *_: Any) -> None:
        self._take_back()

    def on_test_start(self, *_: Any) -> None:
        self._take_back()

    def _take_back(self) -> None:
        if signal.SIGTERM in self.handled:
            signal.signal(signal.SIGTERM, self._interrupt)

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        self.came = True
        raise KeyboardInterrupt
