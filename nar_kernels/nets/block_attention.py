"""Attention of block diffusion (BD3LM, arXiv:2503.09573): blocks are denoised one after the other,
each given the clean ones before it, and a training step does all of them at once.

A row is twice L long: the noisy tokens x_t, then the clean ones x_0. Blocks are counted from the
beginning of a document; its last one may be short. Of the keys of its own document

* a noisy query attends to the noisy ones of its block and the clean ones of the blocks before,
* a clean query attends to the clean ones of its block and the blocks before.

So each attends to two ranges of keys at most, which is all that is used here. Documents are those
of nets/attention.py: gaps of padding are segments of their own, with blocks as if they were one, so
that no position attends to nothing and all forms agree at every position.

Shapes: B rows, L their length without the noisy half, S positions of a tile, N tiles of a row.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from nar_kernels.checks import as_int, check_device
from nar_kernels.nets.attention import Segments, find_segments, ordered
from nar_kernels.ops.dispatch import needs_dispatcher, raw_stream
from nar_kernels.ops.segments import segment_ids

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

MaskMod = Callable[[Tensor, Any, Tensor, Tensor], Tensor]


def block_mask(
    seq_len: int,
    block_length: int,
    cu_seqlens: Tensor | None = None,
    lengths: Tensor | None = None,
    *,
    rows: int = 1,
    noisy: bool = True,
    device: torch.device | str | None = None,
    block_size: int = 128,
) -> "BlockMask":
    """For ``flex_attention(query, key, value, block_mask=...)`` with queries and keys
    `[B, heads, 2 L, D]`: what ``create_block_mask`` makes of the same mask, without looking at all
    pairs. On a GPU nothing waits for the device.

    Without documents the lists of the last few masks are kept; each call returns a copy.

    Args:
        seq_len: L: tokens of a row, noisy and clean ones counted once.
        block_length: tokens of a block, in [1, L].
        cu_seqlens, lengths: documents of the flattened batch `[B * L]`, as of
            :func:`~nar_kernels.flex_block_mask`. Default: each row is one.
        rows: B, which documents need. Without them the mask is the same for every row, and has a
            batch dimension of 1.
        noisy: False leaves the noisy half out, for decoding: queries and keys are the L clean
            tokens, which attend to their block and those before.
        device: where the mask is. Default: that of ``cu_seqlens``; without documents the CPU.
        block_size: positions of a tile, of queries as of keys.

    Raises:
        TypeError: an argument is not of its type.
        ValueError: an argument is out of its range, or on another device; on the CPU also documents
            that are not in order, are longer than their place, or cross the end of a row.
    """
    from torch.nn.attention.flex_attention import BlockMask  # not every caller has flex_attention

    segments, block_length = _described(seq_len, block_length, cu_seqlens, lengths, rows, device)
    block_size = as_int("block_size", block_size)
    if block_size < 1:
        raise ValueError(f"block_size is {block_size}: it must be positive, such as 128")
    length = segments.length
    if cu_seqlens is None:
        counts, indices = _tiles_of_one(
            length, block_length, block_size, noisy, segments.bounds.device
        )
        mask_mod = _mask_of_one(length, block_length, noisy)
    else:
        places = _find_places(segments, block_length)
        counts, indices = _tiles(places, block_size, noisy)
        mask_mod = _mask_of_documents(places, noisy)
    total = 2 * length if noisy else length
    return BlockMask(
        seq_lengths=(total, total),
        kv_num_blocks=counts[0],
        kv_indices=indices[0],
        full_kv_num_blocks=counts[1],
        full_kv_indices=indices[1],
        q_num_blocks=counts[2],
        q_indices=indices[2],
        full_q_num_blocks=counts[3],
        full_q_indices=indices[3],
        BLOCK_SIZE=(block_size, block_size),
        mask_mod=mask_mod,
    )


def dense_block_mask(
    seq_len: int,
    block_length: int,
    cu_seqlens: Tensor | None = None,
    lengths: Tensor | None = None,
    *,
    rows: int = 1,
    noisy: bool = True,
    device: torch.device | str | None = None,
) -> Tensor:
    """For ``scaled_dot_product_attention(query, key, value, attn_mask=...)``: a byte for each pair.

    Args:
        seq_len, block_length, cu_seqlens, lengths, rows, noisy, device: as of :func:`block_mask`.

    Returns:
        bool `[B, 1, 2 L, 2 L]`, without documents `[1, 1, 2 L, 2 L]` (L instead of 2 L if not
        ``noisy``): True where a query attends to a key.

    Raises:
        TypeError, ValueError: as :func:`block_mask`.
    """
    segments, block_length = _described(seq_len, block_length, cu_seqlens, lengths, rows, device)
    length, device = segments.length, segments.bounds.device
    if cu_seqlens is None:
        rows, mask_mod = 1, _mask_of_one(length, block_length, noisy)
    else:
        rows = segments.rows
        mask_mod = _mask_of_documents(_find_places(segments, block_length), noisy)
    row = torch.arange(rows, device=device)[:, None, None, None]
    index = torch.arange(2 * length if noisy else length, device=device)
    return mask_mod(row, None, index[:, None], index).expand(rows, 1, len(index), len(index))


class BlockVarlen(NamedTuple):
    """Attention of block diffusion as two calls of ``flash_attn_varlen_func``, on the same keys.

    Attributes:
        key_indices: int64: which of the `[B * 2 L]` keys and values to gather.
        noisy, clean: ``cu_seqlens_q``, ``cu_seqlens_k`` (int32), ``max_seqlen_q``,
            ``max_seqlen_k`` for the queries of that half, `[B * L]`.
    """

    key_indices: Tensor
    noisy: dict[str, Any]
    clean: dict[str, Any]


def block_varlen_arguments(
    seq_len: int,
    block_length: int,
    cu_seqlens: Tensor | None = None,
    lengths: Tensor | None = None,
    *,
    rows: int = 1,
    device: torch.device | str | None = None,
) -> BlockVarlen:
    """For FlashAttention, which has no such mask, but sequences of queries with keys of their own.
    With queries, keys and values `[B, 2 L, heads, D]`::

        key_indices, noisy, clean = block_varlen_arguments(L, block_length, rows=B)
        keys, values = (x.flatten(0, 1)[key_indices] for x in (key, value))
        of_noisy, of_clean = (x.flatten(0, 1) for x in query.split(L, 1))
        flash_attn_varlen_func(of_noisy, keys, values, **noisy)  # [B * L, heads, D]
        flash_attn_varlen_func(of_clean, keys, values, **clean)

    ``torch.nn.attention.varlen.varlen_attn`` takes the same arguments in the same order.

    The gathered keys are, of each block, its noisy ones, the clean ones of the blocks before, and
    its clean ones. The first two are those of its noisy queries, the last two of its clean ones:
    that is why one gathering serves both, and what a call leaves out are sequences of no queries.
    A document of n tokens has about ``n**2 / (2 * block_length) + 1.5 * n`` of them, where
    :func:`block_mask` needs none: this is for long blocks, or for where there is no flex_attention.

    On a GPU documents make the host wait once, for how many keys there are.

    Args:
        seq_len, block_length, cu_seqlens, lengths, device: as of :func:`block_mask`.
        rows: B, also without documents.

    Raises:
        TypeError, ValueError: as :func:`block_mask`; there are 2**31 or more keys to gather.
    """
    segments, block_length = _described(seq_len, block_length, cu_seqlens, lengths, rows, device)
    bounds, rows, length = segments
    per_segment = (bounds.diff() + block_length - 1) // block_length
    num_blocks, num_keys = _count(segments, per_segment, block_length, cu_seqlens is None)
    if num_keys >= 1 << 31:
        raise ValueError(
            f"blocks of {block_length} tokens have {num_keys} keys to gather: it must be less than "
            "2**31; use block_mask, or longer blocks"
        )

    first_blocks = _cumulated(per_segment)
    segment = segment_ids(first_blocks, num_blocks) - 1
    block = torch.arange(num_blocks, dtype=torch.int32, device=bounds.device)
    document = bounds[segment]
    begin = document + (block - first_blocks[segment]) * block_length
    end = torch.minimum(begin + block_length, bounds[segment + 1])

    # Two runs of keys a block: its noisy ones, and the clean ones of its document up to its end.
    run_begins = _cumulated(_alternating(end - begin, end - document))
    first_keys = _alternating(
        begin + begin // length * length, document + (document // length + 1) * length
    )
    run = segment_ids(run_begins, num_keys) - 1
    place = torch.arange(num_keys, dtype=torch.int32, device=bounds.device)
    key_indices = ((first_keys - run_begins[:-1])[run] + place).long()

    key_end = run_begins[2::2]
    longest = {"max_seqlen_q": block_length, "max_seqlen_k": length}
    noisy = {
        "cu_seqlens_q": _after_zero(_alternating(end, end)),
        "cu_seqlens_k": _after_zero(_alternating(key_end - (end - begin), key_end)),
        **longest,
    }
    clean = {
        "cu_seqlens_q": _after_zero(_alternating(begin, end)),
        "cu_seqlens_k": run_begins,
        **longest,
    }
    return BlockVarlen(key_indices, noisy, clean)


def _described(
    seq_len: int,
    block_length: int,
    cu_seqlens: Tensor | None,
    lengths: Tensor | None,
    rows: int,
    device: torch.device | str | None,
) -> tuple[Segments, int]:
    """The segments of a batch, and ``block_length``, checked."""
    seq_len, block_length = as_int("seq_len", seq_len), as_int("block_length", block_length)
    rows = as_int("rows", rows)
    if seq_len < 1 or rows < 1 or 2 * rows * seq_len >= 1 << 31:
        raise ValueError(
            f"rows is {rows} and seq_len is {seq_len}: both must be positive, and a batch of noisy "
            "and clean tokens must have less than 2**31 positions"
        )
    if not 1 <= block_length <= seq_len:
        raise ValueError(
            f"block_length is {block_length}: it must be in [1, {seq_len}], up to seq_len"
        )
    found = None if device is None else check_device(device)
    if cu_seqlens is None:
        if lengths is not None:
            raise ValueError("lengths are given without cu_seqlens: give both, or none")
        row_bounds = torch.arange(rows + 1, dtype=torch.int32, device=found or "cpu")
        return Segments(seq_len * row_bounds, rows, seq_len), block_length
    segments = find_segments(cu_seqlens, lengths, (rows, seq_len))
    if found not in (None, cu_seqlens.device):
        raise ValueError(
            f"device is {found}, but cu_seqlens is on {cu_seqlens.device}: move it there"
        )
    return segments, block_length


class _Places(NamedTuple):
    """int32 `[B, L]`: of each position of a row, where in the row its document begins and ends, and
    where its block does."""

    document: Tensor
    document_end: Tensor
    block: Tensor
    block_end: Tensor


def _find_places(segments: Segments, block_length: int) -> _Places:
    bounds, rows, length = segments
    positions = torch.arange(length, dtype=torch.int32, device=bounds.device)
    row_begins = length * torch.arange(rows, dtype=torch.int32, device=bounds.device)[:, None]
    ids = segments.ids()
    document, document_end = bounds[ids - 1] - row_begins, bounds[ids] - row_begins
    block = positions - (positions - document) % block_length
    block_end = torch.minimum(block + block_length, document_end)
    return _Places(document, document_end, block, block_end)


def _mask_of_documents(places: _Places, noisy: bool) -> MaskMod:
    document, _, block, block_end = places
    length = document.shape[1]

    def block_diffusion(b: Tensor, h: Any, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        place = q_idx % length
        begin, end = block[b, place], block_end[b, place]
        return _attends(q_idx, kv_idx, document[b, place], begin, end, length, noisy)

    return block_diffusion


def _mask_of_one(length: int, block_length: int, noisy: bool) -> MaskMod:
    """Of rows that are one document: without tensors, which a kernel would have to read."""

    def block_diffusion(b: Tensor, h: Any, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        place = q_idx % length
        begin = place - place % block_length
        end = (begin + block_length).clamp(max=length)
        return _attends(q_idx, kv_idx, 0, begin, end, length, noisy)

    return block_diffusion


def _attends(
    q_idx: Tensor,
    kv_idx: Tensor,
    document: Tensor | int,
    begin: Tensor,
    end: Tensor,
    length: int,
    noisy: bool,
) -> Tensor:
    """Whether queries attend to keys, given where the document and the block of each query begin,
    and where its block ends. Of a key no more than its index is needed."""
    if not noisy:
        return (kv_idx >= document) & (kv_idx < end)
    is_noisy = q_idx < length
    to_noisy = is_noisy & (kv_idx >= begin) & (kv_idx < end)
    clean_idx = kv_idx - length
    to_clean = (clean_idx >= document) & (clean_idx < torch.where(is_noisy, begin, end))
    return to_noisy | to_clean


def _tiles_of_one(
    length: int, block_length: int, block_size: int, noisy: bool, device: torch.device
) -> tuple[Tensor, Tensor]:
    """:func:`_tiles` of rows that are one document."""
    arguments = (length, block_length, block_size, noisy, device)
    is_captured = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    # What is made for a trace, or in the memory of a CUDA graph, is of no use outside of it.
    if is_captured or needs_dispatcher():
        return _make_tiles_of_one(*arguments)
    stream = raw_stream(device.index) if device.type == "cuda" else None
    counts, indices = _kept_tiles_of_one(*arguments, stream)
    return counts.clone(), indices.clone()  # a caller may write into its own


def _make_tiles_of_one(
    length: int, block_length: int, block_size: int, noisy: bool, device: torch.device
) -> tuple[Tensor, Tensor]:
    bounds = torch.arange(0, length + 1, length, dtype=torch.int32, device=device)
    return _tiles(_find_places(Segments(bounds, 1, length), block_length), block_size, noisy)


@lru_cache(maxsize=4)
def _kept_tiles_of_one(*arguments: Any) -> tuple[Tensor, Tensor]:
    """The last argument is the stream that makes them, since another would not wait for it."""
    return _make_tiles_of_one(*arguments[:-1])


def _tiles(places: _Places, block_size: int, noisy: bool) -> tuple[Tensor, Tensor]:
    """The lists of a block mask: counts int32 `[4, B, 1, N]` and indices int32 `[4, B, 1, N, N]`,
    of partial and full tiles, first of keys by query, then of queries by key."""
    rows, length = places.block.shape
    is_met, full = (_noisy_and_clean if noisy else _clean_alone)(places, block_size)
    if (2 * length if noisy else length) % block_size:
        # As create_block_mask has it: positions behind the end are masked.
        full[:, -1] = False
        full[:, :, -1] = False
    partial = is_met & ~full
    by_query = torch.stack((partial, full))
    counts, indices = ordered(torch.cat((by_query, by_query.mT)).flatten(0, 1))
    return counts.view(4, rows, *counts.shape[1:]), indices.view(4, rows, *indices.shape[1:])


class _Ends(NamedTuple):
    """`[B, n]`: a quantity at the first and last position of the n tiles of a half."""

    first: Tensor
    last: Tensor


def _at_ends(of_positions: Tensor, block_size: int, skipped: int) -> _Ends:
    """``skipped``: positions of the first tile that belong to the half before."""
    first, cut = of_positions[:, :1], block_size - skipped
    return _Ends(
        torch.cat((first, of_positions[:, cut::block_size]), 1),
        torch.cat((of_positions[:, cut - 1 : -1 : block_size], of_positions[:, -1:]), 1),
    )


def _in_ranges(begin: _Ends, end: _Ends, keys: _Ends) -> tuple[Tensor, Tensor]:
    """Which tiles are met, and which are full, bool `[B, n, m]`, where queries attend to the keys
    in [begin, end), which both ascend. The ranges of a tile must have no gaps between them."""
    is_met = (begin.first[:, :, None] <= keys.last[:, None]) & (
        end.last[:, :, None] > keys.first[:, None]
    )
    is_full = (begin.last[:, :, None] <= keys.first[:, None]) & (
        end.first[:, :, None] > keys.last[:, None]
    )
    return is_met, is_full


def _clean_alone(places: _Places, block_size: int, skipped: int = 0) -> tuple[Tensor, Tensor]:
    """Of clean queries and clean keys: from the beginning of the document to the end of the block,
    without gaps, since a document ends with its last block."""
    keys = _at_ends(_positions(places), block_size, skipped)
    document = _at_ends(places.document, block_size, skipped)
    block_end = _at_ends(places.block_end, block_size, skipped)
    return _in_ranges(document, block_end, keys)


def _noisy_and_clean(places: _Places, block_size: int) -> tuple[Tensor, Tensor]:
    """Of both halves. Where L is no multiple of S, one tile has positions of both."""
    document, document_end, block, block_end = places
    positions = _positions(places)
    skipped = positions.shape[1] % block_size
    noisy, clean = (_at_ends(positions, block_size, n) for n in (0, skipped))
    block_begins = _at_ends(block, block_size, 0)

    in_block = _in_ranges(block_begins, _at_ends(block_end, block_size, 0), noisy)
    _, before_is_full = _in_ranges(_at_ends(document, block_size, 0), block_begins, clean)
    # Between the ranges of clean keys there are gaps, the last blocks of documents, and queries of
    # first blocks have none. A tile is met if, of its queries that have some, the last one reaches
    # into the tile, and if the last query of all that attends to a key of the tile is not before.
    reach = _greatest(block.where(block > document, -1), block_size, 0)
    last_query = _greatest(
        (document_end - 1).where(block_end < document_end, -1), block_size, skipped
    )
    before_is_met = (reach[:, :, None] > clean.first[:, None]) & (
        last_query[:, None] >= noisy.first[:, :, None]
    )

    of_clean = _clean_alone(places, block_size, skipped)
    is_met = _assembled(in_block[0], before_is_met, of_clean[0])
    is_full = _assembled(in_block[1], before_is_full, of_clean[1])
    if skipped:
        shared = noisy.first.shape[1] - 1
        is_met = _joined(is_met, shared, torch.logical_or)
        is_full = _joined(is_full, shared, torch.logical_and)
    return is_met, is_full


def _positions(places: _Places) -> Tensor:
    """int32 `[1, L]`."""
    length, device = places.block.shape[1], places.block.device
    return torch.arange(length, dtype=torch.int32, device=device)[None]


def _greatest(of_positions: Tensor, block_size: int, skipped: int) -> Tensor:
    """`[B, n]`: the greatest of each tile, of what is at least -1."""
    behind = -(skipped + of_positions.shape[1]) % block_size
    padded = F.pad(of_positions, (skipped, behind), value=-1)
    return padded.view(len(padded), -1, block_size).amax(-1)


def _assembled(in_block: Tensor, before: Tensor, of_clean: Tensor) -> Tensor:
    """The four quarters of a mask. Clean queries attend to no noisy key."""
    above = torch.cat((in_block, before), 2)
    return torch.cat((above, torch.cat((torch.zeros_like(before.mT), of_clean), 2)), 1)


def _joined(tiles: Tensor, at: int, operator: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """``at`` and the next one become one tile, of queries and of keys."""
    for dim in (1, 2):
        before, one, other, after = tiles.tensor_split((at, at + 1, at + 2), dim)
        tiles = torch.cat((before, operator(one, other), after), dim)
    return tiles


def _count(
    segments: Segments, per_segment: Tensor, block_length: int, are_rows: bool
) -> tuple[int, int]:
    """How many blocks there are, and how many keys to gather: of a segment of n positions in m
    blocks, ``block_length * m * (m - 1) / 2`` before blocks, and n twice in them."""
    bounds, rows, length = segments
    if are_rows:  # known without looking
        blocks = -(-length // block_length)
        return rows * blocks, rows * (block_length * (blocks * (blocks - 1) // 2) + 2 * length)
    blocks_of = per_segment.long()
    before = block_length * (blocks_of * (blocks_of - 1) // 2)
    num_blocks, num_before = torch.stack((blocks_of.sum(), before.sum())).tolist()
    return num_blocks, num_before + 2 * rows * length


def _alternating(evens: Tensor, odds: Tensor) -> Tensor:
    return torch.stack((evens, odds), 1).flatten()


def _after_zero(x: Tensor) -> Tensor:
    return F.pad(x, (1, 0))


def _cumulated(sizes: Tensor) -> Tensor:
    """int32 `[n + 1]`: where each of n begins, and at last where they end."""
    return _after_zero(sizes.cumsum(0, dtype=torch.int32))
