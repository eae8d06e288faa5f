"""Softmax cross-entropy of rows of logits and its gradient in place: one program per row.

The first pass is an online softmax (Milakov, Gimelshein, "Online normalizer calculation for
softmax", 2018, arXiv:1805.02867); the second, which finds most of the row in the cache, writes the
gradient over the logits.
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from nar_kernels.ops.arguments import NllArgs
from nar_kernels.ops.kernels.launcher import Launcher

# Columns per block, at most.
MAX_BLOCK = 4096


@triton.jit
def _load_logits(logits, bias, column, vocabulary, width):
    """A block of a row in float32, padded with -inf."""
    z = tl.load(logits + column, mask=column < width, other=0.0).to(tl.float32)
    if bias is not None:
        z += tl.load(bias + column, mask=column < vocabulary, other=0.0)
    return tl.where(column < vocabulary, z, float("-inf"))


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
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    label = tl.load(labels + row)
    valid = (label >= 0) & (label < vocabulary)
    at_label = tl.load(logits + label, mask=valid, other=float("nan")).to(tl.float32)
    if bias is not None:
        at_label += tl.load(bias + label, mask=valid, other=0.0)

    largest = tl.full((), float("-inf"), tl.float32)
    total = tl.zeros((), tl.float32)
    for first in range(0, vocabulary, BLOCK):
        z = _load_logits(logits, bias, first + tl.arange(0, BLOCK), vocabulary, width)
        higher = tl.maximum(largest, tl.max(z))
        # Nothing but -inf so far: nothing to rescale, and -inf - -inf would be NaN.
        total *= tl.where(largest == float("-inf"), 0.0, tl.exp(largest - higher))
        total += tl.sum(tl.where(z == float("-inf"), 0.0, tl.exp(z - higher)))
        largest = higher
    # Differences first: logits may be far from 0.
    tl.store(nll + row, tl.log(total) - (at_label - largest))

    if GRADIENT:
        scale = tl.full((), 1.0, tl.float32)
        if weight is not None:
            scale *= tl.load(weight + row)
        share = tl.div_rn(scale, total)
        for first in range(0, vocabulary, BLOCK):
            column = first + tl.arange(0, BLOCK)
            z = _load_logits(logits, bias, column, vocabulary, width)
            grad = share * tl.exp(z - largest) - tl.where(column == label, scale, 0.0)
            tl.store(logits + column, grad.to(logits.dtype.element_ty), mask=column < width)


def _block(vocabulary: int) -> int:
    return min(max(triton.next_power_of_2(vocabulary), 64), MAX_BLOCK)


def launch_options(vocabulary: int, gradient: bool) -> dict[str, Any]:
    """Compile-time arguments."""
    block = _block(vocabulary)
    return {
        "GRADIENT": gradient,
        "BLOCK": block,
        "num_warps": min(max(block // 256, 1), 8),
        "enable_fp_fusion": False,
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
    variant = logits.get_device(), logits.dtype, a.gradient, _block(vocabulary)
    _launch(rows, arguments, variant, lambda: launch_options(vocabulary, a.gradient))
