"""Mask schedules: mask ratio m(t) over time, and their tabulation.

``t`` runs from 0 (everything masked, m = 1) to 1 (nothing masked, m = 0), as in MaskGIT (Chang et
al. 2022, arXiv:2202.04200) and x-transformers. Times are quantised to 16 bits: ``t16`` in
[0, 65536) stands for the share ``(t16 + 0.5) / 65536`` of the range of times, all of [0, 1] or a
part. A schedule is tabulated once over them, in float64 on the host, so that every kernel supports
any Python callable, and none evaluates a cosine.
"""

import hashlib
import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

NUM_TIMES = 1 << 16

_CUT_OFF = 1e-3 + 1e-6  # tolerance of the ends of a bound's m: 1e-3 off 1 or 0, and rounding
_MAX_SHARE_IN_JUMPS = 0.05

Schedule = Callable[[Tensor], Tensor]


def linear(t: Tensor) -> Tensor:
    """m = 1 - t: mask ratio uniform in (0, 1), as in masked diffusion LMs (arXiv:2406.07524)."""
    return 1 - t


def cosine(t: Tensor) -> Tensor:
    """m = cos(pi t / 2), MaskGIT's default."""
    return torch.cos(t * (math.pi / 2))


def square(t: Tensor) -> Tensor:
    """m = 1 - t**2 (MaskGIT, concave)."""
    return 1 - t**2


def cubic(t: Tensor) -> Tensor:
    """m = 1 - t**3 (MaskGIT, concave)."""
    return 1 - t**3


def sqrt(t: Tensor) -> Tensor:
    """m = 1 - sqrt(t) (MaskGIT, convex)."""
    return 1 - t**0.5


def arccos(t: Tensor) -> Tensor:
    """m = arccos(t) / (pi / 2): mostly high ratios (MUSE, arXiv:2301.00704)."""
    return torch.arccos(t) / (math.pi / 2)


def sigmoid(t: Tensor) -> Tensor:
    """The sigmoid schedule of Chen 2023 (arXiv:2301.10972) with start -3, end 3, tau 1."""
    low, high = 1 / (1 + math.exp(3)), 1 / (1 + math.exp(-3))
    return (high - torch.sigmoid(t * 6 - 3)) / (high - low)


@dataclass(frozen=True)
class Constant:
    """The same ratio at all times, such as BERT's 0.15: it masks, but gives no bound."""

    ratio: float

    def __call__(self, t: Tensor) -> Tensor:
        return torch.full_like(t, self.ratio)


SCHEDULES: dict[str, Schedule] = {
    f.__name__: f for f in (linear, cosine, square, cubic, sqrt, arccos, sigmoid)
}


class ScheduleTable(NamedTuple):
    """Lookup tables of a schedule over 65536 times of a range, indexed by ``t16``.

    Attributes:
        ratio: int32 ``[65536]``, bit patterns of unsigned 0.32 fixed point: floor(m * 2**32), at
            most 2**32 - 1. Rounded down, so that ``ceil(m * n)`` is right for ratios such as 2/3.
        exact_weight: float32 ``[65536]``, |m'(t)|.
        bernoulli_weight: float32 ``[65536]``, |m'(t)| / m(t); 0 where m is 0.
        edges: float64 ``[65537]``, m at the start of each time bin, and at the end of the range.
    """

    ratio: Tensor
    exact_weight: Tensor
    bernoulli_weight: Tensor
    edges: Tensor

    def at(self, t: Tensor) -> Tensor:
        """float64: m at float64 shares of the range, by linear interpolation between the edges."""
        place = t * NUM_TIMES
        i = place.long().clamp(max=NUM_TIMES - 1)
        left, right = self.edges[i], self.edges[i + 1]
        return left + (right - left) * (place - i)

    @property
    def is_bound(self) -> bool:
        """Whether losses weighted by |m'| are a likelihood bound (NELBO): if m falls from 1 to 0
        (within 1e-3 at either end, where many clip times), and not in jumps, which sampled times
        would hardly ever hit."""
        spans = self.edges[0].item() >= 1 - _CUT_OFF and self.edges[-1].item() <= _CUT_OFF
        return spans and self.share_in_jumps < _MAX_SHARE_IN_JUMPS

    def ratio_bounds(self, parts: int) -> tuple[int, ...]:
        """For each of ``parts`` equal parts of time, the largest ratio from its start on."""
        ratio = self.ratio.numpy().view(np.uint32)[::-1]
        largest = np.maximum.accumulate(ratio)[::-1]
        return tuple(largest[:: NUM_TIMES // parts].tolist())

    def digest(self) -> str:
        """A fingerprint of the schedule, named or callable.

        Coarse (ratios to 16 bits, slopes to 6 fractional bits): the last bits of a cosine differ
        between CPUs, which must not prevent resuming on another machine.
        """
        ratio = self.ratio.numpy().view(np.uint32) / 2.0**16
        slope = self.exact_weight.numpy() * 2.0**6
        sha = hashlib.sha256()
        for values in (ratio, slope):
            sha.update(np.rint(values).astype("<i8").tobytes())
        return sha.hexdigest()

    @property
    def share_in_jumps(self) -> float:
        """Total drop of m in jumps: time bins between two bins without a drop."""
        falls = self.edges[:-1] - self.edges[1:]
        still = torch.nn.functional.pad(falls <= 0, (1, 1), value=True)
        return falls[still[:-2] & still[2:]].clamp(min=0).sum().item()


def resolve(schedule: str | Schedule) -> Schedule:
    """The schedule of that name, or the callable itself."""
    if callable(schedule):
        return schedule
    if not isinstance(schedule, str) or schedule not in SCHEDULES:
        raise ValueError(
            f"unknown schedule {schedule!r}: use one of {', '.join(SCHEDULES)}, or a callable from "
            "times in [0, 1] to mask ratios in [0, 1]"
        )
    return SCHEDULES[schedule]


def _evaluate(schedule: Schedule, t: Tensor) -> Tensor:
    """``schedule(t)`` in float64; element by element if it only accepts Python floats."""
    value: Any = None
    with suppress(TypeError, ValueError, RuntimeError):  # math.cos, max and the like need a scalar
        value = schedule(t)
    if isinstance(value, Tensor) and value.shape == t.shape:
        return value.detach().to("cpu", torch.float64)
    first: Any = schedule(t[0].item())  # type: ignore[arg-type]
    try:
        float(first)
    except (TypeError, ValueError):
        raise TypeError(
            f"schedule {schedule!r} gives {first!r} at t = {t[0].item()}: a mask ratio must be a "
            "number in [0, 1]"
        ) from None
    return torch.tensor([float(schedule(x)) for x in t.tolist()], dtype=torch.float64, device="cpu")


WHOLE_RANGE = 0.0, 1.0


def tabulate(
    schedule: str | Schedule, time_range: tuple[float, float] = WHOLE_RANGE
) -> ScheduleTable:
    """Tabulates a schedule over a range of times, with |m'| as the mean slope over each of its
    65536 time bins.

    The mean slope needs no derivative of the callable, is finite where the derivative is not (sqrt
    at 0, arccos at 1), and integrates exactly: to the fall of m over the range.

    Raises:
        ValueError: the schedule is not finite, leaves [0, 1], or increases.
    """
    tabulated = _tabulate_named if isinstance(schedule, str) else _tabulate
    return tabulated(schedule, time_range)


def _tabulate(schedule: str | Schedule, time_range: tuple[float, float]) -> ScheduleTable:
    name = schedule if isinstance(schedule, str) else getattr(schedule, "__name__", repr(schedule))
    fn = resolve(schedule)
    low, high = time_range
    span = high - low
    shares = torch.arange(NUM_TIMES + 1, dtype=torch.float64, device="cpu") / NUM_TIMES
    edges = low + span * shares
    m_edges = _evaluate(fn, edges)
    m = _evaluate(fn, low + span * (shares[:-1] + 0.5 / NUM_TIMES))
    for t, value in ((edges, m_edges), (edges[:-1], m)):
        # Tolerance for float32 schedules; values within it are clamped.
        bad = ~((value >= -1e-6) & (value <= 1 + 1e-6))
        if bad.any():
            i = int(bad.nonzero()[0])
            raise ValueError(
                f"schedule {name!r} gives {value[i].item()} at t = {t[i].item()}: a mask ratio "
                "must be a finite number in [0, 1]"
            )
    m_edges, m = m_edges.clamp(0, 1), m.clamp(0, 1)
    slope = (m_edges[:-1] - m_edges[1:]) * (NUM_TIMES / span)
    if (slope < -1e-6 * NUM_TIMES / span).any():
        i = int(slope.argmin())
        raise ValueError(
            f"schedule {name!r} increases at t = {edges[i].item()}: the mask ratio must fall from "
            "t = 0 (all masked) to t = 1; if yours runs the other way, pass "
            "lambda t: schedule(1 - t)"
        )
    slope = slope.clamp(min=0)
    fixed = (m * 2.0**32).floor().clamp(max=2.0**32 - 1).to(torch.int64)
    ratio = fixed.to(torch.float64) / 2.0**32
    return ScheduleTable(
        ratio=torch.where(fixed >= 1 << 31, fixed - (1 << 32), fixed).to(torch.int32),
        exact_weight=slope.to(torch.float32),
        bernoulli_weight=torch.where(fixed > 0, slope / ratio, 0.0).to(torch.float32),
        edges=m_edges,
    )


# Named schedules only: a callable may be stateful.
_tabulate_named = lru_cache(_tabulate)
