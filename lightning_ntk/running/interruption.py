"""Ctrl+C during a run or a test, whatever it becomes on its way up."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType


@contextlib.contextmanager
def interruptible(advice: Callable[[], str]) -> Iterator[None]:
    """On Ctrl+C, end with a `KeyboardInterrupt` that says what `advice` then returns.

    Lightning makes a `SystemExit` of it, and `torch.save` a `RuntimeError` in the middle of a write; so the signal
    decides, not the exception. A process that ignores the signal, or handles it in its own way, is left alone.
    """
    in_main_thread = threading.current_thread() is threading.main_thread()  # No other may set handlers.
    if not in_main_thread or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    pressed = False

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal pressed
        pressed = True
        signal.default_int_handler(number, frame)

    signal.signal(signal.SIGINT, note)
    try:
        yield
    except (Exception, SystemExit, KeyboardInterrupt):
        if not pressed:
            raise
        raise KeyboardInterrupt(advice()) from None
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # Lightning ignores the signal once it has come.
