"""Signals that let a step finish: Ctrl-C, and those by which schedulers stop a job."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

# Kubernetes and Slurm send SIGTERM before they kill; Slurm sends what `--signal` says. Windows has
# no SIGUSR1.
SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)
)

_ECHO = 1.0  # seconds


class Interrupted(KeyboardInterrupt):
    """A signal has stopped training.

    Attributes:
        signum: its number.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum = signum

    def __str__(self) -> str:
        return signal.Signals(self.signum).name


class Interrupt:
    """Which signal asked to stop, if one did.

    Args:
        hears_echoes: a launcher hands on what it receives, so a signal to a whole job comes twice;
            what comes at once after the first is no second wish.
    """

    def __init__(self, hears_echoes: bool = False) -> None:
        self.signum: int | None = None
        self._echo_until = 0.0
        self._hears_echoes = hears_echoes

    @property
    def requested(self) -> bool:
        return self.signum is not None

    def handle(self, signum: int, frame: FrameType | None) -> None:
        if self.requested:
            if time.monotonic() < self._echo_until:
                return
            raise Interrupted(signum)
        self.signum = signum
        if self._hears_echoes:
            self._echo_until = time.monotonic() + _ECHO
        name = signal.Signals(signum).name
        line = f"\n{name}: finishing this step to save it; another signal does not wait\n"
        # print() is not safe here: the signal may have come in the middle of another one.
        with suppress(OSError):
            os.write(2, line.encode())


@contextmanager
def _handling(handle: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """``handle`` gets :data:`SIGNALS`, where there is one to get."""
    if threading.current_thread() is not threading.main_thread():  # which alone may set handlers
        yield
        return
    before = {}
    try:
        for number in SIGNALS:
            handler = signal.getsignal(number)
            # Ignored is Ctrl-C in the background of a shell script; None are handlers of C code.
            if handler not in (signal.SIG_IGN, None):
                before[number] = handler
                signal.signal(number, handle)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def interruptible(hears_echoes: bool = False) -> Iterator[Interrupt]:
    """Takes note of the first of :data:`SIGNALS`."""
    interrupt = Interrupt(hears_echoes)
    with _handling(interrupt.handle):
        yield interrupt


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """The first of :data:`SIGNALS` is an exception, so that what is held gets released."""

    def end(signum: int, frame: FrameType | None) -> None:
        raise Interrupted(signum)

    with _handling(end):
        yield
