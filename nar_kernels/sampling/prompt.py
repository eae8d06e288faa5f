"""Prompts of ``generate``: parsed, validated and padded with ``mask_id`` to what is decoded.

Shapes: B batch, L sequence length.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nar_kernels.checks import as_int
from nar_kernels.ops.masking import MaskingConfig

Prompt = (
    Tensor | np.ndarray | Sequence[int] | Sequence[Tensor | np.ndarray] | Sequence[Sequence[int]]
)


# Behind the end of a sequence that is shorter than others of its batch.
NO_ID = -1


def read_prompt(
    prompt: Prompt | None,
    batch_size: int | None,
    seq_len: int,
    masking: MaskingConfig,
    *,
    length: int | tuple[int, ...] | None = None,
    max_new_tokens: int | None = None,
) -> Tensor:
    """int64 ``[B, L]`` on the CPU: the prompt, right-padded with ``mask_id`` to the length of its
    sequence, and with :data:`NO_ID` from there to L, the longest.

    Args:
        prompt: one sequence or several, of any lengths up to L; None for unconditional samples.
        batch_size: number of samples of a single sequence; None for one sample per sequence.
        seq_len: the most that the net takes; the length of all sequences if none is given.
        length, max_new_tokens: as in ``SamplingConfig``, at most one of them.

    Raises:
        TypeError, ValueError: wrong types, lengths or ids.
    """
    if batch_size is not None and (batch_size := as_int("batch_size", batch_size)) < 0:
        raise ValueError(f"batch_size is {batch_size}: it must be at least 0")
    sequences = (
        [torch.empty(0, dtype=torch.int64, device="cpu")] if prompt is None else _sequences(prompt)
    )
    if batch_size is None and isinstance(length, tuple) and len(sequences) == 1:
        batch_size = len(length)
    if batch_size is not None and len(sequences) == 1:
        sequences = sequences * batch_size
    if batch_size is not None and len(sequences) != batch_size:
        raise ValueError(
            f"batch_size is {batch_size}, but the prompt has {len(sequences)} sequences: leave "
            "batch_size out, or give one sequence"
        )
    for sequence in sequences:
        if len(sequence) > seq_len:
            raise ValueError(f"a prompt has {len(sequence)} ids: the net takes {seq_len} at most")
        bad = (sequence < 0) | (sequence >= masking.num_tokens)
        if bad.any():
            raise ValueError(
                f"the prompt holds id {int(sequence[bad][0])}: ids must be in "
                f"[0, {masking.num_tokens}), with {masking.mask_id} where there is something to "
                "fill"
            )
    lengths = _lengths([len(s) for s in sequences], seq_len, length, max_new_tokens)
    longest = max(lengths, default=length if isinstance(length, int) else seq_len)
    ids = torch.full((len(sequences), longest), NO_ID, device="cpu")
    for row, sequence, end in zip(ids, sequences, lengths, strict=True):
        row[: len(sequence)] = sequence
        row[len(sequence) : end] = masking.mask_id
    return ids


def _lengths(
    given: list[int],
    seq_len: int,
    length: int | tuple[int, ...] | None,
    max_new_tokens: int | None,
) -> list[int]:
    """How long each sequence is to be, by how many ids are given of it."""
    if max_new_tokens is not None:
        lengths = [number + max_new_tokens for number in given]
        if lengths and max(lengths) > seq_len:
            raise ValueError(
                f"max_new_tokens is {max_new_tokens}, after a prompt of {max(given)} ids: the net "
                f"takes {seq_len} in all"
            )
        return lengths
    if not isinstance(length, tuple):
        length = (seq_len if length is None else length,) * len(given)
    if len(length) != len(given):
        raise ValueError(
            f"length has {len(length)} numbers for {len(given)} sequences: give one for each, or "
            "one for all"
        )
    for number, end in zip(given, length, strict=True):
        if end > seq_len:
            raise ValueError(f"length is {end}: the net takes {seq_len} at most")
        if number > end:
            raise ValueError(
                f"a prompt has {number} ids, but length is {end}, which counts them, too: give "
                "more, or max_new_tokens to count from the end of each prompt"
            )
    return list(length)


def is_one_sequence(prompt: Prompt | None) -> bool:
    """Whether ``prompt`` is a single sequence, or none, rather than a batch of sequences."""
    if prompt is None:
        return True
    if isinstance(prompt, Tensor | np.ndarray) and prompt.ndim > 0:
        return prompt.ndim == 1
    if isinstance(prompt, str | dict | Tensor | np.ndarray) or not hasattr(prompt, "__getitem__"):
        raise _no_prompt(f"is {prompt!r}")
    return len(prompt) > 0 and np.ndim(prompt[0]) == 0


def _sequences(prompt: Prompt) -> list[Tensor]:
    batch: Any = [prompt] if is_one_sequence(prompt) else prompt
    return [_ids(sequence) for sequence in batch]


def _ids(sequence: Any) -> Tensor:
    """int64 ``[n]`` on the CPU."""
    if isinstance(sequence, np.ndarray):
        # torch cannot view read-only, negative-stride or non-native-endian arrays: copy.
        sequence = sequence.astype(sequence.dtype.newbyteorder("="))
    try:
        ids = torch.as_tensor(sequence, device="cpu")
    except (TypeError, ValueError, RuntimeError):
        raise _no_prompt(f"holds {sequence!r}") from None
    if ids.dim() == 1 and len(ids) == 0:
        return ids.long()
    if ids.dim() != 1 or ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise _no_prompt(f"has dtype {ids.dtype} and shape {list(ids.shape)}")
    return ids.long()


def _no_prompt(what: str) -> TypeError:
    return TypeError(
        f"a prompt {what}: it must be integers [L] or [B, L], or a list of such sequences"
    )
