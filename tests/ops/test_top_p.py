"""`top_p` of `unmask`: the nucleus of a row on every backend, and that of others."""

import itertools
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from nar_kernels import unmask
from tests.helpers import devices
from tests.helpers.devices import device_of
from tests.helpers.goodness_of_fit import chi_square_p
from tests.helpers.unmasking import (
    DTYPES,
    MASK,
    assert_equals_reference,
    awkward_logits,
    draw,
    nearly_equal_rows,
)

# In Triton's interpreter, of what a GPU computes in silence: -inf that is not chosen.
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")

ROWS = 12
TOP_PS = (0.9, 1e-12, 0.5, 1 - 2.0**-30, 0.99, 0.1)


def arguments(vocabulary: int) -> Iterator[dict]:
    given = torch.full((ROWS,), -1)
    given[8], given[9], given[10] = MASK % vocabulary, 0, vocabulary - 1
    options = (
        {"temperature": 0.6},
        {"temperature": 0.0, "confidence": "margin"},
        {"top_k": vocabulary // 3 + 1, "confidence": "entropy"},
        {"temperature": 3.0, "forbidden_ids": (0,) if vocabulary > 2 else ()},
        {"temperature": 1e30, "given": given},
        {"temperature": 1e-6, "confidence": "entropy"},
    )
    for top_p, more in itertools.product(TOP_PS, options):
        yield dict(top_p=top_p, mask_id=min(MASK, vocabulary), **more)


def assert_all_equal(backend: str, vocabulary: int, dtype: torch.dtype, every: int = 1) -> None:
    logits = awkward_logits(ROWS, vocabulary, dtype)
    for args in itertools.islice(arguments(vocabulary), 0, None, every):
        assert_equals_reference(logits, backend=backend, **args)


@pytest.mark.cpp
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocabulary", [1, 2, 5, 63, 129, 1000, 4099])
def test_cpp_agrees(vocabulary, dtype, simd_level):
    assert_all_equal("cpp", vocabulary, dtype, every=1 if vocabulary < 1000 else 5)


@pytest.mark.cpp
@pytest.mark.seconds
@pytest.mark.parametrize("dtype", DTYPES)
def test_cpp_agrees_on_a_large_vocabulary(dtype, simd_level):
    assert_all_equal("cpp", 70_001, dtype, every=11)


@pytest.mark.cpp
@pytest.mark.parametrize("top_p", [1e-9, 0.3, 0.999])
@pytest.mark.parametrize("top_k", [None, 1200])
def test_ties(top_p, top_k, simd_level):
    logits = nearly_equal_rows(3000)
    for temperature in (1.0, 1e-3):
        args = dict(top_p=top_p, top_k=top_k, temperature=temperature, confidence="margin")
        assert_equals_reference(logits, backend="cpp", **args)


@pytest.mark.triton
@pytest.mark.parametrize(
    "vocabulary, dtype",
    [(1, torch.float32), (70, torch.float16), (300, torch.bfloat16), (1100, torch.float32)],
)
def test_triton_agrees(vocabulary, dtype):
    every = 7 if devices.is_interpreted("triton") else 1
    assert_all_equal("triton", vocabulary, dtype, every)


@pytest.mark.triton
def test_ties_with_triton():
    args = dict(top_p=0.3, top_k=900, temperature=0.5, confidence="margin")
    assert_equals_reference(nearly_equal_rows(1200), backend="triton", **args)


@pytest.mark.cuda
@pytest.mark.seconds
@pytest.mark.parametrize(
    ("vocabulary", "every"), [(1, 1), (2, 5), (300, 3), (1000, 5), (4099, 7), (20_011, 11)]
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_cuda_agrees(vocabulary, every, dtype):
    every = every if device_of("cuda") == "cpu" else 1
    assert_all_equal("cuda", vocabulary, dtype, every)


@pytest.mark.cuda
@pytest.mark.seconds
@pytest.mark.parametrize("top_k", [None, 1200])
def test_ties_with_cuda(top_k):
    for dtype in DTYPES:
        args = dict(top_p=0.3, top_k=top_k, temperature=1e-3, confidence="margin")
        assert_equals_reference(nearly_equal_rows(3000).to(dtype), backend="cuda", **args)


def kept_ids(logits: Tensor, **args) -> Tensor:
    """bool ``[V]``: which ids of a row may be drawn."""
    every = torch.arange(len(logits))
    rows = logits.expand(len(every), -1)
    options = dict(mask_id=len(logits), seed=0, noise_slots=every, given=every)
    return unmask(rows, **options, **args).log_prob > -math.inf


def row_of_its_own(generator: torch.Generator, length: int = 500) -> Tensor:
    """Logits without neighbours that float32 can mistake for another in a sum of probabilities."""
    return 3 * torch.randn(length, generator=generator)


@pytest.fixture
def transformers() -> Any:  # whose import takes seconds
    return pytest.importorskip("transformers")


@pytest.mark.seconds
@pytest.mark.parametrize("top_k", [None, 40])
@pytest.mark.parametrize("temperature", [0.4, 1.0, 2.0])
def test_the_nucleus_is_that_of_transformers(transformers, temperature, top_k):
    generator = torch.Generator().manual_seed(3)
    for top_p in (0.01, 0.3, 0.8, 0.95, 0.999):
        row = row_of_its_own(generator)
        scores = transformers.TemperatureLogitsWarper(temperature)(None, row.double()[None])
        if top_k is not None:
            scores = transformers.TopKLogitsWarper(top_k)(None, scores)
        scores = transformers.TopPLogitsWarper(top_p)(None, scores)
        kept = kept_ids(row, temperature=temperature, top_k=top_k, top_p=top_p)
        assert torch.equal(kept, scores[0] > -math.inf)


@pytest.mark.seconds
@pytest.mark.parametrize("top_k", [None, 40])
@pytest.mark.parametrize("temperature", [0.4, 1.0, 2.0])
def test_the_nucleus_is_that_of_diffusers(temperature, top_k):
    scheduler = pytest.importorskip("diffusers", minversion="0.42").BlockRefinementScheduler
    generator = torch.Generator().manual_seed(4)
    for top_p in (0.01, 0.3, 0.8, 0.95, 0.999):
        row = row_of_its_own(generator)
        scores = scheduler._top_k_filtering(row.double()[None] / temperature, top_k)
        scores = scheduler._top_p_filtering(scores, top_p)
        kept = kept_ids(row, temperature=temperature, top_k=top_k, top_p=top_p)
        assert torch.equal(kept, scores[0] > torch.finfo(torch.float64).min)


def test_at_temperature_0_the_nucleus_is_that_of_the_logits():
    row = row_of_its_own(torch.Generator().manual_seed(5))
    assert torch.equal(
        kept_ids(row, temperature=0, top_p=0.7), kept_ids(row, temperature=1, top_p=0.7)
    )
    drawn = draw(row[None], temperature=0, top_p=0.7)
    assert torch.equal(drawn.tokens, draw(row[None], temperature=0).tokens)


def test_of_equal_ids_the_first_are_kept():
    logits = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0, 1.0])
    for top_p, first in ((0.2, 1), (0.3, 2), (0.6, 3), (0.8, 4)):
        kept = kept_ids(logits, top_p=top_p).nonzero()[:, 0].tolist()
        assert kept == [0, 2, 3, 5][:first]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_samples_have_the_probabilities_of_the_nucleus(temperature):
    logits, number = torch.tensor([0.0, 1.0, -1.0, 9.0, 0.5, 0.25, 2.0, -3.0, 1.5, -0.25]), 100_000
    allowed = logits.index_fill(0, torch.tensor([MASK]), -torch.inf)
    ranked = (allowed / temperature).softmax(0).sort(descending=True)
    inside = ranked.indices[ranked.values.cumsum(0) - ranked.values < 0.8]
    assert 2 <= len(inside) < 9
    nucleus = torch.full_like(allowed, -torch.inf).index_copy_(0, inside, allowed[inside])
    got = draw(logits.expand(number, -1), temperature=temperature, top_p=0.8)
    counts = got.tokens.bincount(minlength=10)
    assert counts[inside].sum() == number
    expected = (nucleus / temperature).softmax(0).double() * number
    assert chi_square_p(counts[inside], expected[inside]) > 1e-4
    torch.testing.assert_close(got.log_prob, nucleus.log_softmax(0)[got.tokens])


@pytest.mark.parametrize("backend", ["reference", pytest.param("cpp", marks=pytest.mark.cpp)])
def test_what_rounds_to_1_filters_nothing(backend):
    logits = torch.cat([torch.zeros(1), torch.full((99,), -40.0)])  # exp(-40) counts 0 in the sum
    for top_p in (1, 1 - 2.0**-40):
        given = torch.tensor([99])
        drawn = draw(logits[None], given=given, top_p=top_p, backend=backend)
        assert drawn.log_prob.item() == -40.0
