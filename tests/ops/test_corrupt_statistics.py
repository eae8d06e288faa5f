"""The masks have the promised distribution; a weakened draw fails the same tests."""

import itertools
import math

import pytest
import torch

from nar_kernels import MaskingConfig, corrupt
from nar_kernels.ops import reference
from nar_kernels.spec.schedules import SCHEDULES
from tests.helpers.goodness_of_fit import (
    FAMILY_ERROR,
    assert_mean,
    assert_uniform,
    chi_square_p,
    is_uniform,
)


def at_ratio(ratio, num_tokens=5, **options):
    """A configuration with the same mask ratio at every time."""
    return MaskingConfig(
        num_tokens, num_tokens - 1, schedule=lambda t: 0 * t + ratio, times="uniform", **options
    )


def masks(masking, batch, length, seed, backend="auto"):
    tokens = torch.zeros(batch, length, dtype=torch.uint8)
    return corrupt(tokens, masking, seed=seed, backend=backend).masked_indices


def subset_counts(masked, k):
    """How often each k-subset occurs."""
    length = masked.shape[1]
    codes = (masked.to(torch.int64) << torch.arange(length)).sum(1)
    counts = torch.bincount(codes, minlength=1 << length)
    subsets = [sum(1 << i for i in s) for s in itertools.combinations(range(length), k)]
    assert counts.sum() == counts[subsets].sum(), "a mask without exactly k positions"
    return counts[subsets]


SMALL = [(n, k) for n in range(1, 13) for k in range(1, n + 1)]


@pytest.mark.parametrize("n", range(1, 13))
def test_exactly_uniform_over_all_subsets(n):
    for k in range(1, n + 1):
        batch = max(1000, 30 * math.comb(n, k))
        counts = subset_counts(masks(at_ratio(k / n), batch, n, seed=n), k)
        assert_uniform(counts, num_tests=len(SMALL))


def test_a_weakened_draw_is_caught(monkeypatch):
    """Keys of 3 bits: ties go to the lowest position, so the subsets are not uniform."""
    strong = reference.words
    monkeypatch.setattr(reference, "words", lambda *args: strong(*args) & 7)
    batch = 30 * math.comb(8, 4)
    counts = subset_counts(masks(at_ratio(0.5), batch, 8, seed=8, backend="reference"), 4)
    assert not is_uniform(counts, num_tests=len(SMALL))


@pytest.mark.parametrize("n", [64, 129, 256])
def test_pairs_of_positions_are_included_equally(n):
    """Two positions are masked together with probability k (k - 1) / (n (n - 1))."""
    k, batch = n // 2, 20000
    masked = masks(at_ratio(k / n), batch, n, seed=n).float()
    assert (masked.sum(1) == k).all()
    together = (masked.T @ masked)[tuple(torch.triu_indices(n, n, offset=1))].double()
    p = k * (k - 1) / (n * (n - 1))
    z = (together - batch * p) / (batch * p * (1 - p)) ** 0.5
    # Sums of z**2 over pairs: variance close to that of independent ones; 5 sigma either way.
    assert abs(z.square().mean().item() - 1) < 5 * (2 / len(z)) ** 0.5 * 2
    assert z.abs().max() < 6
    alone = (masked.double().sum(0) - batch * k / n) / (batch * k / n * (1 - k / n)) ** 0.5
    assert alone.abs().max() < 5


def test_masks_of_neighbouring_slots_and_seeds_are_independent():
    n, batch = 64, 20000
    masked = masks(at_ratio(0.5), batch, n, seed=1).float()
    other = masks(at_ratio(0.5), batch, n, seed=2).float()
    for a, b in ((masked[1:], masked[:-1]), (masked, other)):
        overlap = (a * b).sum(1)
        assert_mean(overlap, n / 4, num_tests=2)


@pytest.mark.parametrize("ratio", [0.1, 0.5, 0.93])
def test_bernoulli_is_independent(ratio):
    n, batch = 10, 60000
    masked = masks(at_ratio(ratio, draw="bernoulli"), batch, n, seed=3)
    assert_mean(masked.float().flatten(), ratio, num_tests=3)
    counts = torch.bincount(masked.sum(1), minlength=n + 1).double()
    expected = torch.tensor(
        [math.comb(n, i) * ratio**i * (1 - ratio) ** (n - i) * batch for i in range(n + 1)],
        dtype=torch.float64,
    )
    cells = [expected >= 5, expected < 5]  # one cell for all the rare counts
    observed, wanted = (torch.stack([*x[cells[0]], x[cells[1]].sum()]) for x in (counts, expected))
    if wanted[-1] < 5:
        observed, wanted = observed[:-1], wanted[:-1]
    assert chi_square_p(observed, wanted) > FAMILY_ERROR / 3


@pytest.mark.parametrize("times", ["uniform", "stratified"])
def test_times_are_uniform(times):
    masking = MaskingConfig(3, 2, times=times)
    tokens = torch.zeros(1 << 16, 1, dtype=torch.uint8)
    for global_batch in (7, 64, 1000):  # slots start anywhere in a stratified batch
        ids = torch.arange(len(tokens)) * 3 + 5
        got = corrupt(tokens, masking, seed=4, sample_ids=ids, global_batch=global_batch)
        counts = torch.bincount((got.times * 256).long(), minlength=256)
        assert (got.times > 0).all() and (got.times < 1).all()
        if times == "uniform":
            assert_uniform(counts, num_tests=6)
        else:  # stratified ones are more even than independent draws, never less
            spread = (counts.double() - 256).square().sum() / 256
            assert spread < 400 and abs(got.times.mean() - 0.5) < 0.005


def test_stratified_time_of_one_slot_is_uniform():
    """Each sample alone, over the steps, sees every time."""
    masking = MaskingConfig(3, 2)
    for global_batch, slot in ((4, 1), (300, 299)):
        ids = torch.arange(30000) * global_batch + slot
        tokens = torch.zeros(len(ids), 1, dtype=torch.uint8)
        got = corrupt(tokens, masking, seed=6, sample_ids=ids, global_batch=global_batch)
        counts = torch.bincount((got.times * 64).long(), minlength=64)
        assert_uniform(counts, num_tests=2)


@pytest.mark.parametrize("mask_id", [0, 5, 9])
def test_random_tokens_are_uniform_without_mask_id(mask_id):
    masking = MaskingConfig(10, mask_id, random_token_prob=1.0)
    tokens = torch.full((2000, 64), 1, dtype=torch.uint8)
    got = corrupt(tokens, masking, seed=7)
    counts = torch.bincount(got.input_ids[got.masked_indices], minlength=10)
    assert counts[mask_id] == 0
    assert_uniform(counts[torch.arange(10) != mask_id], num_tests=3)


@pytest.mark.parametrize("draw", ["exact", "bernoulli"])
@pytest.mark.parametrize("length", [3, 200])
def test_shares_of_the_masked_positions(draw, length):
    """80 / 10 / 10 on average, also when a row has fewer than ten masked positions."""
    masking = MaskingConfig(1000, 999, draw=draw, no_replace_prob=0.1, random_token_prob=0.1)
    tokens = torch.full((20000, length), 7, dtype=torch.int16)
    got = corrupt(tokens, masking, seed=8)
    masked = got.masked_indices
    kept = (masked & (got.input_ids == 7)).sum(1).double()
    shown = (masked & (got.input_ids == 999)).sum(1).double()
    total = masked.sum(1).double()
    # The random token is the own one once in 999 times.
    assert_mean(kept - total * (0.1 + 0.1 / 999), 0, num_tests=8)
    assert_mean(shown - total * 0.8, 0, num_tests=8)


def test_corruption_prob_is_a_coin_per_sample():
    masking = MaskingConfig(
        1000, 999, no_replace_prob=0.5, random_token_prob=0.5, corruption_prob=0.25
    )
    tokens = torch.full((20000, 64), 7, dtype=torch.int16)
    got = corrupt(tokens, masking, seed=9)
    many = got.num_masked >= 16
    kept = (got.masked_indices & (got.input_ids == 7)).any(1)[many].float()
    other = got.masked_indices & (got.input_ids != 7) & (got.input_ids != 999)
    randomised = other.any(1)[many].float()
    assert_mean(kept, 0.25, num_tests=3)
    assert_mean(randomised, 0.25, num_tests=3)
    assert_mean(kept * randomised, 0.0625, num_tests=3)


@pytest.mark.parametrize("draw", ["exact", "bernoulli"])
@pytest.mark.parametrize("schedule", list(SCHEDULES))
def test_expected_weight_of_a_position_is_one(schedule, draw):
    """E[w / n summed over the masked] = 1 for every schedule: the bound does not depend on it."""
    masking = MaskingConfig(3, 2, schedule=schedule, draw=draw, times="uniform")
    got = corrupt(torch.zeros(100000, 16, dtype=torch.uint8), masking, seed=1)
    share = got.loss_weight * got.num_masked / 16
    if schedule == "linear" and draw == "exact":
        torch.testing.assert_close(share, torch.ones_like(share))
    else:
        assert_mean(share, 1.0, num_tests=14)
