"""The k-th smallest of random keys, without a sort: a bracket around a pivot, narrowed by counting.

A search is done once exactly ``rank`` keys are below ``low``, which is the pivot, or once no pivot
is left because equal keys straddle the boundary: ``low``, of which some are then wanted.
"""

from typing import NamedTuple

import triton
import triton.language as tl


class PivotSearch(NamedTuple):
    """The pivot that has exactly ``rank`` keys below it lies in ``[low, last]``."""

    rank: tl.tensor  # int32
    low: tl.tensor  # uint32
    last: tl.tensor
    below_low: tl.tensor  # int32: so many keys are
    below_end: tl.tensor  # up to `last`


@triton.jit
def start_search(rank, n):
    """Among ``n`` keys of 32 bits."""
    low = tl.zeros((), tl.uint32)
    return PivotSearch(
        rank=rank, low=low, last=low + 0xFFFFFFFF, below_low=tl.zeros((), tl.int32), below_end=n
    )


@triton.jit
def is_done(search):
    return (search.below_low == search.rank) | (search.low == search.last)


@triton.jit
def num_wanted(search):
    """How many keys of the bracket are; once the search is done, of those that equal ``low``."""
    return search.rank - search.below_low


@triton.jit
def propose(search, turn):
    """The next pivot. Random keys are nearly evenly spread, so interpolation homes in within about
    four turns; a bisection every other turn after the eighth bounds their number for any keys.
    (Every pivot is right: rounding here cannot change a result.)"""
    most = search.last - search.low
    keys = (search.below_end - search.below_low).to(tl.float32)
    share = (num_wanted(search).to(tl.float32) + 0.5) / (keys + 1)
    share = tl.where((turn < 8) | (turn % 2 == 0), share, 0.5)
    # The largest float below 2**32, which no conversion leaves undefined.
    offset = tl.minimum(most.to(tl.float32) * share, 4294967040.0).to(tl.uint32)
    offset = tl.minimum(tl.maximum(offset, 1), most)
    offset = tl.where(search.rank == search.below_end, most, offset)
    return tl.where(is_done(search), search.low, search.low + offset)


@triton.jit
def learn(search, pivot, below):
    """Narrows the bracket, given how many keys are below the pivot."""
    todo = not is_done(search)
    up = todo & (below <= search.rank)
    down = todo & (below > search.rank)
    return PivotSearch(
        rank=search.rank,
        low=tl.where(up, pivot, search.low),
        last=tl.where(down, pivot - 1, search.last),
        below_low=tl.where(up, below, search.below_low),
        below_end=tl.where(down, below, search.below_end),
    )
