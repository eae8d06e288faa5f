"""Several datasets by weight: :class:`Mixture`.

Shapes: B batch, K sources, Q period.
"""

import heapq
import math
from collections.abc import Sequence
from fractions import Fraction
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nar_kernels.checks import as_float
from nar_kernels.data.corpus import Corpus
from nar_kernels.data.windows.dataset import TokenDataset

_LONGEST_PERIOD = 1 << 16  # sample slots


class Mixture:
    """Several datasets, each of which gets a share of the sample slots of a
    :class:`~nar_kernels.data.loader.MaskedLoader`: a function of the slot, exact in every prefix.

    Among the first n slots, a source of share w has floor(n w) or ceil(n w). Each source has an
    order of its own, with an epoch of its own: small ones begin again while large ones go on.

    Args:
        datasets: K of them, of one ``seq_len``, vocabulary and dtype.
        weights: K positive numbers; only their ratios count. Read as decimal fractions: 0.1 is one
            tenth. Shares are exact if they have a common denominator of at most 65536, as (0.7,
            0.3) and (2, 1) do; otherwise they are rounded to multiples of 1/65536, by largest
            remainders.

    Attributes:
        datasets: as given.
        shares: of each dataset, exact; they add up to 1.

    Raises:
        TypeError: not datasets, or a weight is no number.
        ValueError: the datasets do not fit together, or a weight is out of range.
    """

    def __init__(self, datasets: Sequence[TokenDataset], weights: Sequence[float]) -> None:
        self.datasets = tuple(datasets)
        for dataset in self.datasets:
            if not isinstance(dataset, TokenDataset):
                raise TypeError(
                    f"a dataset of the mixture is a {type(dataset).__name__}: each must be a "
                    "TokenDataset (of a mixture within, name its datasets and their weights)"
                )
        if not self.datasets or len(weights) != len(self.datasets):
            raise ValueError(
                f"there are {len(self.datasets)} datasets and {len(weights)} weights: give as many "
                "weights as datasets, at least one"
            )
        first = self.datasets[0]
        for name in ("seq_len", "num_tokens", "mask_id"):
            for other in self.datasets[1:]:
                one, two = getattr(first, name), getattr(other, name)
                if one != two:
                    raise ValueError(
                        f"{name} is {one} for {first.corpus.name} and {two} for "
                        f"{other.corpus.name}: the datasets of a mixture must agree"
                    )
        self.seq_len, self.num_tokens = first.seq_len, first.num_tokens
        self.mask_id = first.mask_id
        self.shares = shares_of(weights)
        self.corpus = Corpus.joined([dataset.corpus for dataset in self.datasets])
        lengths = [len(dataset.corpus) for dataset in self.datasets]
        self.offsets = tuple(np.cumsum([0, *lengths[:-1]]).tolist())

    def __len__(self) -> int:
        """Windows of all datasets."""
        return sum(len(dataset) for dataset in self.datasets)

    def windows(self, indices: Tensor | Sequence[int]) -> Tensor:
        """int64 ``[B, L]``: windows of the sample slots with these numbers, in order."""
        slots = torch.as_tensor(indices, dtype=torch.int64, device="cpu")
        sources, numbers = self.assign(slots)
        out = torch.empty(len(slots), self.seq_len, dtype=torch.int64, device="cpu")
        for source in sources.unique().tolist():
            here, dataset = sources == source, self.datasets[source]
            out[here] = dataset.windows(numbers[here] % len(dataset))
        return out

    def loss_mask(self, indices: Tensor | Sequence[int]) -> Tensor | None:
        """uint8 ``[B, L]`` of these windows, as of ``TokenDataset``; None if no source has one."""
        if self.corpus.loss_mask is None:
            return None
        slots = torch.as_tensor(indices, dtype=torch.int64, device="cpu")
        sources, numbers = self.assign(slots)
        out = torch.ones(len(slots), self.seq_len, dtype=torch.uint8, device="cpu")
        for source in sources.unique().tolist():
            here, dataset = sources == source, self.datasets[source]
            flags = dataset.loss_mask(numbers[here] % len(dataset))
            if flags is not None:
                out[here] = flags
        return out

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_period"}

    @cached_property
    def _period(self) -> tuple[Tensor, Tensor, Tensor]:
        """int64: the source of each of the first Q slots ``[Q]``; how many slots before it the same
        source has ``[Q]``; how many slots of Q each source has ``[K]``."""
        period = math.lcm(*(share.denominator for share in self.shares))
        counts = np.array([int(share * period) for share in self.shares])
        sources = np.array(even_schedule(counts.tolist()))
        before = np.zeros(period, np.int64)
        for source, count in enumerate(counts):
            before[sources == source] = np.arange(count)
        return torch.from_numpy(sources), torch.from_numpy(before), torch.from_numpy(counts)

    def assign(self, slots: Tensor) -> tuple[Tensor, Tensor]:
        """int64 ``[B]``, ``[B]``: the source of each sample slot, and how many earlier slots that
        source has."""
        sources, before, counts = self._period
        place, rounds = slots % len(sources), slots // len(sources)
        source = sources[place]
        return source, rounds * counts[source] + before[place]


def shares_of(weights: Sequence[float]) -> tuple[Fraction, ...]:
    """Weights as fractions of their sum, with a common denominator of at most 65536."""
    for weight in weights:
        if not 0 < as_float("a weight", weight) < math.inf:
            raise ValueError(f"a weight is {weight}: it must be positive and finite")
    parts = [Fraction(str(_number(weight))) for weight in weights]
    exact = [part / sum(parts) for part in parts]
    if math.lcm(*(share.denominator for share in exact)) <= _LONGEST_PERIOD:
        return tuple(exact)
    counts = apportion(_LONGEST_PERIOD, exact)
    if min(counts) < 1:
        raise ValueError(
            f"a weight is {min(weights)} of {sum(weights)}: it must be at least "
            f"1/{_LONGEST_PERIOD} of all; leave the dataset out, or give it more"
        )
    return tuple(Fraction(count, _LONGEST_PERIOD) for count in counts)


def _number(weight: float | Tensor) -> float:
    """One whose text is its decimal digits."""
    return float(weight) if isinstance(weight, bool | Tensor) else weight


def apportion(total: int, shares: Sequence[Fraction]) -> list[int]:
    """Whole numbers in the ratios of ``shares``, which add up to 1, that add up to ``total``: by
    largest remainders."""
    exact = [share * total for share in shares]
    counts = [math.floor(count) for count in exact]
    by_remainder = sorted(range(len(counts)), key=lambda i: (counts[i] - exact[i], i))
    for i in by_remainder[: total - sum(counts)]:
        counts[i] += 1
    return counts


def even_schedule(counts: Sequence[int]) -> list[int]:
    """Sources ``[Q]``, Q the sum of ``counts``, each as often as its count says, such that among
    the first n a source of count c occurs floor(n c / Q) or ceil(n c / Q) times.

    Its j-th occurrence must lie at places (j - 1) Q / c to j Q / c; whichever must come first comes
    first. (Baruah, Cohen, Plaxton, Varvel: "Proportionate progress", 1996; with one resource this
    order meets every deadline.)
    """
    period = sum(counts)
    occurrences = sorted(
        ((j * period // count, -(-(j + 1) * period // count), source)
        for source, count in enumerate(counts) for j in range(count)),
    )  # fmt: skip
    ready: list[tuple[int, int]] = []
    schedule, coming = [], 0
    for place in range(period):
        while coming < period and occurrences[coming][0] <= place:
            _, deadline, source = occurrences[coming]
            heapq.heappush(ready, (deadline, source))
            coming += 1
        schedule.append(heapq.heappop(ready)[1])
    return schedule
