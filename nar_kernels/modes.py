"""Evaluation mode of nets that other threads may be training."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from weakref import WeakKeyDictionary

from torch import nn

from nar_kernels.nets import unwrapped

# The mode is a flag of the module, which all threads see: so those that need one take turns.
_locks: WeakKeyDictionary[nn.Module, threading.RLock] = WeakKeyDictionary()
_locks_lock = threading.Lock()


def turn(net: nn.Module) -> threading.RLock:
    """A lock for the time in which nobody may change the mode of ``net``."""
    inner = unwrapped(net)
    with _locks_lock:
        return _locks.setdefault(inner, threading.RLock())


@contextmanager
def evaluating(module: nn.Module, net: nn.Module) -> Iterator[None]:
    """``module``, which holds ``net``, is in evaluation mode; afterwards each of its submodules is
    back in the mode it had. Waits while another thread needs ``net`` in the mode it has."""
    with turn(net):
        was_training = module.training
        training = [m for m in module.modules() if m.training]
        if training:
            module.eval()
        try:
            yield
        finally:
            if was_training:
                module.train()  # some nets do more than set a flag
            if training:
                kept = set(training)
                for m in module.modules():
                    m.training = m in kept
