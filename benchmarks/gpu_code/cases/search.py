"""The search for the k-th largest logit, `csrc/unmask/gpu/top_k.h`, simulated: how often a row
comes to each of its steps."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from benchmarks.gpu_code.cases.case import constant
from benchmarks.gpu_code.cases.logits import INFINITY, NUM_ROWS, SIGN, keys_of, random_logits

_TOP_K_H = "unmask/gpu/top_k.h"
SAMPLES = constant(_TOP_K_H, "kSamples")
WORTH_SAMPLING = constant(_TOP_K_H, "kWorthSampling")
FEW_KEYS = constant(_TOP_K_H, "kFewKeys")
MOST_LISTED = constant(_TOP_K_H, "kMost")


class Search(NamedTuple):
    """
    Attributes:
        counts: passes that count how many logits reach two pivots.
        lists: passes that list the logits of the bracket.
        listed: logits, by a pass that lists.
        ends_by_list: whether the last one is found in a list.
        ends_by_tie: whether it is found by counting on ties.
        from_row, around, thirds, from_list: proposals of pivots.
    """

    counts: float = 0
    lists: float = 0
    listed: float = 0
    ends_by_list: float = 0
    ends_by_tie: float = 0
    from_row: float = 0
    around: float = 0
    thirds: float = 0
    from_list: float = 0


class _Bracket:
    """`Bracket`."""

    def __init__(self, logits: Tensor, k: int) -> None:
        self.keys, self.dtype, self.k = keys_of(logits), logits.dtype, k
        self.ordered = np.sort(self.keys)
        self.lowest = SIGN[logits.dtype] - INFINITY[logits.dtype]
        self.low, self.high = self.lowest, int(self.ordered[-1]) + 1
        self.reach_low, self.reach_high = len(logits), 0

    def is_done(self) -> bool:
        return self.reach_low == self.k or self.high - self.low == 1

    def size(self) -> int:
        return self.reach_low - self.reach_high

    def wanted(self) -> int:
        return self.k - self.reach_high

    def learn(self, pivot: int) -> None:
        reach = len(self.keys) - int(np.searchsorted(self.ordered, pivot))
        if reach >= self.k:
            if pivot > self.low:
                self.low, self.reach_low = pivot, reach
        elif pivot < self.high:
            self.high, self.reach_high = pivot, reach

    def proposed(self, first: int, second: int) -> list[int]:
        first = min(max(first, self.low + 1), self.high - 1)
        return [first, min(max(second, first + 1), self.high - 1)]

    def thirds(self) -> list[int]:
        third = (self.high - self.low + 1) // 3
        return self.proposed(self.low + third, self.high - third)

    def around(self) -> list[int]:
        count, above = self.size(), self.wanted() - 0.5
        spread = 1.5 * np.sqrt(above * (1 - above / count)) + count / 256 + 0.5
        rank = self.reach_high + above
        return self.proposed(self._key_of_rank(rank + spread), self._key_of_rank(rank - spread))

    def _key_of_rank(self, rank: float) -> int:
        def log_odds(reach: float) -> float:
            return np.log((reach + 0.5) / (len(self.keys) - reach + 0.5))

        least, most = self.reach_high, self.reach_low
        of_low = log_odds(most)
        share = (log_odds(min(max(rank, least), most)) - of_low) / (log_odds(least) - of_low)
        first = self._value(self.low)
        with np.errstate(invalid="ignore"):  # of -inf: any pivot will do
            value = first + (self._value(self.high) - first) * share
        return int(keys_of(torch.tensor([value], dtype=self.dtype))[0])

    def _value(self, key: int) -> float:
        sign = SIGN[self.dtype]
        bits = sign | (sign - key) if key < sign else key - sign
        width = np.uint32 if self.dtype == torch.float32 else np.uint16
        return torch.from_numpy(np.array([bits], width)).view(self.dtype).item()

    def from_sample(self, sample: np.ndarray, share: float) -> list[int]:
        """`propose_from_sample`."""
        sample, count = np.sort(sample)[::-1], len(sample)
        rank = share * count
        spread = 2.5 * np.sqrt(rank * (1 - share)) + 1
        pivots = []
        for wanted in (np.ceil(rank + spread), np.floor(rank - spread)):
            if wanted < 1:
                pivots.append(self.high - 1)
            elif wanted > count:
                pivots.append(self.low + 1)
            else:
                pivots.append(int(sample[int(wanted) - 1]))
        return self.proposed(*pivots)

    def from_row(self) -> list[int]:
        shift = 16 if self.dtype == torch.float32 else 0
        sample = self.keys[np.arange(SAMPLES) * (len(self.keys) // SAMPLES)] >> shift << shift
        return self.from_sample(sample, self.k / len(self.keys))

    def listed(self) -> np.ndarray:
        """Keys of the bracket, those of -inf not."""
        is_inside = (self.keys >= max(self.low, self.lowest + 1)) & (self.keys < self.high)
        return self.keys[is_inside]


def search(logits: Tensor, k: int) -> Search:
    """`TopKSearch::find`."""
    bracket, knows_ties = _Bracket(logits, k), False
    steps = dict.fromkeys(Search._fields, 0)
    turn = 0
    while True:
        pivots = [bracket.low, bracket.low + 1]
        if bracket.is_done():
            if bracket.wanted() == bracket.size() or bracket.low == bracket.lowest:
                break
            if knows_ties:
                steps["ends_by_tie"] = 1
                break
        elif turn == 0 and len(logits) >= WORTH_SAMPLING:
            steps["from_row"] += 1
            pivots = bracket.from_row()
        elif turn % 6 == 5 or bracket.high - bracket.low <= FEW_KEYS:
            steps["thirds"] += 1
            pivots = bracket.thirds()
        elif bracket.size() <= MOST_LISTED or turn % 6 == 3 or turn == 0:
            listed = bracket.listed()
            steps["lists"] += 1
            steps["listed"] += min(len(listed), MOST_LISTED)
            if len(listed) <= MOST_LISTED:
                steps["ends_by_list"] = 1
                break
            steps["from_list"] += 1
            share = bracket.wanted() / bracket.size()
            pivots = bracket.from_sample(listed[:MOST_LISTED], share)
        else:
            steps["around"] += 1
            pivots = bracket.around()
        steps["counts"] += 1
        for pivot in pivots:
            bracket.learn(pivot)
        knows_ties = pivots == [bracket.low, bracket.high]
        turn += 1
    return Search(**steps)


def mean_search(vocabulary: int, dtype: torch.dtype, k: int) -> Search:
    rng = np.random.default_rng(0)
    found = [search(random_logits(rng, vocabulary, dtype), k) for _ in range(10 * NUM_ROWS)]
    mean = Search(*np.mean(found, axis=0).tolist())
    return mean._replace(listed=mean.listed / mean.lists if mean.lists else 0)
