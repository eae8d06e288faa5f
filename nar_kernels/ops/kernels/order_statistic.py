"""The k-th smallest of random keys, without a sort: a bracket around a pivot, narrowed by counting.

A search is four scalars, ``(low, high, below_low, below_high)``. The pivot that has exactly ``k``
keys below it lies in ``[low, high)``, int64; so many keys, int32, are below either end. The search
is done once ``below_low == k`` (the pivot is then ``low``), or once no pivot is left because equal
keys straddle the boundary (``high - low == 1``).
"""

import triton
import triton.language as tl


@triton.jit
def is_done(low, high, below_low, k):
    return (below_low == k) | (high - low <= 1)


@triton.jit
def propose(low, high, below_low, below_high, k, turn):
    """The next pivot. Random keys are nearly evenly spread, so interpolation homes in within about
    five turns; a bisection every other turn after that bounds their number for any keys. (Every
    pivot is correct: rounding here cannot change a result.)"""
    width = (high - low).to(tl.float32)
    share = ((k - below_low).to(tl.float32) + 0.5) / ((below_high - below_low).to(tl.float32) + 1)
    share = tl.where((turn < 8) | (turn % 2 == 0), share, 0.5)
    offset = tl.minimum(tl.maximum((width * share).to(tl.int64), 1), high - low - 1)
    offset = tl.where(k == below_high, high - low - 1, offset)
    return tl.where(is_done(low, high, below_low, k), low, low + offset)


@triton.jit
def learn(low, high, below_low, below_high, k, pivot, below):
    """Narrows the bracket, given how many keys are below the pivot."""
    todo = not is_done(low, high, below_low, k)
    up = todo & (below <= k)
    down = todo & (below > k)
    return (
        tl.where(up, pivot, low),
        tl.where(down, pivot, high),
        tl.where(up, below, below_low),
        tl.where(down, below, below_high),
    )
