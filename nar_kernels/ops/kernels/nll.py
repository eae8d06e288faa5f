"""Softmax cross-entropy of rows of logits and its gradient in place: one program per row.

The first pass is an online softmax (Milakov, Gimelshein, "Online normalizer calculation for
softmax", 2018, arXiv:1805.02867) with a maximum and a sum for each vector of 16 bytes, so that the
loop neither shuffles nor waits for other warps. The second writes the gradient over the logits,
from the end of the row to its beginning: what was read last is in the cache.
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from nar_kernels.ops.arguments import NllArgs
from nar_kernels.ops.kernels.launcher import Launcher

# Logits of a block for each warp: 16 bytes a lane in bfloat16.
_OF_A_WARP = 256
# With 32 registers a thread, two rows are in flight on a multiprocessor: few enough for the caches
# to hold them until the second pass.
_MAX_WARPS = 32
# A program has a fixed cost for each warp, and half a block of padding.
_ENOUGH_BLOCKS = 4

LOG2E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-3.4028234663852886e38)


@triton.jit
def _exp(x):
    return tl.exp2(x * LOG2E)  # one instruction, which flushes denormals


@triton.jit
def _load_from(logits, first, column, width):
    """The block from column ``first`` on, to be read again."""
    column += first
    return tl.load(logits + column, mask=column < width, other=0.0, eviction_policy="evict_last")


@triton.jit
def _load_before(logits, end, column, BLOCK: tl.constexpr):
    """The block that ends before column ``end``, if there is one, for the last time."""
    column += end - BLOCK
    return tl.load(logits + column, mask=column >= 0, other=0.0, eviction_policy="evict_first")


@triton.jit
def _logits(raw, bias, column):
    z = raw.to(tl.float32)
    if bias is not None:
        z += tl.load(bias + column)
    return z


@triton.jit
def _last_logits(raw, bias, column, vocabulary):
    """Those of the last block, padded with -inf."""
    z = raw.to(tl.float32)
    if bias is not None:
        z += tl.load(bias + column, mask=column < vocabulary, other=0.0)
    return tl.where(column < vocabulary, z, float("-inf"))


@triton.jit
def _add(largest, total, z):
    """Maxima and sums of vectors, with the vectors ``z``."""
    higher = tl.maximum(largest, tl.max(z, 1))
    # Differences first: logits may be far from 0.
    total *= _exp(largest - higher)
    return higher, total + tl.sum(_exp(z - higher[:, None]), 1)


@triton.jit
def _fill_with_zeros(logits, column, width, BLOCK: tl.constexpr):
    for first in range(0, width, BLOCK):
        zeros = tl.zeros(column.shape, logits.dtype.element_ty)
        tl.store(logits + first + column, zeros, mask=first + column < width)


_VARYING = ["vocabulary"]  # alignment of loads and stores depends on the width alone


@triton.jit(do_not_specialize=_VARYING)
def nll_kernel(
    nll, logits, labels, bias, weight, vocabulary, stride, width,
    GRADIENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row. Arguments as in ``NllArgs``; ``nll`` is the output.

    ``width``: columns that are loaded and stored, ``vocabulary`` or more. Where it divides by 16,
    loads and stores may be wide.
    """
    VECTOR: tl.constexpr = 128 // logits.dtype.element_ty.primitive_bitwidth
    VECTORS: tl.constexpr = BLOCK // VECTOR
    column = tl.arange(0, VECTORS)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]

    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    label = tl.load(labels + row)
    valid = (label >= 0) & (label < vocabulary)
    scale = tl.full((), 1.0, tl.float32)
    if weight is not None:
        scale *= tl.load(weight + row)
        if (scale == 0) & (valid == 0):
            tl.store(nll + row, 0.0)
            if GRADIENT:
                _fill_with_zeros(logits, column, width, BLOCK)
            return
    at_label = tl.load(logits + label, mask=valid, other=float("nan")).to(tl.float32)
    if bias is not None:
        at_label += tl.load(bias + label, mask=valid, other=0.0)

    # Finite, so that its difference from -inf is not NaN.
    largest = tl.full((VECTORS,), LOWEST, tl.float32)
    total = tl.zeros((VECTORS,), tl.float32)
    last = (vocabulary - 1) // BLOCK * BLOCK  # the block that may be padded
    raw = _load_from(logits, 0, column, width)
    for first in range(0, last, BLOCK):
        following = _load_from(logits, first + BLOCK, column, width)
        largest, total = _add(largest, total, _logits(raw, bias, first + column))
        raw = following
    z = _last_logits(raw, bias, last + column, vocabulary)
    largest, total = _add(largest, total, z)
    highest = tl.max(largest)
    total = tl.sum(total * _exp(largest - highest))
    tl.store(nll + row, tl.log(total) - (at_label - highest))

    if GRADIENT:
        share = tl.div_rn(scale, total)
        kind: tl.constexpr = logits.dtype.element_ty
        raw = _load_before(logits, last, column, BLOCK)
        grad = (share * _exp(z - highest)).to(kind)
        tl.store(logits + last + column, grad, mask=last + column < width)
        for done in range(0, last, BLOCK):
            first = last - BLOCK - done
            following = _load_before(logits, first, column, BLOCK)
            z = _logits(raw, bias, first + column)
            tl.store(logits + first + column, (share * _exp(z - highest)).to(kind))
            raw = following
        tl.debug_barrier()  # another thread has stored the gradient without it
        if valid:  # not a mask, which the interpreter of Triton 3.2 ignores
            at_label = share * _exp(at_label - highest) - scale
            tl.store(logits + label, at_label.to(kind))


def _num_warps(vocabulary: int) -> int:
    blocks = vocabulary // (_OF_A_WARP * _ENOUGH_BLOCKS)
    return min(1 << max(blocks.bit_length() - 1, 0), _MAX_WARPS)


def launch_options(vocabulary: int, gradient: bool) -> dict[str, Any]:
    """Compile-time arguments."""
    num_warps = _num_warps(vocabulary)
    return {
        "GRADIENT": gradient,
        "BLOCK": num_warps * _OF_A_WARP,
        "num_warps": num_warps,
        "enable_fp_fusion": True,
    }


_launch = Launcher(nll_kernel, _VARYING)


def nll_triton(nll: Tensor, a: NllArgs) -> None:
    """Fills ``nll``, and replaces the logits by their gradient if asked to."""
    logits = a.logits
    rows, vocabulary = logits.shape
    if rows == 0:
        return
    # Includes the gap after each row, if the last row has one, too.
    stride, size = logits.stride(0), logits.untyped_storage().nbytes() // logits.itemsize
    width = stride if logits.storage_offset() + rows * stride <= size else vocabulary
    arguments = nll, logits, a.labels, a.bias, a.weight, vocabulary, stride, width
    variant = logits.get_device(), logits.dtype, a.gradient, _num_warps(vocabulary)
    _launch(rows, arguments, variant, lambda: launch_options(vocabulary, a.gradient))
