"""Ctrl-C that lets a step finish."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Interrupt:
    """Whether Ctrl-C was pressed."""

    requested = False

    def handle(self, signum: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        # print() is not safe here: the signal may have come in the middle of another one.
        os.write(2, b"\nfinishing this step to save it; Ctrl-C again does not wait\n")


@contextmanager
def interruptible() -> Iterator[Interrupt]:
    """Takes note of the first Ctrl-C, where there is one to take note of."""
    interrupt, before = Interrupt(), signal.getsignal(signal.SIGINT)
    # Only the main thread may set a handler. In the background of a shell script, it is ignored.
    if threading.current_thread() is not threading.main_thread() or before == signal.SIG_IGN:
        yield interrupt
        return
    signal.signal(signal.SIGINT, interrupt.handle)
    try:
        yield interrupt
    finally:
        signal.signal(signal.SIGINT, before)
