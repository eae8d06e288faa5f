"""`MaskingConfig`: any values are valid, or refused by name."""

import copy
import pickle
from dataclasses import fields
from fractions import Fraction

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from nar_kernels import MaskingConfig
from nar_kernels.spec.schedules import SCHEDULES

CORRECT = {
    "num_tokens": st.integers(8, 70) | st.sampled_from([np.int64(9), torch.tensor(9)]),
    "mask_id": st.integers(0, 8),
    "schedule": st.sampled_from([*SCHEDULES]),
    "draw": st.sampled_from(["exact", "bernoulli"]),
    "times": st.sampled_from(["stratified", "uniform"]),
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
        wanted = {"never_mask_ids": tuple, **dict.fromkeys(PROBABILITIES, float)}.get(name)
        assert kept == (wanted(value) if wanted else value)
    for again in (pickle.loads(pickle.dumps(masking)), copy.deepcopy(masking)):
        assert again == masking and again.masks_like(masking)
        assert again.shares == masking.shares
