"""CUDA kernels on the CPU: any order of threads gives the same result, and the emulation that says
so does see what is wrong with a kernel."""

import ctypes

import pytest
import torch

from nar_kernels import MaskingConfig, backends, unmask
from nar_kernels.ops.backends import cuda, device_type
from tests import cuda_on_cpu
from tests.helpers.batches import assert_same, clean_batch, corrupt

emulated = pytest.mark.skipif(
    cuda is None or device_type("cuda") != "cpu",
    reason="runs on a GPU here, not in the emulation" if cuda else backends()["cuda"],
)
SCHEDULES = [0, 1, 2, 3]


@pytest.fixture
def library():
    library = ctypes.CDLL(str(cuda_on_cpu.LIBRARY))
    for name in ("sum", "divergent", "overrun", "uninitialised"):
        getattr(library, f"run_{name}").restype = ctypes.c_char_p
    yield library
    library.set_schedule(0)
    library.set_num_processors(132)
    library.set_shared_bytes(227 << 10)


# The shape of a batch of 9 depends on the processors of the device: warps with one tile, with up to
# four, eight or twelve; several rows a block; several warps a row; none held.
SHAPES = [
    *((length, 132) for length in (100, 500, 1500, 3000, 9000, 16000, 17000)),
    *((length, 1) for length in (300, 2000)),
    *((length, 0) for length in (128, 250, 512, 1000, 4100)),
]


@emulated
@pytest.mark.seconds
@pytest.mark.parametrize("draw", ["exact", "bernoulli"])
@pytest.mark.parametrize(("length", "num_processors"), SHAPES)
def test_any_order_of_threads_gives_the_same(library, length, num_processors, draw):
    library.set_num_processors(num_processors)
    masking = MaskingConfig(
        90, 89, draw=draw, no_replace_prob=0.2, random_token_prob=0.2, never_mask_ids=(1, 2)
    )
    tokens = clean_batch(masking, 9, length, torch.uint8)
    expected = corrupt(tokens, masking, seed=5, backend="reference")
    for schedule in SCHEDULES:
        library.set_schedule(schedule)
        assert_same(corrupt(tokens, masking, seed=5, backend="cuda"), expected)


def assert_unmasks_as_the_reference(logits, **options):
    options |= dict(mask_id=3, seed=7, noise_slots=torch.arange(len(logits)))
    for confidence in ("margin", "entropy"):
        options["confidence"] = confidence
        got = unmask(logits, backend="cuda", **options)
        for ours, theirs in zip(got, unmask(logits, backend="reference", **options), strict=True):
            assert torch.equal(ours, theirs), options


@emulated
@pytest.mark.seconds
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocabulary", [700, 9000])
def test_any_order_of_threads_unmasks_the_same(library, vocabulary, dtype):
    logits = (3 * torch.randn(5, vocabulary)).to(dtype)
    for schedule in SCHEDULES:
        library.set_schedule(schedule)
        for top_k in (None, vocabulary // 3):
            assert_unmasks_as_the_reference(logits, top_k=top_k)
        assert_unmasks_as_the_reference(logits, top_k=vocabulary // 3, top_p=0.9)


@emulated
@pytest.mark.seconds
@pytest.mark.parametrize("kilobytes", [20, 26, 48])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_that_do_not_fit_into_shared_memory(library, dtype, kilobytes):
    library.set_shared_bytes(kilobytes << 10)
    whole = (3 * torch.randn(3, 15_013)).to(dtype)
    whole[1, ::3] = torch.nan
    whole[2] = whole[2].round()
    for logits in (whole, whole[:, 1:], whole[:, 5:15_005]):
        assert_unmasks_as_the_reference(logits, top_k=4000, forbidden_ids=(0, 9000, 14_999))
        given = torch.tensor([5, -1, 14_000])
        assert_unmasks_as_the_reference(logits, given=given)
        assert_unmasks_as_the_reference(logits, given=given, top_p=0.95)


@emulated
@pytest.mark.parametrize("kilobytes", [20, 227])
def test_ranges_of_forbidden_ids(library, kilobytes):
    """Whole tiles of them, and more than are arguments of the kernel."""
    library.set_shared_bytes(kilobytes << 10)
    forbidden_ids = (0, *range(700, 1500), 8001, 8999)
    logits = torch.randn(4, 9001, dtype=torch.bfloat16)
    logits[0] = logits[0].sort(descending=True).values
    logits[1, 700:1500] += 8
    for given in (None, torch.tensor([699, 700, 8000, 8001])):
        assert_unmasks_as_the_reference(logits, top_k=900, forbidden_ids=forbidden_ids, given=given)


@emulated
def test_logits_next_to_zero(library):
    """Of bfloat16: those that the table of exponentials leaves out."""
    for scale in (1e-2, 1e-6, 1e-30, 0):
        logits = (scale * torch.randn(2, 9000)).bfloat16()
        logits[1, ::7] = 8
        assert_unmasks_as_the_reference(logits, top_k=None)
        got = unmask(logits, mask_id=3, seed=7, noise_slots=torch.arange(2), backend="cuda")
        expected = unmask(logits, mask_id=3, seed=7, noise_slots=torch.arange(2), backend="cpp")
        assert torch.equal(got.log_prob, expected.log_prob)


@emulated
@pytest.mark.parametrize("extreme", ["max", "min"])
def test_the_largest_bfloat16_beside_nan(extreme):
    """The table of exponentials ends there; what is above are NaNs."""
    extreme = getattr(torch.finfo(torch.bfloat16), extreme)
    logits = torch.full((2, 9000), -torch.inf, dtype=torch.bfloat16)
    logits[:, 10:500] = min(extreme, -3e38)
    logits[:, 77] = extreme
    logits[1, 1000:1100] = torch.nan
    for top_k in (None, 100):
        assert_unmasks_as_the_reference(logits, top_k=top_k)


@emulated
def test_a_launch_leaves_no_less_memory_to_those_of_other_threads(library):
    """Of the same kernel, for rows of another size."""
    for vocabulary in (50_000, 9000, 50_000):
        assert_unmasks_as_the_reference(torch.randn(1, vocabulary), temperature=0.7)


@emulated
@pytest.mark.parametrize("length", [1, 128, 129, 2**31 - 129, 2**31 - 128, 2**31 - 1])
def test_tiles_of_a_row_of_any_length(library, length):
    count, is_last_whole = ctypes.c_int32(), ctypes.c_bool()
    library.tiles_of_row(length, ctypes.byref(count), ctypes.byref(is_last_whole))
    assert (count.value, is_last_whole.value) == (-(-length // 128), length % 128 == 0)


@pytest.mark.cuda
@pytest.mark.seconds
@pytest.mark.parametrize(("length", "draw"), [(1000, "exact"), (128, "bernoulli")])
def test_large_batches(length, draw):
    """Several rows a block, and blocks that look back across many others."""
    masking = MaskingConfig(90, 89, draw=draw)
    tokens = clean_batch(masking, 3000, length, torch.int32)
    expected = corrupt(tokens, masking, seed=5, backend="cpp")
    assert_same(corrupt(tokens, masking, seed=5, backend="cuda"), expected)


@emulated
def test_a_missing_barrier_shows(library):
    results = {True: set(), False: set()}
    for with_barrier in results:
        for schedule in SCHEDULES:
            library.set_schedule(schedule)
            sums = (ctypes.c_uint32 * 192)()
            assert library.run_sum(3, sums, with_barrier) is None
            results[with_barrier].add(tuple(sums))
    assert results[True] == {(64 * 63 // 2,) * 192}
    assert len(results[False]) > 1


@emulated
def test_divergence_is_an_error(library):
    error = library.run_divergent(True).decode()
    assert error.startswith("deadlock: thread 0, 0 of block 0 waits at __syncthreads")
    assert "deadlock" in library.run_divergent(False).decode()


@emulated
def test_a_write_behind_shared_memory_is_an_error(library):
    assert library.run_overrun(15) is None
    assert library.run_overrun(16) == b"block 0 wrote to byte 64 of 64 in shared memory"


@emulated
def test_memory_that_a_block_has_not_written_is_garbage(library):
    """Also where another block has been."""
    seen = (ctypes.c_uint32 * 20)()
    assert library.run_uninitialised(20, seen) is None
    assert {*seen} == {0xFFFFFFFF}
