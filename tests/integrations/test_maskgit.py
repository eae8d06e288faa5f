"""Halton-MaskGIT's and muse-maskgit-pytorch's masks, and dropped classes, by their formulas."""

import math

import pytest
import torch
from torch import Tensor

from nar_kernels import InvalidTokenError
from nar_kernels.integrations.maskgit import drop_labels, get_mask_code, muse_mask
from nar_kernels.spec.philox import Stream, words
from tests.helpers.goodness_of_fit import assert_same_law, assert_uniform, same_law_p

pytestmark = pytest.mark.usefixtures("one_thread")

VALUE, BATCH, HEIGHT, WIDTH = 30, 20000, 3, 4

RATIOS = {
    "arccos": lambda r: torch.arccos(r) / (math.pi / 2),
    "root": lambda r: 1 - r**0.5,
    "linear": lambda r: 1 - r,
    "square": lambda r: 1 - r**2,
    "cosine": lambda r: torch.cos(r * math.pi / 2),
}


def codes(batch: int) -> Tensor:
    noise = torch.Generator().manual_seed(batch)
    return torch.randint(0, VALUE, (batch, HEIGHT, WIDTH), generator=noise)


def cells(masked: Tensor) -> list[Tensor]:
    """How often an image has so many masked, and two neighbours are, at one place of each."""
    masked = masked.flatten(1)
    length, image = masked.shape[1], torch.arange(len(masked))
    at = image % (length - 1)
    both = masked[image, at] + 2 * masked[image, at + 1]
    return [
        torch.bincount(masked.sum(1), minlength=length + 1),
        torch.bincount(at * 4 + both, minlength=4 * length),
    ]


@pytest.mark.parametrize("given", [False, True], ids=["drawn", "given"])
@pytest.mark.parametrize("mode", RATIOS)
def test_the_law_of_get_mask_code(mode, given):
    torch.manual_seed(0)
    r = torch.rand(BATCH)
    expected = cells(torch.rand(BATCH, HEIGHT, WIDTH) < RATIOS[mode](r)[:, None, None])
    if given:
        r = torch.rand(BATCH)
    code = codes(BATCH)
    masked_code, mask, loss_mask = get_mask_code(
        code, r if given else None, mode, VALUE, seed=1, codebook_size=VALUE
    )
    assert torch.equal(masked_code, torch.where(mask, VALUE, code))
    assert mask.dtype == loss_mask.dtype == torch.bool and loss_mask.all()
    assert mask.shape == loss_mask.shape == code.shape
    for mine, their in zip(cells(mask), expected, strict=True):
        assert_same_law(mine, their, num_tests=20)
    other = RATIOS["linear" if mode != "linear" else "cosine"](torch.rand(BATCH))
    flat = cells(torch.rand(BATCH, HEIGHT, WIDTH) < other[:, None, None])
    assert same_law_p(flat[0], expected[0]) < 1e-9


def test_ratios_that_are_given():
    code, r = codes(4), torch.tensor([0.0, 1.0, 0.5, 0.5])
    mask = get_mask_code(code, r, "linear", VALUE, seed=2)[1]
    assert mask[0].all() and not mask[1].any() and not torch.equal(mask[2], mask[3])


def test_defaults_and_dtypes_are_those_of_the_original():
    torch.manual_seed(0)
    code = codes(200)
    assert torch.equal(
        get_mask_code(code, value=VALUE, seed=1)[1],
        get_mask_code(code, None, "arccos", VALUE, seed=1)[1],
    )
    masked_code, mask, _ = get_mask_code(code.int(), value=VALUE)
    assert masked_code.dtype == torch.int32 and mask.any()
    for r in (None, torch.full((200,), 0.5)):
        masked_code, mask, _ = get_mask_code(code, r, value=-1)
        assert torch.equal(masked_code, code) and masked_code is not code and mask.any()


def test_masks_follow_from_seed_and_sample_alone():
    code, slots, rows = codes(6), torch.tensor([70, 3, 9, 1 << 40, 5, 4]), [4, 0, 2]
    r, y = torch.rand(6), torch.arange(6)

    def call(rows: list[int]) -> list[Tensor]:
        given = {"seed": 2, "sample_ids": slots[rows]}
        flat = code[rows].flatten(1)
        return [
            *get_mask_code(code[rows], value=VALUE, **given),
            *get_mask_code(code[rows], r[rows], value=VALUE, **given),
            *muse_mask(flat, VALUE, no_mask_token_prob=0.3, **given),
            drop_labels(y[rows], 0.5, 100, **given),
        ]

    for part, of_all in zip(call(rows), call([*range(6)]), strict=True):
        assert torch.equal(part, of_all[rows])


def muse_formula(batch: int, length: int, no_mask_token_prob: float) -> tuple[Tensor, Tensor]:
    count = (length * torch.cos(torch.rand(batch, 1) * math.pi / 2)).round().clamp(min=1)
    order = torch.rand(batch, length).argsort(1)
    return order < count, order < count * no_mask_token_prob


def test_muse_masks():
    length = 7
    torch.manual_seed(0)
    expected, _ = muse_formula(BATCH, length, 0.0)
    ids = codes(BATCH).flatten(1)[:, :length].contiguous()
    x, labels = muse_mask(ids, VALUE, seed=3)
    masked = x == VALUE
    assert torch.equal(labels, torch.where(masked, ids, -1))
    assert torch.equal(x, torch.where(masked, VALUE, ids))
    for mine, their in zip(cells(masked), cells(expected), strict=True):
        assert_same_law(mine, their, num_tests=6)
    of_three = masked[masked.sum(1) == 3] * 2 ** torch.arange(length)
    subsets = of_three.sum(1).bincount()
    assert (subsets > 0).sum() == 35
    assert_uniform(subsets[subsets > 0], num_tests=6)
    assert (muse_mask(ids, VALUE, ignore_index=-7, seed=3)[1][~masked] == -7).all()


def test_muse_keeps_a_share_of_the_masked_tokens():
    ids = codes(BATCH).flatten(1)
    x, labels = muse_mask(ids, VALUE, no_mask_token_prob=0.25, seed=3)
    predicted = labels != -1
    assert torch.equal(predicted, muse_mask(ids, VALUE, seed=3)[1] != -1)
    kept = (predicted & (x != VALUE)).sum(1)
    assert torch.equal(x[predicted & (x != VALUE)], ids[predicted & (x != VALUE)])
    count = predicted.sum(1)
    assert ((kept >= (count * 0.25).floor()) & (kept <= (count * 0.25).ceil())).all()
    assert abs(kept.sum() / count.sum() - 0.25) < 0.003


def test_dropped_labels():
    y = torch.arange(BATCH) % 10
    dropped = drop_labels(y, 0.1, 10, seed=5)
    is_dropped = dropped == 10
    assert torch.equal(dropped[~is_dropped], y[~is_dropped]) and dropped.dtype == y.dtype
    assert_same_law(is_dropped.long().bincount(), torch.tensor([9, 1]) * BATCH * 100, num_tests=2)
    coins = words(5, Stream.CLASS_DROPOUT, torch.arange(BATCH), torch.tensor(0))
    assert torch.equal(is_dropped, coins.double() < 0.1 * 2**32)
    assert torch.equal(drop_labels(y, 0, 10), y) and (drop_labels(y.int(), 1, 10) == 10).all()
    torch.manual_seed(0)
    first = drop_labels(y, 0.5, 10)
    assert not torch.equal(first, drop_labels(y, 0.5, 10))
    torch.manual_seed(0)
    assert torch.equal(first, drop_labels(y, 0.5, 10))


def test_clear_errors():
    code = codes(2)
    with pytest.raises(ValueError, match="mode is 'sine': it must be one of linear"):
        get_mask_code(code, mode="sine", value=VALUE)
    with pytest.raises(TypeError, match="value is missing"):
        get_mask_code(code)
    with pytest.raises(InvalidTokenError, match="id 30"):
        get_mask_code(torch.full_like(code, VALUE), value=VALUE)
    with pytest.raises(ValueError, match="with 3 dimensions"):
        get_mask_code(code.flatten(1), value=VALUE)
    with pytest.raises(ValueError, match=r"p is 1\.5"):
        drop_labels(torch.arange(3), 1.5, 9)


def test_what_a_dtype_cannot_hold_is_an_error():
    """It would wrap: to another id, or to another class."""
    code = codes(2).to(torch.uint8)
    for call, name in (
        (lambda: get_mask_code(code, value=300), "the mask token is 300"),
        (lambda: get_mask_code(code, torch.ones(2) / 2, value=300), "mask_id is 300"),
        (lambda: muse_mask(code.flatten(1), VALUE), "ignore_index is -1"),
        (lambda: drop_labels(torch.arange(3).to(torch.uint8), 0.5, 1000), "null_label is 1000"),
    ):
        with pytest.raises(ValueError, match=name):
            call()
    assert get_mask_code(code, value=0)[0].dtype == torch.uint8


@pytest.mark.parametrize(
    ("sample_ids", "error"),
    [
        (torch.arange(3), ValueError),
        (torch.arange(6, dtype=torch.int32), ValueError),
        ([0, 1, 2, 3, 4, 5], TypeError),
    ],
)
def test_sample_ids_that_do_not_fit(sample_ids, error):
    """The kernel would read past their end."""
    with pytest.raises(error, match="sample_ids is"):
        drop_labels(torch.arange(6), 0.5, 9, seed=0, sample_ids=sample_ids)
