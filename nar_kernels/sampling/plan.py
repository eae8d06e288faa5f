"""The decoding plan, computed on the host up front: blocks, steps, and how many positions each step
unmasks.

Shapes: B batch, L sequence length.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from nar_kernels.spec.schedules import Schedule


class Step(NamedTuple):
    """One decoding step: one call of the net.

    Attributes:
        number: index in the plan from 0; skipped steps count.
        annealing: factor on temperatures, which falls linearly to 0 at the last step of a block.
        left: int64 ``[B]`` on the CPU: how many positions of the block stay masked, at most.
        again: int64 ``[B]`` on the CPU: how many of them were filled before; None for none.
    """

    number: int
    annealing: float
    left: Tensor
    again: Tensor | None = None


class Block(NamedTuple):
    """Contiguous positions that are filled before any to the right of them.

    Attributes:
        counts: int64 ``[B]`` on the CPU: number of masked positions in each sequence.
        rows: int64 ``[R]`` on the CPU: the masked positions, ascending indices into the flat
            ``[B * L]``.
        steps: steps that would not unmask anything are skipped, unless all were asked for.
        part: the positions of the block.
    """

    counts: Tensor
    rows: Tensor
    steps: list[Step]
    part: slice

    def only(self, which: np.ndarray, length: int, *, every_step: bool) -> "Block":
        """The block without the sequences that are false in ``which``, bool ``[B]``."""
        going = torch.from_numpy(which)
        counts, rows = self.counts * going, self.rows[going[self.rows // length]]
        steps = [
            step._replace(
                left=step.left * going, again=None if step.again is None else step.again * going
            )
            for step in self.steps
        ]
        steps = steps if every_step else _that_unmask(steps, counts)
        return Block(counts, rows, steps, self.part)


class Plan(NamedTuple):
    """The decoding plan of a batch.

    Attributes:
        blocks: in decoding order.
        num_steps: number of steps requested; every ``Step.number`` is below it.
        every_step: whether steps that would not unmask anything were kept.
    """

    blocks: list[Block]
    num_steps: int
    every_step: bool = False


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


def _evenly(size: Tensor, steps: int) -> Tensor:
    """int64 ``[S, B]``: how many of ``size`` positions, ``[B]``, are due after each step."""
    done = torch.arange(1, steps + 1, dtype=torch.int64, device="cpu")[:, None]
    return done * (size // steps) + done.minimum(size % steps)


def make_plan(
    masked: Tensor,
    schedule: Schedule | None,
    steps: int,
    *,
    block_length: int | None = None,
    first_block: int = 0,
    every_step: bool = False,
) -> Plan:
    """Distributes steps over blocks, and positions over steps.

    Args:
        masked: bool ``[B, L]`` on the CPU, the positions to fill.
        schedule: mask ratio m(t) within a block. None: its positions, also those of the prompt, are
            divided evenly, the first steps getting the remainder (LLaDA 2); without
            ``block_length``, those to fill.
        steps: for all blocks together; the first blocks get the remainder.
        block_length: positions of a block; blocks go from left to right. Default: one block.
        first_block: a position at which a block begins.
        every_step: keep steps that would not unmask anything.

    Raises:
        ValueError: ``block_length`` is not positive, or there are more blocks than steps.
    """
    if block_length is not None and block_length < 1:
        raise ValueError(f"block_length is {block_length}: it must be at least 1")
    parts = [
        part
        for part in block_parts(masked.shape[1], block_length, first_block)
        if masked[:, part].any()
    ]
    if steps < max(len(parts), 1):
        raise ValueError(
            f"steps is {steps}: it must be at least {max(len(parts), 1)}, one for each block with "
            "something to fill"
        )
    blocks, number = [], 0
    for i, part in enumerate(parts):
        share = steps // len(parts) + (i < steps % len(parts))
        blocks.append(_block(masked, part, schedule, share, number, every_step, block_length))
        number += share
    return Plan(blocks, steps, every_step)


def block_parts(length: int, block_length: int | None, first_block: int = 0) -> list[slice]:
    """The positions of each block, the first and last of which may be cut off."""
    if block_length is None:
        return [slice(0, length)]
    starts = range(-(-first_block % block_length), length, block_length)
    return [slice(max(start, 0), start + block_length) for start in starts]


def _block(
    masked: Tensor,
    part: slice,
    schedule: Schedule | None,
    steps: int,
    number: int,
    every_step: bool,
    block_length: int | None,
) -> Block:
    here = torch.zeros_like(masked)
    here[:, part] = masked[:, part]
    counts = here.sum(1)
    if schedule is not None:
        num_left = num_masked_after(schedule, steps, counts)
    else:
        size = counts
        if block_length is not None:
            size = torch.full_like(counts, min(block_length, masked.shape[1]))
        num_left = (counts - _evenly(size, steps)).clamp(min=0)
    kept = [Step(number + i, 1 - (i + 1) / steps, left) for i, left in enumerate(num_left.unbind())]
    if not every_step:
        kept = _that_unmask(kept, counts)
    part = slice(part.start, min(part.stop, masked.shape[1]))
    return Block(counts, here.flatten().nonzero()[:, 0], kept, part)


def _that_unmask(steps: list[Step], counts: Tensor) -> list[Step]:
    """Without the steps after which as many positions are masked as before."""
    before = [counts, *(step.left for step in steps)]
    return [step for step, n in zip(steps, before, strict=False) if not torch.equal(step.left, n)]
