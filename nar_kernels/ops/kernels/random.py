"""Philox words and permutations on the device, as specified in ``nar_kernels/spec/philox.py``."""

import triton
import triton.language as tl

from nar_kernels.spec.philox import EXACT_PERMUTATION_MAX as _EXACT_MAX
from nar_kernels.spec.philox import FEISTEL_ROUNDS as _ROUNDS

EXACT_PERMUTATION_MAX = tl.constexpr(_EXACT_MAX)
FEISTEL_ROUNDS = tl.constexpr(_ROUNDS)
_M0, _M1 = tl.constexpr(0xD2511F53), tl.constexpr(0xCD9E8D57)
_W0, _W1 = tl.constexpr(0x9E3779B9), tl.constexpr(0xBB67AE85)


@triton.jit
def _multiply(a: tl.constexpr, b):
    """The upper and the lower half of a product: one wide multiplication, where ``tl.philox``
    makes two."""
    product = b.to(tl.uint64) * a
    return (product >> 32).to(tl.uint32), product.to(tl.uint32)


@triton.jit
def random_block(seed, stream, sample, block):
    """The four uint32 words at positions ``4 * block .. 4 * block + 3`` of a sample: Philox4x32-10
    (Salmon et al., SC 2011)."""
    bits = sample.to(tl.uint64, bitcast=True)
    # The interpreter passes a small seed as int32, or, in Triton 3.2, as a number.
    key = (tl.zeros((), tl.int64) + seed).to(tl.uint64, bitcast=True)
    k0, k1 = key.to(tl.uint32), (key >> 32).to(tl.uint32)
    c0, c1 = block.to(tl.uint32), bits.to(tl.uint32)
    c2, c3 = (bits >> 32).to(tl.uint32), (tl.zeros((), tl.int64) + stream).to(tl.uint32)
    for _ in tl.static_range(10):
        high0, low0 = _multiply(_M0, c0)
        high1, low1 = _multiply(_M1, c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0 += _W0
        k1 += _W1
    return c0, c1, c2, c3


@triton.jit
def random_words(seed, stream, sample, first, COUNT: tl.constexpr):
    """uint32 ``[COUNT]``: the words at positions ``first ..`` of a sample; both multiples of 4.

    A thread holds the four words of a block: four neighbouring positions.
    """
    block = first // 4 + tl.arange(0, COUNT // 4)
    a, b, c, d = random_block(seed, stream, sample, block)
    return tl.join(tl.join(a, c), tl.join(b, d)).reshape(COUNT)


@triton.jit
def random_word(seed, stream, sample, position):
    a, b, c, d = random_block(seed, stream, sample, position // 4)
    item = position % 4
    return tl.where(item < 2, tl.where(item == 0, a, b), tl.where(item == 2, c, d))


@triton.jit
def _mix(x):
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _feistel(x, seed, stream, round, right_bits, left_mask, right_mask):
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
def _bit_length(x):
    """Of a positive int64."""
    bits = tl.full((), 1, tl.int64)
    for exponent in tl.static_range(6):
        is_longer = (x >> (32 >> exponent)) != 0
        x = tl.where(is_longer, x >> (32 >> exponent), x)
        bits += tl.where(is_longer, 32 >> exponent, 0)
    return bits


@triton.jit
def permute(index, n, seed, stream, round):
    """Where permutation ``round`` of [0, n) sends ``index`` (int64 scalars)."""
    result = index
    if n <= EXACT_PERMUTATION_MAX:
        words = random_words(seed, stream, round, 0, EXACT_PERMUTATION_MAX)
        position = tl.arange(0, EXACT_PERMUTATION_MAX)
        own = random_word(seed, stream, round, index)
        before = (words < own) | ((words == own) & (position < index))
        result = tl.sum((before & (position < n)).to(tl.int32)).to(tl.int64)
    else:
        bits = _bit_length(n - 1)
        right_bits = bits - bits // 2
        one = tl.full((), 1, tl.int64)
        left_mask = ((one << (bits // 2)) - 1).to(tl.uint32)
        right_mask = ((one << right_bits) - 1).to(tl.uint32)
        result = _feistel(result, seed, stream, round, right_bits, left_mask, right_mask)
        while result >= n:  # walk the cycle of the next power of two until it lands below n
            result = _feistel(result, seed, stream, round, right_bits, left_mask, right_mask)
    return result
