"""The decoding plan, computed on the host up front: blocks, steps, and how many positions each step
unmasks.

Shapes: B batch, L sequence length.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from nar_kernels.spec.schedules import Schedule


class Step(NamedTuple):
    """One decoding step: one call of the net.

    Attributes:
        number: index in the plan from 0; skipped steps count.
        annealing: factor on temperatures, which falls linearly to 0 at the last step of a block.
        left: int64 ``[B]`` on the CPU: how many positions of the block stay masked, at most.
    """

    number: int
    annealing: float
    left: Tensor


class Block(NamedTuple):
    """Contiguous positions that are filled before any to the right of them.

    Attributes:
        counts: int64 ``[B]`` on the CPU: number of masked positions in each sequence.
        rows: int64 ``[R]`` on the CPU: the masked positions, ascending indices into the flat
            ``[B * L]``.
        steps: steps that would not unmask anything are skipped, unless all were asked for.
    """

    counts: Tensor
    rows: Tensor
    steps: list[Step]


class Plan(NamedTuple):
    """The decoding plan of a batch.

    Attributes:
        blocks: in decoding order.
        num_steps: number of steps requested; every ``Step.number`` is below it.
    """

    blocks: list[Block]
    num_steps: int


def num_masked_after(schedule: Schedule, steps: int, counts: Tensor) -> Tensor:
    """Number of masked positions after each step, for each count n: ``floor(m((i + 1) / S) n)``.

    Computed in float32 whatever the default dtype, as in x-transformers. For any schedule it is
    non-increasing, and 0 after the last step.

    Args:
        counts: int64 ``[B]``.

    Returns:
        int64 ``[S, B]``.
    """
    times = torch.linspace(0, 1, steps + 1, dtype=torch.float32, device="cpu")[1:]
    ratios = [float(schedule(t)) for t in times]
    ratio = torch.tensor(ratios, dtype=torch.float32, device="cpu")
    left = (ratio[:, None] * counts).long().clamp(min=0).minimum(counts).cummin(0).values
    left[-1] = 0
    return left


def make_plan(
    masked: Tensor,
    schedule: Schedule,
    steps: int,
    *,
    block_length: int | None = None,
    every_step: bool = False,
) -> Plan:
    """Distributes steps over blocks, and positions over steps.

    Args:
        masked: bool ``[B, L]`` on the CPU, the positions to fill.
        schedule: mask ratio m(t) within a block.
        steps: for all blocks together; the first blocks get the remainder.
        block_length: positions of a block; blocks go from left to right. Default: one block.
        every_step: keep steps that would not unmask anything.

    Raises:
        ValueError: ``block_length`` is not positive, or there are more blocks than steps.
    """
    length = masked.shape[1]
    block_length = length if block_length is None else block_length
    if block_length < 1:
        raise ValueError(f"block_length is {block_length}: it must be at least 1")
    starts = [s for s in range(0, length, block_length) if masked[:, s : s + block_length].any()]
    if steps < max(len(starts), 1):
        raise ValueError(
            f"steps is {steps}: it must be at least {max(len(starts), 1)}, one for each block with "
            "something to fill"
        )
    blocks, number = [], 0
    for i, start in enumerate(starts):
        share = steps // len(starts) + (i < steps % len(starts))
        blocks.append(_block(masked, start, block_length, schedule, share, number, every_step))
        number += share
    return Plan(blocks, steps)


def _block(
    masked: Tensor,
    start: int,
    block_length: int,
    schedule: Schedule,
    steps: int,
    number: int,
    every_step: bool,
) -> Block:
    here = torch.zeros_like(masked)
    here[:, start : start + block_length] = masked[:, start : start + block_length]
    counts = here.sum(1)
    before, kept = counts, []
    for i, left in enumerate(num_masked_after(schedule, steps, counts)):
        if every_step or not torch.equal(left, before):
            kept.append(Step(number + i, 1 - (i + 1) / steps, left))
        before = left
    return Block(counts, here.flatten().nonzero()[:, 0], kept)
