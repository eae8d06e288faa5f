"""``corrupt`` on the device: one program a row, one launch.

What differs from a loop over a row is only that the row indices of the batch are compacted in the
same launch: each program publishes how many positions it masks, and adds up what those before it
published (decoupled look-back: Merrill, Garland, "Single-pass Parallel Prefix Scan", 2016).
"""

import math
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from nar_kernels.ops.arguments import CorruptArgs
from nar_kernels.ops.kernels.launcher import Launcher
from nar_kernels.ops.kernels.order_statistic import (
    is_done,
    learn,
    num_wanted,
    propose,
    start_search,
)
from nar_kernels.ops.kernels.random import permute, random_block, random_words
from nar_kernels.ops.masking import IGNORE_INDEX, NUM_INVALID
from nar_kernels.spec.philox import VIEW_SHIFT, Stream

_TIME = tl.constexpr(int(Stream.TIME))
_STRATUM = tl.constexpr(int(Stream.STRATUM))
_MASK_KEY = tl.constexpr(int(Stream.MASK_KEY))
_RANDOM_TOKEN = tl.constexpr(int(Stream.RANDOM_TOKEN))
_WINDOW_ORDER = tl.constexpr(int(Stream.WINDOW_ORDER))
_CORRUPTION = tl.constexpr(int(Stream.CORRUPTION))
_IGNORE = tl.constexpr(IGNORE_INDEX)
_VIEW_SHIFT = tl.constexpr(VIEW_SHIFT)

# Words of the workspace: Corrupted.invalid, a lock, and for each row what it has published.
_LOCK = tl.constexpr(NUM_INVALID)
_FIRST_ROW = tl.constexpr(NUM_INVALID + 1)

# A published word: 0 before anything is known, then one of these flags and a count.
_OWN = tl.constexpr(1 << 60)  # the positions that the row masks
_UP_TO = tl.constexpr(2 << 60)  # those of all rows up to it
_COUNT_BITS = tl.constexpr((1 << 60) - 1)

# Rows up to this length stay in registers. In longer ones every pass makes the keys again, which
# costs less than to store and read them.
MAX_TILE = 4096
# Long rows come in small batches: many warps each, to fill a GPU.
LONG_ROW_TILE, LONG_ROW_WARPS = 1024, 8


# What the steps of a row hand to each other. Made by keyword: Triton's cache of compiled kernels
# does not see in which order the fields are.


class Row(NamedTuple):
    """A draw: a sample or a block of it, in one view."""

    slot: tl.tensor
    # As View of csrc/corrupt/division.h; None stands for false.
    streams: tl.tensor
    is_rest: tl.tensor | None
    is_all: tl.tensor | None
    is_first_view: tl.tensor  # whose bad ids count
    seed: tl.tensor
    tokens: tl.tensor  # pointers; None where there is no such tensor
    maskable: tl.tensor | None
    loss_mask: tl.tensor | None
    prompt: tl.tensor | None  # positions that are given
    never_mask: tl.tensor | None
    start: tl.tensor  # in tokens
    begin: tl.tensor  # in the outputs
    given: tl.tensor  # in inputs of the batch
    stored: tl.tensor  # ids in the corpus; ends of sequence up to length, padding up to space
    length: tl.tensor
    space: tl.tensor
    end: tl.tensor  # of loops over tiles: a constant for a row of one tile, so that they vanish
    eos_id: tl.tensor
    pad_id: tl.tensor
    num_tokens: tl.tensor
    mask_id: tl.tensor


class Tile(NamedTuple):
    position: tl.tensor
    order: tl.tensor  # of equal keys, the lowest comes first
    clean: tl.tensor  # ids, bad ones replaced
    can_mask: tl.tensor
    keys: tl.tensor  # the largest where nothing may be masked


class CorruptionShares(NamedTuple):
    """Shares of the masked positions to keep or replace, and the word for stochastic rounding."""

    keep: tl.tensor
    replace: tl.tensor  # kept or random
    rounding: tl.tensor


class KeyBound(NamedTuple):
    """Below it are smaller keys, and equal ones whose order is below ``tie``."""

    key: tl.tensor
    tie: tl.tensor


class RowBounds(NamedTuple):
    """The kept are below the first, the kept or random below the second, the masked below the
    third."""

    keep: KeyBound
    replace: KeyBound
    mask: KeyBound


# ---- which sample, view and window this is


@triton.jit
def _sample_slot(index, sample_ids, first_sample, step, global_batch):
    if sample_ids is not None:
        sample = tl.load(sample_ids + index)
    else:
        sample = first_sample + index
        if step is not None:
            sample += tl.load(step) * global_batch
    return sample


@triton.jit
def _ordered_start(seed, sample, num_windows, phase, stride, SHUFFLE: tl.constexpr):
    """Where the window of a sample slot starts."""
    slot = tl.maximum(sample, 0)
    index = slot % num_windows
    if SHUFFLE:
        index = permute(index, num_windows, seed, _WINDOW_ORDER, slot // num_windows)
    return phase + index * stride


@triton.jit
def _checked_start(record, sample, start, num_corpus_tokens, stored, is_first):
    """The start, or 0 of a window that reaches outside the corpus, which is recorded once, as is a
    negative slot."""
    outside = (start < 0) | (start > num_corpus_tokens - stored)
    start = tl.where(outside, 0, start)
    if outside & is_first:
        tl.atomic_add(record + 3, 1)
    if (sample < 0) & is_first:
        tl.atomic_add(record + 4, 1)
    return start


@triton.jit
def _in_block(count, first, block_length):
    """Of the first positions of a sample, how many are in a block."""
    return tl.minimum(tl.maximum(count - first, 0), block_length).to(tl.int32)


@triton.jit
def _span(spans, index, batch):
    """Of a sample: where it begins in the outputs, ids in the corpus, positions, and those with the
    padding behind them."""
    begin = tl.load(spans + index)
    space = (tl.load(spans + index + 1) - begin).to(tl.int32)
    stored = tl.load(spans + batch + 1 + index).to(tl.int32)
    length = tl.load(spans + 2 * (batch + 1) + index).to(tl.int32)
    return begin, stored, length, space


# ---- time and corruption, from the slot alone


@triton.jit
def _row_time(seed, streams, slot, num_strata, STRATIFIED: tl.constexpr):
    """The 16-bit time of a slot."""
    word, _, _, _ = random_block(seed, streams + _TIME, slot, tl.zeros((), tl.int32))
    time = (word >> 16).to(tl.int64)
    if STRATIFIED:
        step = slot // num_strata
        stream = streams + _STRATUM
        stratum = permute(slot % num_strata, num_strata, seed, stream, step)
        time = ((stratum << 16) + time) // num_strata
    return time


@triton.jit
def _corruption_shares(
    seed, streams, slot, keep_share, random_share, coin_share, RANKS: tl.constexpr
):
    keep = tl.zeros((), tl.int64)
    replace = tl.zeros((), tl.int64)
    rounding = tl.zeros((), tl.int64)
    if RANKS == 3:
        stream, first = streams + _CORRUPTION, tl.zeros((), tl.int32)
        coin0, coin1, coin2, _ = random_block(seed, stream, slot, first)
        keep += tl.where((coin0 >> 1).to(tl.int64) < coin_share, keep_share, 0)
        replace += keep
        replace += tl.where((coin1 >> 1).to(tl.int64) < coin_share, random_share, 0)
        rounding += (coin2 >> 1).to(tl.int64)
    return CorruptionShares(keep=keep, replace=replace, rounding=rounding)


# ---- ids and keys, a tile at a time


@triton.jit
def _load_tile(row, first, record, TILE: tl.constexpr):
    """Positions ``first ..``; bad ids go into ``record``, if there is one.

    A pass that leaves some of a tile unused does not load or compute that.
    """
    position = first + tl.arange(0, TILE)
    stored = position < row.stored
    raw = tl.load(row.tokens + row.start + position, mask=stored, other=0)
    if row.tokens.dtype.element_ty == tl.int64:
        bad = (raw < 0) | (raw >= row.num_tokens)
    else:
        raw = raw.to(tl.uint32) if row.tokens.dtype.element_ty == tl.uint32 else raw.to(tl.int32)
        bad = raw.to(tl.uint32, bitcast=True) >= row.num_tokens.to(tl.uint32)
    bad = stored & (bad | (raw == row.mask_id))
    clean = tl.where(bad, (row.mask_id == 0).to(tl.int32), raw.to(tl.int32))
    inside = stored
    if row.eos_id is not None:
        inside = position < row.length
        clean = tl.where(stored, clean, row.eos_id)
    can_mask = inside
    if row.maskable is not None:
        at = row.maskable + row.given + position
        is_label: tl.constexpr = row.maskable.dtype.element_ty.primitive_bitwidth > 8
        given: tl.constexpr = -100 if is_label else 0
        can_mask = can_mask & (tl.load(at, mask=inside, other=given) != given)
    if row.loss_mask is not None:
        flag = tl.load(row.loss_mask + row.start + position, mask=stored, other=1)
        can_mask = can_mask & (flag != 0)
    if row.prompt is not None:
        can_mask = can_mask & (position >= row.prompt)
    if row.never_mask is not None:
        can_mask = can_mask & (tl.load(row.never_mask + clean, mask=inside, other=0) == 0)
    if record is not None:
        _record_bad_ids(record, row, position, bad)
    keys = random_words(row.seed, row.streams + _MASK_KEY, row.slot, first, TILE)
    order = position
    if row.is_rest is not None:  # the largest keys, and of equal ones the last
        keys = tl.where(row.is_rest, ~keys, keys)
        order = tl.where(row.is_rest, 0x7FFFFFFF - position, position)
    keys = tl.where(can_mask, keys, 0xFFFFFFFF)
    return Tile(position=position, order=order, clean=clean, can_mask=can_mask, keys=keys)


@triton.jit
def _record_bad_ids(record, row, position, bad):
    """The record is the same for any order of the rows: they take turns, by a lock. Rare. An id
    counts once, whatever the views."""
    num_bad = tl.sum(bad.to(tl.int32))
    if (num_bad > 0) & row.is_first_view:
        offset = row.start + tl.min(tl.where(bad, position, 0x7FFFFFFF))
        value = tl.load(row.tokens + offset).to(tl.int64)
        free = tl.zeros((), tl.int64)
        while tl.atomic_cas(record + _LOCK, free, free + 1) != 0:
            pass
        count = tl.atomic_add(record, num_bad.to(tl.int64))
        lowest = tl.atomic_add(record + 1, free)
        if (count == 0) | (offset < lowest):
            tl.atomic_xchg(record + 1, offset)
            tl.atomic_xchg(record + 2, value)
        tl.atomic_xchg(record + _LOCK, free)


@triton.jit
def _tile(row, held, first, TILE: tl.constexpr):
    """A tile for one more pass: the one in registers, or, in a longer row, made again."""
    return held if held is not None else _load_tile(row, first, None, TILE)


# ---- how many positions are masked, and which keys are


@triton.jit
def _count_maskable(row, held, TILE: tl.constexpr):
    n = tl.zeros((), tl.int32)
    for first in range(0, row.end, TILE):
        n += tl.sum(_tile(row, held, first, TILE).can_mask.to(tl.int32))
    return n


@triton.jit
def _exact_count(ratio, n, is_rest, is_all):
    """ceil(ratio * n), at least one of n; or what a view makes of it."""
    k = (ratio * n.to(tl.int64) + 0xFFFFFFFF) >> 32
    k = tl.minimum(tl.maximum(k, 1), n.to(tl.int64)).to(tl.int32)
    if is_rest is not None:
        k = tl.where(is_all, n, tl.where(is_rest, n - k, k))
    return k


@triton.jit
def _view_ratio(ratio, is_rest):
    if is_rest is not None:
        ratio = tl.where(is_rest, (tl.zeros((), tl.int64) + 1 << 32) - ratio, ratio)
    return ratio


@triton.jit
def _bernoulli_count(row, held, ratio, TILE: tl.constexpr):
    count = tl.zeros((), tl.int32)
    for first in range(0, row.end, TILE):
        tile = _tile(row, held, first, TILE)
        count += tl.sum((tile.can_mask & (tile.keys < ratio.to(tl.uint32))).to(tl.int32))
    return count


@triton.jit
def _bernoulli_bounds(ratio, shares):
    """The ratio and its shares are bounds: a key is uniform over 32 bits."""
    keep = (ratio * shares.keep >> 31).to(tl.uint32)
    replace = (ratio * shares.replace >> 31).to(tl.uint32)
    no_tie = tl.zeros((), tl.int32)
    return _row_bounds(keep, replace, ratio.to(tl.uint32), no_tie, no_tie, no_tie)


@triton.jit
def _exact_bounds(row, held, n, count, shares, RANKS: tl.constexpr, TILE: tl.constexpr):
    """Exactly ``count`` positions are below the last bound: three order statistics of the keys,
    selected at once."""
    k0 = ((count.to(tl.int64) * shares.keep + shares.rounding) >> 31).to(tl.int32)
    k1 = ((count.to(tl.int64) * shares.replace + shares.rounding) >> 31).to(tl.int32)
    keep, replace, mask = start_search(k0, n), start_search(k1, n), start_search(count, n)
    turn = 0
    while not (is_done(keep) & is_done(replace) & is_done(mask)):
        pivot0, pivot1, pivot2 = propose(keep, turn), propose(replace, turn), propose(mask, turn)
        below0, below1, below2 = _count_below(row, held, pivot0, pivot1, pivot2, RANKS, TILE)
        keep = learn(keep, pivot0, below0)
        replace = learn(replace, pivot1, below1)
        mask = learn(mask, pivot2, below2)
        turn += 1
    tie0, tie1, tie2 = _break_ties(row, held, keep, replace, mask, TILE)
    return _row_bounds(keep.low, replace.low, mask.low, tie0, tie1, tie2)


@triton.jit
def _count_below(row, held, pivot0, pivot1, pivot2, RANKS: tl.constexpr, TILE: tl.constexpr):
    """How many keys are below each pivot; with ``RANKS`` 1 only the last count is wanted."""
    count0, count1, count2 = tl.zeros((), tl.int32), tl.zeros((), tl.int32), tl.zeros((), tl.int32)
    for first in range(0, row.end, TILE):
        keys = _tile(row, held, first, TILE).keys
        if RANKS == 3:
            # 21 bits each: one reduction instead of three.
            below = (keys < pivot2).to(tl.int64)
            below += (keys < pivot0).to(tl.int64) << 21
            below += (keys < pivot1).to(tl.int64) << 42
            counts = tl.sum(below)
            count2 += (counts & 0x1FFFFF).to(tl.int32)
            count0 += ((counts >> 21) & 0x1FFFFF).to(tl.int32)
            count1 += (counts >> 42).to(tl.int32)
        else:
            count2 += tl.sum((keys < pivot2).to(tl.int32))
    return count0, count1, count2


@triton.jit
def _break_ties(row, held, keep, replace, mask, TILE: tl.constexpr):
    """Of equal keys at a bound, those at the lowest positions are below it. Rare."""
    tie0, tie1, tie2 = tl.zeros((), tl.int32), tl.zeros((), tl.int32), tl.zeros((), tl.int32)
    wanted0, wanted1, wanted2 = num_wanted(keep), num_wanted(replace), num_wanted(mask)
    if (wanted0 > 0) | (wanted1 > 0) | (wanted2 > 0):
        if row.is_rest is not None:
            wanted0 = _from_first(row, held, keep.low, wanted0, TILE)
            wanted1 = _from_first(row, held, replace.low, wanted1, TILE)
            wanted2 = _from_first(row, held, mask.low, wanted2, TILE)
        for first in range(0, row.end, TILE):
            tile = _tile(row, held, first, TILE)
            tie0, wanted0 = _break_tie(tile, keep.low, tie0, wanted0)
            tie1, wanted1 = _break_tie(tile, replace.low, tie1, wanted1)
            tie2, wanted2 = _break_tie(tile, mask.low, tie2, wanted2)
    return tie0, tie1, tie2


@triton.jit
def _from_first(row, held, key, wanted, TILE: tl.constexpr):
    """Which of the equal keys, from the first position on, is the ``wanted``-th in the order of the
    view."""
    equal = tl.zeros((), tl.int32)
    for first in range(0, row.end, TILE):
        tile = _tile(row, held, first, TILE)
        equal += tl.sum((tile.can_mask & (tile.keys == key)).to(tl.int32))
    return tl.where(row.is_rest & (wanted > 0), equal - wanted + 1, wanted)


@triton.jit
def _break_tie(tile, key, tie, wanted):
    """The order behind that of the ``wanted``-th of the equal keys, once a tile has it, and how
    many are wanted of the next tiles."""
    equal = tile.can_mask & (tile.keys == key)
    number = tl.cumsum(equal.to(tl.int32), 0)
    tie += tl.max(tl.where(equal & (number == wanted), tile.order + 1, 0))
    return tie, wanted - tl.sum(equal.to(tl.int32))


@triton.jit
def _row_bounds(keep, replace, mask, keep_tie, replace_tie, mask_tie):
    return RowBounds(
        keep=KeyBound(key=keep, tie=keep_tie),
        replace=KeyBound(key=replace, tie=replace_tie),
        mask=KeyBound(key=mask, tie=mask_tie),
    )


# ---- where its row indices go: decoupled look-back


@triton.jit
def _publish(record, index, flag, count):
    # The word is all that others read: no memory needs to be in order with it.
    tl.atomic_xchg(record + _FIRST_ROW + index, count.to(tl.int64) + flag, sem="relaxed")


@triton.jit
def _rows_before(record, index, WINDOW: tl.constexpr):
    """Masked positions in all rows before this one; it looks back on ``WINDOW`` rows at a time.

    With fewer than a word for each thread, several would load the same one, at different moments:
    one may see it published and another not, and what is computed from both is wrong.
    """
    total = tl.zeros((), tl.int64)
    end = index
    lane = tl.arange(0, WINDOW)
    while end > 0:
        at = end - WINDOW + lane
        published = tl.load(record + _FIRST_ROW + at, mask=at >= 0, other=_UP_TO, volatile=True)
        newest = tl.max(tl.where(published >= _UP_TO, lane, -1))
        missing = tl.max(((published == 0) & (lane > newest)).to(tl.int32))
        if missing == 0:
            total += tl.sum(tl.where(lane >= newest, published & _COUNT_BITS, 0))
            end = tl.where(newest >= 0, 0, end - WINDOW)
    return total


# ---- what it writes


@triton.jit
def _write_scalars(
    times, loss_weight, num_masked, num_maskable, weight_table, index, is_rest, time, time_low,
    time_span, n, count, WEIGHS_COUNTS: tl.constexpr, PAIRING: tl.constexpr,
):  # fmt: skip
    weight = tl.load(weight_table + time)
    if WEIGHS_COUNTS:
        weight = tl.div_rn(weight * n.to(tl.float32), tl.maximum(count, 1).to(tl.float32))
        weight = tl.where(count == 0, 0.0, weight)
        if PAIRING == 1:  # what has no complement counts for it, too
            weight = tl.where((count == n) & (not is_rest), 2 * weight, weight)
    tl.store(times + index, time_low + time_span * ((time.to(tl.float32) + 0.5) / 65536))
    tl.store(loss_weight + index, weight)
    tl.store(num_masked + index, count.to(tl.int64))
    tl.store(num_maskable + index, n.to(tl.int64))


@triton.jit
def _is_below(tile, bound):
    return (tile.keys < bound.key) | ((tile.keys == bound.key) & (tile.order < bound.tie))


@triton.jit
def _corrupt_ids(row, tile, first, masked, bounds, RANKS: tl.constexpr, TILE: tl.constexpr):
    """The mask, a random token, or the token itself."""
    ids = tl.where(masked, row.mask_id, tile.clean)
    if RANKS == 3:
        if (bounds.replace.key != bounds.keep.key) | (bounds.replace.tie != bounds.keep.tie):
            stream = row.streams + _RANDOM_TOKEN
            word = random_words(row.seed, stream, row.slot, first, TILE)
            token = tl.umulhi(word, (row.num_tokens - 1).to(tl.uint32)).to(tl.int32)
            token += (token >= row.mask_id).to(tl.int32)
            ids = tl.where(masked & _is_below(tile, bounds.replace), token, ids)
        ids = tl.where(masked & _is_below(tile, bounds.keep), tile.clean, ids)
    return ids


@triton.jit
def _order_of(chosen, TILE: tl.constexpr):
    """How many are chosen before each position, and in all. A scan of quarters, since one of all
    positions takes four times the shuffles."""
    quads = chosen.to(tl.int32).reshape(TILE // 4, 4)
    of_quad = tl.sum(quads, 1)
    before = tl.cumsum(of_quad, 0) - of_quad
    order = before[:, None] + tl.cumsum(quads, 1) - quads
    return order.reshape(TILE), tl.sum(of_quad)


@triton.jit
def _write_positions(
    row, held, bounds, before, input_ids, labels, masked_indices, rows, record,
    RANKS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Ids, labels and mask of a row, and the indices of the masked ones, by stream compaction; what
    is None is not wanted."""
    kind: tl.constexpr = input_ids.dtype.element_ty
    for first in range(0, row.end, TILE):
        tile = held if held is not None else _load_tile(row, first, record, TILE)
        masked = tile.can_mask & _is_below(tile, bounds.mask)
        ids = _corrupt_ids(row, tile, first, masked, bounds, RANKS, TILE)
        inside = tile.position < row.length
        at = row.begin + tile.position
        if row.pad_id is not None:
            ids = tl.where(inside, ids, row.pad_id)
            inside = tile.position < row.space
        tl.store(input_ids + at, ids.to(kind), mask=inside)
        if labels is not None:
            tl.store(labels + at, tl.where(masked, tile.clean, _IGNORE).to(kind), mask=inside)
        if masked_indices is not None:
            tl.store(masked_indices + at, masked, mask=inside)
        if rows is not None:
            order, count = _order_of(masked, TILE)
            tl.store(rows + before + order, at.to(kind), mask=masked)
            before += count


# ---- the kernel: a row top to bottom

# What would otherwise be compiled again where it is 1, divides by 16 or, but for the annotations,
# has another width.
_VARYING = [
    "seed", "num_corpus_tokens", "num_tokens", "mask_id", "first_sample", "num_windows", "phase",
    "stride", "global_batch", "keep_share", "random_share", "coin_share", "time_low", "time_span",
    "eos_id", "pad_id", "batch", "num_positions", "block_length", "num_blocks", "blocks_per_slot",
    "views", "first_view",
]  # fmt: skip


@triton.jit(do_not_specialize=_VARYING)
def corrupt_kernel(
    tokens, starts, spans, sample_ids, step, maskable, loss_mask, prompt_lengths, never_mask,
    ratio_table, weight_table, view_times, seed: tl.int64, seed_tensor, input_ids, labels,
    masked_indices, times, loss_weight, num_masked, num_maskable, rows, record,
    num_corpus_tokens: tl.int64, seq_len, eos_id, pad_id, num_tokens, mask_id,
    first_sample: tl.int64, num_windows: tl.int64, phase: tl.int64, stride: tl.int64,
    global_batch: tl.int64, keep_share: tl.int64, random_share: tl.int64, coin_share: tl.int64,
    time_low: tl.float32, time_span: tl.float32, batch: tl.int64, num_positions: tl.int64,
    block_length: tl.int64, num_blocks: tl.int64, blocks_per_slot: tl.int64, views: tl.int64,
    first_view: tl.int64,
    ORDERED: tl.constexpr, SHUFFLE: tl.constexpr, EXACT: tl.constexpr, STRATIFIED: tl.constexpr,
    WEIGHS_COUNTS: tl.constexpr, RANKS: tl.constexpr, TILE: tl.constexpr, FITS: tl.constexpr,
    LOOK_BACK: tl.constexpr, DIVIDED: tl.constexpr, ALIGNED: tl.constexpr, PAIRING: tl.constexpr,
    BY_VIEW: tl.constexpr,
):  # fmt: skip
    """One draw: a sample or a block of it, in one view. Arguments as in ``CorruptArgs``; ``record``
    is the workspace, zeros, ``num_positions`` those of a view.

    ``ORDERED``: sample slots tell which windows. ``RANKS``: 3 with kept or random tokens, else 1.
    ``FITS``: the row is a single tile. ``LOOK_BACK``: see ``_rows_before``. ``DIVIDED``: there are
    blocks or views; ``ALIGNED``: which begin at multiples of 16. ``BY_VIEW``: each view has a table
    of weights.
    """
    index = tl.program_id(0).to(tl.int64)
    if seed_tensor is not None:
        seed = tl.load(seed_tensor)
    which, number, first_of_block = index, tl.zeros((), tl.int64), tl.zeros((), tl.int64)
    block = first_of_block
    if DIVIDED:
        block = index % num_blocks
        number = index // num_blocks // batch  # of the view
        which = index // num_blocks % batch
        first_of_block = block * block_length
    streams, is_rest, is_all = tl.zeros((), tl.int64), None, None
    if PAIRING > 0:
        is_rest = number == views - 1
        is_all = (number == 0) & (PAIRING == 2)
    elif DIVIDED:
        streams += (first_view + number) << _VIEW_SHIFT
    sample = _sample_slot(which, sample_ids, first_sample, step, global_batch)
    start = which * seq_len
    if starts is not None:
        start = tl.load(starts + which)
    if ORDERED:
        start = _ordered_start(seed, sample, num_windows, phase, stride, SHUFFLE)
    given = which * seq_len
    stored, length, space = seq_len, seq_len, seq_len
    if spans is not None:
        given, stored, length, space = _span(spans, which, batch)
    is_first = (number == 0) & (block == 0)
    start = _checked_start(record, sample, start, num_corpus_tokens, stored, is_first)
    slot, num_strata = sample, global_batch
    begin = given
    if DIVIDED:
        slot = sample * blocks_per_slot + block
        num_strata = global_batch * blocks_per_slot
        start += first_of_block
        given += first_of_block
        begin = given + number * num_positions
        stored = _in_block(stored, first_of_block, block_length)
        length = _in_block(length, first_of_block, block_length)
        space = _in_block(space, first_of_block, block_length)
        if ALIGNED:  # so that they are stored 16 bytes at a time: shifts say it to any Triton
            begin, length = begin >> 4 << 4, length >> 4 << 4
            stored, space = stored >> 4 << 4, space >> 4 << 4
    prompt = None
    if prompt_lengths is not None:
        prompt = tl.load(prompt_lengths + which) - first_of_block
    row = Row(
        slot=slot, streams=streams, is_rest=is_rest, is_all=is_all, is_first_view=number == 0,
        seed=seed, tokens=tokens,
        maskable=maskable, loss_mask=loss_mask, prompt=prompt, never_mask=never_mask, start=start,
        begin=begin, given=given, stored=stored, length=length, space=space,
        end=TILE if FITS else space, eos_id=eos_id, pad_id=pad_id, num_tokens=num_tokens,
        mask_id=mask_id,
    )  # fmt: skip

    if view_times is not None:
        time = tl.load(view_times + number)
    else:
        time = _row_time(seed, streams, slot, num_strata, STRATIFIED)
    ratio = tl.load(ratio_table + time).to(tl.int64) & 0xFFFFFFFF
    shares = _corruption_shares(seed, streams, slot, keep_share, random_share, coin_share, RANKS)
    if BY_VIEW:
        weight_table += number << 16

    held = _load_tile(row, 0, record, TILE) if FITS else None
    n = tl.zeros((), tl.int32) + length
    restricted: tl.constexpr = maskable is not None or prompt_lengths is not None
    if restricted or loss_mask is not None or never_mask is not None:
        n = _count_maskable(row, held, TILE)
    # The count is published as soon as it is known, since other rows wait for it.
    if EXACT:
        count = _exact_count(ratio, n, is_rest, is_all)
        _publish(record, index, _OWN, count)
        bounds = _exact_bounds(row, held, n, count, shares, RANKS, TILE)
    else:
        ratio = _view_ratio(ratio, is_rest)
        bounds = _bernoulli_bounds(ratio, shares)
        count = _bernoulli_count(row, held, ratio, TILE)
        if PAIRING == 2:  # the first view masks everything, which no ratio below 1 does
            if is_all:
                count = n
                bounds = _exact_bounds(row, held, n, count, shares, RANKS, TILE)
        _publish(record, index, _OWN, count)
    _write_scalars(
        times, loss_weight, num_masked, num_maskable, weight_table, index, is_rest, time, time_low,
        time_span, n, count, WEIGHS_COUNTS, PAIRING,
    )  # fmt: skip

    before = tl.zeros((), tl.int64)
    if rows is not None:
        before += _rows_before(record, index, LOOK_BACK)
        _publish(record, index, _UP_TO, before + count)
    _write_positions(
        row, held, bounds, before, input_ids, labels, masked_indices, rows, record, RANKS, TILE
    )


def workspace_size(num_draws: int) -> int:
    return NUM_INVALID + 1 + num_draws


def _tile_of(seq_len: int) -> tuple[bool, int]:
    """Whether a row is a single tile, and how long a tile is."""
    fits = seq_len <= MAX_TILE
    return fits, max(triton.next_power_of_2(seq_len), 64) if fits else LONG_ROW_TILE


def is_divided(a: CorruptArgs) -> bool:
    return (a.num_blocks, a.blocks_per_slot, a.views, a.first_view) != (1, 1, 1, 0)


def _is_aligned(a: CorruptArgs) -> bool:
    """Whether the blocks of windows begin at multiples of 16, in each view."""
    return a.spans is None and a.seq_len % 16 == a.block_length % 16 == 0


def launch_options(a: CorruptArgs) -> dict[str, Any]:
    """Compile-time arguments."""
    fits, tile = _tile_of(a.block_length)
    # What a row does once, each of its warps does: 16 positions a thread.
    num_warps = max(tile // 512, 1) if fits else LONG_ROW_WARPS
    return {
        "ORDERED": a.num_windows > 0,
        "SHUFFLE": a.shuffle and a.num_windows > 0,
        "EXACT": a.exact,
        "STRATIFIED": a.stratified,
        "WEIGHS_COUNTS": a.weighs_counts,
        "RANKS": 3 if a.keep_share or a.random_share else 1,
        "TILE": tile,
        "FITS": fits,
        "LOOK_BACK": max(32 * num_warps, 128),
        "DIVIDED": is_divided(a),
        "ALIGNED": _is_aligned(a),
        "PAIRING": a.pairing,
        "BY_VIEW": a.weights_by_view,
        "num_warps": num_warps,
        "enable_fp_fusion": False,
    }


_launch = Launcher(corrupt_kernel, _VARYING)


def kernel_arguments(outputs: tuple[Tensor, ...], a: CorruptArgs) -> tuple[Any, ...]:
    """All but the compile-time ones, in the order of the kernel."""
    ids, labels, masked_indices, *of_rows, row_buffer, record = outputs
    # Spans tell lengths: no kernel for each longest one.
    is_ragged = a.spans is not None
    seq_len = 1 if is_ragged else a.seq_len
    fillers = (a.eos_id, a.pad_id) if is_ragged else (None, None)
    num_positions = math.prod(a.shape) // a.views
    return (
        a.tokens, a.starts, a.spans, a.sample_ids, a.step, a.maskable, a.loss_mask,
        a.prompt_lengths, a.never_mask, a.ratio_table, a.weight_table, a.view_times, a.seed,
        a.seed_tensor, ids, labels if a.labels else None,
        masked_indices if a.masked_indices else None, *of_rows,
        row_buffer if a.masked_rows else None, record, a.tokens.numel(), seq_len, *fillers,
        a.num_tokens, a.mask_id, a.first_sample, a.num_windows, a.phase, a.stride, a.global_batch,
        a.keep_share, a.random_share, a.coin_share, a.time_low, a.time_span, a.batch,
        num_positions, a.block_length, a.num_blocks, a.blocks_per_slot, a.views, a.first_view,
    )  # fmt: skip


def corrupt_triton(outputs: tuple[Tensor, ...], a: CorruptArgs) -> Any:
    """Fills ``outputs``: those of the operator, with the workspace (zeros) for ``invalid``.

    Returns the compiled kernel, if there is one.
    """
    num_draws = math.prod(a.of_samples)
    if num_draws == 0:
        return None
    device = a.ratio_table.get_device()
    corrupts = bool(a.keep_share or a.random_share)
    order = a.num_windows > 0, a.shuffle
    wanted = a.narrow, a.labels, a.masked_indices, a.masked_rows
    draw = a.exact, a.weighs_counts, a.stratified, corrupts
    given = a.maskable_bytes, a.loss_mask is not None
    # The length of windows is an argument of the kernel; of documents, their spans are.
    tile = _tile_of(a.block_length) if is_divided(a) or a.spans is not None else None
    shape = tile, a.spans is None, is_divided(a) and _is_aligned(a)
    views = a.pairing, a.weights_by_view, a.view_times is None
    variant = device, a.tokens.dtype, given, shape, views, order, draw, wanted
    return _launch(num_draws, kernel_arguments(outputs, a), variant, lambda: launch_options(a))
