"""``corrupt`` on the device: one program a row, one launch.

What differs from a loop over a row is only that the row indices of the batch are compacted in the
same launch: each program publishes how many positions it masks, and adds up what those before it
published (decoupled look-back: Merrill, Garland, "Single-pass Parallel Prefix Scan", 2016).
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from nar_kernels.ops.arguments import CorruptArgs
from nar_kernels.ops.kernels.launcher import Launcher
from nar_kernels.ops.kernels.order_statistic import is_done, learn, propose
from nar_kernels.ops.kernels.random import permute, random_block, random_words
from nar_kernels.ops.masking import IGNORE_INDEX, NUM_INVALID
from nar_kernels.spec.philox import Stream

_TIME = tl.constexpr(int(Stream.TIME))
_STRATUM = tl.constexpr(int(Stream.STRATUM))
_MASK_KEY = tl.constexpr(int(Stream.MASK_KEY))
_RANDOM_TOKEN = tl.constexpr(int(Stream.RANDOM_TOKEN))
_WINDOW_ORDER = tl.constexpr(int(Stream.WINDOW_ORDER))
_CORRUPTION = tl.constexpr(int(Stream.CORRUPTION))
_IGNORE = tl.constexpr(IGNORE_INDEX)

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
LONG_ROW_TILE = 2048  # with more, registers spill on sm_100


@triton.jit
def _load_tile(
    tokens,
    maskable,
    never_mask,
    row,
    start,
    first,
    seq_len,
    num_tokens,
    mask_id,
    TILE: tl.constexpr,
):
    """Ids at ``first ..`` of the row, bad ones replaced; which were bad; which may be masked."""
    position = first + tl.arange(0, TILE)
    inside = position < seq_len
    raw = tl.load(tokens + start + position, mask=inside, other=0)
    if tokens.dtype.element_ty == tl.int64:
        bad = (raw < 0) | (raw >= num_tokens)
    else:
        raw = raw.to(tl.uint32) if tokens.dtype.element_ty == tl.uint32 else raw.to(tl.int32)
        bad = raw.to(tl.uint32, bitcast=True) >= num_tokens.to(tl.uint32)
    bad = inside & (bad | (raw == mask_id))
    clean = tl.where(bad, (mask_id == 0).to(tl.int32), raw.to(tl.int32))
    can = inside
    if maskable is not None:
        allowed = tl.load(maskable + row * seq_len + position, mask=inside, other=0)
        can = can & (allowed != 0)
    if never_mask is not None:
        can = can & (tl.load(never_mask + clean, mask=inside, other=0) == 0)
    return clean, bad, can, position


@triton.jit
def _record_bad(record, tokens, start, first, bad, num_bad, TILE: tl.constexpr):
    """Adds to the record of bad ids, which is the same for any order of the rows. Rare."""
    column = tl.min(tl.where(bad, first + tl.arange(0, TILE), 0x7FFFFFFF))
    offset = start + column
    value = tl.load(tokens + offset).to(tl.int64)
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
def _row_time(seed, sample, global_batch, STRATIFIED: tl.constexpr):
    """The 16-bit time of a sample slot."""
    word, _, _, _ = random_block(seed, _TIME, sample, tl.zeros((), tl.int32))
    time = (word >> 16).to(tl.int64)
    if STRATIFIED:
        step = sample // global_batch
        stratum = permute(sample % global_batch, global_batch, seed, _STRATUM, step)
        time = ((stratum << 16) + time) // global_batch
    return time


@triton.jit
def _exact_count(ratio, n):
    """ceil(ratio * n), at least one of n."""
    k = (ratio * n.to(tl.int64) + 0xFFFFFFFF) >> 32
    return tl.minimum(tl.maximum(k, 1), n.to(tl.int64)).to(tl.int32)


@triton.jit
def _below(key, position, high, low):
    """Whether (key, position) is below a bound: position decides between equal keys."""
    return (key < high) | ((key == high) & (position < low))


@triton.jit
def _rows_before(record, row, WINDOW: tl.constexpr):
    """Masked positions in all rows before this one; it looks back on ``WINDOW`` rows at a time.

    With fewer than a word for each thread, several would load the same one, at different moments:
    one may see it published and another not, and what is computed from both is wrong.
    """
    total = tl.zeros((), tl.int64)
    end = row
    lane = tl.arange(0, WINDOW)
    while end > 0:
        index = end - WINDOW + lane
        published = tl.load(
            record + _FIRST_ROW + index, mask=index >= 0, other=_UP_TO, volatile=True
        )
        newest = tl.max(tl.where(published >= _UP_TO, lane, -1))
        missing = tl.max(((published == 0) & (lane > newest)).to(tl.int32))
        if missing == 0:
            total += tl.sum(tl.where(lane >= newest, published & _COUNT_BITS, 0))
            end = tl.where(newest >= 0, 0, end - WINDOW)
    return total


@triton.jit
def _keys(seed, sample, first, can, TILE: tl.constexpr):
    """Keys of a tile; those of positions that may not be masked are the largest."""
    return tl.where(can, random_words(seed, _MASK_KEY, sample, first, TILE), 0xFFFFFFFF)


@triton.jit
def _count_tile(keys, pivot0, pivot1, pivot2, RANKS: tl.constexpr):
    """How many keys are below each pivot, 21 bits each: one reduction instead of three."""
    below = (keys < pivot2.to(tl.uint32)).to(tl.int64)
    if RANKS == 3:
        below += (keys < pivot0.to(tl.uint32)).to(tl.int64) << 21
        below += (keys < pivot1.to(tl.uint32)).to(tl.int64) << 42
    return tl.sum(below)


@triton.jit
def _tied(keys, position, can, value, wanted):
    """Position after the ``wanted``-th of the keys that equal ``value``, and how many do."""
    equal = can & (keys == value.to(tl.uint32))
    order = tl.cumsum(equal.to(tl.int32), 0)
    here = tl.max(tl.where(equal & (order == wanted), position + 1, 0))
    return here, tl.sum(equal.to(tl.int32))


@triton.jit
def _write_tile(
    clean, can, keys, position, keep, keep_tie, replace, replace_tie, mask, mask_tie, seed, sample,
    first, row, before, input_ids, labels, masked_indices, rows, seq_len, num_tokens, mask_id,
    RANKS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """All outputs of a tile. Returns how many positions it masks."""
    masked = can & _below(keys, position, mask, mask_tie)
    ids = tl.where(masked, mask_id, clean)
    if RANKS == 3:
        if (replace != keep) | (replace_tie != keep_tie):
            word = random_words(seed, _RANDOM_TOKEN, sample, first, TILE)
            token = tl.umulhi(word, (num_tokens - 1).to(tl.uint32)).to(tl.int32)
            token += (token >= mask_id).to(tl.int32)
            ids = tl.where(masked & _below(keys, position, replace, replace_tie), token, ids)
        ids = tl.where(masked & _below(keys, position, keep, keep_tie), clean, ids)
    inside = position < seq_len
    at = row * seq_len + position
    tl.store(input_ids + at, ids.to(tl.int64), mask=inside)
    tl.store(labels + at, tl.where(masked, clean, _IGNORE).to(tl.int64), mask=inside)
    tl.store(masked_indices + at, masked, mask=inside)
    order = tl.cumsum(masked.to(tl.int32), 0)
    tl.store(rows + before + order - 1, at, mask=masked)
    return tl.sum(masked.to(tl.int32))


# What would otherwise be compiled again where it is 1, divides by 16 or, but for the annotations,
# has another width.
_VARYING = [
    "seed", "num_corpus_tokens", "num_tokens", "mask_id", "first_sample", "num_windows", "phase",
    "stride", "global_batch", "keep_share", "random_share", "coin_share",
]  # fmt: skip


@triton.jit(do_not_specialize=_VARYING)
def corrupt_kernel(
    tokens, starts, sample_ids, step, maskable, never_mask, ratio_table, weight_table,
    seed: tl.int64, seed_tensor, input_ids, labels, masked_indices, times, loss_weight, num_masked,
    num_maskable, rows, record, num_corpus_tokens: tl.int64, seq_len, num_tokens, mask_id,
    first_sample: tl.int64, num_windows: tl.int64, phase: tl.int64, stride: tl.int64,
    global_batch: tl.int64, keep_share: tl.int64, random_share: tl.int64, coin_share: tl.int64,
    ORDERED: tl.constexpr, SHUFFLE: tl.constexpr, EXACT: tl.constexpr, STRATIFIED: tl.constexpr,
    RANKS: tl.constexpr, TILE: tl.constexpr, FITS: tl.constexpr, LOOK_BACK: tl.constexpr,
):  # fmt: skip
    """One row. Arguments as in ``arguments.py``; ``record`` is the workspace, zeros.

    ``ORDERED``: sample slots tell which windows. ``RANKS``: 3 with kept or random tokens, else 1.
    ``FITS``: the row is a single tile. ``LOOK_BACK``: see ``_rows_before``.
    """
    EXCLUDES: tl.constexpr = maskable is not None or never_mask is not None
    row = tl.program_id(0).to(tl.int64)
    if seed_tensor is not None:
        seed = tl.load(seed_tensor)
    if sample_ids is not None:
        sample = tl.load(sample_ids + row)
    else:
        sample = first_sample + row
        if step is not None:
            sample += tl.load(step) * global_batch
    start = row * seq_len
    if starts is not None:
        start = tl.load(starts + row)
    if ORDERED:
        slot = tl.maximum(sample, 0)
        index = slot % num_windows
        if SHUFFLE:
            index = permute(index, num_windows, seed, _WINDOW_ORDER, slot // num_windows)
        start = phase + index * stride
    outside = (start < 0) | (start > num_corpus_tokens - seq_len)
    start = tl.where(outside, 0, start)
    if outside:
        tl.atomic_add(record + 3, 1)
    if sample < 0:
        tl.atomic_add(record + 4, 1)

    # What the row does, from its slot alone.
    time = _row_time(seed, sample, global_batch, STRATIFIED)
    ratio = tl.load(ratio_table + time).to(tl.int64) & 0xFFFFFFFF
    kept_share = tl.zeros((), tl.int64)
    replaced_share = tl.zeros((), tl.int64)
    rounding = tl.zeros((), tl.int64)
    if RANKS == 3:
        coin0, coin1, coin2, unused = random_block(
            seed, _CORRUPTION, sample, tl.zeros((), tl.int32)
        )
        kept_share += tl.where((coin0 >> 1).to(tl.int64) < coin_share, keep_share, 0)
        replaced_share += kept_share
        replaced_share += tl.where((coin1 >> 1).to(tl.int64) < coin_share, random_share, 0)
        rounding += (coin2 >> 1).to(tl.int64)

    # Which positions may be masked, and their keys.
    n = tl.full((), seq_len, tl.int32)
    if FITS:
        clean, bad, can, position = _load_tile(
            tokens, maskable, never_mask, row, start, 0, seq_len, num_tokens, mask_id, TILE
        )
        num_bad = tl.sum(bad.to(tl.int32))
        if num_bad > 0:
            _record_bad(record, tokens, start, 0, bad, num_bad, TILE)
        keys = _keys(seed, sample, 0, can, TILE)
        if EXCLUDES:
            n = tl.sum(can.to(tl.int32))
    elif EXCLUDES:
        n = tl.zeros((), tl.int32)
        for first in range(0, seq_len, TILE):
            tile, bad, can, at = _load_tile(
                tokens, maskable, never_mask, row, start, first, seq_len, num_tokens, mask_id, TILE
            )
            n += tl.sum(can.to(tl.int32))

    # Bounds: the kept are below the first, the kept or random below the second, the masked below
    # the third.
    keep = ratio * kept_share >> 31
    replace = ratio * replaced_share >> 31
    mask = ratio
    keep_tie = tl.zeros((), tl.int32)
    replace_tie = tl.zeros((), tl.int32)
    mask_tie = tl.zeros((), tl.int32)
    count = tl.zeros((), tl.int32)
    if EXACT:
        count = _exact_count(ratio, n)
        tl.atomic_xchg(record + _FIRST_ROW + row, count.to(tl.int64) + _OWN)
        k0 = ((count.to(tl.int64) * kept_share + rounding) >> 31).to(tl.int32)
        k1 = ((count.to(tl.int64) * replaced_share + rounding) >> 31).to(tl.int32)
        keep, replace, mask = tl.zeros_like(ratio), tl.zeros_like(ratio), tl.zeros_like(ratio)
        high0, high1, high2 = keep + (1 << 32), keep + (1 << 32), keep + (1 << 32)
        below0, below1, below2 = keep_tie, keep_tie, keep_tie
        above0, above1, above2 = n, n, n
        turn = 0
        while not (
            is_done(keep, high0, below0, k0)
            & is_done(replace, high1, below1, k1)
            & is_done(mask, high2, below2, count)
        ):
            pivot0 = propose(keep, high0, below0, above0, k0, turn)
            pivot1 = propose(replace, high1, below1, above1, k1, turn)
            pivot2 = propose(mask, high2, below2, above2, count, turn)
            if FITS:
                counts = _count_tile(keys, pivot0, pivot1, pivot2, RANKS)
                c2 = (counts & 0x1FFFFF).to(tl.int32)
                c0 = ((counts >> 21) & 0x1FFFFF).to(tl.int32)
                c1 = (counts >> 42).to(tl.int32)
            else:
                c0 = tl.zeros((), tl.int32)
                c1 = tl.zeros((), tl.int32)
                c2 = tl.zeros((), tl.int32)
                for first in range(0, seq_len, TILE):
                    tile, bad, can, at = _load_tile(
                        tokens, maskable, never_mask, row, start, first, seq_len, num_tokens,
                        mask_id, TILE,
                    )  # fmt: skip
                    tile_keys = _keys(seed, sample, first, can, TILE)
                    counts = _count_tile(tile_keys, pivot0, pivot1, pivot2, RANKS)
                    c2 += (counts & 0x1FFFFF).to(tl.int32)
                    c0 += ((counts >> 21) & 0x1FFFFF).to(tl.int32)
                    c1 += (counts >> 42).to(tl.int32)
            keep, high0, below0, above0 = learn(keep, high0, below0, above0, k0, pivot0, c0)
            replace, high1, below1, above1 = learn(replace, high1, below1, above1, k1, pivot1, c1)
            mask, high2, below2, above2 = learn(mask, high2, below2, above2, count, pivot2, c2)
            turn += 1
        # Equal keys at a bound, rare: so many of them, in order of position.
        wanted0, wanted1, wanted2 = k0 - below0, k1 - below1, count - below2
        if (wanted0 > 0) | (wanted1 > 0) | (wanted2 > 0):
            if FITS:
                keep_tie, equal = _tied(keys, position, can, keep, wanted0)
                replace_tie, equal = _tied(keys, position, can, replace, wanted1)
                mask_tie, equal = _tied(keys, position, can, mask, wanted2)
            else:
                for first in range(0, seq_len, TILE):
                    tile, bad, can, at = _load_tile(
                        tokens, maskable, never_mask, row, start, first, seq_len, num_tokens,
                        mask_id, TILE,
                    )  # fmt: skip
                    tile_keys = _keys(seed, sample, first, can, TILE)
                    here, equal = _tied(tile_keys, at, can, keep, wanted0)
                    keep_tie, wanted0 = tl.maximum(keep_tie, here), wanted0 - equal
                    here, equal = _tied(tile_keys, at, can, replace, wanted1)
                    replace_tie, wanted1 = tl.maximum(replace_tie, here), wanted1 - equal
                    here, equal = _tied(tile_keys, at, can, mask, wanted2)
                    mask_tie, wanted2 = tl.maximum(mask_tie, here), wanted2 - equal
    else:
        if FITS:
            count = tl.sum((can & (keys < mask.to(tl.uint32))).to(tl.int32))
        else:
            for first in range(0, seq_len, TILE):
                tile, bad, can, at = _load_tile(
                    tokens, maskable, never_mask, row, start, first, seq_len, num_tokens, mask_id,
                    TILE,
                )  # fmt: skip
                tile_keys = _keys(seed, sample, first, can, TILE)
                count += tl.sum((can & (tile_keys < mask.to(tl.uint32))).to(tl.int32))
        tl.atomic_xchg(record + _FIRST_ROW + row, count.to(tl.int64) + _OWN)

    weight = tl.load(weight_table + time)
    if EXACT:
        weight = tl.div_rn(weight * n.to(tl.float32), tl.maximum(count, 1).to(tl.float32))
        weight = tl.where(count == 0, 0.0, weight)
    tl.store(times + row, (time.to(tl.float32) + 0.5) / 65536)
    tl.store(loss_weight + row, weight)
    tl.store(num_masked + row, count.to(tl.int64))
    tl.store(num_maskable + row, n.to(tl.int64))

    before = _rows_before(record, row, LOOK_BACK)
    tl.atomic_xchg(record + _FIRST_ROW + row, before + count.to(tl.int64) + _UP_TO)
    keep, replace, mask = keep.to(tl.uint32), replace.to(tl.uint32), mask.to(tl.uint32)
    if FITS:
        _write_tile(
            clean, can, keys, position, keep, keep_tie, replace, replace_tie, mask, mask_tie,
            seed, sample, 0, row, before, input_ids, labels, masked_indices, rows,
            seq_len, num_tokens, mask_id, RANKS, TILE,
        )  # fmt: skip
    else:
        for first in range(0, seq_len, TILE):
            tile, bad, can, at = _load_tile(
                tokens, maskable, never_mask, row, start, first, seq_len, num_tokens, mask_id, TILE
            )
            num_bad = tl.sum(bad.to(tl.int32))
            if num_bad > 0:
                _record_bad(record, tokens, start, first, bad, num_bad, TILE)
            tile_keys = _keys(seed, sample, first, can, TILE)
            before += _write_tile(
                tile, can, tile_keys, at, keep, keep_tie, replace, replace_tie, mask, mask_tie,
                seed, sample, first, row, before, input_ids, labels, masked_indices, rows,
                seq_len, num_tokens, mask_id, RANKS, TILE,
            )  # fmt: skip


def workspace_size(batch: int) -> int:
    return NUM_INVALID + 1 + batch


def launch_options(a: CorruptArgs) -> dict[str, Any]:
    """Compile-time arguments."""
    fits = a.seq_len <= MAX_TILE
    tile = max(triton.next_power_of_2(a.seq_len), 64) if fits else LONG_ROW_TILE
    num_warps = min(max(tile // 256, 1), 16)
    return {
        "ORDERED": a.num_windows > 0,
        "SHUFFLE": a.shuffle and a.num_windows > 0,
        "EXACT": a.exact,
        "STRATIFIED": a.stratified,
        "RANKS": 3 if a.keep_share or a.random_share else 1,
        "TILE": tile,
        "FITS": fits,
        "LOOK_BACK": max(32 * num_warps, 128),
        "num_warps": num_warps,
        "enable_fp_fusion": False,
    }


_launch = Launcher(corrupt_kernel, _VARYING)


def kernel_arguments(outputs: tuple[Tensor, ...], a: CorruptArgs) -> tuple[Any, ...]:
    """All but the compile-time ones, in the order of the kernel."""
    return (
        a.tokens, a.starts, a.sample_ids, a.step, a.maskable, a.never_mask,
        a.ratio_table, a.weight_table, a.seed, a.seed_tensor, *outputs, a.tokens.numel(),
        a.seq_len, a.num_tokens, a.mask_id, a.first_sample, a.num_windows, a.phase, a.stride,
        a.global_batch, a.keep_share, a.random_share, a.coin_share,
    )  # fmt: skip


def corrupt_triton(outputs: tuple[Tensor, ...], a: CorruptArgs) -> Any:
    """Fills ``outputs``: those of the operator, with the workspace (zeros) for ``invalid``.

    Returns the compiled kernel, if there is one.
    """
    if a.batch == 0:
        return None
    device = a.ratio_table.get_device()
    corrupts = bool(a.keep_share or a.random_share)
    order = a.num_windows > 0, a.shuffle
    variant = device, a.tokens.dtype, order, a.exact, a.stratified, corrupts
    return _launch(a.batch, kernel_arguments(outputs, a), variant, lambda: launch_options(a))
