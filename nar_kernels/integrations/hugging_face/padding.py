"""What collators know of tokenizers and padding.

Shapes: B batch, L the longest sequence of it.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nar_kernels.ops.masking import IGNORE_INDEX


def check_lengths(examples: Sequence[Mapping[str, Any]]) -> None:
    """Raises ValueError: a column of an example is not as long as its ``input_ids``."""
    for i, example in enumerate(examples):
        length = len(example["input_ids"])
        for name, row in example.items():
            if len(row) != length:
                raise ValueError(
                    f"example {i} of the batch has {length} input_ids and {len(row)} {name}: "
                    "there must be one for each token"
                )


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


def num_leading(is_padding: Tensor) -> Tensor:
    """int64 ``[B]``: of the positions ``[B, L]`` before the first token."""
    if is_padding.is_cpu and not is_padding[:, :1].any():
        return torch.zeros(len(is_padding), dtype=torch.int64, device="cpu")
    return is_padding.cumprod(1).sum(1)


def rolled(rows: Tensor, by: Tensor) -> Tensor:
    """Rows ``[B, L, ...]``, each rolled to the left by ``by`` ``[B]`` places. What is drawn for a
    position is then that of its token, however much padding is before it."""
    if by.is_cpu and not by.any():
        return rows
    row = torch.arange(len(rows), device=rows.device)[:, None]
    place = torch.arange(rows.shape[1], device=rows.device) + by[:, None]
    return rows[row, place % max(rows.shape[1], 1)]


def vocabulary_size(tokenizer: Any) -> int:
    """One more than the greatest id, which of a vocabulary with gaps is above ``len``."""
    return max(len(tokenizer), max(tokenizer.get_vocab().values(), default=-1) + 1)
