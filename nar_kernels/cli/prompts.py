"""Parses prompts of the command line: text or ids, with gaps to infill."""

import re
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from nar_kernels.data.sequence_spec import SequenceSpec
from nar_kernels.show.pieces import pieces_of

_GAP = re.compile(r"\[MASK(?::(\d+))?\]")


def from_text(text: str, spec: SequenceSpec, *, gaps: bool) -> Tensor:
    """int64 ``[n]`` or ``[B, n]``: the ids of a prompt, with ``mask_id`` in its gaps.

    Args:
        text: for a model of text, the text; for others, whitespace-separated ids. Or the name of
            a ``.npy`` file of ids, where negative ids are gaps.
        gaps: whether ``[MASK]`` in the text stands for one id to fill, and ``[MASK:12]`` for
            twelve.

    :func:`nar_kernels.sampling.prompt.read_prompt` checks that ids are in the vocabulary.

    Raises:
        ValueError, OSError: not ids, or the file cannot be read.
    """
    if text.endswith(".npy"):
        return _from_file(Path(text), spec)
    if gaps:
        return _with_gaps(text, spec)
    return _tensor(_ids(text, spec), spec)


def _from_file(path: Path, spec: SequenceSpec) -> Tensor:
    try:
        array = np.load(path)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{path} is no .npy file of ids: {error}") from error
    if not isinstance(array, np.ndarray):
        array.close()
        raise ValueError(f"{path} is no .npy file of ids: it is a .npz archive")
    if array.dtype.kind not in "iu" or array.ndim not in (1, 2) or array.size == 0:
        raise ValueError(
            f"{path} holds {array.dtype} {list(array.shape)}: a prompt is integers [L] or [B, L]"
        )
    _check_fits(int(array.max()), spec)
    ids = torch.from_numpy(array.astype(np.int64))
    return ids.where(ids >= 0, spec.mask_id)


def _with_gaps(text: str, spec: SequenceSpec) -> Tensor:
    ids: list[int] = []
    end = 0
    for gap in _GAP.finditer(text):
        ids += _ids(text[end : gap.start()], spec)
        length = int(gap[1] or 1)
        if len(ids) + length > spec.seq_len:  # before allocating them
            raise ValueError(
                f"a prompt has {len(ids) + length} ids: the net takes {spec.seq_len} at most"
            )
        ids += [spec.mask_id] * length
        end = gap.end()
    return _tensor(ids + _ids(text[end:], spec), spec)


def _tensor(ids: list[int], spec: SequenceSpec) -> Tensor:
    for id_ in ids:
        _check_fits(id_, spec)
    return torch.tensor(ids, dtype=torch.int64, device="cpu")


def _check_fits(id_: int, spec: SequenceSpec) -> None:
    """Raises ValueError for an id that a tensor cannot hold."""
    if not -1 << 63 <= id_ < 1 << 63:
        raise ValueError(
            f"the prompt holds id {id_}: ids must be in [0, {spec.num_tokens}), with "
            f"{spec.mask_id} where there is something to fill"
        )


def _ids(text: str, spec: SequenceSpec) -> list[int]:
    if spec.render == "bytes":
        return list(text.encode(errors="surrogateescape"))  # raw bytes of invalid UTF-8
    if spec.render == "text":
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"the prompt is not UTF-8 ({error}): this model takes text") from None
        return pieces_of(spec).ids(text)
    try:
        return [int(word) for word in text.split()]
    except ValueError:
        raise ValueError(
            f"the prompt is {text!r}: this model takes ids, numbers separated by blanks, or the "
            "name of a .npy file of them"
        ) from None
