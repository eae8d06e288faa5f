"""Times, noise and x_t of MDLM and BD3LM, against their formulas."""

import math

import pytest
import torch
from torch import Tensor

from nar_kernels import mask_tokens
from nar_kernels.integrations.mdlm import noise, q_xt, sample_block_t, sample_t
from tests.helpers.goodness_of_fit import assert_uniform, chi_square_p

MASK_ID = 30


def ids_of(batch: int, length: int) -> Tensor:
    return torch.randint(0, MASK_ID, (batch, length), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("antithetic", [True, False])
def test_times_are_uniform(antithetic):
    t = sample_t(4096, sampling_eps=0.1, antithetic_sampling=antithetic, seed=0)
    assert t.dtype == torch.float32 and t.shape == (4096,)
    assert 0.1 < t.min() and t.max() < 1
    assert_uniform(torch.histc((t - 0.1) / 0.9, 16, 0, 1), num_tests=1)
    has_one_each = ((t - 0.1) / 0.9 * 4096).long().sort().values.equal(torch.arange(4096))
    assert has_one_each == antithetic


def test_times_of_ranks_are_those_of_the_whole():
    whole = sample_t(12, seed=4)
    parts = [
        sample_t(4, seed=4, sample_ids=torch.arange(i, i + 4), global_batch=12) for i in (0, 4, 8)
    ]
    assert torch.equal(torch.cat(parts), whole)
    assert not torch.equal(sample_t(12, seed=4, sample_ids=torch.arange(12, 24)), whole)
    torch.manual_seed(0)
    drawn = sample_t(5)
    assert not torch.equal(drawn, sample_t(5))
    torch.manual_seed(0)
    assert torch.equal(drawn, sample_t(5))


def test_times_of_blocks():
    t = sample_block_t((3, 12), block_size=4, sampling_eps_min=0.3, sampling_eps_max=0.8, seed=1)
    assert t.shape == (3, 12) and 0.3 < t.min() and t.max() < 0.8
    of_blocks = t.view(3, 3, 4)
    assert (of_blocks == of_blocks[..., :1]).all()
    strata = ((of_blocks[..., 0].flatten() - 0.3) / 0.5 * 9).long().sort().values
    assert torch.equal(strata, torch.arange(9))
    row = sample_block_t(
        (1, 12), block_size=4, sampling_eps_min=0.3, sampling_eps_max=0.8, seed=1,
        sample_ids=torch.tensor([2]), global_batch=3,
    )  # fmt: skip
    assert torch.equal(row, t[2:])
    ones = sample_block_t((2, 4), block_size=1, sampling_eps_min=1.0, sampling_eps_max=1.0)
    assert torch.equal(ones, torch.ones(2, 4))


def test_x_t_is_masked_at_the_given_chances():
    x, slots = ids_of(5, 40), torch.tensor([7, 1, 9, 1 << 35, 2])
    p = sample_t(5, seed=3, sample_ids=slots)[:, None]
    x_t = q_xt(x, p, MASK_ID, seed=3, sample_ids=slots)
    assert torch.equal(x_t, mask_tokens(x, MASK_ID, p, seed=3, sample_ids=slots)[0])
    assert torch.equal(q_xt(x[2:3], p[2:3], MASK_ID, seed=3, sample_ids=slots[2:3]), x_t[2:3])
    unbounded = q_xt(x, p, MASK_ID, 4, 1e-3, 1.0, seed=3, sample_ids=slots)
    assert torch.equal(unbounded, x_t)


@pytest.mark.parametrize(
    ("low", "high", "valid"),
    [(0.3, 0.8, [2, 3]), (1e-3, 0.5, [0, 1, 2]), (0.5, 1.0, [2, 3, 4])],
)
def test_counts_of_blocks_are_binomial_within_the_bounds(low, high, valid):
    """As of draws that are made anew until they are within."""
    x, p, size = ids_of(2000, 16), torch.full((2000, 16), 0.55), 4
    x_t = q_xt(x, p, MASK_ID, size, low, high, seed=0)
    assert ((x_t == x) | (x_t == MASK_ID)).all()
    counts = (x_t == MASK_ID).view(-1, size).sum(1).bincount(minlength=size + 1)
    chances = torch.tensor([math.comb(size, k) * 0.55**k * 0.45 ** (size - k) for k in valid])
    assert counts.sum() == counts[valid].sum()
    expected = chances / chances.sum() * counts.sum()
    assert chi_square_p(counts[valid], expected) > 1e-3
    alone = q_xt(x[9:10], p[9:10], MASK_ID, size, low, high, seed=0, sample_ids=torch.tensor([9]))
    assert torch.equal(alone, x_t[9:10])


def test_bounds_that_leave_nothing():
    x, p = ids_of(2, 8), torch.full((2, 8), 0.5)
    assert (q_xt(x, torch.ones(2, 8), MASK_ID, 1, 1.0, 1.0) == MASK_ID).all()
    with pytest.raises(ValueError, match=r"no share of 4 tokens is in \[0.3, 0.45\]"):
        q_xt(x, p, MASK_ID, 4, 0.3, 0.45)
    with pytest.raises(ValueError, match="block_size is 3: it must divide the length, 8"):
        q_xt(x, p, MASK_ID, 3, 0.3, 0.8)
    with pytest.raises(ValueError, match=r"4 blocks are masked outside of \[0.5, 0.9\]"):
        q_xt(x, torch.zeros(2, 8), MASK_ID, 4, 0.5, 0.9)


@pytest.mark.parametrize("kind", ["loglinear", "square", "square_root", "log", "mdlm", "cosine"])
def test_the_scaling_is_the_slope_over_the_chance(kind):
    t = torch.linspace(0.1, 0.99, 50, dtype=torch.float64, requires_grad=True)
    scaling, chance = noise(t, kind)
    (slope,) = torch.autograd.grad(chance.sum(), t)
    divisor = chance + 1e-3 if kind == "cosine" else chance
    assert torch.allclose(scaling, -slope / divisor, rtol=1e-9)
    ends = noise(torch.tensor([1.0], dtype=torch.float64), kind)[1]
    assert torch.allclose(ends, torch.ones_like(ends), atol=2e-3)
    with pytest.raises(ValueError, match="noise_type is 'linear'"):
        noise(t, "linear")


def test_clear_errors():
    with pytest.raises(ValueError, match="times are from 1.2 to 1.0"):
        sample_t(3, sampling_eps=1.2)
    with pytest.raises(ValueError, match="block_size is 5: it must divide the length, 12"):
        sample_block_t((2, 12), block_size=5)
    for call in (
        lambda **k: sample_t(2, **k),
        lambda **k: sample_block_t((2, 4), block_size=2, **k),
    ):
        with pytest.raises(
            ValueError, match=r"sample_ids is torch.int64 \[3\]: it must be int64 \[2"
        ):
            call(sample_ids=torch.arange(3))
    with pytest.raises(ValueError, match=r"ratios is \[2, 3\]"):
        q_xt(ids_of(2, 4), torch.rand(2, 3), MASK_ID)
