"""Heads that are sharded by rows of the vocabulary, in two processes, against whole ones."""

import pytest
import torch

from tests.helpers.losses import TOLERANCE, assert_near
from tests.helpers.ranks import run, vocabulary_case, vocabulary_cases

pytestmark = [
    pytest.mark.seconds,
    # In Triton's interpreter, of what a GPU computes in silence.
    pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),  # Dynamo
]


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    return run("work_of_vocabulary", tmp_path_factory.mktemp("vocabulary"))


@pytest.mark.parametrize("name", vocabulary_cases())
def test_equals_the_whole_head(sharded, name, one_thread):
    """Loss and gradients, on both ranks. 257 rows are 129 and 128; 1 row is 1 and 0."""
    whole = vocabulary_case(name, lambda x: x)
    dtype = torch.bfloat16 if name == "autocast" else vocabulary_cases()[name][1]
    for found in sharded:
        for got, expected in zip(found[name], whole, strict=True):
            assert got.dtype == expected.dtype
            if expected.isfinite().all():
                assert_near(got, expected.double(), 3 * TOLERANCE[dtype])
            else:
                torch.testing.assert_close(got, expected, equal_nan=True)


def test_ranks_agree_bit_for_bit(sharded):
    for name, found in sharded[0].items():
        for got, of_other in zip(found, sharded[1][name], strict=True):
            assert torch.equal(got.nan_to_num(7), of_other.nan_to_num(7))
