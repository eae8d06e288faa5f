"""Memory of batches on the CPU that is used again: :class:`BatchMemory`."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

_ALIGN = 64  # bytes
_MOST_FREE = 2  # a loop that holds a batch while it asks for the next one needs two in turns


class _Block(np.ndarray):
    """Memory. A type of its own, or numpy would make it the base of arrays in a lease of it, and
    the lease would end."""


class _Lease(np.ndarray):
    """A block, as the tensors of one batch hold it: at its end the block is free again. (Half the
    time of a ``weakref.finalize``.)"""

    free: list[_Block]

    def __del__(self) -> None:
        if len(self.free) < _MOST_FREE:
            assert isinstance(self.base, _Block)
            self.free.append(self.base)


class BatchMemory:
    """Memory for the tensors of a batch, which goes to a later batch once nothing holds any of
    them, or a view of one: a training loop then writes to pages that it has, and that the caches
    know.

    Args:
        kinds: dtype and shape of each tensor.
    """

    def __init__(self, kinds: Sequence[tuple[torch.dtype, tuple[int, ...]]]) -> None:
        self._places = []
        self._size = 0
        for dtype, shape in kinds:
            name = str(dtype).removeprefix("torch.")
            self._places.append((np.dtype(name), shape, self._size))
            self._size += -(-math.prod(shape) * dtype.itemsize // _ALIGN) * _ALIGN
        self._free: list[_Block] = []

    def tensors(self) -> tuple[Tensor, ...]:
        """Tensors of these kinds, not initialised."""
        block = self._free.pop() if self._free else np.empty(self._size, np.uint8).view(_Block)
        lease = block.view(_Lease)
        lease.free = self._free
        return tuple(
            torch.from_numpy(np.ndarray(shape, dtype, lease, offset))
            for dtype, shape, offset in self._places
        )
