"""Where windows begin: :class:`WindowTable`.

Shapes: B batch, L sequence length (``seq_len``), S segments, N windows.
"""

import hashlib
from functools import cached_property

import numpy as np
import torch
from torch import Tensor


class WindowTable:
    """Windows of L tokens, one every ``stride`` tokens from the beginning of each segment of a
    stream on, none of which leaves its segment. They are numbered in the order of the stream.

    Args:
        begins, lengths: int64 ``[S]``, the segments, ascending; such as documents, or all of it.
    """

    def __init__(self, begins: np.ndarray, lengths: np.ndarray, seq_len: int, stride: int) -> None:
        counts = (lengths - seq_len) // stride + 1
        holds = lengths >= seq_len
        self.stride = stride
        self.begins = begins[holds]
        self._before = np.zeros(len(self.begins) + 1, np.int64)  # windows before each segment
        np.cumsum(counts[holds], out=self._before[1:])

    def __len__(self) -> int:
        """N."""
        return int(self._before[-1])

    @property
    def is_regular(self) -> bool:
        """Whether window i begins at ``begins[0] + i * stride``."""
        return len(self.begins) == 1

    def starts(self, index: Tensor) -> Tensor:
        """Where the windows with these numbers, in [0, N), begin; on their device."""
        if self.is_regular:
            return int(self.begins[0]) + index * self.stride
        numbers = index.cpu().numpy()
        segment = np.searchsorted(self._before, numbers, "right") - 1
        starts = self.begins[segment] + (numbers - self._before[segment]) * self.stride
        return torch.from_numpy(starts).to(index.device)

    def num_before(self, offset: int) -> int:
        """How many windows begin before this offset of the stream."""
        segment = int(np.searchsorted(self.begins, offset, "left")) - 1
        if segment < 0:
            return 0
        before, after = self._before[segment : segment + 2].tolist()
        return min(before + -(-(offset - int(self.begins[segment])) // self.stride), after)

    def covered(self, offsets: np.ndarray, seq_len: int, first: int, last: int) -> np.ndarray:
        """Those of the offsets of the stream that windows ``first`` to ``last`` cover."""
        segment = np.searchsorted(self.begins, offsets, "right") - 1
        last_of_segment = self._before[segment + 1] - 1
        number = self._before[segment] + (offsets - self.begins[segment]) // self.stride
        number = np.minimum(number, last_of_segment).clip(first, last)
        starts = self.starts(torch.from_numpy(number)).numpy()
        return offsets[(starts <= offsets) & (offsets < starts + seq_len)]

    @cached_property
    def digest(self) -> str | None:
        """SHA-256 of the segments, in hex; None for a regular table, which is its numbers."""
        if self.is_regular:
            return None
        return hashlib.sha256(self.begins.tobytes() + self._before.tobytes()).hexdigest()
