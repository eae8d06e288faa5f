"""The iterator of decoding states: runs the net in eval mode, beside other threads."""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import nn

from nar_kernels.extras import import_extra
from nar_kernels.nets.modes import ModeLocks, eval_mode
from nar_kernels.sampling.decode import DecodeState


class Blocks(NamedTuple):
    """The blocks that a batch is decoded in, from left to right.

    Attributes:
        length: positions of a block.
        first: of each sequence, a position at which a block begins.
        cached: whether the keys and values of finished blocks are kept, so that the net is called
            for a block alone.
    """

    length: int
    first: list[int]
    cached: bool


class DecodeIterator(Iterator[DecodeState]):
    """A state before the first step and one after each, computed in eval mode without gradients.

    Args:
        states: the states, of which the first needs no call of the net.
        module: contains the nets.
        nets: the nets that are called.
        refresh: called before a step if the caller, or another thread, may have changed the nets.
        blocks: None if the batch is decoded as a whole.
    """

    def __init__(
        self,
        states: Iterator[DecodeState],
        module: nn.Module,
        *nets: nn.Module | None,
        refresh: Callable[[], None],
        blocks: Blocks | None,
    ) -> None:
        self.blocks = blocks
        self._states, self._module, self._nets = states, module, nets
        self._submodules = list(module.modules())
        self._refresh = refresh
        self._state: DecodeState | None = None
        self._error: BaseException | None = None

    def _eval_mode(self) -> Any:
        return eval_mode(self._module, *self._nets, submodules=self._submodules)

    def _advance(self) -> DecodeState | None:
        """Runs a step; None after the last. An error that ended decoding is raised again: the state
        before it is not the last."""
        if self._error is not None:
            raise self._error
        try:
            state = next(self._states, None)
        except BaseException as error:
            self._error = error
            raise
        if state is not None:
            self._state = state
        return state

    def __next__(self) -> DecodeState:
        if self._state is None:
            state = self._advance()
        else:
            # Per step, not around the loop: the caller may train between two states.
            with self._eval_mode(), torch.no_grad():
                self._refresh()
                state = self._advance()
        if state is None:
            raise StopIteration
        return state

    def last(self, *, progress: bool = False) -> DecodeState:
        """Runs all remaining steps and returns the last state.

        Args:
            progress: show a progress bar (tqdm).
        """
        state = next(self) if self._state is None else self._state
        step: DecodeState | None = state
        bar: Any = nullcontext()
        if progress:
            bar = import_extra("tqdm").tqdm(total=state.num_steps, unit="step", dynamic_ncols=True)
        locks = ModeLocks(*self._nets)
        with bar:
            while step is not None:
                # Switch modes once for all steps, but yield to a thread that waits to train.
                with self._eval_mode(), torch.no_grad():
                    self._refresh()
                    while (step := self._advance()) is not None:
                        state = step
                        if progress:
                            bar.update()
                        if locks.has_waiters:
                            break
        return state
