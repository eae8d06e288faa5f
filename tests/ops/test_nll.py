"""The kernel of the loss, `nll_`: every element on its own, on every backend."""

import ctypes
import itertools
import mmap
import multiprocessing

import pytest
import torch
import torch.nn.functional as F

from nar_kernels.ops.arguments import NllArgs
from nar_kernels.ops.nll import NLL_DTYPES, run_nll
from tests.helpers import devices
from tests.helpers.devices import device_of
from tests.helpers.losses import (
    BACKENDS,
    BACKENDS_AND_DTYPES,
    assert_near,
)

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # In Triton's interpreter, of what a GPU computes in silence, as in the gaps between rows.
    pytest.mark.filterwarnings("ignore:.* encountered:RuntimeWarning"),
]

GUARD = 64  # elements, and one more: rows at any alignment


class Guarded:
    """A copy of logits between memory that nobody may touch; huge where it is read."""

    def __init__(self, logits, gap=0):
        rows, vocabulary = logits.shape
        size, pitch = rows * (vocabulary + gap), vocabulary + gap
        self.memory = torch.empty(size + 2 * GUARD + 1, dtype=logits.dtype, device=logits.device)
        self.memory.view(torch.uint8).fill_(0x5A)
        self.guards = self.memory[: GUARD + 1], self.memory[GUARD + 1 + size :]
        self.logits = self.memory.as_strided((rows, vocabulary), (pitch, 1), GUARD + 1)
        self.memory[GUARD + 1 : GUARD + 1 + size] = torch.nan  # the gaps
        self.logits.copy_(logits)

    def check(self):
        assert all((guard.view(torch.uint8) == 0x5A).all() for guard in self.guards)


@pytest.fixture
def poisoned_memory():
    """What a kernel forgets to write is NaN."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(1).isnan()
    yield
    torch.use_deterministic_algorithms(False)


def softmax_problem(rows, vocabulary, dtype, *, spread=2.0, seed=0):
    """Logits, labels, bias and weight; sums of logit and bias are exact in float32."""
    generator = torch.Generator().manual_seed(seed)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    logits = spread * torch.randn(rows, vocabulary, generator=generator)
    logits = ((logits * 64).round() / 64).to(dtype)
    labels = torch.randint(0, vocabulary, (rows,), generator=generator)
    labels[0], labels[-1] = 0, vocabulary - 1
    bias = (torch.randn(vocabulary, generator=generator) * 64).round().to(wide) / 64
    return logits, labels, bias, torch.randn(rows, generator=generator).to(wide)


# The largest error of a softmax, as a part of itself: of its own type's rounding, and before it.
ROUNDING = {torch.bfloat16: 2**-8, torch.float16: 2**-11}

COMPUTING = {"reference": 4e-6, "cpp": 1e-6, "triton": 4e-6}


def softmax_error(backend, dtype):
    if dtype == torch.float64:
        return 1e-14
    cuts_off = devices.is_interpreted(backend)
    rounding = ROUNDING.get(dtype, 0) * (2 if cuts_off and dtype == torch.bfloat16 else 1)
    return rounding + COMPUTING[backend]


def check_kernel(logits, labels, bias, weight, backend, gap=0):
    """Of every element, on its own."""
    device = device_of(backend)
    wide = logits.double() if bias is None else logits.double() + bias.double()
    nll = F.cross_entropy(wide, labels, reduction="none")
    softmax, one_hot = wide.softmax(1), F.one_hot(labels, wide.shape[1])
    w = torch.ones(len(labels), 1) if weight is None else weight.double()[:, None]
    for gradient in (True, False):
        guarded = Guarded(logits.to(device), gap)
        tensors = [x if x is None else x.to(device) for x in (labels, bias, weight)]
        got = run_nll(NllArgs(guarded.logits, *tensors, gradient=gradient), backend).cpu()
        guarded.check()
        assert got.dtype == (torch.float64 if logits.dtype == torch.float64 else torch.float32)
        assert_near(got, nll, 1e-14 if logits.dtype == torch.float64 else 1e-6)
        if gradient:
            off = (guarded.logits.cpu().double() - w * (softmax - one_hot)).abs()
            error = softmax_error(backend, logits.dtype)
            allowed = error * w.abs() * (softmax + one_hot)
            tiny = 2**-25 if logits.dtype == torch.float16 else 1e-37
            assert (off <= allowed + tiny).all(), ((off - tiny) / allowed).max()


VOCABULARIES = [*range(1, 34), 257, 4099, 70001]


@pytest.mark.parametrize("backend, dtype", BACKENDS_AND_DTYPES)
def test_kernel(backend, dtype, poisoned_memory):
    few = backend == "triton"  # which compiles most of these anew, or is slow in its interpreter
    for vocabulary in [1, 2, 31, 32, 33, 257, 4099] if few else VOCABULARIES:
        if few and dtype != torch.float32 and vocabulary not in (33, 4099):
            continue
        rows = 2 if vocabulary > 257 else 5
        logits, labels, bias, weight = softmax_problem(rows, vocabulary, dtype)
        check_kernel(logits, labels, bias, weight, backend)
        if not few or vocabulary == 33:
            check_kernel(logits, labels, None, weight, backend)
            check_kernel(logits, labels, bias, None, backend)
            check_kernel(logits, labels, None, None, backend)


@pytest.mark.parametrize("backend, dtype", BACKENDS_AND_DTYPES)
def test_kernel_that_finds_larger_logits_later(backend, dtype, poisoned_memory):
    """Where a row is taken in blocks, sums so far are rescaled; in Triton there are two here."""
    logits, labels, bias, weight = softmax_problem(2, 4099, dtype)
    for descending in (False, True):
        ordered = logits.sort(1, descending=descending).values
        check_kernel(ordered, labels, None, weight, backend)


@pytest.mark.parametrize("backend, dtype", BACKENDS_AND_DTYPES)
def test_kernel_with_gaps_behind_rows(backend, dtype, poisoned_memory):
    for vocabulary, gap in [(1, 1), (1, 63), (11, 5), (16, 16), (33, 1), (64, 3), (257, 255)]:
        check_kernel(*softmax_problem(3, vocabulary, dtype), backend, gap)


@pytest.mark.parametrize("backend", BACKENDS)
def test_kernel_where_memory_ends_with_the_last_row(backend):
    """Without a gap. What is behind it is not touched, though it is memory of somebody else."""
    device = device_of(backend)
    memory = torch.full((64,), 7.0)
    whole = torch.from_numpy(memory.numpy()[:21]) if device == "cpu" else memory[:21].to(device)
    assert whole.untyped_storage().nbytes() == 21 * 4
    logits = whole.as_strided((3, 5), (8, 1))
    labels = torch.zeros(3, dtype=torch.int64, device=device)
    nll = run_nll(NllArgs(logits, labels, None, None, gradient=True), backend)
    assert_near(nll, torch.full((3,), 5.0, device=device).log().double(), 1e-6)
    expected = torch.full((3, 5), 0.2, device=device)
    expected[:, 0] -= 1
    assert_near(logits, expected.double(), 1e-6)
    assert (memory[21:] == 7).all()


def beside_forbidden_pages(tensor, at_end):
    """A copy that begins, or ends, where one byte further may not even be read."""
    size, page = tensor.numel() * tensor.element_size(), mmap.PAGESIZE
    inner = -(-size // page) * page
    memory = mmap.mmap(-1, inner + 2 * page)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    protect = ctypes.CDLL(None, use_errno=True).mprotect
    protect.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    for forbidden in (address, address + page + inner):
        assert protect(forbidden, page, 0) == 0
    offset = page + (inner - size if at_end else 0)
    copy = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=offset)
    return copy.view(tensor.shape).copy_(tensor)


def nll_beside_forbidden_pages(dtype):
    for vocabulary, at_end, gap in itertools.product(VOCABULARIES[:-1], [True, False], [0, 3]):
        tensors = softmax_problem(3, vocabulary, dtype)
        size = 3 * (vocabulary + gap) - gap
        memory, *others = (
            beside_forbidden_pages(x, at_end)
            for x in (torch.zeros(size, dtype=dtype), *tensors[1:])
        )
        logits = memory.as_strided((3, vocabulary), (vocabulary + gap, 1), memory.storage_offset())
        logits.copy_(tensors[0])
        run_nll(NllArgs(logits, *others, gradient=True), "cpp")


@pytest.mark.cpp
@pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning")
@pytest.mark.parametrize("dtype", NLL_DTYPES["cpp"])
def test_kernel_reads_nothing_outside(simd_level, dtype):
    context = multiprocessing.get_context("fork")
    child = context.Process(target=nll_beside_forbidden_pages, args=(dtype,))
    child.start()
    child.join(60)
    assert child.exitcode == 0


@pytest.mark.parametrize("backend, dtype", BACKENDS_AND_DTYPES)
def test_kernel_far_from_zero(backend, dtype):
    """A constant takes nothing from the accuracy, where logits hold it exactly."""
    shift = 2**13 if dtype in (torch.float64, torch.float32) else 2**8
    for vocabulary in (2, 50):
        logits, labels, _, weight = softmax_problem(5, vocabulary, dtype)
        for sign in (1, -1):
            check_kernel(logits + sign * shift, labels, None, weight, backend)


@pytest.mark.cpp
@pytest.mark.parametrize("dtype", NLL_DTYPES["cpp"])
def test_every_instruction_set(simd_level, dtype):
    for vocabulary in VOCABULARIES[:-1]:
        logits, labels, bias, weight = softmax_problem(3, vocabulary, dtype)
        check_kernel(logits, labels, bias, weight, "cpp")
        check_kernel(logits, labels, None, None, "cpp")
        got, expected = logits.clone(), logits.clone()
        nll = run_nll(NllArgs(got, labels, bias, weight, gradient=True), "cpp")
        ref = run_nll(NllArgs(expected, labels, bias, weight, gradient=True), "reference")
        torch.testing.assert_close(nll, ref, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(got, expected, rtol=2**-8, atol=1e-6)


@pytest.mark.cpp
def test_exp_is_accurate(simd_level):
    """Down to the smallest normal numbers; whole steps of 2^-10 are exact in float32."""
    steps = torch.arange(-85 * 1024, 1, 5) / 1024
    logits = steps[torch.randperm(len(steps), generator=torch.Generator().manual_seed(0))][None]
    for shift in (0, 1000, -1000):
        check_kernel(logits + shift, torch.tensor([7]), None, None, "cpp")


@pytest.mark.parametrize("backend", BACKENDS)
def test_kernel_special_values(backend, poisoned_memory):
    """As cross entropy has them; a row does not change its neighbours."""
    inf, nan = torch.inf, torch.nan
    rows = [
        [1.0, 2.0, 3.0],
        [1.0, -inf, 3.0],  # a wrong id
        [-inf, 2.0, 3.0],  # the label
        [-inf, -inf, -inf],
        [1.0, inf, 3.0],
        [1.0, nan, 3.0],
        [nan, nan, nan],
        [3e38, -3e38, 3e38],
        [-3e38, -3e38, -3e38],
        [1.0, 2.0, 3.0],
    ]
    logits, labels = torch.tensor(rows), torch.zeros(len(rows), dtype=torch.int64)
    wide = logits.double().requires_grad_()
    expected = F.cross_entropy(wide, labels, reduction="none")
    expected.backward(torch.ones_like(expected))
    device = device_of(backend)
    moved = logits.to(device)
    got = run_nll(NllArgs(moved, labels.to(device), None, None, gradient=True), backend)
    close = dict(rtol=1e-6, atol=1e-6, equal_nan=True)
    torch.testing.assert_close(got.cpu().double(), expected.detach(), **close)
    torch.testing.assert_close(moved.cpu().double(), wide.grad, **close)


BAD_LABELS = [-1, 5, -100, 2**31, 2**32, 2**32 + 1, 2**63 - 1, -(2**63), -(2**32)]


@pytest.mark.parametrize("backend, dtype", BACKENDS_AND_DTYPES)
def test_bad_labels(backend, dtype):
    """Give NaN, and touch neither other rows nor what is beside the logits."""
    device = device_of(backend)
    count = len(BAD_LABELS)
    logits, labels, bias, weight = softmax_problem(count + 2, 5, dtype)
    labels[1:-1] = torch.tensor(BAD_LABELS)
    moved = [x.to(device) for x in (labels, bias, weight)]
    good = [0, count + 1]
    for gradient in (True, False):
        guarded, alone = Guarded(logits.to(device)), logits[good].to(device)
        nll = run_nll(NllArgs(guarded.logits, *moved, gradient=gradient), backend)
        guarded.check()
        of_good = moved[0][good], moved[1], moved[2][good]
        expected = run_nll(NllArgs(alone, *of_good, gradient=gradient), backend)
        assert nll[1:-1].isnan().all() and torch.equal(nll[good], expected)
        assert not gradient or torch.equal(guarded.logits[good], alone)


@pytest.mark.parametrize("backend, dtype", BACKENDS_AND_DTYPES)
def test_ignored_rows(backend, dtype, poisoned_memory):
    """Their logits, which may be anything, become zeros."""
    device = device_of(backend)
    logits, labels, bias, weight = softmax_problem(len(BAD_LABELS) + 3, 5, dtype)
    labels[1:-2] = torch.tensor(BAD_LABELS)
    logits[1:-2] = torch.nan
    weight[1:-1] = 0  # the label of one of them is in the vocabulary
    others = [x.to(device) for x in (labels, bias, weight)]
    wide = logits.double() + bias.double()
    expected = F.cross_entropy(wide, labels.clamp(0, 4), reduction="none")
    expected[1:-2] = 0
    for gradient in (True, False):
        guarded = Guarded(logits.to(device), gap=11)
        nll = run_nll(NllArgs(guarded.logits, *others, gradient=gradient), backend).cpu()
        guarded.check()
        assert_near(nll, expected, 1e-6)
        if gradient:
            got = guarded.logits.cpu()
            assert (got[1:-1] == 0).all() and (got[[0, -1]] != 0).any(1).all()


@pytest.mark.parametrize("backend, dtype", BACKENDS_AND_DTYPES)
def test_labels_outside_have_no_one_hot(backend, dtype):
    device = device_of(backend)
    logits, _, _, weight = softmax_problem(len(BAD_LABELS), 5, dtype)
    labels, moved = torch.tensor(BAD_LABELS).to(device), logits.clone().to(device)
    run_nll(NllArgs(moved, labels, None, weight.to(device), gradient=True), backend)
    expected = weight.double()[:, None] * logits.double().softmax(1)
    allowed = softmax_error(backend, dtype) * expected.abs() + 2**-25
    assert ((moved.cpu().double() - expected).abs() <= allowed).all()


@pytest.mark.parametrize("backend, dtype", BACKENDS_AND_DTYPES)
def test_without_bias_and_gradient_logits_are_left_alone(backend, dtype):
    for vocabulary in (5, 300):
        logits, labels, _, _ = softmax_problem(3, vocabulary, dtype)
        moved = logits.clone().to(device_of(backend))
        run_nll(NllArgs(moved, labels.to(moved.device), None, None, gradient=False), backend)
        assert torch.equal(moved.cpu(), logits)


@pytest.mark.cpp
@pytest.mark.parametrize("dtype", NLL_DTYPES["cpp"])
def test_independent_of_threads(dtype):
    logits, labels, bias, weight = softmax_problem(301, 1031, dtype)
    outcomes = []
    for threads in (1, 2, 7):
        torch.set_num_threads(threads)
        gradient = logits.clone()
        nll = run_nll(NllArgs(gradient, labels, bias, weight, gradient=True), "cpp")
        outcomes.append((nll, gradient))
    torch.set_num_threads(1)
    for nll, gradient in outcomes[1:]:
        assert torch.equal(nll, outcomes[0][0]) and torch.equal(gradient, outcomes[0][1])


@pytest.mark.parametrize("backend, dtype", BACKENDS_AND_DTYPES)
def test_opcheck(backend, dtype):
    tensors = [x.to(device_of(backend)) for x in softmax_problem(2, 5, dtype)]
    operator = torch.ops.nar_kernels.nll_.default
    torch.library.opcheck(operator, (*tensors, True, backend))
    # Without the gradient, logits are undefined, so that two calls cannot be compared.
    only = ("test_schema", "test_faketensor")
    torch.library.opcheck(operator, (*tensors[:2], None, None, False, backend), test_utils=only)
