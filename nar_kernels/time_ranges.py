"""Which times to train on: :func:`time_ranges`, BD3LM's search of the range whose losses vary least
(arXiv:2503.09573, section 5.2)."""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from nar_kernels.checks import as_float, as_int
from nar_kernels.data.packing.document_range import DocumentRange
from nar_kernels.data.windows.dataset import TokenDataset
from nar_kernels.likelihood import document_batches, weighted_nats, window_batches

LEAST_WIDTH, GRID = 0.5, 0.05  # BD3LM's


class TimeRange(NamedTuple):
    """A range of times and the losses of draws in it, in nats per token, weighted as the bound is.

    Attributes:
        low, high: ``MaskingConfig(time_range=(low, high))``.
        mean: that of the loss of a draw.
        variance, standard_error: its variance over draws and data, and how well it is known.
        num_draws: how many draws it was seen in.
    """

    low: float
    high: float
    mean: float
    variance: float
    standard_error: float
    num_draws: int


@torch.no_grad()
def time_ranges(
    net: nn.Module,
    held_out: TokenDataset | DocumentRange,
    windows: Tensor | None = None,
    *,
    draws: int,
    device: torch.device,
    block_length: int | None = None,
    least_width: float = LEAST_WIDTH,
    grid: float = GRID,
    class_ids: Tensor | None = None,
) -> list[TimeRange]:
    """Ranges of time, by the variance of the loss in them, least first.

    The losses of held-out draws with times of the whole range serve all ranges: one pass through
    the data, where a draw is a sample, or with blocks a block. A loss is that of the linear
    schedule, ``w * sum(NLL) / maskable positions``, whose weight w grows towards time 1, where
    little is masked.

    Args:
        held_out: what to measure on; of a TokenDataset these ``windows``, int64 ``[N]``.
        draws: masks of each window or document.
        block_length: of block diffusion.
        least_width: in (0, 1], of a range.
        grid: in (0, 1], between the ends of ranges.
        class_ids: int64 ``[N]``, of the windows, for a net that takes a class.

    Raises:
        ValueError: an argument is out of range, there are not enough draws for such a grid, or a
            loss is not finite.
    """
    draws = as_int("draws", draws)
    if draws < 1:
        raise ValueError(f"draws is {draws}: it must be at least 1")
    ranges = _grid(as_float("least_width", least_width), as_float("grid", grid))
    if isinstance(held_out, DocumentRange):
        batches = document_batches(held_out, draws, block_length)
    else:
        if windows is None or len(windows) == 0:
            raise ValueError(f"windows is {windows}: it must say which windows of the dataset")
        batches = window_batches(held_out, windows, draws, block_length, class_ids)
    times, losses = [], []
    for make in batches:
        batch = make()[1].to(device)
        counts = batch.num_maskable > 0
        per_token = weighted_nats(net, batch)[counts] / batch.num_maskable[counts]
        times.append(batch.times[counts].cpu())
        losses.append(per_token.double().cpu())
    every_time, every_loss = torch.cat(times), torch.cat(losses)
    if not every_loss.isfinite().all():
        bad = every_loss[~every_loss.isfinite()]
        raise ValueError(f"{len(bad)} losses are not finite, such as {bad[0]}: has it diverged?")
    made = [_range(low, high, every_time, every_loss) for low, high in ranges]
    return sorted(made, key=lambda r: r.variance)


def _grid(least_width: float, grid: float) -> list[tuple[float, float]]:
    """The ranges in [0, 1] at least ``least_width`` wide, with ends at multiples of ``grid``."""
    for name, value in (("least_width", least_width), ("grid", grid)):
        if not 0 < value <= 1:
            raise ValueError(f"{name} is {value}: it must be in (0, 1]")
    steps = round(1 / grid)
    if not math.isclose(steps * grid, 1):
        raise ValueError(f"grid is {grid}: it must divide 1, as 0.05 does")
    least = math.ceil(least_width * steps - 1e-9)
    return [
        (first / steps, last / steps)
        for first in range(steps)
        for last in range(first + least, steps + 1)
    ]


def _range(low: float, high: float, times: Tensor, losses: Tensor) -> TimeRange:
    there = losses[(times >= low) & (times <= high)]
    if len(there) < 2:
        raise ValueError(
            f"{len(there)} draws have a time in [{low}, {high}]: take more draws or windows, or a "
            "greater least_width"
        )
    mean, variance = there.mean(), there.var()
    # Of a sample variance of independent draws.
    spread = ((there - mean) ** 4).mean() - variance**2
    error = math.sqrt(max(spread.item(), 0) / len(there))
    return TimeRange(low, high, mean.item(), variance.item(), error, len(there))
