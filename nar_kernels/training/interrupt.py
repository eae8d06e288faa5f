"""Graceful shutdown: Ctrl-C and the signals of job schedulers let the current step finish."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

# Kubernetes and Slurm send SIGTERM before SIGKILL; Slurm sends the signal of `--signal` (SIGUSR1).
# Windows has no SIGUSR1.
SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)
)

_DUPLICATE_SECONDS = 1.0


class Interrupted(KeyboardInterrupt):
    """Training was stopped by a signal.

    Attributes:
        signum: the signal number.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum = signum

    def __str__(self) -> str:
        return signal.Signals(self.signum).name


class Interrupt:
    """Records the first signal that asked to stop.

    Args:
        ignore_duplicates: ignore signals within a second of the first: a launcher forwards what it
            receives, so a signal to a whole job arrives twice.
    """

    def __init__(self, ignore_duplicates: bool = False) -> None:
        self.signum: int | None = None
        self._duplicates_until = 0.0
        self._ignore_duplicates = ignore_duplicates

    @property
    def requested(self) -> bool:
        return self.signum is not None

    def handle(self, signum: int, frame: FrameType | None) -> None:
        if self.requested:
            if time.monotonic() < self._duplicates_until:
                return
            raise Interrupted(signum)
        self.signum = signum
        if self._ignore_duplicates:
            self._duplicates_until = time.monotonic() + _DUPLICATE_SECONDS
        name = signal.Signals(signum).name
        line = f"\n{name}: finishing this step to save it; another signal does not wait\n"
        # print() is not reentrant: the signal may have interrupted one.
        with suppress(OSError):
            os.write(2, line.encode())


@contextmanager
def _handling(handle: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Installs ``handle`` for :data:`SIGNALS`; does nothing outside the main thread."""
    if threading.current_thread() is not threading.main_thread():  # only it may set handlers
        yield
        return
    before = {}
    try:
        for number in SIGNALS:
            handler = signal.getsignal(number)
            # SIG_IGN: Ctrl-C in a background job of a shell script. None: a handler set in C.
            if handler not in (signal.SIG_IGN, None):
                before[number] = handler
                signal.signal(number, handle)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def interruptible(ignore_duplicates: bool = False) -> Iterator[Interrupt]:
    """Records the first of :data:`SIGNALS` instead of raising; a second one raises."""
    interrupt = Interrupt(ignore_duplicates)
    with _handling(interrupt.handle):
        yield interrupt


@contextmanager
def raise_on_signals() -> Iterator[None]:
    """Raises :class:`Interrupted` on any of :data:`SIGNALS`, so that resources are released."""

    def end(signum: int, frame: FrameType | None) -> None:
        raise Interrupted(signum)

    with _handling(end):
        yield
