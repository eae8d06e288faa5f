"""Philox words and permutations on the device, as specified in ``nar_kernels/spec/philox.py``."""

import triton
import triton.language as tl

from nar_kernels.spec.philox import EXACT_PERMUTATION_MAX as _EXACT_MAX
from nar_kernels.spec.philox import FEISTEL_ROUNDS as _ROUNDS

EXACT_PERMUTATION_MAX = tl.constexpr(_EXACT_MAX)
FEISTEL_ROUNDS = tl.constexpr(_ROUNDS)


@triton.jit
def random_block(seed, stream: tl.constexpr, sample, block):
    """The four uint32 words at positions ``4 * block .. 4 * block + 3`` of a sample."""
    bits = sample.to(tl.uint64, bitcast=True)
    low = (bits & 0xFFFFFFFF).to(tl.uint32)
    high = (bits >> 32).to(tl.uint32)
    return tl.philox(seed, block.to(tl.uint32), low, high, tl.full((), stream, tl.uint32))


@triton.jit
def random_words(seed, stream: tl.constexpr, sample, first, COUNT: tl.constexpr):
    """uint32 ``[COUNT]``: the words at positions ``first ..`` of a sample; both multiples of 4.

    A thread holds the four words of a block: four neighbouring positions.
    """
    block = first // 4 + tl.arange(0, COUNT // 4)
    a, b, c, d = random_block(seed, stream, sample, block)
    return tl.join(tl.join(a, c), tl.join(b, d)).reshape(COUNT)


@triton.jit
def _mix(x):
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _feistel(x, seed, stream: tl.constexpr, round, right_bits, left_mask, right_mask):
    left = (x >> right_bits).to(tl.uint32)
    right = (x & right_mask).to(tl.uint32)
    for block in tl.static_range(FEISTEL_ROUNDS // 4):
        a, b, c, d = random_block(seed, stream, round, tl.full((), block, tl.int32))
        left ^= _mix(right ^ a) & left_mask
        right ^= _mix(left ^ b) & right_mask
        left ^= _mix(right ^ c) & left_mask
        right ^= _mix(left ^ d) & right_mask
    return (left.to(tl.int64) << right_bits) | right.to(tl.int64)


@triton.jit
def permute(index, n, seed, stream: tl.constexpr, round):
    """Where permutation ``round`` of [0, n) sends ``index`` (int64 scalars)."""
    result = index
    if n <= EXACT_PERMUTATION_MAX:
        words = random_words(seed, stream, round, 0, EXACT_PERMUTATION_MAX)
        position = tl.arange(0, EXACT_PERMUTATION_MAX)
        own = tl.max(tl.where(position == index, words, 0))
        before = (words < own) | ((words == own) & (position < index))
        result = tl.sum((before & (position < n)).to(tl.int32)).to(tl.int64)
    else:
        bits = tl.zeros((), tl.int64)
        while ((n - 1) >> bits) != 0:
            bits += 1
        right_bits = bits - bits // 2
        one = tl.full((), 1, tl.int64)
        left_mask = ((one << (bits // 2)) - 1).to(tl.uint32)
        right_mask = ((one << right_bits) - 1).to(tl.uint32)
        result = _feistel(result, seed, stream, round, right_bits, left_mask, right_mask)
        while result >= n:  # walk the cycle of the next power of two until it lands below n
            result = _feistel(result, seed, stream, round, right_bits, left_mask, right_mask)
    return result
