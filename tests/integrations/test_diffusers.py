"""The noise of diffusers' BlockRefinementScheduler and aMUSEd's masks, by the law of theirs."""

import inspect
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from nar_kernels import InvalidTokenError
from nar_kernels.integrations.diffusers import add_noise, amused_mask
from tests.helpers.goodness_of_fit import assert_same_law, assert_uniform, same_law_p

pytestmark = pytest.mark.usefixtures("one_thread")

MASK_ID, BATCH, LENGTH = 40, 20000, 13


@pytest.fixture(scope="module")
def scheduler() -> Any:  # whose import takes seconds
    return pytest.importorskip("diffusers", minversion="0.42").BlockRefinementScheduler()


def ids_of(batch: int, length: int = LENGTH) -> Tensor:
    noise = torch.Generator().manual_seed(batch)
    return torch.randint(0, MASK_ID, (batch, length), generator=noise)


def options_of(prompt_length: int = 3, block_length: int = 4) -> dict[str, int]:
    return {
        "prompt_length": prompt_length,
        "block_length": block_length,
        "mask_token_id": MASK_ID,
    }


def test_arguments_and_outputs_are_those_of_diffusers(scheduler):
    expected = inspect.signature(scheduler.add_noise).parameters
    found = inspect.signature(add_noise).parameters
    of_both = [found[name] for name in found if name not in ("seed", "sample_ids")]
    assert [(p.name, p.kind, p.default) for p in of_both] == [
        (p.name, p.kind, p.default) for p in expected.values()
    ]
    for dtype in (torch.int64, torch.int32):
        for prompt_length in (0, 3, 13, 20):
            ids = ids_of(2).to(dtype)
            options = options_of(prompt_length)
            for mine, their in zip(
                add_noise(ids, torch.ones_like(ids), **options),
                scheduler.add_noise(ids, torch.ones_like(ids), **options),
                strict=True,
            ):
                assert (mine.dtype, mine.shape) == (their.dtype, their.shape)


@pytest.mark.parametrize("prompt_length", [0, 3, 12, 13])
def test_each_token_is_masked_in_one_of_the_views(prompt_length):
    ids, attention = ids_of(50), (torch.arange(LENGTH) < 11).long().expand(50, LENGTH)
    noisy, noisy_rev, masked, masked_rev = add_noise(
        ids, attention, **options_of(prompt_length), seed=1
    )
    valid = attention.bool() & (torch.arange(LENGTH) >= prompt_length)
    assert not (masked & masked_rev).any() and torch.equal(masked | masked_rev, valid)
    assert torch.equal(noisy, torch.where(masked, MASK_ID, ids))
    assert torch.equal(noisy_rev, torch.where(masked_rev, MASK_ID, ids))


def formula(
    ids: Tensor, attention: Tensor, *, prompt_length: int, block_length: int, mask_token_id: int
) -> tuple[None, None, Tensor, Tensor]:
    block = (torch.arange(ids.shape[1]) - prompt_length).div(block_length, rounding_mode="floor")
    p = torch.rand(len(ids), ids.shape[1])[:, block]
    valid = attention.bool() & (block >= 0)
    masked = torch.rand(ids.shape) < p
    return None, None, masked & valid, ~masked & valid


def cells(function: Callable, **more: Any) -> dict[str, Tensor]:
    """How often a sample has so many masked in two of its blocks, and two neighbours are masked,
    at one place of each sample."""
    attention = (torch.arange(LENGTH) != 5).long().expand(BATCH, LENGTH)
    masked = function(torch.zeros_like(attention), attention, **options_of(), **more)[2]
    sample = torch.arange(BATCH)
    at = sample % (LENGTH - 1)
    both = masked[sample, at] + 2 * masked[sample, at + 1]
    counts = masked[:, 3:7].sum(1) * 5 + masked[:, 7:11].sum(1)
    return {
        "counts": torch.bincount(counts, minlength=25),
        "last": torch.bincount(masked[:, 11:].sum(1), minlength=3),
        "neighbours": torch.bincount(at * 4 + both, minlength=4 * LENGTH),
    }


@pytest.mark.parametrize("against", ["formula", "diffusers"])
def test_the_law(against, request):
    theirs = formula
    if against == "diffusers":
        theirs = request.getfixturevalue("scheduler").add_noise
    torch.manual_seed(0)
    expected = cells(theirs)
    for what, counts in cells(add_noise, seed=1).items():
        assert_same_law(counts, expected[what], num_tests=6)
    one_p = cells(lambda *a, **k: formula(*a, **{**k, "block_length": LENGTH}))
    assert same_law_p(one_p["counts"], expected["counts"]) < 1e-9


def test_masks_follow_from_seed_and_sample_alone():
    ids, slots = ids_of(6), torch.tensor([70, 3, 9, 1 << 40, 5, 4])
    attention = torch.ones_like(ids)
    whole = add_noise(ids, attention, **options_of(), seed=2, sample_ids=slots)
    images = amused_mask(ids, MASK_ID, seed=2, sample_ids=slots)
    rows = [4, 0, 2]
    given = {"seed": 2, "sample_ids": slots[rows]}
    parts = add_noise(ids[rows], attention[rows], **options_of(), **given)
    parts += amused_mask(ids[rows], MASK_ID, **given)
    for part, of_all in zip(parts, whole + images, strict=True):
        assert torch.equal(part, of_all[rows])
    draws = [
        add_noise(ids, attention, **options_of(), generator=torch.Generator().manual_seed(s))[2]
        for s in (1, 1, 2)
    ]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


@pytest.mark.parametrize("low", [0.0, 0.4])
def test_amused_masks(low):
    """The count is that of the example's rule, and every subset of it as likely."""
    length = 6
    torch.manual_seed(0)
    share = torch.cos(torch.rand(BATCH) * math.pi / 2).clip(low)
    expected = (length * share).round().clamp(min=1).long().bincount(minlength=length + 1)
    ids = ids_of(BATCH, length)
    input_ids, labels = amused_mask(ids, MASK_ID, low, seed=3)
    masked = input_ids == MASK_ID
    assert input_ids.dtype == labels.dtype == torch.int64
    assert torch.equal(labels, torch.where(masked, ids, -100))
    assert torch.equal(input_ids, torch.where(masked, MASK_ID, ids))
    counts = masked.sum(1)
    assert_same_law(counts.bincount(minlength=length + 1), expected, num_tests=4)
    of_four = masked[counts == 4] * 2 ** torch.arange(length)
    subsets = of_four.sum(1).bincount()
    assert (subsets > 0).sum() == 15
    assert_uniform(subsets[subsets > 0], num_tests=4)


def test_clear_errors():
    ids = ids_of(2)
    with pytest.raises(InvalidTokenError, match="id 40"):
        add_noise(torch.full((1, 5), MASK_ID), torch.ones(1, 5), **options_of())
    with pytest.raises(ValueError, match="prompt_length is -1"):
        add_noise(ids, torch.ones_like(ids), **options_of(-1))
    with pytest.raises(ValueError, match="block_length is 0"):
        add_noise(ids, torch.ones_like(ids), **options_of(3, 0))
    with pytest.raises(ValueError, match=r"min_masking_rate is 1\.5"):
        amused_mask(ids, MASK_ID, 1.5)
    with pytest.raises(ValueError, match=r"is -100, which torch\.uint8 cannot hold"):
        amused_mask(ids.to(torch.uint8), MASK_ID)
