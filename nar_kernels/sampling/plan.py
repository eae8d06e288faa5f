"""What decoding will do, known on the host before it begins: which positions, and how many a step.

Shapes: B batch, L sequence length.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from nar_kernels.spec.schedules import Schedule


class Step(NamedTuple):
    """One call of the net.

    Attributes:
        number: counts the steps of a plan from 0, those too that are left out.
        annealing: falls to 0 at the last step of a block.
        left: int64 ``[B]`` on the CPU: how many positions of the block stay masked, at most.
    """

    number: int
    annealing: float
    left: Tensor


class Block(NamedTuple):
    """Neighbouring positions that are filled before any behind them.

    Attributes:
        counts: int64 ``[B]`` on the CPU: how many are open in each sequence.
        rows: int64 ``[R]`` on the CPU: those, ascending, as indices into the flat ``[B * L]``.
        steps: without those that would leave as many masked as the one before.
    """

    counts: Tensor
    rows: Tensor
    steps: list[Step]


class Plan(NamedTuple):
    """What decoding a batch will do.

    Attributes:
        blocks: one after the other.
        num_steps: that were asked for; their numbers are below.
    """

    blocks: list[Block]
    num_steps: int


def num_masked_after(schedule: Schedule, steps: int, counts: Tensor) -> Tensor:
    """How many of each of the ``counts`` are masked after each step: ``floor(m((i + 1) / S) n)``.

    In float32 whatever the default type, as x-transformers counts. Never rises, and ends at 0
    whatever the schedule.

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
    is_open: Tensor,
    schedule: Schedule,
    steps: int,
    *,
    block_length: int | None = None,
    every_step: bool = False,
) -> Plan:
    """Divides steps over blocks, and positions over steps.

    Args:
        is_open: bool ``[B, L]`` on the CPU, where there is something to fill.
        schedule: mask ratio m(t) within a block.
        steps: of all blocks together; those at the front get what does not divide.
        block_length: L / block_length blocks, from left to right. Default: one.
        every_step: keep also steps that would leave as many masked as the one before.

    Raises:
        ValueError: ``block_length`` is not positive, or there are more blocks than steps.
    """
    length = is_open.shape[1]
    block_length = length if block_length is None else block_length
    if block_length < 1:
        raise ValueError(f"block_length is {block_length}: it must be at least 1")
    starts = [s for s in range(0, length, block_length) if is_open[:, s : s + block_length].any()]
    if steps < max(len(starts), 1):
        raise ValueError(
            f"steps is {steps}: it must be at least {max(len(starts), 1)}, one for each block with "
            "something to fill"
        )
    blocks, number = [], 0
    for i, start in enumerate(starts):
        share = steps // len(starts) + (i < steps % len(starts))
        blocks.append(_block(is_open, start, block_length, schedule, share, number, every_step))
        number += share
    return Plan(blocks, steps)


def _block(
    is_open: Tensor,
    start: int,
    block_length: int,
    schedule: Schedule,
    steps: int,
    number: int,
    every_step: bool,
) -> Block:
    here = torch.zeros_like(is_open)
    here[:, start : start + block_length] = is_open[:, start : start + block_length]
    counts = here.sum(1)
    before, kept = counts, []
    for i, left in enumerate(num_masked_after(schedule, steps, counts)):
        if every_step or not torch.equal(left, before):
            kept.append(Step(number + i, 1 - (i + 1) / steps, left))
        before = left
    return Block(counts, here.flatten().nonzero()[:, 0], kept)
