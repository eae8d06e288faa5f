"""``choose`` on the GPU: one program per sequence, which stores its keys and searches them."""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from nar_kernels.ops.arguments import ChooseArgs
from nar_kernels.ops.kernels.float_math import gumbel
from nar_kernels.ops.kernels.launcher import Launcher
from nar_kernels.ops.kernels.order_statistic import (
    is_done,
    learn,
    num_wanted,
    propose,
    start_search,
)
from nar_kernels.ops.kernels.random import random_word
from nar_kernels.spec.philox import Stream

_CRITIC_NOISE = tl.constexpr(int(Stream.CRITIC_NOISE))

# Candidates per block, at most.
MAX_BLOCK = 2048


# Made by keyword: Triton's cache of compiled kernels does not see in which order the fields are.


class Sequence(NamedTuple):
    """The candidates of a sequence: how many, and pointers to the first."""

    number: tl.tensor
    rows: tl.tensor
    keys: tl.tensor
    score: tl.tensor | None


@triton.jit
def _reversing_key(score):
    """uint32 in reverse order of the scores: the smallest is NaN, then comes the highest."""
    bits = (score + 0.0).to(tl.int32, bitcast=True)  # -0 would not equal 0 as a key
    key = tl.where(bits < 0, bits, bits ^ 0x7FFFFFFF).to(tl.uint32, bitcast=True)
    return tl.where(score == score, key, 0)


@triton.jit
def _store_keys(
    of, first_row, seed, slot, noise_scale,
    BY_POSITION: tl.constexpr, LOWEST_FIRST: tl.constexpr, NOISE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    for first in range(0, of.number, BLOCK):
        i = first + tl.arange(0, BLOCK)
        is_inside = i < of.number
        position = (tl.load(of.rows + i, mask=is_inside, other=first_row) - first_row).to(tl.int32)
        if of.score is None:
            key = random_word(seed, _CRITIC_NOISE, slot, position) ^ 0xFFFFFFFF
        else:
            at = position if BY_POSITION else i
            score = tl.load(of.score + at, mask=is_inside, other=0.0)
            if LOWEST_FIRST:
                score = -score
            if NOISE:
                score += noise_scale * gumbel(random_word(seed, _CRITIC_NOISE, slot, position))
            key = _reversing_key(score)
        tl.store(of.keys + i, key.to(tl.int32, bitcast=True), mask=is_inside)


@triton.jit
def _load_keys(of, i):
    """uint32; past the last the largest, which is below no pivot."""
    return tl.load(of.keys + i, mask=i < of.number, other=-1).to(tl.uint32, bitcast=True)


@triton.jit
def _find_smallest(of, rank, BLOCK: tl.constexpr):
    """The search for a key that has ``rank`` others below it, when it is done."""
    search = start_search(rank, of.number)
    turn = 0
    while not is_done(search):
        pivot = propose(search, turn)
        below = tl.zeros((), tl.int32)
        for first in range(0, of.number, BLOCK):
            below += tl.sum((_load_keys(of, first + tl.arange(0, BLOCK)) < pivot).to(tl.int32))
        search = learn(search, pivot, below)
        turn += 1
    return search


# Triton would otherwise specialize on these being 1, divisible by 16 or, but for the annotations,
# of another width.
_VARYING = ["length", "seed", "first_slot", "slot_stride", "noise_scale"]


@triton.jit(do_not_specialize=_VARYING)
def choose_kernel(
    kept, left, keys, score, rows, bounds, left_bounds, length, seed: tl.int64,
    first_slot: tl.int64, slot_stride: tl.int64, slots, noise_scale: tl.float32,
    BY_POSITION: tl.constexpr, LOWEST_FIRST: tl.constexpr, NOISE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One sequence. Arguments as in ``ChooseArgs``; ``keys`` is int32 ``[R]``, scratch."""
    b = tl.program_id(0).to(tl.int64)
    begin, left_begin = tl.load(bounds + b), tl.load(left_bounds + b)
    number = (tl.load(bounds + b + 1) - begin).to(tl.int32)
    num_left = (tl.load(left_bounds + b + 1) - left_begin).to(tl.int32)
    of_sequence = None
    if score is not None:
        of_sequence = score if BY_POSITION else score + begin
    of = Sequence(number=number, rows=rows + begin, keys=keys + begin, score=of_sequence)
    slot = first_slot + b * slot_stride
    if slots is not None:
        slot = tl.load(slots + b)
    _store_keys(
        of, b * length, seed, slot, noise_scale, BY_POSITION, LOWEST_FIRST, NOISE, BLOCK
    )  # fmt: skip
    tl.debug_barrier()  # other threads may read them
    search = _find_smallest(of, number - num_left, BLOCK)

    kept_here, left_here = kept + (begin - left_begin), left + left_begin
    num_kept, num_tied = tl.zeros((), tl.int32), tl.zeros((), tl.int32)
    for first in range(0, number, BLOCK):
        i = first + tl.arange(0, BLOCK)
        key = _load_keys(of, i)
        is_tied = (key == search.low) & (i < number)
        tie = num_tied + tl.cumsum(is_tied.to(tl.int32), 0)
        is_kept = (key < search.low) | (is_tied & (tie <= num_wanted(search)))
        kept_up_to = num_kept + tl.cumsum(is_kept.to(tl.int32), 0)
        row = tl.load(of.rows + i, mask=i < number, other=0)
        tl.store(kept_here + (kept_up_to - 1), row, mask=is_kept)
        tl.store(left_here + (i - kept_up_to), row, mask=(i < number) & (is_kept == 0))
        num_tied += tl.sum(is_tied.to(tl.int32))
        num_kept += tl.sum(is_kept.to(tl.int32))


def _block(length: int) -> int:
    return min(max(triton.next_power_of_2(length), 64), MAX_BLOCK)


def launch_options(a: ChooseArgs) -> dict[str, Any]:
    """Compile-time arguments."""
    block = _block(a.length)
    return {
        "BY_POSITION": a.by_position,
        "LOWEST_FIRST": a.lowest_first,
        "NOISE": a.noise_scale > 0,
        "BLOCK": block,
        "num_warps": min(max(block // 128, 1), 8),
        "enable_fp_fusion": False,
    }


_launch = Launcher(choose_kernel, _VARYING)


def choose_triton(outputs: tuple[Tensor, Tensor], a: ChooseArgs) -> None:
    """Fills ``outputs``: the rows that keep their ids, and those that are left."""
    sequences = len(a.bounds) - 1
    if sequences == 0 or a.rows.shape[0] == 0:
        return
    keys = torch.empty_like(a.rows, dtype=torch.int32)
    arguments = (
        *outputs, keys, a.score, a.rows, a.bounds, a.left_bounds, a.length, a.seed, a.first_slot,
        a.slot_stride, a.slots, a.noise_scale,
    )  # fmt: skip
    flags = a.by_position, a.lowest_first, a.noise_scale > 0, _block(a.length), a.slots is None
    _launch(sequences, arguments, (a.rows.get_device(), *flags), lambda: launch_options(a))
