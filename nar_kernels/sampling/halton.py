"""Halton order: positions of a grid for ``strategy="halton"``."""

from collections.abc import Iterator

import torch
from torch import Tensor


def grid_order(grid: tuple[int, int] | None, seq_len: int) -> Tensor:
    """int64 ``[L]``: the ranks of :func:`halton_order`; ``grid`` defaults to a square.

    Raises:
        ValueError: L is not a square, or the grid does not have L cells.
    """
    if grid is None:
        side = round(seq_len**0.5)
        grid = side, side
    height, width = grid
    if height * width != seq_len or height < 1:
        raise ValueError(
            f"grid is {height} x {width}: strategy 'halton' needs grid=(height, width) with "
            f"{seq_len} cells"
        )
    return halton_order(height, width)


def halton_order(height: int, width: int) -> Tensor:
    """Rank of each grid cell in a 2D Halton sequence (bases 2 and 3): each new cell is far from
    those before (Besnier et al. 2025, arXiv:2503.17076).

    Returns:
        int64 ``[height * width]``: the rank of each cell, row by row.
    """
    ranks = torch.full((height, width), -1, device="cpu")
    visited = 0
    for down, right in zip(_van_der_corput(2), _van_der_corput(3), strict=True):
        cell = int(down * height), int(right * width)
        if ranks[cell] < 0:
            ranks[cell] = visited
            visited += 1
            if visited == height * width:
                break
    return ranks.flatten()


def _van_der_corput(base: int) -> Iterator[float]:
    """Van der Corput sequence: the digits of 0, 1, 2, ... reversed behind the radix point."""
    index = 0
    while True:
        value, unit, rest = 0.0, 1.0, index
        while rest:
            unit /= base
            rest, digit = divmod(rest, base)
            value += digit * unit
        yield value
        index += 1
