"""Bidirectional attention within the documents of a packed batch: one description of where they
are, as FlashAttention has it, and what three implementations of attention are given for it.

A batch is flat `[T]`, documents one after the other, or rows `[B, L]` of whole documents, T = B L.
It falls into segments: the documents, and each gap of padding behind one, which attends to itself.
So no position attends to nothing, which would be NaN, and all three agree at every position.

Shapes: B rows, L their length, T positions of the batch, n documents, N tiles of a row.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from nar_kernels.checks import as_int
from nar_kernels.ops.segments import can_read, check_cu_seqlens, check_integers, segment_ids

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask


def flex_block_mask(
    cu_seqlens: Tensor,
    lengths: Tensor | None = None,
    *,
    shape: Sequence[int],
    block_size: int = 128,
) -> "BlockMask":
    """For ``flex_attention(query, key, value, block_mask=...)``: what ``create_block_mask`` makes
    of the same documents, from the segments at the ends of tiles instead of all L x L pairs.

    A flat batch has one row: queries are `[1, heads, T, D]`. On a GPU nothing waits for the device.

    Args:
        cu_seqlens: int32 or int64 `[n + 1]`: where in the flattened batch each document begins, and
            at last T, ascending from 0. Documents may be empty; each row begins with one.
        lengths: int32 or int64 `[n]`: the tokens of each document; what lies between its end and
            the next one's begin is padding. Default: there is none.
        shape: `(T,)` or `(B, L)`.
        block_size: positions of a tile, of queries as of keys.

    Raises:
        TypeError: ``cu_seqlens`` or ``lengths`` is no tensor of integers.
        ValueError: a wrong shape, or another device; on the CPU also documents that are not in
            order, are longer than their place, or cross the end of a row.
    """
    from torch.nn.attention.flex_attention import BlockMask  # not every caller has flex_attention

    block_size = as_int("block_size", block_size)
    if block_size < 1:
        raise ValueError(f"block_size is {block_size}: it must be positive, such as 128")
    segments = find_segments(cu_seqlens, lengths, shape).ids()
    length = segments.shape[1]
    first, last = segments[:, ::block_size], segments[:, block_size - 1 :: block_size]
    if is_ragged := length % block_size > 0:
        last = torch.cat((last, segments[:, -1:]), 1)
    # Segments ascend, so a tile has all of its positions in one if its ends are.
    is_one = first == last
    if is_ragged:
        is_one[:, -1] = False  # as create_block_mask has it: positions behind the end are masked
    meet = (first[:, :, None] <= last[:, None, :]) & (first[:, None, :] <= last[:, :, None])
    full = meet & is_one[:, :, None] & is_one[:, None, :]
    partial_count, partial_indices = ordered(meet & ~full)
    full_count, full_indices = ordered(full)

    def same_segment(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return segments[b, q_idx] == segments[b, kv_idx]

    return BlockMask(
        seq_lengths=(length, length),
        kv_num_blocks=partial_count,
        kv_indices=partial_indices,
        full_kv_num_blocks=full_count,
        full_kv_indices=full_indices,
        # The mask is symmetric: keys have the queries that queries have as keys.
        q_num_blocks=partial_count,
        q_indices=partial_indices,
        full_q_num_blocks=full_count,
        full_q_indices=full_indices,
        BLOCK_SIZE=(block_size, block_size),
        mask_mod=same_segment,
    )


def varlen_arguments(
    cu_seqlens: Tensor,
    lengths: Tensor | None = None,
    *,
    shape: Sequence[int],
    max_seqlen: int | None = None,
) -> dict[str, Any]:
    """For ``flash_attn_varlen_func(query, key, value, **...)``, whose queries, keys and values are
    those of the flattened batch, `[T, heads, D]`. ``torch.nn.attention.varlen.varlen_attn`` has
    other names in the same order: ``varlen_attn(query, key, value, *arguments.values())``.

    Args:
        cu_seqlens, lengths, shape: as of :func:`flex_block_mask`.
        max_seqlen: at least the length of the longest segment, gaps of padding included: what lies
            behind it would not be computed. Default: L, or T of a flat batch; the kernel launches
            blocks for that many queries of each segment, which end at once if it has fewer.

    Returns:
        ``cu_seqlens_q``, ``cu_seqlens_k``: int32, where segments begin: `[n + 1]`, with ``lengths``
        `[2 n + 1]`. ``max_seqlen_q``, ``max_seqlen_k``.

    Raises:
        TypeError, ValueError: as :func:`flex_block_mask`; ``max_seqlen`` is not in [1, T], or, on
            the CPU, less than a segment.
    """
    bounds, rows, length = find_segments(cu_seqlens, lengths, shape)
    longest = length if max_seqlen is None else as_int("max_seqlen", max_seqlen)
    if not 1 <= longest <= rows * length:
        raise ValueError(f"max_seqlen is {longest}: it must be in [1, {rows * length}]")
    if can_read(bounds) and (needed := int(bounds.diff().max())) > longest:
        raise ValueError(
            f"max_seqlen is {longest}, but a segment has {needed} positions: give at least that "
            "(gaps of padding are segments, too)"
        )
    return {
        "cu_seqlens_q": bounds,
        "cu_seqlens_k": bounds,
        "max_seqlen_q": longest,
        "max_seqlen_k": longest,
    }


def dense_mask(
    cu_seqlens: Tensor,
    lengths: Tensor | None = None,
    *,
    shape: Sequence[int],
) -> Tensor:
    """For ``scaled_dot_product_attention(query, key, value, attn_mask=...)``: a byte for each pair.

    Args:
        cu_seqlens, lengths, shape: as of :func:`flex_block_mask`.

    Returns:
        bool `[B, 1, L, L]`, or `[T, T]` of a flat batch: True where a query attends to a key.

    Raises:
        TypeError, ValueError: as :func:`flex_block_mask`.
    """
    ids = find_segments(cu_seqlens, lengths, shape).ids()
    mask = ids[:, None, :, None] == ids[:, None, None, :]
    return mask[0, 0] if len(shape) == 1 else mask


class Segments(NamedTuple):
    """Attributes:
    bounds: int32: where each segment begins, some of them empty, and at last T.
    rows, length: B and L; 1 and T of a flat batch.
    """

    bounds: Tensor
    rows: int
    length: int

    def ids(self) -> Tensor:
        """int32 `[B, L]`: ascending, the same within a segment alone."""
        return segment_ids(self.bounds, self.rows * self.length).view(self.rows, self.length)


def find_segments(cu_seqlens: Tensor, lengths: Tensor | None, shape: Sequence[int]) -> Segments:
    rows, length = _rows_and_length(shape)
    check_cu_seqlens(cu_seqlens, rows * length)
    _check_rows(cu_seqlens, rows, length)
    begins = cu_seqlens.to(torch.int32).contiguous()
    if lengths is None:
        return Segments(begins, rows, length)
    _check_lengths(lengths, cu_seqlens)
    ends = begins[:-1] + lengths.to(torch.int32)
    both = torch.stack((begins[:-1], ends), 1).flatten()
    return Segments(torch.cat((both, begins[-1:])), rows, length)


def _rows_and_length(shape: Sequence[int]) -> tuple[int, int]:
    if not isinstance(shape, Sequence):
        raise TypeError(f"shape is {shape!r}: it must be (T,) or (B, L)")
    sizes = tuple(as_int("shape", size) for size in shape)
    if len(sizes) not in (1, 2) or min(sizes) < 1:
        raise ValueError(f"shape is {sizes}: it must be (T,) or (B, L), of positive sizes")
    rows, length = (1, *sizes)[-2:]
    if rows * length >= 1 << 31:
        raise ValueError(f"shape is {sizes}: a batch must have less than 2**31 positions")
    return rows, length


def _check_rows(cu_seqlens: Tensor, rows: int, length: int) -> None:
    if rows == 1 or not can_read(cu_seqlens):
        return
    row_begins = torch.arange(
        0, rows * length, length, dtype=cu_seqlens.dtype, device=cu_seqlens.device
    )
    at_or_after = torch.searchsorted(cu_seqlens, row_begins)
    if (is_crossed := cu_seqlens[at_or_after] != row_begins).any():
        row = int(is_crossed.nonzero()[0])
        document = int(at_or_after[row]) - 1
        begin, end = cu_seqlens[document : document + 2].tolist()
        raise ValueError(
            f"document {document}, from {begin} to {end}, crosses the end of row {row - 1} at "
            f"{row * length}: each row must begin with a document"
        )


def _check_lengths(lengths: Tensor, cu_seqlens: Tensor) -> None:
    num_documents = len(cu_seqlens) - 1
    check_integers("lengths", lengths, f"[{num_documents}]", num_documents)
    if lengths.device != cu_seqlens.device:
        raise ValueError(
            f"lengths is on {lengths.device}, but cu_seqlens on {cu_seqlens.device}: "
            "move one to the other"
        )
    if not can_read(lengths):
        return
    extents = cu_seqlens.diff()
    if (is_wrong := (lengths < 0) | (lengths > extents)).any():
        at = int(is_wrong.nonzero()[0])
        raise ValueError(
            f"lengths[{at}] is {int(lengths[at])}: it must be in [0, {int(extents[at])}], up to "
            "where the next document begins"
        )


def ordered(member: Tensor) -> tuple[Tensor, Tensor]:
    """How a block mask has a set of tiles: bool `[B, N, N]` to counts int32 `[B, 1, N]` and
    indices int32 `[B, 1, N, N]`, members first, both parts ascending: a counting sort."""
    columns = torch.arange(member.shape[-1], dtype=torch.int32, device=member.device)
    up_to = member.cumsum(-1, dtype=torch.int32)
    count = up_to[..., -1:]
    place = torch.where(member, up_to - 1, count + columns - up_to)
    indices = torch.empty_like(place).scatter_(-1, place.long(), columns.expand_as(place))
    return count[:, None, :, 0].contiguous(), indices[:, None]
