"""Passes of the search for an order statistic: the pivots of `csrc/corrupt/gpu/select.h` and
`nar_kernels/ops/kernels/order_statistic.py`."""

import numpy as np


def num_passes(length: int, num_ranks: int, num_rows: int = 300) -> float:
    """Mean for random keys of a row, of which any number is masked."""
    rng = np.random.default_rng(0)
    total = 0
    for _ in range(num_rows):
        keys = np.sort(rng.integers(0, 1 << 32, length))
        k = int(rng.integers(1, length + 1))
        total += max(_passes(keys, rank) for rank in (k, k // 5, k // 10)[:num_ranks])
    return total / num_rows


def _passes(keys: np.ndarray, rank: int) -> int:
    low, last, below_low, below_end = 0, (1 << 32) - 1, 0, len(keys)
    passes = 0
    while below_low != rank and low < last:
        share = (rank - below_low + 0.5) / (below_end - below_low + 1)
        share = share if passes < 8 or passes % 2 == 0 else 0.5
        offset = last - low if rank == below_end else int((last - low) * share)
        pivot = low + min(max(offset, 1), last - low)
        below = int(np.searchsorted(keys, pivot))
        if below <= rank:
            low, below_low = pivot, below
        else:
            last, below_end = pivot - 1, below
        passes += 1
    return passes
