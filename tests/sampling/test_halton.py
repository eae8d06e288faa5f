"""The order of a grid of any height and width."""

import pytest
import torch

from nar_kernels.sampling.halton import grid_order, halton_order


def radical_inverse(index: int, base: int) -> float:
    value, unit = 0.0, 1.0 / base
    while index:
        value += index % base * unit
        index, unit = index // base, unit / base
    return value


@pytest.mark.parametrize("grid", [(4, 6), (6, 4), (1, 7), (7, 1), (16, 9), (8, 8)])
def test_cells_come_in_the_order_of_the_sequence(grid: tuple[int, int]) -> None:
    height, width = grid
    seen: list[int] = []
    index = 0
    while len(seen) < height * width:
        row = int(radical_inverse(index, 2) * height)
        column = int(radical_inverse(index, 3) * width)
        if row * width + column not in seen:
            seen.append(row * width + column)
        index += 1
    ranks = grid_order(grid, height * width)
    assert torch.equal(ranks.argsort(), torch.tensor(seen))
    assert torch.equal(ranks, halton_order(height, width))
