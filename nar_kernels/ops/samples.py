"""What a batch of ``corrupt`` is made of, checked: windows or documents, their slots and spans.

Shapes: B batch, L sequence length (``seq_len``), T corpus tokens, n documents.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from nar_kernels.checks import as_int
from nar_kernels.ops.documents import Documents
from nar_kernels.ops.masking import MaskingConfig
from nar_kernels.ops.tokens import check_ids, check_range
from nar_kernels.ops.views import Views


def _check_starts(starts: Tensor, tokens: Tensor) -> Tensor:
    if starts.is_cuda and tokens.device.type == "cpu":
        if not tokens.is_pinned():
            raise ValueError(
                f"starts is on {starts.device} but tokens are on the CPU, in memory that a GPU "
                "cannot read: use tokens.pin_memory(), or move either"
            )
        return check_ids("starts", starts, starts.device)
    return check_ids("starts", starts, tokens.device)


def _batch_shape(tokens: Tensor, seq_len: int | None) -> tuple[int, int]:
    """B and L of a batch ``[B, L]``."""
    if tokens.dim() != 2:
        raise ValueError(
            f"tokens have shape {list(tokens.shape)}: pass [B, L], or a flat corpus [T] with "
            "starts and seq_len"
        )
    batch, length = tokens.shape
    if seq_len is not None and seq_len != length:
        raise ValueError(f"seq_len is {seq_len} but tokens have length {length}")
    return batch, length


def _check_windows(tokens: Tensor, starts: Tensor, seq_len: int | None) -> tuple[Tensor, int]:
    """Starts and L of windows of a flat corpus."""
    if tokens.dim() != 1 or seq_len is None:
        raise ValueError("with starts, tokens must be a flat corpus [T] and seq_len given")
    starts = _check_starts(starts, tokens)
    if starts.shape[0] and tokens.shape[0] < seq_len:
        raise IndexError(
            f"a window of seq_len {seq_len} reaches outside the corpus of {tokens.shape[0]} tokens"
        )
    return starts, seq_len


def _check_slots(
    sample_ids: Tensor | range, batch: int, device: torch.device
) -> tuple[range | None, Tensor | None]:
    """Sample slots, as a range if they are given as one, and as a tensor unless they are a range of
    step 1, which kernels count up themselves."""
    if isinstance(sample_ids, range):
        check_range("sample_ids", sample_ids)
    else:
        sample_ids = check_ids("sample_ids", sample_ids, device)
    if len(sample_ids) != batch:
        raise ValueError(f"there are {batch} windows but {len(sample_ids)} sample_ids")
    if not isinstance(sample_ids, range):
        return None, sample_ids
    if sample_ids.step == 1:
        return sample_ids, None
    ids = torch.arange(sample_ids.start, sample_ids.stop, sample_ids.step, device=device)
    return sample_ids, ids


class Samples(NamedTuple):
    """What a batch is made of.

    Attributes:
        seq_len: L; of documents, the space of the longest.
        slots, sample_ids: as a range, and as a tensor, if they are known so.
    """

    starts: Tensor | None
    batch: int
    seq_len: int
    device: torch.device
    slots: range | None
    sample_ids: Tensor | None
    documents: Documents | None

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.batch, self.seq_len) if self.documents is None else self.documents.shape


def check_seq_len(seq_len: int) -> int:
    seq_len = as_int("seq_len", seq_len)
    if not 1 <= seq_len < 1 << 31:
        raise ValueError(f"seq_len is {seq_len}: it must be in [1, 2**31)")
    return seq_len


def samples_of_windows(
    tokens: Tensor,
    starts: Tensor | None,
    seq_len: int | None,
    sample_ids: Tensor | range | None,
) -> Samples:
    device = tokens.device
    if starts is None:
        batch, seq_len = _batch_shape(tokens, seq_len)
        check_seq_len(seq_len)
    else:
        starts, seq_len = _check_windows(tokens, starts, seq_len)
        batch, device = starts.shape[0], starts.device
    slots: range | None = range(batch)
    ids = None
    if sample_ids is not None:
        slots, ids = _check_slots(sample_ids, batch, device)
    return Samples(starts, batch, seq_len, device, slots, ids, None)


def samples_of_documents(documents: Documents, tokens: Tensor, starts: Tensor | None) -> Samples:
    if starts is None or tokens.dim() != 1:
        raise ValueError(
            "lengths are given: tokens must be a flat corpus [T], and starts say where in it each "
            "document begins"
        )
    starts = _check_starts(starts, tokens)
    n, longest = len(documents), documents.extent.longest
    if starts.shape[0] != n:
        raise ValueError(f"there are {starts.shape[0]} starts but {n} lengths")
    check_stored(documents, tokens.shape[0])
    return Samples(starts, n, longest, starts.device, None, None, documents)


def check_stored(documents: Documents, num_tokens: int) -> None:
    """Raises IndexError for a document of more ids than the corpus has: the kernels of a GPU, which
    read the first ids in place of those outside, would read behind its end."""
    longest = documents.extent.longest_stored
    if longest > num_tokens:
        raise IndexError(
            f"document {int(documents.stored.argmax())} has length {longest}, which reaches "
            f"outside the corpus of {num_tokens} tokens"
        )


def check_max_length(
    documents: Documents, masking: MaskingConfig, max_length: int | None
) -> int | None:
    """The argument of :func:`nar_kernels.corrupt` of that name, of documents."""
    if max_length is None:
        if documents.row_length is None and masking.block_length is not None:
            raise ValueError(
                f"masking has block_length {masking.block_length}: a flat batch of documents needs "
                "max_length, the most positions that any document of the corpus has"
            )
        return documents.row_length
    max_length = check_seq_len(max_length)
    if len(documents) and (longest := int(documents.lengths.max())) > max_length:
        raise ValueError(
            f"document {int(documents.lengths.argmax())} has {longest} positions: max_length is "
            f"{max_length}, but must be at least those of any document"
        )
    return max_length


def check_beside(loss_mask: Tensor, tokens: Tensor, device: torch.device) -> Tensor:
    """uint8 or bool ``[T]``, where the tokens are, for a kernel on this device."""
    if not isinstance(loss_mask, Tensor):
        raise TypeError(f"loss_mask is a {type(loss_mask).__name__}: it must be a tensor")
    if loss_mask.dtype not in (torch.bool, torch.uint8) or loss_mask.shape != tokens.shape:
        raise ValueError(
            f"loss_mask is {loss_mask.dtype} {list(loss_mask.shape)}: beside a corpus it must be "
            f"bool or uint8 {list(tokens.shape)}; what says it of positions of the batch is "
            "loss_mask [B, L] of windows, and maskable of documents"
        )
    if loss_mask.device != tokens.device:
        raise ValueError(f"loss_mask is on {loss_mask.device} but tokens are on {tokens.device}")
    loss_mask = loss_mask.contiguous()
    if device.type == "cuda" and loss_mask.is_cpu and not loss_mask.is_pinned():
        raise ValueError(
            "loss_mask is in memory that a GPU cannot read, beside tokens that it can: use "
            "loss_mask.pin_memory()"
        )
    return loss_mask


class Division(NamedTuple):
    """Fields of :class:`CorruptArgs`: into views and blocks."""

    shape: list[int]
    of_samples: list[int]
    block_length: int
    num_blocks: int
    blocks_per_slot: int
    views: int
    first_view: int
    pairing: int


def divide(
    masking: MaskingConfig,
    views: Views,
    shape: Sequence[int],
    batch: int,
    seq_len: int,
    max_length: int | None = None,
) -> Division:
    """
    Args:
        shape: of the batch in one view.
        batch, seq_len: samples, and positions of the longest.
        max_length: of any sample that has slots of this numbering. Default: ``seq_len``.
    """
    num_rows = views.num * batch
    num_blocks = masking.num_blocks(seq_len)
    block_length = masking.block_length_of(seq_len)
    of_samples, per_slot = [num_rows], 1
    if masking.block_length is not None:
        of_samples.append(num_blocks)
        per_slot = num_blocks if max_length is None else masking.num_blocks(max_length)
    return Division(
        [views.num * shape[0], *shape[1:]],
        of_samples,
        block_length,
        num_blocks,
        per_slot,
        *views,
    )


class Spans(NamedTuple):
    """Fields of :class:`CorruptArgs`."""

    spans: Tensor | None
    eos_id: int
    pad_id: int

    @property
    def ids(self) -> Tensor | None:
        """int64 ``[n]`` on the device of the kernel: sample slots."""
        if self.spans is None:
            return None
        # Saves 2 us beside self.spans[3, :-1].
        return self.spans.select(0, 3).narrow(0, 0, self.spans.shape[1] - 1)


def spans_of(
    documents: Documents,
    masking: MaskingConfig,
    eos_id: int | None,
    pad_id: int | None,
    device: torch.device,
) -> Spans:
    if eos_id is None and documents.extent.has_ends:
        raise ValueError("eos_lengths are given without eos_id, the id that they stand for")
    filler = int(masking.mask_id == 0)
    eos_id = filler if eos_id is None else check_id("eos_id", eos_id, masking)
    pad_id = eos_id if pad_id is None else check_id("pad_id", pad_id, masking)
    return Spans(documents.spans(device), eos_id, pad_id)


def check_id(name: str, value: int, masking: MaskingConfig) -> int:
    """``value`` as an int, if it is an id that data may have; otherwise ValueError."""
    value = as_int(name, value)
    if not 0 <= value < masking.num_tokens or value == masking.mask_id:
        raise ValueError(
            f"{name} is {value}: it must be in [0, {masking.num_tokens}), and not mask_id "
            f"{masking.mask_id}"
        )
    return value
