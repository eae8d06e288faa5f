"""Which positions a policy keeps: against a sort in Python."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from nar_kernels.sampling.strategies import Candidates, Counts, StepNoise, UnmaskingPolicy
from nar_kernels.spec.float_math import gumbel
from nar_kernels.spec.philox import Stream, words

CPU = torch.device("cpu")
LENGTH, NUM_STEPS, STEP = 9, 5, 2
SCORES = st.sampled_from([-math.inf, -1.5, -0.0, 0.0, 0.25, 3.0, math.inf])  # with ties


@st.composite
def candidates_and_left(draw) -> tuple[Candidates, Counts]:
    """Of up to four sequences, some of which have none."""
    counts = draw(st.lists(st.integers(0, LENGTH), max_size=4))
    own = [sorted(draw(st.permutations(range(LENGTH)))[:n]) for n in counts]
    rows = [LENGTH * b + i for b, places in enumerate(own) for i in places]
    left = [draw(st.integers(0, n)) for n in counts]
    of_all, of_left = Counts.of(np.array([counts, left], dtype=np.int64), CPU)
    return Candidates(torch.tensor(rows, dtype=torch.int64), of_all), of_left


def by_sorting(candidates: Candidates, left: Counts, score: list[float]) -> list[list[int]]:
    """Highest first, of equal ones the first position: what is kept, and what is left."""
    kept, remaining = [], []
    bounds = candidates.counts.bounds.tolist()
    rows = candidates.rows.tolist()
    for b, n in enumerate(left.of_sequence):
        mine = sorted(range(bounds[b], bounds[b + 1]), key=lambda i: (-score[i], i))
        kept += sorted(rows[i] for i in mine[: len(mine) - n])
        remaining += sorted(rows[i] for i in mine[len(mine) - n :])
    return [kept, remaining]


def noise_words(rows: Tensor, sequences: range, seed: int = 7) -> Tensor:
    numbers = rows // LENGTH * sequences.step + sequences.start
    return words(seed, Stream.CRITIC_NOISE, numbers * NUM_STEPS + STEP, rows % LENGTH)


@pytest.mark.parametrize("backend", ["reference", pytest.param("cpp", marks=pytest.mark.cpp)])
@given(
    st.data(),
    candidates_and_left(),
    st.sampled_from([SCORES, st.floats(width=32)]),
    st.sampled_from(["confidence", "critic", "random", "halton"]),
    st.sampled_from([0.0, 2.0]),
    st.sampled_from([range(4), range(3, 11, 2)]),
)
def test_against_a_sort(backend, data, both, scores, strategy, temperature, sequences):
    candidates, left = both
    rows = candidates.rows
    order = torch.tensor(data.draw(st.permutations(range(LENGTH))))
    policy = UnmaskingPolicy(strategy, temperature, order=order)
    noise = StepNoise(7, NUM_STEPS, STEP, LENGTH, sequences)
    drawn = noise_words(rows, sequences)
    if policy.order_is_fixed:
        score = None
        expected = drawn.double() if strategy == "random" else -order[rows % LENGTH].double()
    else:
        number = st.lists(scores.filter(lambda x: not math.isnan(x)), min_size=len(rows))
        score = torch.tensor(data.draw(number)[: len(rows)], dtype=torch.float32)
        expected = -score if strategy == "critic" else score
        if temperature:
            expected = expected + temperature * 0.5 * gumbel(drawn)
    got = policy.choose(candidates, left, score, 0.5, noise, backend)
    assert [x.tolist() for x in got] == by_sorting(candidates, left, expected.tolist())


def test_counts_know_where_each_sequence_begins():
    first, second = Counts.of(np.array([[3, 0, 2], [1, 0, 0]]), CPU)
    assert first.bounds.tolist() == [0, 3, 3, 5] and first.total == 5
    assert second.bounds.tolist() == [0, 1, 1, 1] and second.total == 1
    assert second.of_sequence.tolist() == [1, 0, 0]
    (empty,) = Counts.of(np.zeros((1, 0), np.int64), CPU)
    assert empty.bounds.tolist() == [0] and empty.total == 0
