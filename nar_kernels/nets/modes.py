"""Calls of nets that are training: in evaluation mode, beside other threads, without gradients."""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from weakref import WeakKeyDictionary

import torch
from torch import nn

from nar_kernels.nets.adapter import innermost


@contextmanager
def no_grad() -> Iterator[None]:
    """``torch.no_grad`` around a call of a net that is called with gradients, too."""
    with torch.no_grad():
        yield
    # Else autocast of older PyTorch gives the next call of the net the weights that were cast in
    # here, cut off from their gradients (pytorch issue 112583).
    torch.clear_autocast_cache()


class ModeLock:
    """A lock for the time in which nobody else may change the mode of a net, or rely on it.

    The mode is a flag of modules, which all threads see: so those that need one take turns. Within
    a thread it may be taken again.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._count_lock = threading.Lock()
        self._waiting = 0

    @property
    def has_waiters(self) -> bool:
        """Whether another thread waits for it."""
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
    """Those of several nets at once, whatever they are wrapped in; None stands for no net."""

    def __init__(self, *nets: nn.Module | None) -> None:
        inner = {id(net): net for net in (innermost(net) for net in nets if net is not None)}
        with _registry_lock:
            # All threads take them in the same order, so that none waits for another in a circle.
            self._locks = [_locks.setdefault(inner[i], ModeLock()) for i in sorted(inner)]

    @property
    def has_waiters(self) -> bool:
        """Whether another thread waits for one of them."""
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
    """``module``, which holds the ``nets``, is in evaluation mode; afterwards each of its
    ``submodules`` (by default all) is back in the mode it had. Waits while another thread needs
    them as they are."""
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
                    module.train()  # some nets do more than set a flag
                kept = set(training)
                for m in submodules:
                    if m.training != (m in kept):
                        m.training = m in kept
