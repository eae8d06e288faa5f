"""Prompts of the command line: what is given of a sequence, and where the gaps are."""

import re
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from nar_kernels.sources import SequenceSpec

_GAP = re.compile(r"\[MASK(?::(\d+))?\]")


def from_text(text: str, spec: SequenceSpec, *, gaps: bool) -> Tensor:
    """int64 ``[n]`` or ``[B, n]``: the ids of a prompt, with ``mask_id`` in its gaps.

    Args:
        text: for a model of bytes, the text; for others, ids separated by blanks. Or the name of a
            ``.npy`` file of ids, where negative ones are gaps.
        gaps: whether ``[MASK]`` in the text stands for one id to fill, and ``[MASK:12]`` for
            twelve.

    Whether they are ids of the model is for :func:`nar_kernels.generation.read_prompt` to say.

    Raises:
        ValueError, OSError: they are no ids, or the file cannot be read.
    """
    if text.endswith(".npy"):
        return _from_file(Path(text), spec)
    if gaps:
        return _with_gaps(text, spec)
    return torch.tensor(_ids(text, spec), dtype=torch.int64)


def _from_file(path: Path, spec: SequenceSpec) -> Tensor:
    try:
        array = np.load(path)
    except ValueError as error:
        raise ValueError(f"{path} is no .npy file of ids: {error}") from error
    if array.dtype.kind not in "iu" or array.ndim not in (1, 2) or array.size == 0:
        raise ValueError(
            f"{path} holds {array.dtype} {list(array.shape)}: a prompt is integers [L] or [B, L]"
        )
    ids = torch.from_numpy(array.astype(np.int64))
    return ids.where(ids >= 0, spec.mask_id)


def _with_gaps(text: str, spec: SequenceSpec) -> Tensor:
    ids: list[int] = []
    end = 0
    for gap in _GAP.finditer(text):
        ids += _ids(text[end : gap.start()], spec)
        ids += [spec.mask_id] * int(gap[1] or 1)
        end = gap.end()
    return torch.tensor(ids + _ids(text[end:], spec), dtype=torch.int64)


def _ids(text: str, spec: SequenceSpec) -> list[int]:
    if spec.render == "bytes":
        return list(text.encode())
    try:
        return [int(word) for word in text.split()]
    except ValueError:
        raise ValueError(
            f"the prompt is {text!r}: this model takes ids, numbers separated by blanks, or the "
            "name of a .npy file of them"
        ) from None
