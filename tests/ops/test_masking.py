"""`MaskingConfig`: any values are valid, or refused by name."""

import copy
import pickle
from dataclasses import fields
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nar_kernels import MaskingConfig, corrupt
from nar_kernels.ops.reference import draw_times
from nar_kernels.spec.schedules import SCHEDULES

CORRECT = {
    "num_tokens": st.integers(8, 70) | st.sampled_from([np.int64(9), torch.tensor(9)]),
    "mask_id": st.integers(0, 8),
    "schedule": st.sampled_from([*SCHEDULES]),
    "draw": st.sampled_from(["exact", "bernoulli"]),
    "times": st.sampled_from(["stratified", "uniform"]),
    "time_range": st.sampled_from([(0, 1), [0.2, 0.7], np.array([0.0, 0.999]), (0.3, 0.3001)]),
    "weighting": st.sampled_from(["elbo", "unit"]),
    "no_replace_prob": st.sampled_from([0, 0.1, 0.5, 1.0, np.float32(0.25), Fraction(1, 3)]),
    "random_token_prob": st.sampled_from([0, 0.1, 0.5, 1, np.float32(0.25)]),
    "corruption_prob": st.floats(0, 1),
    "never_mask_ids": st.lists(st.integers(0, 8), max_size=3) | st.just(np.array([1, 2])),
}
ANYTHING = st.one_of(
    st.none(),
    st.integers(),
    st.sampled_from([10**400, 1 << 31, True, np.float32(3), torch.ones(2), 1j, object()]),
    st.floats(),
    st.text(max_size=3),
    st.lists(st.integers() | st.floats() | st.none(), max_size=2),
)
NAMES = [f.name for f in fields(MaskingConfig) if f.init]


PROBABILITIES = ("no_replace_prob", "random_token_prob", "corruption_prob")
NEEDED = ("num_tokens", "mask_id")
OTHERS = {name: values for name, values in CORRECT.items() if name not in NEEDED}


@given(
    st.fixed_dictionaries({name: CORRECT[name] for name in NEEDED}, optional=OTHERS),
    st.dictionaries(st.sampled_from(NAMES), ANYTHING, max_size=1),
)
def test_any_configuration_is_valid_or_named(correct, wrong):
    values = correct | wrong
    try:
        masking = MaskingConfig(**values)
    except (TypeError, ValueError) as error:
        assert any(name in str(error) for name in values), error
        return
    assert 2 <= masking.num_tokens < 1 << 31 and 0 <= masking.mask_id < masking.num_tokens
    keep, random, coin = masking.shares
    assert min(keep, random, coin) >= 0 and max(keep + random, coin) <= 1 << 31
    assert all(0 <= i < masking.num_tokens for i in masking.never_mask_ids)
    for name, value in values.items():
        kept = getattr(masking, name)
        tuples = dict.fromkeys(("never_mask_ids", "time_range"), tuple)
        wanted = {**tuples, **dict.fromkeys(PROBABILITIES, float)}.get(name)
        assert kept == (wanted(value) if wanted else value)
    for again in (pickle.loads(pickle.dumps(masking)), copy.deepcopy(masking)):
        assert again == masking and again.masks_like(masking)
        assert again.shares == masking.shares


@pytest.mark.parametrize(
    "value, error, message",
    [
        ((0.5, 0.5), ValueError, r"time_range is \(0.5, 0.5\): it must be 0 <= low < high <= 1"),
        ((-0.1, 1), ValueError, "0 <= low < high <= 1"),
        ((0, float("nan")), (TypeError, ValueError), "time_range is"),
        (0.5, TypeError, r"time_range is 0.5: it must be two times \(low, high\)"),
        ((0, 0.5, 1), TypeError, "it must be two times"),
    ],
)
def test_a_wrong_range_of_times(value, error, message):
    with pytest.raises(error, match=message):
        MaskingConfig(9, 8, time_range=value)


def test_which_weights_give_a_bound():
    assert MaskingConfig(9, 8, time_range=(0, 0.999)).is_bound
    for options in (dict(time_range=(0.2, 1)), dict(weighting="unit")):
        assert not MaskingConfig(9, 8, **options).is_bound
    with pytest.raises(ValueError, match=r"from 0.8 at t = 0.2 to 0 at t = 1, but the"):
        MaskingConfig(9, 8, time_range=(0.2, 1)).check_bound()


@pytest.mark.parametrize("draw", ["exact", "bernoulli"])
@pytest.mark.parametrize("eps", [1e-3, 0.3])
def test_a_range_is_the_eps_of_llada(draw, eps):
    """p = (1 - eps) t + eps, of a t that is uniform over (0, 1)."""
    masking = MaskingConfig(9, 8, draw=draw, time_range=(0, 1 - eps))
    batch = corrupt(torch.zeros(4096, 200, dtype=torch.int64), masking, seed=1)
    t = (batch.p_mask[:, 0].double() - eps) / (1 - eps)
    assert -1e-5 < t.min() < 0.001 and 0.999 < t.max() < 1 + 1e-5
    assert abs(t.mean() - 0.5) < 1e-3
    assert torch.allclose(batch.p_mask[:, 0], 1 - batch.times, atol=1e-6)
    assert batch.p_mask.shape == (4096, 200) and batch.p_mask.stride(1) == 0
    assert abs(batch.num_masked.sum() / (batch.p_mask.sum()) - 1) < 0.02
    if draw == "bernoulli":
        assert torch.allclose(batch.loss_weight, 1 / batch.p_mask[:, 0], rtol=1e-4)
    else:
        assert torch.allclose(batch.loss_weight, 200 / batch.num_masked, rtol=1e-4)


@pytest.mark.parametrize("time_range", [(0, 1), (0, 0.999), (0.3, 0.31)])
def test_times_tell_which_of_the_tables(time_range):
    masking = MaskingConfig(9, 8, time_range=time_range, times="uniform")
    batch = corrupt(torch.zeros(70_000, 1, dtype=torch.int64), masking, seed=1)
    drawn = draw_times(1, torch.arange(70_000), 70_000, False)
    assert torch.equal(batch.quantised_times, drawn)
    shares = (masking.table.ratio.long() & 0xFFFFFFFF).double() / 2**32
    assert torch.equal(batch.p_mask[:, 0], shares[drawn].float())


def test_unit_weights():
    ids = torch.zeros(64, 50, dtype=torch.int64)
    for draw in ("exact", "bernoulli"):
        batch = corrupt(ids, MaskingConfig(9, 8, draw=draw, weighting="unit"), seed=1)
        elbo = corrupt(ids, MaskingConfig(9, 8, draw=draw), seed=1)
        assert torch.equal(batch.loss_weight, torch.ones(64))
        assert torch.equal(batch.input_ids, elbo.input_ids)


def test_ratios_outside_of_the_range():
    """Decoding goes through all times, whatever was trained on."""
    for schedule in ("cosine", half_cosine):
        part = MaskingConfig(9, 8, schedule=schedule, time_range=(0.2, 0.4))
        t = torch.linspace(0, 1, 11)
        whole = MaskingConfig(9, 8, schedule=schedule)
        assert torch.allclose(part.ratio_at(t).double(), whole.ratio_at(t).double(), atol=1e-9)


def half_cosine(t):
    return torch.cos(t * torch.pi / 2)
