"""``unmask`` on the GPU: one program per row, in several passes, all but the first from the cache.

Floats are those of ``nar_kernels/spec/float_math.py``, bit for bit: nothing may be fused, or taken
from a library of the device.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from nar_kernels.ops.arguments import WHOLE, UnmaskArgs
from nar_kernels.ops.kernels.float_math import exp_of_negative, gumbel, log_of_positive
from nar_kernels.ops.kernels.launcher import Launcher
from nar_kernels.ops.kernels.random import random_words
from nar_kernels.spec.philox import Stream

_DECODE_NOISE = tl.constexpr(int(Stream.DECODE_NOISE))
_LARGEST_FLOAT = tl.constexpr(torch.finfo(torch.float32).max)

# Columns per block, at most.
MAX_BLOCK = 1024

# Blocks that 4-bit counts can count without overflow.
_COUNTED = tl.constexpr(15)


# Made by keyword: Triton's cache of compiled kernels does not see in which order the fields are.


class Row(NamedTuple):
    """A row of logits, and the ids that may not be drawn: -1 and None for none."""

    logits: tl.tensor  # pointer
    vocabulary: tl.tensor
    forbidden0: tl.tensor
    forbidden1: tl.tensor
    others: tl.tensor | None  # pointer
    num_others: tl.tensor


class Top(NamedTuple):
    """A filter: keeps keys that begin with less than ``prefix``, and, up to a column, with it."""

    shift: tl.tensor  # of a key, which leaves as many bits as the prefix has
    prefix: tl.tensor
    last_tie: tl.tensor  # column


@triton.jit
def _units(x):
    """x in [0, 1] in units of 2**-30: sums of integers are the same in any order."""
    return (x * 1073741824.0 + 0.5).to(tl.int32).to(tl.int64)


@triton.jit
def _from_units(total):
    return total.to(tl.float32) * 9.313225746154785e-10


@triton.jit
def _load(row, column):
    """Logits of a block of columns, or of one, in float32: finite, or -inf where never drawn."""
    x = tl.load(row.logits + column, mask=column < row.vocabulary, other=float("-inf"))
    x = x.to(tl.float32)
    is_forbidden = (column == row.forbidden0) | (column == row.forbidden1)
    x = tl.where((x != x) | is_forbidden, float("-inf"), x)
    if row.others is not None:
        for i in range(row.num_others):
            x = tl.where(column == tl.load(row.others + i), float("-inf"), x)
    return tl.minimum(x, _LARGEST_FLOAT) + 0.0  # -0 would not equal 0 as a key


@triton.jit
def _largest_logit(row, BLOCK: tl.constexpr):
    largest = tl.full([BLOCK], float("-inf"), tl.float32)
    for first in range(0, row.vocabulary, BLOCK):
        largest = tl.maximum(largest, _load(row, first + tl.arange(0, BLOCK)))
    return tl.max(largest)


@triton.jit
def _upper(x, shift):
    """The upper bits of a uint32 key that reverses the order of clean floats."""
    # Back to infinity: bits that the type of the logits lacks are then equal in all keys.
    bits = tl.where(x == _LARGEST_FLOAT, float("inf"), x).to(tl.int32, bitcast=True)
    key = tl.where(bits < 0, bits, bits ^ 0x7FFFFFFF).to(tl.uint32, bitcast=True)
    return key >> shift.to(tl.uint32)


@triton.jit
def _kept(x, column, top):
    """-inf for what the filter leaves out, if there is one."""
    if top is not None:
        upper = _upper(x, top.shift)
        is_kept = (upper < top.prefix) | ((upper == top.prefix) & (column <= top.last_tie))
        x = tl.where(is_kept, x, float("-inf"))
    return x


@triton.jit
def _load_kept(row, column, top):
    return _kept(_load(row, column), column, top)


@triton.jit
def _unpack(packed, BLOCK: tl.constexpr):
    """int32 ``[16]``: sums of the 16 counts of 4 bits in each of ``packed``."""
    # First sums of 16 lanes each, which fit into bytes: all else is for few of them.
    even = tl.sum((packed & 0x0F0F0F0F0F0F0F0F).reshape(BLOCK // 16, 16), 1)[:, None]
    odd = tl.sum(((packed >> 4) & 0x0F0F0F0F0F0F0F0F).reshape(BLOCK // 16, 16), 1)[:, None]
    digit = tl.arange(0, 16)[None, :]
    byte = tl.where(digit % 2 == 0, even, odd) >> (digit // 2 * 8).to(tl.int64)
    return tl.sum((byte & 255).to(tl.int32), 0)


@triton.jit
def _count_digits(row, shift, prefix, BLOCK: tl.constexpr):
    """int32 ``[16]``: of the keys that begin with ``prefix``, how many go on with each digit."""
    counts = tl.zeros([16], tl.int32)
    one = tl.full((), 1, tl.int64)
    for start in range(0, row.vocabulary, _COUNTED * BLOCK):
        # 16 counts of 4 bits each.
        packed = tl.zeros([BLOCK], tl.int64)
        for first in range(start, tl.minimum(start + _COUNTED * BLOCK, row.vocabulary), BLOCK):
            x = _load(row, first + tl.arange(0, BLOCK))
            next_digit = _upper(x, shift) - prefix  # 16 or more under another prefix
            place = one << (4 * (next_digit & 15)).to(tl.int64)
            packed += tl.where(next_digit < 16, place, 0)
        counts += _unpack(packed, BLOCK)
    return counts


@triton.jit
def _last_tie(row, shift, prefix, wanted, BLOCK: tl.constexpr):
    """The column of the ``wanted``-th key that begins with ``prefix``; with 0, no tie to break."""
    last_tie = tl.full((), 0x7FFFFFFF, tl.int32)
    first = tl.zeros((), tl.int32)
    while wanted > 0:
        column = first + tl.arange(0, BLOCK)
        is_equal = (_upper(_load(row, column), shift) == prefix).to(tl.int32)
        number = tl.sum(is_equal)
        if number >= wanted:
            rank = tl.cumsum(is_equal, 0)
            last_tie = tl.min(tl.where(rank == wanted, column, 0x7FFFFFFF))
        wanted -= number
        first += BLOCK
    return last_tie


@triton.jit
def _find_top_k(row, k, BLOCK: tl.constexpr):
    """The k largest logits, by radix select; of equal ones, those that come first.

    Finds the digits, of 4 bits, of the last one until all keys that begin so are kept, or equal.
    """
    # Behind it are bits that the type of the logits lacks.
    LAST_SHIFT: tl.constexpr = (23 - row.logits.dtype.element_ty.fp_mantissa_width) // 4 * 4
    digits = tl.arange(0, 16)
    shift = tl.full((), 32, tl.int32)
    prefix = tl.zeros((), tl.uint32)
    wanted = tl.full((), 0, tl.int32) + k  # of the keys that begin with `prefix`
    equal = wanted + 1  # so many do; to begin with, just more than are wanted
    while (shift > LAST_SHIFT) & (wanted < equal):
        shift -= 4
        prefix <<= 4
        counts = _count_digits(row, shift, prefix, BLOCK)
        # Not a scan: of fewer elements than threads, Triton's were wrong in some (its issue 2298).
        up_to = tl.sum(tl.where(digits[:, None] <= digits[None, :], counts[:, None], 0), 0)
        digit = tl.sum((up_to < wanted).to(tl.int32))
        wanted -= tl.sum(tl.where(digits < digit, counts, 0))
        equal = tl.sum(tl.where(digits == digit, counts, 0))
        prefix += digit.to(tl.uint32)
    last_tie = _last_tie(row, shift, prefix, tl.where(wanted < equal, wanted, 0), BLOCK)
    return Top(shift=shift, prefix=prefix, last_tie=last_tie)


class Shares(NamedTuple):
    """What the probabilities of a row are computed from."""

    largest: tl.tensor  # logit
    scale: tl.tensor  # of the logits


@triton.jit
def _share_units(x, shares):
    return _units(exp_of_negative((x - shares.largest) * shares.scale))


@triton.jit
def _wanted_sum(row, shares, top, top_p, BLOCK: tl.constexpr):
    """So much of the sum of all that ``top`` keeps, rounded up."""
    units = tl.zeros([BLOCK], tl.int64)
    for first in range(0, row.vocabulary, BLOCK):
        x = _load_kept(row, first + tl.arange(0, BLOCK), top)
        units += _share_units(x, shares)
    total = tl.sum(units)
    return (total >> 30) * top_p + (((total & 0x3FFFFFFF) * top_p + 0x3FFFFFFF) >> 30)


@triton.jit
def _sum_digits(row, shares, top, shift, prefix, BLOCK: tl.constexpr):
    """Of the keys that begin with ``prefix``, but for the last 2 bits: how many there are, and the
    sums of those that go on with 0, with 1 and with 2."""
    number = tl.zeros([BLOCK], tl.int32)
    units0 = tl.zeros([BLOCK], tl.int64)
    units1 = tl.zeros([BLOCK], tl.int64)
    units2 = tl.zeros([BLOCK], tl.int64)
    for first in range(0, row.vocabulary, BLOCK):
        column = first + tl.arange(0, BLOCK)
        x = _load(row, column)
        next_digit = _upper(x, shift) - prefix  # 4 or more under another prefix
        number += (next_digit < 4).to(tl.int32)
        units = _share_units(_kept(x, column, top), shares)
        units0 += tl.where(next_digit == 0, units, 0)
        units1 += tl.where(next_digit == 1, units, 0)
        units2 += tl.where(next_digit == 2, units, 0)
    return tl.sum(number), tl.sum(units0), tl.sum(units1), tl.sum(units2)


@triton.jit
def _last_of_sum(row, shares, top, shift, prefix, wanted, BLOCK: tl.constexpr):
    """The column up to which the keys that begin with ``prefix`` add up to ``wanted``."""
    last = tl.full((), 0x7FFFFFFF, tl.int32)
    first = tl.zeros((), tl.int32)
    while wanted > 0:
        column = first + tl.arange(0, BLOCK)
        x = _load(row, column)
        units = _share_units(_kept(x, column, top), shares)
        units = tl.where(_upper(x, shift) == prefix, units, 0)
        total = tl.sum(units)
        if total >= wanted:
            last = tl.min(tl.where(tl.cumsum(units, 0) >= wanted, column, 0x7FFFFFFF))
        wanted -= total
        first += BLOCK
    return last


@triton.jit
def _find_top_p(row, shares, top, top_p, BLOCK: tl.constexpr):
    """Of what ``top`` keeps, the largest logits whose shares add up to ``top_p``; of equal ones,
    those that come first.

    Finds the digits, of 2 bits, of the last one until it alone begins so.
    """
    LAST_SHIFT: tl.constexpr = (23 - row.logits.dtype.element_ty.fp_mantissa_width) // 4 * 4
    shift = tl.full((), 32, tl.int32)
    prefix = tl.zeros((), tl.uint32)
    wanted = _wanted_sum(row, shares, top, top_p, BLOCK)  # of the keys that begin with `prefix`
    number = tl.full((), 2, tl.int32)  # so many did before the last digit; to begin with, enough
    while (shift > LAST_SHIFT) & (number > 1):
        shift -= 2
        prefix <<= 2
        number, units0, units1, units2 = _sum_digits(row, shares, top, shift, prefix, BLOCK)
        up_to1, up_to2 = units0 + units1, units0 + units1 + units2
        digit = (units0 < wanted).to(tl.uint32)
        digit += (up_to1 < wanted).to(tl.uint32) + (up_to2 < wanted).to(tl.uint32)
        wanted -= tl.where(
            digit == 0, 0, tl.where(digit == 1, units0, tl.where(digit == 2, up_to1, up_to2))
        )
        prefix += digit
    last_tie = _last_of_sum(row, shares, top, shift, prefix, wanted, BLOCK)
    return Top(shift=shift, prefix=prefix, last_tie=last_tie)


@triton.jit
def _score_bound(from_largest, words, inverse_temperature):
    """No score is above. Noise is at most -log(u); scores and this are rounded, more where they are
    large."""
    u = (words.to(tl.float32) + 0.5) * 2.3283064365386963e-10  # 2**-32
    return from_largest * (inverse_temperature * 0.999999) + (1e-3 - 0.6931472 * tl.log2(u))


@triton.jit
def _better(best, best_column, score, column):
    is_better = score > best
    return tl.where(is_better, score, best), tl.where(is_better, column, best_column)


@triton.jit
def _confidence(total, gap_units, num_largest, second, CONFIDENCE: tl.constexpr):
    """Negative entropy or margin, from the sums of each lane."""
    if CONFIDENCE == "entropy":
        gap = tl.div_rn(_from_units(tl.sum(gap_units)), total)
        sure = -(log_of_positive(total) + gap)
    else:
        gap = tl.where(tl.sum(num_largest) > 1, 0.0, tl.max(second))
        sure = tl.div_rn(1.0 - exp_of_negative(gap), total)
    return sure


# Triton would otherwise specialize on these being 1, divisible by 16 or, but for the annotations,
# of another width.
_VARYING = [
    "forbidden0", "forbidden1", "num_others", "fallback", "seed", "top_k", "top_p",
    "inverse_temperature",
]  # fmt: skip


@triton.jit(do_not_specialize=_VARYING)
def unmask_kernel(
    tokens, log_prob, confidence, logits, noise_slots, given, others,
    vocabulary, stride, forbidden0, forbidden1, num_others, fallback, seed: tl.int64, top_k, top_p,
    inverse_temperature: tl.float32, SELECTS: tl.constexpr, CONFIDENCE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One row. Arguments as in ``UnmaskArgs``.

    ``forbidden0``, ``forbidden1``, ``others``: the forbidden ids, -1 and None for none.
    ``SELECTS``: ``top_k`` leaves something out. ``top_p``: None if it does not.
    """
    index = tl.program_id(0).to(tl.int64)
    row = Row(
        logits=logits + index * stride, vocabulary=vocabulary, forbidden0=forbidden0,
        forbidden1=forbidden1, others=others, num_others=num_others,
    )  # fmt: skip
    slot = tl.load(noise_slots + index)
    given_token = tl.full((), -1, tl.int64)
    if given is not None:
        given_token = tl.load(given + index)
    # A tensor also in the interpreter of Triton 3.2, which passes numbers as they are.
    noise_scale = tl.full((), 0.0, tl.float32) + inverse_temperature
    has_noise = (given_token < 0) & (noise_scale > 0)
    largest = _largest_logit(row, BLOCK)
    allows_none = largest == float("-inf")
    largest = tl.where(allows_none, 0.0, largest)  # -inf - -inf would be NaN
    top = _find_top_k(row, top_k, BLOCK) if SELECTS else None
    if top_p is not None:
        scale = tl.where(noise_scale > 0, noise_scale, 1.0)
        top = _find_top_p(row, Shares(largest=largest, scale=scale), top, top_p, BLOCK)

    # Per lane: the best score and the sums over every BLOCK-th column.
    best = tl.full([BLOCK], float("-inf"), tl.float32)
    best_column = tl.zeros([BLOCK], tl.int32)
    to_beat = tl.full((), float("-inf"), tl.float32)
    exp_units = tl.zeros([BLOCK], tl.int64)
    gap_units = tl.zeros([BLOCK], tl.int64)
    num_largest = tl.zeros([BLOCK], tl.int32)
    second = tl.full([BLOCK], float("-inf"), tl.float32)
    for first in range(0, vocabulary, BLOCK):
        column = first + tl.arange(0, BLOCK)
        from_largest = _load_kept(row, column, top) - largest
        exp = exp_of_negative(from_largest)
        exp_units += _units(exp)
        if CONFIDENCE == "entropy":
            gap_units += _units(exp * tl.minimum(-from_largest, 87.0))
        if CONFIDENCE == "margin":
            num_largest += (from_largest == 0.0).to(tl.int32)
            second = tl.maximum(second, tl.where(from_largest < 0.0, from_largest, float("-inf")))
        if has_noise:
            words = random_words(seed, _DECODE_NOISE, slot, first, BLOCK)
            # Noise is made only of blocks that may have the largest score.
            if tl.max(_score_bound(from_largest, words, inverse_temperature)) >= to_beat:
                score = from_largest * inverse_temperature + gumbel(words)
                best, best_column = _better(best, best_column, score, column)
                to_beat = tl.max(best)
        else:
            best, best_column = _better(best, best_column, from_largest, column)

    token = tl.min(tl.where(best == tl.max(best), best_column, 0x7FFFFFFF)).to(tl.int64)
    token = tl.where(allows_none, fallback, token)
    token = tl.where(given_token < 0, token, given_token)
    total = _from_units(tl.sum(exp_units))
    tl.store(tokens + index, token)
    logit = _load_kept(row, token, top)
    tl.store(log_prob + index, (logit - largest) - log_of_positive(total))
    if CONFIDENCE != "probability":
        sure = _confidence(total, gap_units, num_largest, second, CONFIDENCE)
        tl.store(confidence + index, tl.where(allows_none, float("-inf"), sure))


def launch_options(vocabulary: int, top_k: int, confidence: str) -> dict[str, Any]:
    """Compile-time arguments."""
    block = min(max(triton.next_power_of_2(vocabulary), 64), MAX_BLOCK)
    return {
        "SELECTS": top_k < vocabulary,
        "CONFIDENCE": confidence,
        "BLOCK": block,
        "num_warps": max(block // 256, 1),
        "enable_fp_fusion": False,
    }


_launch = Launcher(unmask_kernel, _VARYING)


def unmask_triton(outputs: tuple[Tensor, Tensor, Tensor], a: UnmaskArgs) -> None:
    """Fills ``outputs``: tokens, log-probabilities and confidences, the last one empty for
    ``"probability"``."""
    logits = a.logits
    rows, vocabulary = logits.shape
    if rows == 0:
        return
    # Two ids are kernel arguments. More need a copy: asynchronous, but no CUDA graph can hold it.
    forbidden0, forbidden1 = [*a.forbidden, -1, -1][:2]
    others = None
    if len(a.forbidden) > 2:
        others = torch.tensor(a.forbidden[2:], device="cpu").to(logits.device, non_blocking=True)
    top_p = None if a.top_p == WHOLE else a.top_p
    arguments = (
        *outputs, logits, a.noise_slots, a.given, others, vocabulary, logits.stride(0),
        forbidden0, forbidden1, len(a.forbidden[2:]), a.fallback, a.seed, a.top_k, top_p,
        a.inverse_temperature,
    )  # fmt: skip
    variant = (
        logits.get_device(), logits.dtype, a.top_k < vocabulary, top_p is None, a.confidence
    )  # fmt: skip
    _launch(rows, arguments, variant, lambda: launch_options(vocabulary, a.top_k, a.confidence))
