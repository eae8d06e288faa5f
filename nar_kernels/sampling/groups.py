"""Batches of sequences of different lengths: those of one length are decoded together.

A sequence never shares a call of the net with a longer one, so nothing needs a mask of attention,
whatever the net is, and no position behind an end is computed.

Shapes: B batch, L length of the longest sequence.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from nar_kernels.sampling.config import ADAPTIVE, SamplingConfig
from nar_kernels.sampling.decode import DecodeState
from nar_kernels.sampling.plan import block_parts
from nar_kernels.sampling.prompt import NO_ID


class Group(NamedTuple):
    """Sequences that are decoded together.

    Attributes:
        which: bool ``[B]``, the sequences.
        length: of each.
        first_block: a position at which a block begins.
    """

    which: np.ndarray
    length: int
    first_block: int

    def of(self, begin: Tensor, mask_id: int) -> Tensor:
        """int64 ``[B, length]``: the prompts, in which other sequences have nothing to fill."""
        filler = 1 if mask_id == 0 else 0
        return begin[:, : self.length].where(torch.from_numpy(self.which)[:, None], filler)


def make_groups(
    begin: Tensor, config: SamplingConfig, mask_id: int, *, from_zero: bool = False
) -> list[Group]:
    """Sequences of one length, whose steps are the same, too: so what a sequence becomes does not
    depend on the others. If no length is given, all are one group.

    Args:
        begin: from :func:`nar_kernels.sampling.prompt.read_prompt`.
        from_zero: the first block begins at position 0, wherever the prompt ends.
    """
    batch, longest = begin.shape
    if (config.length is None and config.max_new_tokens is None) or batch == 0:
        return [Group(np.ones(batch, bool), longest, 0)]
    masked = (begin == mask_id).numpy()
    members: dict[tuple[int, int, tuple[int, ...]], list[int]] = defaultdict(list)
    for b, length in enumerate((begin != NO_ID).sum(1).tolist()):
        first_block = 0
        if config.max_new_tokens is not None and not from_zero:
            first_block = length - config.max_new_tokens
        parts = block_parts(length, config.block_length, first_block)
        counts = [int(masked[b, part].sum()) for part in parts]
        # A plan leaves out steps in which nothing is due. An adaptive strategy would make use of
        # one that others need. (By a quota, these are the last steps of a block for all.)
        if config.strategy == "quota" or config.strategy not in ADAPTIVE:
            # Steps are divided among the blocks with something to fill.
            counts = [min(count, 1) for count in counts] if len(parts) > 1 else []
        members[length, first_block, tuple(counts)].append(b)
    return [
        Group(np.isin(np.arange(batch), numbers), length, first_block)
        for (length, first_block, _), numbers in members.items()
    ]


def side_by_side(
    groups: Sequence[Group], states: Sequence[Iterator[DecodeState]], longest: int, padding: int
) -> Iterator[DecodeState]:
    """The states of the whole batch, from those of its groups: a step of each group that is not
    done, one after the other.

    Args:
        longest: L.
        padding: the id behind the end of a shorter sequence.
    """
    if len(groups) == 1:
        yield from states[0]
        return
    latest = [next(of_group) for of_group in states]
    step, num_steps = 0, max(state.num_steps for state in latest)
    index = [torch.from_numpy(g.which.nonzero()[0]).to(latest[0].ids.device) for g in groups]
    is_new = True
    while is_new:
        yield _whole(step, num_steps, latest, index, longest, padding)
        is_new, step = False, step + 1
        for i, of_group in enumerate(states):
            state = next(of_group, None)
            if state is not None:
                latest[i], is_new = state, True


def _whole(
    step: int,
    num_steps: int,
    states: Sequence[DecodeState],
    index: Sequence[Tensor],
    longest: int,
    padding: int,
) -> DecodeState:
    like = states[0]
    shape = like.ids.shape[0], longest
    ids = like.ids.new_full(shape, padding)
    masked, log_prob = like.masked.new_zeros(shape), like.log_prob.new_zeros(shape)
    for state, own in zip(states, index, strict=True):
        length = state.ids.shape[1]
        for whole, part in ((ids, state.ids), (masked, state.masked), (log_prob, state.log_prob)):
            whole[:, :length].index_copy_(0, own, part.index_select(0, own))
    return DecodeState(step, num_steps, ids, masked, log_prob)
