"""`choose`: backends against each other, ties, and what there is little of."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from nar_kernels.ops.arguments import ChooseArgs
from nar_kernels.ops.choose import run_choose
from tests.helpers.devices import device_of, is_interpreted

BACKENDS = ["reference", pytest.param("cpp", marks=pytest.mark.cpp)]
WITH_TRITON = [*BACKENDS, pytest.param("triton", marks=pytest.mark.triton)]

# Scores of which many are equal as numbers but not as bits, and what is not finite.
AWKWARD = torch.tensor([-0.0, 0.0, 1.0, 1 + 2.0**-23, -1.0, math.nan, -math.nan, *2 * [math.inf]])
AWKWARD[-1] *= -1


def bounds_of(counts: Tensor) -> Tensor:
    return torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])


def arguments(
    is_candidate: Tensor, left: Tensor, score: Tensor | None = None, **changes
) -> ChooseArgs:
    """Of candidates bool ``[B, L]``, of which ``left`` are left."""
    args = ChooseArgs(
        score,
        by_position=False,
        lowest_first=False,
        noise_scale=0.0,
        rows=is_candidate.flatten().nonzero()[:, 0],
        bounds=bounds_of(is_candidate.sum(1)),
        left_bounds=bounds_of(left),
        num_left=int(left.sum()),
        length=is_candidate.shape[1],
        seed=-3,
        first_slot=5,
        slot_stride=7,
    )
    return args._replace(**changes)


def drawn(batch: int, length: int, share: float, seed: int, scores: str | None, **changes):
    """Arguments with a share of all positions as candidates, and any number of them left."""
    draw = torch.Generator().manual_seed(seed)
    is_candidate = torch.rand(batch, length, generator=draw) < share
    counts = is_candidate.sum(1)
    left = (torch.rand(batch, generator=draw) * (counts + 1)).long()
    left[:1] = counts[:1] // 2
    number = length if changes.get("by_position") else int(counts.sum())
    score = None
    if scores == "normal":
        score = torch.randn(number, generator=draw)
    elif scores == "awkward":
        score = AWKWARD[torch.randint(len(AWKWARD), (number,), generator=draw)]
    if changes.get("slots"):
        changes["slots"] = torch.randint(-(2**62), 2**62, (batch,), generator=draw)
    return arguments(is_candidate, left, score, seed=seed, **changes)


def choose(args: ChooseArgs, backend: str) -> tuple[list[int], list[int]]:
    device = device_of(backend)
    moved = [x.to(device) if isinstance(x, Tensor) else x for x in args]
    kept, left = run_choose(ChooseArgs(*moved), backend)
    return kept.tolist(), left.tolist()


KINDS = {
    "words": dict(scores=None),
    "words of large slots": dict(scores=None, first_slot=-1, slot_stride=2**40),
    "scores": dict(scores="normal"),
    "awkward scores, lowest first": dict(scores="awkward", lowest_first=True),
    "noise": dict(scores="normal", noise_scale=4.5),
    "little noise": dict(
        scores="awkward", noise_scale=1e-7, lowest_first=True, first_slot=2**63 - 1
    ),
    "given slots": dict(scores="normal", noise_scale=1.0, slots=True),
    "by position": dict(scores="normal", by_position=True, lowest_first=True),
    "by position, noise": dict(scores="awkward", by_position=True, noise_scale=2.0),
}


@pytest.mark.cpp
@pytest.mark.parametrize("kind", KINDS)
def test_cpp_agrees(kind, simd_level):
    shapes = [(1, 1), (2, 3), (5, 17), (3, 128), (2, 1000), (2, 4099)]
    for seed, ((batch, length), share) in enumerate(
        itertools.product(shapes, (1.0, 0.6, 0.1, 0.01))
    ):
        args = drawn(batch, length, share, seed, **KINDS[kind])
        assert choose(args, "cpp") == choose(args, "reference"), (batch, length, share)


@pytest.mark.triton
@pytest.mark.parametrize("kind", KINDS)
def test_triton_agrees(kind):
    shapes = [(3, 17), (2, 2100)] if is_interpreted("triton") else [(3, 17), (64, 1024), (9, 2100)]
    for seed, ((batch, length), share) in enumerate(itertools.product(shapes, (1.0, 0.3))):
        args = drawn(batch, length, share, seed, **KINDS[kind])
        assert choose(args, "triton") == choose(args, "reference"), (batch, length, share)


@pytest.mark.parametrize("backend", WITH_TRITON)
@pytest.mark.parametrize("kind", ["words", "noise"])
def test_long_sequences(backend, kind):
    if is_interpreted(backend) and kind != "words":
        pytest.skip("in Triton's interpreter one is enough")
    args = drawn(1, 65536, 0.9, 1, **KINDS[kind])
    kept, left = choose(args, backend)
    assert (kept, left) == choose(args, "reference")
    assert sorted(kept + left) == args.rows.tolist()


@pytest.mark.parametrize("backend", WITH_TRITON)
@pytest.mark.parametrize("number", [0, 1, 2])
def test_nothing_left_all_left_and_empty_sequences(backend, number):
    is_candidate = torch.zeros(4, 6, dtype=torch.bool)
    is_candidate[1, 2:], is_candidate[3, ::2] = True, True
    counts = is_candidate.sum(1)
    left = [counts * 0, counts, counts // 2][number]
    for score in (None, torch.zeros(7)):
        args = arguments(is_candidate, left, score)
        kept, remaining = choose(args, backend)
        assert len(kept) == (7, 0, 4)[number]
        assert sorted(kept + remaining) == args.rows.tolist()
    if number == 2:  # of equal scores the first are kept
        assert (kept, remaining) == ([8, 9, 18, 20], [10, 11, 22])


@pytest.mark.parametrize("backend", WITH_TRITON)
@pytest.mark.parametrize("batch", [0, 2])
def test_no_candidates(backend, batch):
    args = arguments(torch.zeros(batch, 5, dtype=torch.bool), torch.zeros(batch, dtype=torch.int64))
    assert choose(args, backend) == ([], [])


@pytest.mark.parametrize("backend", WITH_TRITON)
def test_keys_that_are_all_alike(backend):
    """No pivot separates them: position decides, also at both ends of the keys."""
    is_candidate = torch.ones(2, 300, dtype=torch.bool)
    for value in (math.nan, math.inf, 0.0, -math.inf):
        args = arguments(is_candidate, torch.tensor([299, 1]), torch.full((600,), value))
        kept, left = choose(args, backend)
        assert kept == [0, *range(300, 599)] and left == [*range(1, 300), 599]


@pytest.mark.parametrize("backend", WITH_TRITON)
def test_sequences_with_different_counts(backend):
    """Ties are filled from the left, and -inf is a score like any other."""
    is_candidate = torch.zeros(3, 10, dtype=torch.bool)
    is_candidate[0, :5] = is_candidate[1, 7:] = True  # none of the last
    score = torch.tensor([1.0, 2.0, 2.0, -math.inf, 2.0, 0.0, -math.inf, 0.0])
    args = arguments(is_candidate, torch.tensor([2, 1, 0]), score)
    assert choose(args, backend) == ([1, 2, 4, 17, 19], [0, 3, 18])
    args = arguments(is_candidate, torch.tensor([4, 3, 0]), score)
    assert choose(args, backend) == ([1], [0, 2, 3, 4, 17, 18, 19])


@pytest.mark.parametrize("backend", WITH_TRITON)
def test_without_scores_every_subset_is_as_likely(backend):
    batch = 100 if is_interpreted(backend) else 6000
    args = arguments(torch.ones(batch, 5, dtype=torch.bool), torch.full((batch,), 3))
    kept, _ = choose(args, backend)
    subsets = (1 << torch.tensor(kept).view(batch, 2) % 5).sum(1)
    counts = subsets.bincount(minlength=32)
    counts = counts[counts > 0]
    expected = batch / 10
    assert len(counts) == 10 and ((counts - expected) ** 2 / expected).sum() < 34  # p = 1e-4


@pytest.mark.cpp
def test_threads_do_not_matter():
    args = drawn(64, 512, 0.8, 3, "normal", noise_scale=1.0)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = choose(args, "cpp")
        torch.set_num_threads(3)
        assert choose(args, "cpp") == alone
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_operator(backend):
    args = drawn(3, 50, 0.5, 2, "normal", noise_scale=1.0)
    torch.library.opcheck(torch.ops.nar_kernels.choose.default, (*args, backend))
