"""Which positions may be masked, in the terms that codes have for it.

Shapes: B batch, L sequence length; of documents, n and the shape of their batch.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from nar_kernels.ops.corrupted import Corrupted
from nar_kernels.ops.documents import Documents
from nar_kernels.ops.masking import IGNORE_INDEX

_COMPARED = 4096  # labels with ids

_LABEL_DTYPES = torch.int64, torch.int32
_FLAG_DTYPES = torch.bool, torch.uint8, torch.int8, torch.int32, torch.int64


class Maskable(NamedTuple):
    """What kernels read.

    Attributes:
        positions: ``[B, L]``: bool or uint8 flags, or int32 or int64 labels, of which all but -100
            may be masked; None for all positions.
        prompt_lengths: int64 ``[B]``: positions before it may not be masked; None for 0.
    """

    positions: Tensor | None = None
    prompt_lengths: Tensor | None = None

    @property
    def positions_bytes(self) -> int:
        """Of an element of ``positions``, which tells flags (1) from labels; 0 without."""
        return 0 if self.positions is None else self.positions.itemsize


EVERY_POSITION = Maskable()


def check_maskable(
    shape: tuple[int, ...],
    device: torch.device,
    *,
    documents: Documents | None = None,
    maskable: Tensor | None = None,
    labels: Tensor | None = None,
    loss_mask: Tensor | None = None,
    prompt_lengths: Tensor | None = None,
) -> Maskable:
    """The arguments of :func:`nar_kernels.corrupt` of these names, checked.

    Args:
        shape: of the batch.
        documents: of which the batch is made.

    Raises:
        TypeError: no tensor, or a wrong dtype.
        ValueError: more than one of the first three, a wrong shape or device; on the CPU, a length
            outside [0, L].
    """
    given = {"maskable": maskable, "labels": labels, "loss_mask": loss_mask}
    names = [name for name, tensor in given.items() if tensor is not None]
    if len(names) > 1:
        raise ValueError(
            f"{' and '.join(names)} say the same: which positions may be masked; pass one of them"
        )
    if maskable is not None:
        _check("maskable", maskable, (torch.bool,), shape, device)
    if labels is not None:
        _check("labels", labels, _LABEL_DTYPES, shape, device)
    if loss_mask is not None:
        _check("loss_mask", loss_mask, _FLAG_DTYPES, shape, device)
        if loss_mask.itemsize > 1:
            loss_mask = loss_mask != 0
    if prompt_lengths is not None:
        of_samples = shape[:1] if documents is None else (len(documents),)
        _check("prompt_lengths", prompt_lengths, _LABEL_DTYPES, of_samples, device)
        _check_lengths(prompt_lengths, shape[-1] if documents is None else documents.lengths)
        prompt_lengths = prompt_lengths.to(torch.int64).contiguous()
    positions = maskable if maskable is not None else labels if labels is not None else loss_mask
    return Maskable(None if positions is None else positions.contiguous(), prompt_lengths)


def check_labels(labels: Tensor, corrupted: Corrupted) -> None:
    """Raises ValueError for labels that are neither -100 nor the ids of the batch they were given
    for, among the first ones."""
    given = labels.flatten()[:_COMPARED]
    clean = corrupted.clean_ids.flatten()[:_COMPARED]
    is_given = given == IGNORE_INDEX
    wrong = (given != clean) & ~is_given
    if not wrong.any():
        return
    at = int(wrong.nonzero()[0])
    is_next = ~is_given[:-1] & (given[:-1] == clean[1:])
    hint = "labels must be the ids themselves, or -100"
    if is_next.sum() > (~is_given).sum() // 2:
        hint = (
            "they look shifted by one, as those of a causal model: a masked position predicts its "
            "own id, so pass labels that are not shifted"
        )
    place = [at] if labels.dim() == 1 else list(divmod(at, labels.shape[1]))
    raise ValueError(
        f"labels{place} is {int(given[at])}, but the id there is {int(clean[at])}: {hint}"
    )


def _check(
    name: str,
    tensor: object,
    dtypes: tuple[torch.dtype, ...],
    shape: tuple[int, ...],
    device: torch.device,
) -> None:
    wanted = f"{' or '.join(str(d).removeprefix('torch.') for d in dtypes)} {list(shape)}"
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} is a {type(tensor).__name__}: it must be a tensor, {wanted}")
    if tensor.dtype not in dtypes or tensor.shape != shape:
        error = TypeError if tensor.dtype not in dtypes else ValueError
        raise error(f"{name} is {tensor.dtype} {list(tensor.shape)}: it must be {wanted}")
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}, but the kernel runs on {device}")


def _check_lengths(prompt_lengths: Tensor, seq_len: int | Tensor) -> None:
    if not prompt_lengths.is_cpu or torch.compiler.is_compiling():
        return
    wrong = (prompt_lengths < 0) | (prompt_lengths > seq_len)
    if wrong.any():
        row = int(wrong.nonzero()[0])
        most = seq_len if isinstance(seq_len, int) else int(seq_len[row])
        raise ValueError(
            f"prompt_lengths[{row}] is {int(prompt_lengths[row])}: it must be in [0, {most}], "
            "the length of the sequence"
        )
