"""NeMo Automodel's ``datasets.dllm.collate``: samples padded to blocks.

Shapes: B batch, L sequence length.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor


class DLLMCollator:
    """Pads samples to one length: ``[tokens][ends to the end of a block][padding]``.

    A sample has the lists ``input_ids``, ``loss_mask`` and ``attention_mask``, of equal length.

    Args:
        pad_token_id: of the padding, which has a loss mask of 0.
        eos_token_id: of the ends, which have one of 1. Default: ``pad_token_id``.
        block_size: tokens and ends together are a multiple of it. Default: no ends.
        pad_seq_len_divisible: above 1, the length is a multiple of it, and of ``block_size``.
        max_seq_len: longer samples are cut.
        supervise_padding: the loss mask of the padding is 1.
        response_window: blocks are counted from the first supervised token, and ends are attended
            to. The supervised tokens of a sample must be contiguous.
    """

    def __init__(
        self,
        pad_token_id: int = 0,
        eos_token_id: int | None = None,
        block_size: int | None = None,
        pad_seq_len_divisible: int | None = None,
        max_seq_len: int | None = None,
        supervise_padding: bool = False,
        response_window: bool = False,
    ) -> None:
        self.pad_token_id = pad_token_id
        self.eos_token_id = eos_token_id
        self.block_size = block_size
        self.pad_seq_len_divisible = pad_seq_len_divisible
        self.max_seq_len = max_seq_len
        self.block_pad_token_id = pad_token_id if eos_token_id is None else eos_token_id
        self.supervise_padding = supervise_padding
        self.response_window = response_window

    def __call__(self, batch: list[dict[str, Any]]) -> dict[str, Tensor]:
        """
        Returns:
            ``input_ids`` and ``attention_mask`` (int64) and ``loss_mask`` (float32), ``[B, L]``;
            ``input_lengths`` (int64 ``[B]``), of tokens.

        Raises:
            ValueError: the lists of a sample differ in length; with ``response_window``, its
                supervised tokens are not contiguous.
        """
        for sample in batch:
            sample.pop("___PAD_TOKEN_IDS___", None)
        lengths = np.array([len(sample["input_ids"]) for sample in batch], np.int64)
        _check_lengths(batch, lengths)
        begins = np.zeros_like(lengths)
        if self.response_window:
            begins = _first_supervised([sample["loss_mask"] for sample in batch], lengths)
        ends = self._ends(lengths, begins)
        length = self._length(ends)
        place = np.arange(length)
        is_token = place < lengths[:, None]
        is_end = ~is_token & (place < ends[:, None])

        def padded(name: str, pad: int, end: int) -> Tensor:
            values = np.where(is_end, end, pad)
            values[is_token] = _joined([sample[name][:length] for sample in batch])
            return torch.from_numpy(values)

        return {
            "input_ids": padded("input_ids", self.pad_token_id, self.block_pad_token_id),
            "loss_mask": padded("loss_mask", int(self.supervise_padding), 1).float(),
            "attention_mask": padded("attention_mask", 0, int(self.response_window)),
            "input_lengths": torch.from_numpy(lengths),
        }

    def _ends(self, lengths: np.ndarray, begins: np.ndarray) -> np.ndarray:
        """Where the last block of each sample ends, counted from ``begins``."""
        if self.max_seq_len is not None:
            lengths = lengths.clip(max=self.max_seq_len)
        size = self.block_size or 1
        begins = np.minimum(begins, lengths)
        return begins - (begins - lengths) // size * size

    def _length(self, ends: np.ndarray) -> int:
        length = int(ends.max(initial=0))
        divisor = self.pad_seq_len_divisible or 1
        if divisor > 1:
            multiple = math.lcm(self.block_size or 1, divisor)
            length = -(-length // multiple) * multiple
        if self.max_seq_len is not None:
            length = min(length, self.max_seq_len)
        return max(length, 1)


def _joined(lists: list[Sequence[int]]) -> np.ndarray:
    nothing = np.empty(0, np.int64)
    return np.concatenate([nothing, *(np.asarray(values, np.int64) for values in lists)])


def _check_lengths(batch: list[dict[str, Any]], lengths: np.ndarray) -> None:
    for name in ("loss_mask", "attention_mask"):
        for i, (sample, length) in enumerate(zip(batch, lengths, strict=True)):
            if len(sample[name]) != length:
                raise ValueError(
                    f"sample {i} has {length} input_ids but {len(sample[name])} values of {name}: "
                    "there must be one for each"
                )


def _first_supervised(loss_masks: list[Sequence[int]], lengths: np.ndarray) -> np.ndarray:
    """int64 ``[B]``: the first supervised token of each sample, or its length if there is none."""
    is_supervised = _joined(loss_masks) != 0
    starts = lengths.cumsum() - lengths
    sample = np.arange(len(lengths)).repeat(lengths)
    after = np.zeros_like(is_supervised)  # a supervised token of the same sample
    after[1:] = is_supervised[:-1] & (sample[1:] == sample[:-1])
    begins = np.flatnonzero(is_supervised & ~after)
    num_runs = np.bincount(sample[begins], minlength=len(lengths))
    if (num_runs > 1).any():
        i = int(num_runs.argmax())
        raise ValueError(
            f"the supervised tokens of sample {i} are in {num_runs[i]} runs, as of a conversation "
            "of several turns: response_window takes one; set mask_history=True on the dataset to "
            "supervise only the final turn"
        )
    first = lengths.copy()
    first[sample[begins]] = begins - starts[sample[begins]]
    return first
