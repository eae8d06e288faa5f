"""Rows of ids, padded to one length.

Shapes: B batch, L the longest sequence of it.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nar_kernels.ops.masking import IGNORE_INDEX


def padded_length(rows: Sequence[Any], multiple: int | None) -> int:
    longest = max(map(len, rows))
    return longest if not multiple else -(-longest // multiple) * multiple


def pad(rows: Sequence[Any], length: int, fill: int, on_left: bool) -> Tensor:
    """int64 ``[B, length]``."""
    out = np.full((len(rows), length), fill, np.int64)
    for to, row in zip(out, rows, strict=True):
        n = len(row)
        to[length - n if on_left else 0 : length if on_left else n] = np.asarray(row)
    return torch.from_numpy(out)


def without(ids: Tensor, ignored: Tensor) -> Tensor:
    """Labels: ``ids``, and -100 where they do not count."""
    return ids.masked_fill(ignored, IGNORE_INDEX)
