"""Strategies that fill as many positions in a step as the net is sure of."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from nar_kernels.sampling.config import ADAPTIVE
from nar_kernels.sampling.strategies import Counts, UnmaskingPolicy
from tests.helpers.neighbours import MASK_ID
from tests.helpers.stepwise import LENGTHS, assert_by_rule

CPU = torch.device("cpu")


class FastDllm:
    """Its Algorithm 1: all above a threshold, or the most for which ``(n + 1) (1 - c_n)`` is no
    more than a factor, where c_n is the n-th highest probability; and one in any case. (Its code
    takes the last candidate, too, if that is the only one that fails.)"""

    edits = False

    def __init__(self, *, threshold: float = 0.0, factor: float = 0.0) -> None:
        self.threshold, self.factor = threshold, factor
        self.numbers: set[int] = set()

    def __call__(
        self, number: int, ids: Tensor, logits: Tensor, is_prompt: Tensor
    ) -> tuple[Tensor, bool]:
        masked = (ids == MASK_ID).nonzero()[:, 0]
        best, token = logits[masked].double().softmax(1).max(1)
        order = best.argsort(descending=True)
        if self.threshold:
            n = int((best >= self.threshold).sum())
        else:
            ranks = range(1, len(order) + 1)
            passes = [(n + 1) * (1 - best[order[n - 1]]) <= self.factor for n in ranks]
            n = max([n for n, passed in zip(ranks, passes, strict=True) if passed], default=1)
        n = max(n, 1)
        self.numbers.add(n)
        ids[masked[order[:n]]] = token[order[:n]]
        return ids, False


@pytest.mark.parametrize("guidance_scale", [1.0, 1.5])
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("block_length", [4, 8])
@pytest.mark.parametrize(
    "option", [{"factor": 0.5}, {"factor": 1.0}, {"factor": 2.0}, {"threshold": 0.6}]
)
@pytest.mark.usefixtures("one_thread")
def test_steps_are_those_of_fast_dllm(option, block_length, lengths, guidance_scale):
    rules = assert_by_rule(
        lambda: FastDllm(**option),
        block_length,
        strategy=next(iter(option)),
        block_length=block_length,
        lengths=lengths,
        guidance_scale=guidance_scale,
        **option,
    )
    assert len(set().union(*(rule.numbers for rule in rules))) > 1


def num_sure(strategy: str, value: float, log_prob: list[float]) -> int:
    """In Python, from the confidences of one sequence."""
    probability = [math.exp(x) for x in log_prob]
    ranked = sorted(probability, reverse=True)
    entropies = sorted(-x for x in log_prob)
    return {
        "threshold": lambda: sum(p >= value for p in probability),
        "quota": lambda: sum(p > value for p in probability),
        "factor": lambda: sum(
            p >= 1 - value / (n + 1) and p > 0 for n, p in enumerate(ranked, start=1)
        ),
        "entropy_bound": lambda: sum(
            h < math.inf and sum(entropies[:i]) <= value for i, h in enumerate(entropies)
        ),
    }[strategy]()


# Sums of these are exact, so that nothing is a matter of rounding.
CONFIDENCES = st.sampled_from([0.0, -0.125, -0.25, -0.5, -1.0, -3.0, -math.inf])


@given(
    st.lists(st.tuples(st.lists(CONFIDENCES, max_size=6), st.integers(0, 6), st.integers(0, 6))),
    st.sampled_from(ADAPTIVE),
    st.sampled_from([0.0, 0.3, 0.75, 1.0]),
)
def test_how_many_are_left(sequences, strategy, value):
    """At most what the plan says: of all that were candidates, but for a quota."""
    counts = np.array([len(own) for own, *_ in sequences], np.int64)
    planned = np.array([min(left, len(own)) for own, left, _ in sequences], np.int64)
    before = planned + np.array([quota for *_, quota in sequences], np.int64)
    now, left = Counts.of(np.stack([counts, planned]), CPU)
    policy = UnmaskingPolicy(strategy, threshold=min(value, 1.0), factor=value, entropy_bound=value)
    confidence = torch.tensor([x for own, *_ in sequences for x in own], dtype=torch.float32)
    found = policy.num_left(left, before, now, confidence)
    expected = []
    for i, (own, _, quota) in enumerate(sequences):
        least = quota if strategy == "quota" else len(own) - int(planned[i])
        filled = max(num_sure(strategy, value, own), least, 1)
        expected.append(max(len(own) - filled, 0))
    assert found.of_sequence.tolist() == expected and found.total == sum(expected)
    assert found.bounds.tolist() == [0, *np.cumsum(expected, dtype=np.int64)]
