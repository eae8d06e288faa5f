"""The iterator over decoding states: evaluation mode, taking turns with threads that train."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from nar_kernels.extras import import_extra
from nar_kernels.nets.modes import ModeLocks, eval_mode
from nar_kernels.sampling.decode import DecodeState


class DecodeIterator(Iterator[DecodeState]):
    """Iterates over ``states``: one before the first step, and one after each step.

    Args:
        states: computed lazily, here in evaluation mode and without gradients.
        module: the module that holds the nets.
        nets: the nets that compute the states.
    """

    def __init__(self, states: Iterator[DecodeState], module: nn.Module, *nets: nn.Module | None):
        self._states, self._module, self._nets = states, module, nets
        self._submodules = list(module.modules())

    def _eval_mode(self) -> Any:
        return eval_mode(self._module, *self._nets, submodules=self._submodules)

    def __next__(self) -> DecodeState:
        # Per step, not around the loop: the caller may train between two states.
        with self._eval_mode(), torch.no_grad():
            state = next(self._states, None)
        if state is None:
            raise StopIteration
        return state

    def last(self, *, progress: bool = False) -> DecodeState:
        """Runs all remaining steps and returns the last state.

        Args:
            progress: show a progress bar (tqdm).
        """
        state = next(self)
        states = self._states
        if progress:
            bar = import_extra("tqdm").tqdm
            states = bar(states, total=state.num_steps, unit="step", dynamic_ncols=True)
        locks, is_done = ModeLocks(*self._nets), False
        while not is_done:
            # Switch modes once for all steps, but yield to a thread that waits to train.
            with self._eval_mode(), torch.no_grad():
                for state in states:  # noqa: B007
                    if locks.has_waiters:
                        break
                else:
                    is_done = True
        return state
