"""Calls of a net for some of the sequences of a batch.

Shapes: B batch, L sequence length, R candidate positions, given as "rows": indices into the flat
``[B * L]``.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor


class Members:
    """The N sequences of a batch for which a net is called.

    Args:
        which: bool ``[B]``.
        device: of the net.
    """

    def __init__(self, which: np.ndarray, device: torch.device) -> None:
        self.which = which
        self._device, self.index = device, _to_device(which.nonzero()[0], device)
        # From the number of a member in the batch to that among the members.
        self._shift = _to_device(which.cumsum() - 1 - np.arange(len(which)), device)

    def of(self, x: Tensor) -> Tensor:
        """``[N, ...]`` of ``[B, ...]``."""
        return x.index_select(0, self.index)

    def among(self, others: "Members | None") -> Tensor:
        """int64 ``[N]``: their places among others, to whom they belong; None for the batch."""
        if others is None:
            return self.index
        return _to_device(self.which[others.which].nonzero()[0], self._device)

    def rows(self, rows: Tensor, length: int) -> Tensor:
        """Indices into the flat ``[N * L]``: int64 ``[R]``, rows of members."""
        return rows + self._shift.index_select(0, rows // length) * length

    def kwargs(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Arguments of the net for the members: of each tensor ``[B, ...]`` their part, also in a
        dict, such as ``embed_ids`` of x-transformers."""
        return {name: self._part(value) for name, value in kwargs.items()}

    def _part(self, value: Any) -> Any:
        if type(value) is dict:
            return self.kwargs(value)
        if isinstance(value, Tensor) and value.shape[:1] == self.which.shape:
            return value.index_select(0, self.index.to(value.device))
        return value

    def scores(self, critic: Callable[[Tensor], Tensor], ids: Tensor) -> Tensor:
        """float32 ``[B, L]``: what a critic says of the ids of the members, 0 for others."""
        scores = critic(self.of(ids))
        return scores.new_zeros(ids.shape).index_copy_(0, self.index, scores)


def _to_device(numbers: np.ndarray, device: torch.device) -> Tensor:
    return torch.from_numpy(numbers).to(device, non_blocking=True)
