"""`unmask`: backends against each other, its arithmetic against float64, its samples against exact
probabilities."""

import itertools
import math
import warnings
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from nar_kernels import backends, unmask
from nar_kernels.ops.backends import cpp
from nar_kernels.spec.float_math import exp_of_negative, gumbel, log_of_positive
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

BACKENDS = ["reference", pytest.param("cpp", marks=pytest.mark.cpp)]
WITH_GPUS = [
    *BACKENDS,
    pytest.param("triton", marks=pytest.mark.triton),
    pytest.param("cuda", marks=pytest.mark.cuda),
]

if backends()["triton"] == "available":
    import triton
    import triton.language as tl

    from nar_kernels.ops.kernels import float_math

    @triton.jit
    def arithmetic_kernel(noise, exp, words, x, BLOCK: tl.constexpr):
        at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        tl.store(noise + at, float_math.gumbel(tl.load(words + at).to(tl.uint32)))
        tl.store(exp + at, float_math.exp_of_negative(tl.load(x + at)))


def arguments(vocabulary: int) -> Iterator[dict]:
    """Of calls for 12 rows."""
    given = torch.full((12,), -1)
    given[8], given[9], given[10] = MASK, 0, vocabulary - 1
    temperatures = (0.0, 0.3, 1.0, 7.0) if vocabulary < 5000 else (1.0,)
    top_ks = (None, 1, 2, vocabulary // 3 + 1, vocabulary - 1)
    others = (
        {"forbidden_ids": (0, vocabulary - 2), "confidence": "margin"},
        {"given": given, "confidence": "entropy"},
        {},
    )
    slots = torch.arange(12) * 2**33 + 5
    for temperature, top_k, more in itertools.product(temperatures, top_ks, others):
        yield dict(temperature=temperature, top_k=top_k, noise_slots=slots, **more)


VOCABULARIES = [4, 5, 63, 127, 128, 129, 1000, 4099]


@pytest.mark.cpp
@pytest.mark.parametrize(
    ("vocabulary", "dtype"),
    [
        *itertools.product(VOCABULARIES, DTYPES),
        pytest.param(70001, DTYPES[0], marks=pytest.mark.seconds),
        *(pytest.param(70001, dtype, marks=pytest.mark.slow) for dtype in DTYPES[1:]),
    ],
)
def test_backends_agree(vocabulary, dtype, simd_level):
    logits = awkward_logits(12, vocabulary, dtype)
    for args in arguments(vocabulary):
        assert_equals_reference(logits, backend="cpp", **args)


@pytest.mark.triton
@pytest.mark.parametrize(
    "vocabulary, dtype",
    [
        (4, torch.float32),
        (129, torch.bfloat16),
        (1000, torch.float16),
        (2050, torch.float32),
        (4099, torch.bfloat16),
    ],
)
def test_triton_agrees(vocabulary, dtype):
    every = 25 if devices.is_interpreted("triton") else 1
    logits = awkward_logits(12, vocabulary, dtype)
    for args in itertools.islice(arguments(vocabulary), 0, None, every):
        assert_equals_reference(logits, backend="triton", **args)


@pytest.mark.cuda
@pytest.mark.seconds
@pytest.mark.parametrize(
    ("vocabulary", "dtype", "every"),
    [
        *((*case, 4) for case in itertools.product(VOCABULARIES[:-1], DTYPES)),
        *((4099, dtype, 7) for dtype in DTYPES),
        *((20_011, dtype, 5) for dtype in DTYPES),
        *(pytest.param(200_003, dtype, 5, marks=pytest.mark.slow) for dtype in DTYPES),
    ],
)
def test_cuda_agrees(vocabulary, dtype, every):
    logits = awkward_logits(12, vocabulary, dtype)
    every = every if device_of("cuda") == "cpu" else 1
    for args in itertools.islice(arguments(vocabulary), 0, None, every):
        assert_equals_reference(logits, backend="cuda", **args)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", DTYPES)
def test_more_forbidden_ids_than_the_cuda_kernel_takes_as_arguments(dtype):
    logits = torch.randn(7, 300).to(dtype)
    forbidden = tuple(range(10, 290))
    for top_k in (None, 5):
        args = dict(forbidden_ids=forbidden, top_k=top_k, noise_slots=torch.arange(7))
        assert_equals_reference(logits, backend="cuda", **args)


@pytest.mark.cuda
@pytest.mark.parametrize("top_k", [1, 200, 700, 2998])
def test_ties_with_cuda(top_k):
    for dtype in DTYPES:
        logits = nearly_equal_rows(3000).to(dtype)
        assert_equals_reference(logits, backend="cuda", top_k=top_k, confidence="margin")


def misled_by_samples(backend: str, samples: int, sampled: float) -> None:
    """The k-th largest is bracketed by what every so many logits say, but is exact all the same."""
    logits = torch.randn(4, 4099)
    logits[:, :: 4099 // samples] += sampled
    for dtype in DTYPES:
        for top_k in (1, 100, 257, 1000, 3800, 4098):
            args = dict(top_k=top_k, noise_slots=torch.arange(4), forbidden_ids=(0, 16, 17))
            assert_equals_reference(logits.to(dtype), backend=backend, **args)


@pytest.mark.cpp
@pytest.mark.parametrize("sampled", [10.0, -10.0, -torch.inf])
def test_a_sample_of_the_row_that_misleads(sampled, simd_level):
    misled_by_samples("cpp", 256, sampled)


@pytest.mark.cuda
@pytest.mark.seconds
@pytest.mark.parametrize("sampled", [10.0, -10.0, -torch.inf])
def test_a_sample_of_the_row_that_misleads_cuda(sampled):
    misled_by_samples("cuda", 256, sampled)


@pytest.mark.cuda
@pytest.mark.seconds
@pytest.mark.parametrize("top_k", [3, 1500, 4500])
def test_searches_that_list_what_is_left_cuda(top_k):
    """Few logits next to the k-th, thousands of equal ones that overflow the list, and -inf."""
    rows = 3 * torch.randn(5, 5000)
    rows[1] = rows[1].bfloat16().float() - 8
    rows[2] = rows[2].round()
    rows[3, ::2] = -torch.inf
    rows[4, 1::2] = torch.nan
    for dtype in DTYPES:
        args = dict(top_k=top_k, forbidden_ids=(0, 16, 17), confidence="margin")
        assert_equals_reference(rows.to(dtype), backend="cuda", **args)


@pytest.mark.cpp
def test_ties_that_upper_halves_of_keys_cannot_tell_apart(simd_level):
    """The k-th largest among thousands of equal logits, and of logits that differ by a bit."""
    for row in nearly_equal_rows(3000):
        for top_k in (1, 2, 700, 2998, 2999):
            args = dict(top_k=top_k, noise_slots=torch.arange(50), mask_id=2999)
            logits = row.expand(50, 3000)
            got = draw(logits, backend="cpp", **args)
            expected = draw(logits, backend="reference", **args)
            assert torch.equal(got.tokens, expected.tokens)
            order = row[:2999].sort(descending=True, stable=True).indices[:top_k].tolist()
            assert set(got.tokens.tolist()) <= set(order)


@pytest.mark.triton
@pytest.mark.parametrize("top_k", [700, 2998])
def test_ties_with_triton(top_k):
    logits = nearly_equal_rows(3000)
    assert_equals_reference(logits, backend="triton", top_k=top_k, confidence="margin")


@pytest.mark.triton
def test_triton_with_more_blocks_than_it_counts_at_a_time():
    logits = torch.stack([torch.zeros(31_000), torch.randn(31_000)]).bfloat16()
    assert_equals_reference(logits, backend="triton", top_k=20_000, confidence="entropy")


@pytest.mark.parametrize("backend", WITH_GPUS[1:])
@pytest.mark.parametrize("dtype", DTYPES)
def test_infinity_is_above_what_is_finite_in_a_narrow_type(dtype, backend):
    logits = torch.full((1, 9), torch.finfo(dtype).max, dtype=dtype)
    logits[0, 4::2] = torch.inf
    for given in (0, 4, 8):
        args = dict(given=torch.tensor([given]), top_k=4)
        assert_equals_reference(logits, backend=backend, **args)


def test_exp_and_log_are_good_to_two_units_in_the_last_place():
    x = torch.cat([-torch.rand(100_000) * 87, -torch.logspace(-30, 1.9, 10_000)])
    exact = x.double().exp()
    assert ((exp_of_negative(x).double() - exact).abs() / exact).max() < 2 * 2**-23
    assert (exp_of_negative(torch.tensor([-88.0, -torch.inf])) == 0).all()
    x = torch.cat([x.exp(), torch.logspace(-37, 38, 100_000, base=10), 1 + x[-10_000:] * 1e-3])
    x = x[x > 1e-37]
    exact = x.double().log()
    error = (log_of_positive(x).double() - exact).abs()
    assert (error / exact.abs().clamp(min=2.0**-23)).max() < 2 * 2**-23


def test_noise_is_gumbel_to_its_last_bits():
    words = torch.cat([torch.arange(1000), 2 ** torch.arange(32), 2**32 - 1 - torch.arange(1000)])
    words = torch.cat([words, torch.randint(0, 2**32, (100_000,)), 2**30 + torch.arange(-9, 9)])
    u = (words.double() + 0.5) * 2**-32
    exact = -(-torch.log1p(-u)).log()
    noise = gumbel(words)
    assert noise.isfinite().all()
    assert (noise - exact)[u < 0.25].abs().max() < 4e-6
    assert (noise - exact)[(u >= 0.25) & (u < 1 - 2**-12)].abs().max() < 1e-4
    assert (noise.min(), noise.max()) == (
        pytest.approx(-3.1, abs=0.1),
        pytest.approx(22.87, abs=0.01),
    )


@pytest.mark.triton
def test_arithmetic_of_triton():
    """Bit by bit: what a draw shows of it is little."""
    number, block = 1 << 18, 1 << 13
    words = torch.cat([torch.randint(0, 2**32, (number - 96,)), 2 ** torch.arange(32)])
    words = torch.cat([words, 2**32 - 1 - torch.arange(32), 2**30 - 16 + torch.arange(32)])
    x = torch.cat([-torch.rand(number // 2) * 90, -torch.logspace(-38, 38.5, number // 2)])
    words, x = words.to(device_of("triton")), x.to(device_of("triton"))
    noise, exp = torch.empty_like(x), torch.empty_like(x)
    options = dict(BLOCK=block, num_warps=8, enable_fp_fusion=False)
    arithmetic_kernel[(number // block,)](noise, exp, words, x, **options)
    assert torch.equal(noise.cpu(), gumbel(words.cpu()))
    assert torch.equal(exp.cpu(), exp_of_negative(x.cpu()))


@pytest.mark.parametrize("top_k", [None, 1, 40])
def test_confidence(top_k):
    logits = torch.randn(30, 200) * 3
    logits[0, [5, 9]] = 20.0
    logits[1, 17] = 100.0
    allowed = logits.index_fill(1, torch.tensor([MASK]), -torch.inf)
    if top_k is not None:
        allowed = allowed.masked_fill(allowed < allowed.topk(top_k).values[:, -1:], -torch.inf)
        if top_k == 1:
            allowed[0, 9] = -torch.inf
    probs = allowed.double().softmax(1)
    best = probs.topk(2).values
    expected = {
        "probability": probs.log().gather(1, draw(logits, top_k=top_k).tokens[:, None])[:, 0],
        "margin": best[:, 0] - best[:, 1],
        "entropy": -torch.special.entr(probs).sum(1),
    }
    for confidence, values in expected.items():
        got = draw(logits, top_k=top_k, confidence=confidence)
        torch.testing.assert_close(got.confidence.double(), values, rtol=1e-5, atol=1e-5)
        assert torch.equal(got.log_prob, draw(logits, top_k=top_k).confidence)
    assert (
        draw(torch.full((1, 9), -torch.inf), confidence="margin").confidence
    ).item() == -math.inf


@pytest.mark.parametrize("temperature", [0.25, 1.0, 4.0])
@pytest.mark.parametrize("top_k", [None, 5])
def test_samples_have_their_probabilities(temperature, top_k):
    logits = torch.tensor([0.0, 1.0, -1.0, 9.0, 0.5, 0.5, 2.0, -3.0, 1.5, -0.25])
    allowed = logits.clone()
    allowed[[MASK, 6]] = -torch.inf
    if top_k is not None:
        allowed[allowed < allowed.topk(top_k).values[-1]] = -torch.inf
    number = 200_000
    got = draw(logits.expand(number, -1), temperature=temperature, top_k=top_k, forbidden_ids=(6,))
    counts = got.tokens.bincount(minlength=10)
    expected = (allowed / temperature).softmax(0).double() * number
    common = expected > 5
    assert (counts[expected == 0] == 0).all() and counts[~common].sum() < 30
    assert chi_square_p(counts[common], expected[common]) > 1e-4
    torch.testing.assert_close(got.log_prob, allowed.log_softmax(0)[got.tokens])
    # What a wrong temperature would give is noticed.
    wrong = (allowed / (temperature * 1.05)).softmax(0).double() * number
    if temperature < 4:
        assert chi_square_p(counts[common], wrong[common]) < 1e-6


@pytest.mark.cpp
@pytest.mark.seconds
@pytest.mark.parametrize("gap", [18.0, 19.25, 20.5])
def test_tails(gap):
    vocabulary, number = 262_144, 12_000
    logits = torch.full((vocabulary,), -gap)
    logits[7] = 0
    tokens = draw(logits.expand(number, -1), temperature=1.0, seed=int(gap * 4)).tokens
    expected = number * (vocabulary - 2) * math.exp(-gap)
    assert abs(int((tokens != 7).sum()) - expected) < 3 * math.sqrt(expected)


@pytest.mark.parametrize("backend", [*BACKENDS, WITH_GPUS[3]])
def test_a_row_depends_on_itself_alone(backend):
    device = device_of(backend)
    logits = torch.randn(40, 300).to(device)
    whole = draw(logits, top_k=100, backend=backend)
    order = torch.randperm(40).to(device)
    shuffled = draw(logits[order], noise_slots=order, top_k=100, backend=backend)
    assert torch.equal(shuffled.tokens, whole.tokens[order])
    assert torch.equal(shuffled.log_prob, whole.log_prob[order])
    one = draw(logits[7:8], noise_slots=torch.tensor([7]).to(device), top_k=100, backend=backend)
    assert torch.equal(one.tokens, whole.tokens[7:8])
    other = draw(logits, seed=2, backend=backend)
    assert not torch.equal(other.tokens, draw(logits, backend=backend).tokens)


@pytest.mark.cpp
def test_any_number_of_threads():
    logits = torch.randn(64, 3001)
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        results.append(draw(logits, top_k=900))
    torch.set_num_threads(before)
    for other in results[1:]:
        assert torch.equal(other.tokens, results[0].tokens)
        assert torch.equal(other.log_prob, results[0].log_prob)


@pytest.mark.parametrize("backend", [WITH_GPUS[1], WITH_GPUS[3]])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_at_any_address(dtype, backend):
    """Of 16 bytes, 8, 4 and 2, and logits before and behind them that are none of theirs."""
    whole = torch.full((8, 1100), 1e4, dtype=dtype)
    for skipped in range(9):
        logits = whole[:, skipped : skipped + 1080]
        logits.copy_(torch.randn(logits.shape))
        device = device_of(backend)
        view = whole.to(device)[:, skipped : skipped + 1080]
        slots = torch.arange(len(view), device=device)
        got = draw(view, noise_slots=slots, top_k=700, backend=backend)
        expected = draw(logits, top_k=700, backend="reference")
        for ours, theirs in zip(got, expected, strict=True):
            assert torch.equal(ours.cpu(), theirs)
        whole.fill_(1e4)


@pytest.mark.parametrize("backend", WITH_GPUS)
def test_rows_in_a_larger_tensor(backend):
    logits = torch.randn(9, 70, device=device_of(backend))
    for view in (logits[::2, 3:60], logits.t()[:7, :9], logits[:1].expand(3, -1), logits[:0]):
        slots = torch.arange(len(view), device=view.device)
        got = draw(view, noise_slots=slots, backend=backend)
        expected = draw(view.cpu().contiguous(), backend="reference")
        assert torch.equal(got.tokens.cpu(), expected.tokens)


def test_a_head_without_a_column_for_mask_id():
    logits = torch.randn(500, 6)
    padded = torch.cat([logits, torch.full((500, 1), 99.0)], 1)
    got = draw(logits, mask_id=6)
    assert torch.equal(got.tokens, draw(padded, mask_id=6).tokens)
    assert set(got.tokens.tolist()) == set(range(6))


@pytest.mark.parametrize("backend", WITH_GPUS)
def test_a_row_that_allows_nothing(backend):
    logits = torch.full((2, 5), -torch.inf, device=device_of(backend))
    args = dict(noise_slots=torch.arange(2).to(logits.device), mask_id=0, backend=backend)
    got = draw(logits, forbidden_ids=(1, 2), **args)
    assert got.tokens.tolist() == [3, 3] and got.log_prob.tolist() == [-math.inf] * 2
    given = draw(logits, given=torch.tensor([4, -1]).to(logits.device), **args)
    assert given.tokens.tolist() == [4, 1]


@pytest.mark.parametrize("backend", WITH_GPUS)
@pytest.mark.parametrize("forbidden_ids", [(), (9,), (9, 8), (9, 8, 7), (0, 2, 4, 9, 8, 7, 6)])
def test_any_number_of_forbidden_ids(forbidden_ids, backend):
    logits = torch.arange(10.0).repeat(2, 1).to(device_of(backend))
    slots = torch.arange(2).to(logits.device)
    args = dict(noise_slots=slots, forbidden_ids=forbidden_ids, temperature=0, backend=backend)
    largest = max({*range(10)} - {MASK, *forbidden_ids})
    assert draw(logits, **args).tokens.tolist() == [largest] * 2


@pytest.mark.parametrize("backend", ["reference", WITH_GPUS[-1]])
def test_as_an_operator(backend):
    logits, slots = (x.to(device_of(backend)) for x in (torch.randn(5, 40), torch.arange(5)))
    args = (logits, slots, None, [3], 0, 1, 40, 1 << 30, 1.0, "entropy", backend)
    torch.library.opcheck(torch.ops.nar_kernels.unmask.default, args)


def test_under_torch_compile():
    logits, slots = torch.randn(5, 40), torch.arange(5)

    @torch.compile(fullgraph=True, backend="eager")
    def compiled(logits: Tensor, slots: Tensor) -> Tensor:
        return unmask(logits, mask_id=MASK, seed=1, noise_slots=slots, forbidden_ids=(0,)).tokens

    assert torch.equal(compiled(logits, slots), draw(logits, forbidden_ids=(0,)).tokens)


@pytest.mark.parametrize(
    "change, error, message",
    [
        (dict(logits=torch.zeros(2, 5).double()), TypeError, "dtype torch.float64.*torch.float32"),
        (dict(logits=torch.zeros(5)), ValueError, r"shape \[5\].*\[R, V\]"),
        (dict(logits=torch.zeros(2, 0)), ValueError, r"shape \[2, 0\]"),
        (dict(noise_slots=torch.arange(3)), ValueError, r"noise_slots must be int64 \[2\].*\[3\]"),
        (dict(given=torch.zeros(2)), ValueError, r"given must be int64 \[2\].*float32"),
        (dict(temperature=-1.0), ValueError, "temperature is -1.0"),
        (dict(temperature=math.nan), ValueError, "temperature is nan"),
        (dict(top_k=0), ValueError, "top_k is 0"),
        (dict(top_p=0.0), ValueError, r"top_p is 0.0: it must be in \(0, 1\]"),
        (dict(top_p=-0.5), ValueError, "top_p is -0.5"),
        (dict(top_p=1.5), ValueError, "top_p is 1.5"),
        (dict(top_p=math.nan), ValueError, "top_p is nan"),
        (dict(top_p="all"), TypeError, "top_p is 'all': it must be a number"),
        (dict(confidence="max"), ValueError, "confidence is 'max'.*probability, margin, entropy"),
        (dict(mask_id=6), ValueError, "mask_id is 6.*5 logits"),
        (dict(forbidden_ids=(5,)), ValueError, r"forbidden_ids holds 5, outside \[0, 5\)"),
        (dict(forbidden_ids=(0, 1, 2, 4)), ValueError, "leave none of the 5 ids"),
        (dict(backend="cuda2"), ValueError, "unknown backend 'cuda2'"),
    ],
)
def test_errors(change, error, message):
    args = dict(logits=torch.zeros(2, 5), mask_id=MASK, seed=1, noise_slots=torch.arange(2))
    with pytest.raises(error, match=message):
        unmask(**(args | change))


def test_any_temperature():
    logits = torch.randn(200, 7)
    for backend in ("reference", *(["cpp"] if cpp is not None else [])):
        tokens = draw(logits, temperature=1e300, backend=backend).tokens
        assert set(tokens.tolist()) == set(range(7)) - {MASK}


def test_tools_see_the_operator():
    def draw(logits: torch.Tensor) -> torch.Tensor:
        slots = torch.arange(logits.shape[0])
        return unmask(logits, mask_id=0, seed=1, noise_slots=slots).tokens

    logits, others = torch.randn(2, 4, 9, generator=torch.Generator().manual_seed(8))
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True
    ) as profile:
        draw(logits)
    assert "nar_kernels::unmask" in {event.name for event in profile.events()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of shapes taken for constants, and of speed
        traced = torch.jit.trace(draw, logits, check_trace=False)
        mapped = torch.func.vmap(draw)(torch.stack([logits, others]))
    assert torch.equal(traced(others), draw(others))
    assert torch.equal(mapped, torch.stack([draw(logits), draw(others)]))
    with FlopCounterMode(display=False):  # a dispatch mode
        assert torch.equal(draw(logits), draw(logits))
