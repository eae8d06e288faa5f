"""Prompts of ``generate``: parsed, validated and padded with ``mask_id``.

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


def read_prompt(
    prompt: Prompt | None, batch_size: int | None, seq_len: int, masking: MaskingConfig
) -> Tensor:
    """int64 ``[B, L]`` on the CPU: the prompt, right-padded with ``mask_id``.

    Args:
        prompt: one sequence or several, of any lengths up to L; None for unconditional samples.
        batch_size: number of samples of a single sequence; None for one sample per sequence.

    Raises:
        TypeError, ValueError: wrong types, lengths or ids.
    """
    if batch_size is not None and (batch_size := as_int("batch_size", batch_size)) < 0:
        raise ValueError(f"batch_size is {batch_size}: it must be at least 0")
    sequences = (
        [torch.empty(0, dtype=torch.int64, device="cpu")] if prompt is None else _sequences(prompt)
    )
    if batch_size is not None and len(sequences) == 1:
        sequences = sequences * batch_size
    if batch_size is not None and len(sequences) != batch_size:
        raise ValueError(
            f"batch_size is {batch_size}, but the prompt has {len(sequences)} sequences: leave "
            "batch_size out, or give one sequence"
        )
    ids = torch.full((len(sequences), seq_len), masking.mask_id, device="cpu")
    for row, sequence in zip(ids, sequences, strict=True):
        if len(sequence) > seq_len:
            raise ValueError(f"a prompt has {len(sequence)} ids: the net takes {seq_len} at most")
        row[: len(sequence)] = sequence
    bad = (ids < 0) | (ids >= masking.num_tokens)
    if bad.any():
        raise ValueError(
            f"the prompt holds id {int(ids[bad][0])}: ids must be in [0, {masking.num_tokens}), "
            f"with {masking.mask_id} where there is something to fill"
        )
    return ids


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
