"""Calls in eval mode and without gradients of nets that are training; thread-safe."""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from weakref import WeakKeyDictionary

import torch
from torch import nn

from nar_kernels.nets.adapter import innermost


@contextmanager
def no_grad() -> Iterator[None]:
    """``torch.no_grad`` for calls of a net that is also called with gradients."""
    with torch.no_grad():
        yield
    # Older PyTorch: autocast would reuse the weights that it cast in here, detached from the graph,
    # in the next call with gradients (pytorch issue 112583).
    torch.clear_autocast_cache()


class ModeLock:
    """A reentrant lock on the train/eval mode of a net.

    The mode is a flag on modules, shared by all threads, so access is serialised: while the lock is
    held, no other thread may change the mode or rely on it.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._count_lock = threading.Lock()
        self._waiting = 0

    @property
    def has_waiters(self) -> bool:
        """Whether another thread waits for the lock."""
        return self._waiting > 0

    def __enter__(self) -> None:
        if self._lock.acquire(blocking=False):
            return
        with self._count_lock:
            self._waiting += 1
        try:
            self._lock.acquire()
        finally:
            with self._count_lock:
                self._waiting -= 1

    def __exit__(self, *_: object) -> None:
        self._lock.release()


_locks: WeakKeyDictionary[nn.Module, ModeLock] = WeakKeyDictionary()
_registry_lock = threading.Lock()


class ModeLocks:
    """The locks of several nets, whatever wraps them; None is skipped."""

    def __init__(self, *nets: nn.Module | None) -> None:
        inner = {id(net): net for net in (innermost(net) for net in nets if net is not None)}
        with _registry_lock:
            # The same order in all threads, or they could deadlock.
            self._locks = [_locks.setdefault(inner[i], ModeLock()) for i in sorted(inner)]

    @property
    def has_waiters(self) -> bool:
        """Whether another thread waits for one of the locks."""
        return any(lock.has_waiters for lock in self._locks)

    def __enter__(self) -> None:
        for lock in self._locks:
            lock.__enter__()

    def __exit__(self, *_: object) -> None:
        for lock in reversed(self._locks):
            lock.__exit__()


@contextmanager
def eval_mode(
    module: nn.Module, *nets: nn.Module | None, submodules: Sequence[nn.Module] | None = None
) -> Iterator[None]:
    """Puts ``module``, which holds the ``nets``, into eval mode; on exit each of its ``submodules``
    (default: all) is back in its previous mode. Takes the :class:`ModeLocks`."""
    with ModeLocks(*nets):
        submodules = list(module.modules()) if submodules is None else submodules
        training = [m for m in submodules if m.training]
        was_training = module.training
        if training:
            module.eval()
        try:
            yield
        finally:
            if training:
                if was_training:
                    module.train()  # some nets override train()
                kept = set(training)
                for m in submodules:
                    if m.training != (m in kept):
                        m.training = m in kept
