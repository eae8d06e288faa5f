"""`corrupt`: what it promises, on every backend, and that the backends agree bit for bit."""

import itertools
import multiprocessing
import pickle
import random
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import nar_kernels
from nar_kernels import InvalidTokenError, MaskingConfig, backends
from nar_kernels.ops import corrupt_launch, host_counts, reference
from nar_kernels.ops.arguments import WindowOrder
from nar_kernels.ops.backends import cpp
from nar_kernels.ops.corrupt import CorruptStep
from nar_kernels.ops.corrupt_launch import run_corrupt
from nar_kernels.ops.host_counts import HostCounts, count_on_host
from nar_kernels.ops.masking import NUM_INVALID
from nar_kernels.ops.reference import permute_rounds
from nar_kernels.ops.tokens import DTYPE_CODE
from nar_kernels.ops.windows import windows
from nar_kernels.spec.philox import Stream
from tests.helpers import devices
from tests.helpers.batches import TENSORS, arguments, assert_same, clean_batch, corrupt
from tests.helpers.devices import device_of

TOKEN_DTYPES = tuple(DTYPE_CODE)

COMPILED = [
    pytest.param("cpp", marks=pytest.mark.cpp),
    pytest.param("cuda", marks=pytest.mark.cuda),
    pytest.param("triton", marks=pytest.mark.triton),
]

BACKENDS = ["reference", *COMPILED]

if backends()["triton"] == "available":
    import triton
    import triton.language as tl

    from nar_kernels.ops.kernels.corrupt import _rows_before

    @triton.jit
    def rows_before_kernel(out, record, row, WINDOW: tl.constexpr):
        tl.store(out, _rows_before(record, tl.load(row), WINDOW))


GUARD = 64  # elements: a multiple of any alignment


@pytest.fixture
def poisoned_outputs(monkeypatch):
    """What a kernel forgets to write shows, and what it writes beside its outputs."""
    original = corrupt_launch.empty_outputs
    guarded = []

    def poisoned(*args):
        outputs = []
        for like in original(*args):
            memory = torch.empty(like.numel() + 2 * GUARD, dtype=like.dtype, device=like.device)
            memory.view(torch.uint8).fill_(0x5A)
            guarded.append(memory)
            outputs.append(memory[GUARD : GUARD + like.numel()].view(like.shape))
        return tuple(outputs)

    monkeypatch.setattr(corrupt_launch, "empty_outputs", poisoned)
    yield
    assert guarded
    for memory in guarded:
        for guard in (memory[:GUARD], memory[-GUARD:]):
            assert (guard.view(torch.uint8) == 0x5A).all()


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


# ---- the backends agree


SHARES = [(0.0, 0.0, 1.0), (0.1, 0.1, 1.0), (0.15, 0.1, 0.5), (0.0, 1.0, 1.0), (1.0, 0.0, 1.0)]

LENGTHS = [1, 2, 3, 7, 63, 64, 65, 127, 128, 129, 1000]
# To Triton the longest row of one tile; several tiles, of which the last holds one; full tiles.
LENGTHS += [4096, 4097, 6144]
# More tiles than CUDA keeps in registers.
LENGTHS += [pytest.param(n, marks=pytest.mark.slow_interpreted) for n in (65536, 70001)]


def next_power_of_2(n):
    return 1 << (n - 1).bit_length()


def as_flags(tokens, flags, rng):
    return {"maskable": flags}


def as_labels(tokens, flags, rng):
    dtype = rng.choice([torch.int64, torch.int32])
    return {"labels": tokens.to(dtype).masked_fill(~flags, -100)}


def as_loss_mask(tokens, flags, rng):
    return {"loss_mask": flags.to(rng.choice([torch.uint8, torch.int64]))}


def behind_prompts(tokens, flags, rng):
    lengths = (torch.arange(len(tokens)) * 7) % (tokens.shape[1] + 1)
    of = rng.choice([as_flags, as_labels, None])
    return {"prompt_lengths": lengths, **(of(tokens, flags, rng) if of else {})}


WHICH_MAY_BE_MASKED = [as_flags, as_labels, as_loss_mask, behind_prompts]


@pytest.mark.parametrize("backend", COMPILED)
@pytest.mark.parametrize("draw", ["exact", "bernoulli"])
@pytest.mark.parametrize("length", LENGTHS)
def test_equals_reference(length, draw, backend, poisoned_outputs):
    rng = of_kernel = random.Random(f"{length} {draw}")
    if backend == "triton" and not devices.is_interpreted(backend):
        # What it compiles a kernel for is the same for lengths that share a tile.
        of_kernel = random.Random(f"{max(64, next_power_of_2(min(length, 4097)))} {draw}")
    cases = list(itertools.product(SHARES, ["stratified", "uniform"], ["all", "maskable", "never"]))
    num_cases = 3 if length > 4096 or backend != "cpp" else 10
    if length > 8192 and devices.is_interpreted(backend):
        num_cases = 1  # which takes half a minute
    for (keep, rand, coin), times, subset in of_kernel.sample(cases, num_cases):
        num_tokens = rng.choice([3, 17, 120])
        masking = MaskingConfig(
            num_tokens,
            rng.randrange(num_tokens),
            draw=draw,
            times=times,
            schedule=rng.choice(["linear", "cosine", "sqrt", "arccos"]),
            time_range=rng.choice([(0, 1), (0, 0.999), (0.2, 0.7)]),
            weighting=of_kernel.choice(["elbo", "elbo", "unit"]),
            no_replace_prob=keep,
            random_token_prob=rand,
            corruption_prob=coin,
            never_mask_ids=(0, 1) if subset == "never" else (),
        )
        batch = rng.choice([1, 2, 13]) if length <= 4096 else 2
        tokens = clean_batch(masking, batch, length, of_kernel.choice(TOKEN_DTYPES))
        which = of_kernel.choice(WHICH_MAY_BE_MASKED)
        restricted = which(tokens, torch.rand(batch, length) < rng.random(), of_kernel)
        args = dict(
            seed=rng.getrandbits(64),
            sample_ids=torch.arange(batch) + rng.getrandbits(40),
            global_batch=rng.choice([1, batch, 200, 1000]),
            **(restricted if subset != "all" else {}),
        )
        assert_same(
            corrupt(tokens, masking, backend=backend, **args),
            corrupt(tokens, masking, backend="reference", **args),
        )


@pytest.mark.cpp
def test_every_instruction_set_agrees(simd_level):
    for draw, length in itertools.product(["exact", "bernoulli"], [5, 200, 1025]):
        masking = MaskingConfig(
            50, 49, draw=draw, no_replace_prob=0.2, random_token_prob=0.2, never_mask_ids=(3,)
        )
        for dtype in TOKEN_DTYPES:
            tokens = clean_batch(masking, 7, length, dtype)
            expected = corrupt(tokens, masking, seed=1, backend="reference")
            assert_same(corrupt(tokens, masking, seed=1, backend="cpp"), expected)
            a = arguments(tokens, masking, seed=1, narrow=True)
            ids, labels, *_, rows, _ = run_corrupt(a, "cpp")
            assert torch.equal(ids, expected.input_ids.int())
            assert torch.equal(labels, expected.labels.int())
            assert torch.equal(rows[: len(expected.masked_rows)], expected.masked_rows.int())


@pytest.mark.cpp
def test_independent_of_threads(two_threads):
    masking = MaskingConfig(300, 299, no_replace_prob=0.1, random_token_prob=0.1)
    tokens = clean_batch(masking, 61, 2048)
    results = []
    for threads in (1, 2, 7):
        torch.set_num_threads(threads)
        results.append(corrupt(tokens, masking, seed=5, backend="cpp"))
    for result in results[1:]:
        assert_same(results[0], result)


def corrupt_and_send(connection, tokens, masking):
    connection.send(corrupt(tokens, masking, seed=5, backend="cpp").input_ids.numpy())


@pytest.mark.cpp
@pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning")
def test_works_after_a_fork_and_from_many_threads(two_threads):
    """Helper threads do not survive a fork (DataLoader workers), and serve one call at a time."""
    masking = MaskingConfig(300, 299)
    tokens = clean_batch(masking, 40, 2048)
    expected = corrupt(tokens, masking, seed=5, backend="cpp")  # starts the helpers

    context = multiprocessing.get_context("fork")
    here, there = context.Pipe()
    child = context.Process(target=corrupt_and_send, args=(there, tokens, masking))
    child.start()
    assert here.poll(60), "the forked process hangs"
    assert (here.recv() == expected.input_ids.numpy()).all()
    child.join()

    with ThreadPoolExecutor(4) as pool:
        calls = [pool.submit(corrupt, tokens, masking, seed=5, backend="cpp") for _ in range(40)]
        for call in calls:
            assert_same(call.result(), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_independent_of_the_batch_split(backend):
    masking = MaskingConfig(40, 39, no_replace_prob=0.1, random_token_prob=0.1)
    tokens = clean_batch(masking, 12, 50)
    whole = corrupt(tokens, masking, seed=3, backend=backend)
    first = 0
    for size in (1, 4, 7):
        ids = torch.arange(first, first + size)
        part = corrupt(
            tokens[ids], masking, seed=3, sample_ids=ids, global_batch=12, backend=backend
        )
        for name in set(TENSORS) - {"masked_rows", "invalid"}:
            assert torch.equal(getattr(part, name), getattr(whole, name)[ids]), name
        first += size


@pytest.mark.parametrize("backend", BACKENDS)
def test_frozen_outputs(backend):
    """Change nothing here without a new major version: trained runs resume on these bits."""
    masking = MaskingConfig(11, 10, schedule="cosine", no_replace_prob=0.2, random_token_prob=0.2)
    tokens = torch.arange(16).view(2, 8) % 10
    got = corrupt(
        tokens, masking, seed=2026, sample_ids=torch.tensor([5, 1 << 40]), backend=backend
    )
    assert got.input_ids.tolist() == FROZEN_INPUT_IDS
    assert got.masked_indices.int().tolist() == FROZEN_MASK
    assert (got.times * 65536 - 0.5).tolist() == FROZEN_T16
    bernoulli = MaskingConfig(11, 10, draw="bernoulli", times="uniform")
    got = corrupt(tokens, bernoulli, seed=-1, backend=backend)
    assert got.input_ids.tolist() == FROZEN_BERNOULLI


FROZEN_INPUT_IDS = [[10, 1, 2, 5, 10, 10, 6, 7], [10, 6, 10, 10, 10, 3, 9, 5]]

FROZEN_MASK = [[1, 1, 0, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1, 1, 1]]

FROZEN_T16 = [40093.0, 19936.0]

FROZEN_BERNOULLI = [[0, 10, 2, 10, 10, 5, 6, 10], [8, 9, 0, 1, 10, 10, 10, 5]]


WANTED = ("labels", "masked_indices", "masked_rows")


@pytest.mark.parametrize("backend", COMPILED)
@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("draw", ["exact", "bernoulli"])
def test_only_wanted_outputs_are_written(backend, narrow, draw, poisoned_outputs):
    """Of even and odd lengths, which the CUDA kernel writes differently."""
    masking = MaskingConfig(90, 89, draw=draw, no_replace_prob=0.2, random_token_prob=0.2)
    device = device_of(backend)
    dtype = torch.int32 if narrow else torch.int64
    subsets = (0, 2, 5, 7) if devices.is_interpreted(backend) else range(8)
    for length, kept in itertools.product((33, 200), subsets):
        wanted = {name: bool(kept >> i & 1) for i, name in enumerate(WANTED)}
        maskable = torch.rand(9, length, device=device) < 0.8 if kept == 5 else None
        tokens = clean_batch(masking, 9, length, torch.uint16).to(device)
        a = arguments(tokens, masking, seed=3, maskable=maskable)
        expected = run_corrupt(a, "reference")
        a = a._replace(narrow=narrow, **wanted)
        got = run_corrupt(a, backend)
        assert [x.shape for x in got[:3]] == [x.shape for x in run_corrupt(a, "reference")[:3]]
        num_rows = int(expected[5].sum())
        for i, name in ((0, None), (1, "labels"), (2, "masked_indices"), (7, "masked_rows")):
            x, y = got[i], expected[i]
            if i == 7:
                x, y = x[:num_rows], y[:num_rows]
            if name is not None and not wanted[name]:
                assert x.numel() == 0
                continue
            assert x.dtype == (torch.bool if i == 2 else dtype)
            assert torch.equal(x.to(y.dtype), y), (length, wanted, name)
        for i in (3, 4, 5, 6):
            assert torch.equal(got[i], expected[i])


# ---- what the outputs say


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("draw", ["exact", "bernoulli"])
def test_outputs_are_consistent(backend, draw):
    masking = MaskingConfig(
        30, 7, draw=draw, no_replace_prob=0.3, random_token_prob=0.3, never_mask_ids=(0, 2)
    )
    tokens = clean_batch(masking, 20, 99, torch.uint8)
    maskable = torch.rand(20, 99) < 0.8
    got = corrupt(tokens, masking, seed=1, maskable=maskable, backend=backend)
    clean, masked = tokens.long(), got.masked_indices
    can = maskable & (clean != 0) & (clean != 2)
    assert not (masked & ~can).any()
    assert torch.equal(got.labels, torch.where(masked, clean, -100))
    assert torch.equal(got.input_ids[~masked], clean[~masked])
    assert torch.equal(got.clean_ids, clean)
    assert torch.equal(got.num_masked, masked.sum(1))
    assert torch.equal(got.num_maskable, can.sum(1))
    assert torch.equal(got.masked_rows, masked.flatten().nonzero().flatten())
    assert got.input_ids.dtype == got.labels.dtype == torch.int64
    assert got.invalid.tolist() == [0] * 5
    shown = got.input_ids[masked]
    kinds = [(shown == 7), (shown == clean[masked])]
    assert all(kind.any() for kind in kinds) and (~kinds[0] & ~kinds[1]).any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("schedule", ["linear", "cosine", "arccos"])
def test_exact_count_and_weight(backend, schedule):
    masking = MaskingConfig(5, 4, schedule=schedule)
    got = corrupt(clean_batch(masking, 40, 37), masking, seed=8, backend=backend)
    t16 = (got.times * 65536 - 0.5).long()
    ratio = masking.table.ratio[t16].long() & 0xFFFFFFFF
    k = ((ratio * 37 + 0xFFFFFFFF) >> 32).clamp(1, 37)
    assert torch.equal(got.num_masked, k)
    slope = masking.table.exact_weight[t16]
    torch.testing.assert_close(got.loss_weight, slope * 37 / k, rtol=1e-6, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_stratified_times_cover_the_global_batch(backend):
    masking = MaskingConfig(5, 4)
    for batch in (8,) if devices.is_interpreted(backend) else (8, 300):
        ids = torch.arange(3 * batch, 4 * batch)
        got = corrupt(
            clean_batch(masking, batch, 2), masking, seed=1, sample_ids=ids, backend=backend
        )
        strata = (got.times.double() * batch).floor().long()
        assert torch.equal(strata.sort().values, torch.arange(batch))
        assert not torch.equal(strata, torch.arange(batch))


@pytest.mark.parametrize("backend", BACKENDS)
def test_which_positions_may_be_masked_has_one_meaning(backend):
    """Whatever says it; bit for bit, with a weight and a count by what is left."""
    masking = MaskingConfig(9, 8, never_mask_ids=(3,))
    ids, flags = clean_batch(masking, 6, 150), torch.rand(6, 150) < 0.7
    lengths = torch.tensor([0, 1, 64, 149, 150, 20])
    expected = corrupt(
        ids, masking, seed=1, maskable=flags & (torch.arange(150) >= lengths[:, None])
    )
    for how in (
        dict(maskable=flags),
        dict(labels=ids.masked_fill(~flags, -100)),
        dict(labels=ids.int().masked_fill(~flags, -100)),
        dict(loss_mask=flags),
        dict(loss_mask=flags.to(torch.uint8)),
        dict(loss_mask=flags.long()),
    ):
        for length in (lengths, lengths.int()):
            got = corrupt(ids, masking, seed=1, prompt_lengths=length, backend=backend, **how)
            assert_same(got, expected)
    got = corrupt(ids, masking, seed=1, prompt_lengths=lengths, backend=backend)
    assert torch.equal(
        got.num_maskable, ((ids != 3) & (torch.arange(150) >= lengths[:, None])).sum(1)
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_maskable_is_nothing_masked(backend):
    for draw in ("exact", "bernoulli"):
        masking = MaskingConfig(5, 4, draw=draw, random_token_prob=1.0)
        tokens = clean_batch(masking, 3, 10)
        none = torch.zeros(3, 10, dtype=torch.bool)
        got = corrupt(tokens, masking, seed=1, maskable=none, backend=backend)
        assert torch.equal(got.input_ids, tokens) and got.num_masked.sum() == 0
        assert len(got.masked_rows) == 0 and torch.isfinite(got.loss_weight).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_batch(backend):
    got = corrupt(
        torch.empty(0, 8, dtype=torch.int64), MaskingConfig(5, 4), seed=1, backend=backend
    )
    assert got.input_ids.shape == (0, 8) and len(got.masked_rows) == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_windows_of_a_corpus(backend):
    """The corpus form equals the batch form on the same windows; strides may overlap."""
    masking = MaskingConfig(300, 0)
    corpus = clean_batch(masking, 1, 1000, torch.uint16).flatten()
    starts = torch.tensor([0, 1, 900, 899, 37])
    got = corrupt(corpus, masking, seed=4, starts=starts, seq_len=100, backend=backend)
    rows = torch.stack([corpus.to(torch.int64)[s : s + 100] for s in starts])
    assert_same(got, corrupt(rows, masking, seed=4, backend=backend))
    assert torch.equal(got.clean_ids, rows)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype, top", [(torch.uint16, 65535), (torch.uint32, 2**31 - 2)])
def test_ids_in_the_upper_half_of_unsigned_types(backend, dtype, top):
    masking = MaskingConfig(top + 1, 5)
    tokens = torch.tensor([[top, top - 1, 0, 1]]).to(dtype)
    got = corrupt(tokens, masking, seed=1, backend=backend)
    assert got.clean_ids.tolist() == [[top, top - 1, 0, 1]]


def test_not_contiguous_inputs():
    masking = MaskingConfig(50, 49)
    tokens = clean_batch(masking, 10, 12)
    maskable = torch.rand(10, 12) < 0.5
    assert_same(
        corrupt(tokens.T, masking, seed=1, maskable=maskable.T),
        corrupt(tokens.T.contiguous(), masking, seed=1, maskable=maskable.T.contiguous()),
    )


def test_microbatches_hold_the_same_rows():
    masking = MaskingConfig(50, 49)
    whole = corrupt(clean_batch(masking, 10, 12), masking, seed=1)
    parts = list(whole.microbatches(4))
    assert [len(p) for p in parts] == [4, 4, 2]
    for name in set(TENSORS) - {"masked_rows", "invalid"}:
        assert torch.equal(torch.cat([getattr(p, name) for p in parts]), getattr(whole, name))
    for part in parts:
        assert torch.equal(part.masked_rows, part.masked_indices.flatten().nonzero().flatten())


# ---- bad input


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [-1, 20, 19, -(2**63), 2**63 - 1, 2**32 + 3, 2**31])
def test_invalid_ids_are_named(backend, bad):
    masking = MaskingConfig(20, 19)
    corpus = clean_batch(masking, 1, 200).flatten()
    corpus[[77, 150]] = bad
    with pytest.raises(InvalidTokenError) as caught:
        starts = torch.tensor([140, 60, 0])
        corrupt(corpus, masking, seed=1, starts=starts, seq_len=50, backend=backend)
    error = caught.value
    assert (error.token_id, error.offset, error.count) == (bad, 77, 2)
    reason = "equals mask_id" if bad == 19 else r"is outside \[0, 20\)"
    with pytest.raises(InvalidTokenError, match=rf"token id {bad} at tokens\[1, 7\] {reason}"):
        rows = clean_batch(masking, 3, 20)
        rows[1, 7] = bad
        corrupt(rows, masking, seed=1, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", TOKEN_DTYPES)
def test_invalid_ids_of_every_dtype(backend, dtype):
    masking = MaskingConfig(100, 0)
    for bad in (-1, 100) if dtype.is_signed else (100,):
        tokens = torch.full((2, 70), 5).to(dtype)
        tokens[1, 65] = bad
        with pytest.raises(InvalidTokenError, match=rf"token id {bad} at tokens\[1, 65\]"):
            corrupt(tokens, masking, seed=1, backend=backend)


@pytest.mark.parametrize("mask_id", [0, 3])
@pytest.mark.parametrize("backend", BACKENDS)
def test_bad_ids_are_replaced_by_a_valid_one(backend, mask_id):
    """So that a deferred check, as on a GPU, never looks up a bad embedding row."""
    masking = MaskingConfig(10, mask_id, never_mask_ids=(5,))
    device = torch.device(device_of(backend))
    tokens = torch.tensor([[-5, 99, mask_id, 5]], device=device)
    outputs = torch.ops.nar_kernels.corrupt.default(*arguments(tokens, masking), backend)
    input_ids, labels = outputs[:2]
    assert ((input_ids >= 0) & (input_ids < 10)).all() and (labels < 10).all()
    assert (labels != mask_id).all() and outputs[-1].tolist() == [3, 0, -5, 0, 0]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("start", [-1, 91, 2**62, -(2**63)])
def test_window_outside_the_corpus(backend, start):
    masking = MaskingConfig(20, 19)
    corpus = clean_batch(masking, 1, 100).flatten()
    starts = torch.tensor([0, start])
    named = f"window start {start} .* corpus of 100 tokens"
    if backend in ("reference", "cpp"):
        with pytest.raises(IndexError, match=named):
            windows(corpus, starts, 10, num_tokens=20, mask_id=19, backend=backend)
    else:
        named = "1 of 2 windows reach outside the corpus"
    with pytest.raises(IndexError, match=named):
        corrupt(corpus, masking, seed=1, starts=starts, seq_len=10, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_negative_sample_ids(backend):
    with pytest.raises(ValueError, match="sample ids? .* negative"):
        corrupt(
            torch.zeros(1, 2, dtype=torch.int64),
            MaskingConfig(3, 2),
            seed=1,
            sample_ids=torch.tensor([-1]),
            backend=backend,
        )


IDS = torch.zeros(2, 4, dtype=torch.int64)


@pytest.mark.parametrize(
    "change, error, message",
    [
        (dict(tokens=IDS.float()), TypeError, "float32.*uint8"),
        (dict(tokens=IDS.bool()), TypeError, "bool"),
        (dict(tokens=IDS[0]), ValueError, r"shape \[4\].*starts and seq_len"),
        (dict(tokens=IDS[:, :0]), ValueError, "seq_len is 0"),
        (dict(seq_len=5), ValueError, "seq_len is 5 but tokens have length 4"),
        (dict(tokens=IDS[0], starts=torch.zeros(1)), ValueError, "flat corpus"),
        (dict(tokens=IDS[0], starts=torch.zeros(1), seq_len=2), ValueError, "starts must be int64"),
        (dict(sample_ids=torch.arange(3)), ValueError, "2 windows but 3 sample_ids"),
        (dict(sample_ids=torch.arange(2).int()), ValueError, "sample_ids must be int64"),
        (dict(sample_ids=torch.tensor(2)), ValueError, "sample_ids must be int64"),
        (dict(global_batch=0), ValueError, "global_batch is 0"),
        (dict(maskable=IDS), TypeError, r"maskable is torch.int64.*it must be bool \[2, 4\]"),
        (dict(maskable=IDS[:1].bool()), ValueError, r"maskable is .*it must be bool \[2, 4\]"),
        (dict(labels=IDS.float()), TypeError, r"labels is .*must be int64 or int32 \[2, 4\]"),
        (dict(loss_mask=[1, 0]), TypeError, "loss_mask is a list: it must be a tensor, bool or"),
        (
            dict(labels=IDS, loss_mask=IDS),
            ValueError,
            "labels and loss_mask say the same: which positions may be masked; pass one of them",
        ),
        (dict(prompt_lengths=IDS), ValueError, r"prompt_lengths is .*int64 or int32 \[2\]"),
        (
            dict(prompt_lengths=torch.tensor([0, 5])),
            ValueError,
            r"prompt_lengths\[1\] is 5: it must be in \[0, 4\], the length of the sequence",
        ),
        (dict(backend="cuda2"), ValueError, "unknown backend 'cuda2'.*'reference'"),
    ],
)
def test_argument_errors(change, error, message):
    args = dict(tokens=IDS, masking=MaskingConfig(3, 2), seed=1) | change
    with pytest.raises(error, match=message):
        corrupt(**args)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(num_tokens=1), "num_tokens is 1"),
        (dict(mask_id=10), r"mask_id 10 is not in \[0, num_tokens\) = \[0, 10\)"),
        (dict(mask_id=-1), "mask_id -1"),
        (dict(draw="topk"), "draw is 'topk'.*exact"),
        (dict(times="iid"), "times is 'iid'.*uniform"),
        (dict(no_replace_prob=1.5), "no_replace_prob is 1.5"),
        (dict(no_replace_prob=0.6, random_token_prob=0.6), "at most 1"),
        (dict(never_mask_ids=(10,)), "never_mask_ids holds 10"),
        (dict(schedule="nope"), "unknown schedule 'nope'"),
    ],
)
def test_masking_config_errors(change, message):
    with pytest.raises(ValueError, match=message):
        MaskingConfig(**(dict(num_tokens=10, mask_id=9) | change))


# ---- selection under ties, which random keys hardly ever show


@pytest.mark.cpp
@pytest.mark.parametrize("spread", [1, 2, 5, 100, 2**16, 2**20, 2**32])
def test_key_bounds_choose_the_smallest(spread):
    generator = torch.Generator().manual_seed(spread)
    for trial in range(100):
        length = int(torch.randint(1, 200, (1,), generator=generator))
        low = int(torch.randint(0, 2**32 - spread + 1, (1,), generator=generator))
        keys = low + torch.randint(0, spread, (length,), generator=generator)
        if trial % 3 == 0:  # crowd the largest key, which also marks excluded positions
            keys[torch.rand(length, generator=generator) < 0.5] = 2**32 - 1
        can_take = torch.rand(length, generator=generator) < (1 if trial % 2 else 0.7)
        n = int(can_take.sum())
        ranks = torch.randint(0, n + 1, (3,), generator=generator).sort().values.tolist()
        raw = torch.where(can_take, keys, 2**32 - 1)
        words = raw.to(torch.uint32)
        bounds = cpp.key_bounds(words.data_ptr(), can_take.data_ptr(), length, n, ranks)
        order = torch.where(can_take, keys, 2**33).argsort(stable=True).tolist()
        for rank, bound in zip(ranks, bounds, strict=True):
            below = {i for i, key in enumerate(raw.tolist()) if key << 32 | i < bound}
            assert {i for i in below if can_take[i]} == set(order[:rank]), (trial, rank)


# For each length a sample with two equal keys in the lower half. Those of 5000 lie in the first and
# the last of Triton's three tiles; 9000 are more than CUDA keeps in registers.
EQUAL_KEYS = {2000: 7429, 4000: 1670, 5000: 2067, 9000: 297}


@pytest.mark.parametrize("backend", COMPILED)
@pytest.mark.parametrize(
    "length", [2000, 4000, 5000, pytest.param(9000, marks=pytest.mark.slow_interpreted)]
)
def test_equal_keys_at_the_boundary(length, backend):
    """A row of keys that holds a pair of equal ones, with the boundary between the two."""
    from nar_kernels.spec.philox import Stream, words

    sample = EQUAL_KEYS[length]
    ordered = words(0, Stream.MASK_KEY, torch.tensor(sample), torch.arange(length)).sort().values
    pairs = (ordered[1:] == ordered[:-1]).nonzero()
    assert len(pairs) and 2 * (int(pairs[0]) + 1) <= length
    rank = int(pairs[0]) + 1
    tokens = clean_batch(MaskingConfig(9, 8), 1, length)
    cases = [  # how many are masked, and the shares of which the boundary is one
        (rank, {}),
        (rank, {"no_replace_prob": 0.3, "random_token_prob": 0.3}),
        (2 * rank, {"no_replace_prob": 0.5, "random_token_prob": 0.25}),
        (2 * rank, {"no_replace_prob": 0.25, "random_token_prob": 0.25}),
    ]
    for k, shares in cases:
        masking = MaskingConfig(9, 8, schedule=lambda t, k=k: 0 * t + k / length, **shares)
        for maskable in (None, torch.ones(1, length, dtype=torch.bool)):
            args = dict(seed=0, sample_ids=torch.tensor([sample]), maskable=maskable)
            args["views"] = "complement"  # of the pair, the other key is the other view's
            got = corrupt(tokens, masking, backend=backend, **args)
            assert got.num_masked.tolist() == [k, length - k]
            assert got.masked_indices.sum(0).eq(1).all()
            assert_same(got, corrupt(tokens, masking, backend="reference", **args))


@pytest.mark.parametrize("backend", COMPILED)
@pytest.mark.parametrize("length", [4096, 6144])
@pytest.mark.parametrize("keep, rand", [(0.9, 0.1), (0.02, 0.9)])
def test_all_of_a_long_row(keep, rand, length, backend):
    """Counts for each bound are those of nearly all positions of a tile."""
    masking = MaskingConfig(
        9, 8, schedule=lambda t: 0 * t + 1, no_replace_prob=keep, random_token_prob=rand
    )
    tokens = clean_batch(masking, 1, length)
    got = corrupt(tokens, masking, seed=2, backend=backend)
    assert got.masked_indices.all()
    assert_same(got, corrupt(tokens, masking, seed=2, backend="reference"))


@pytest.mark.triton
@pytest.mark.parametrize(
    ("length", "bits"), [(1, 0), (90, 0), (90, 1), (90, 3), (500, 6), (5000, 1)]
)
def test_crowded_keys(length, bits, monkeypatch):
    """Of few different values, the largest of which is that of excluded positions, too."""
    if not devices.is_interpreted("triton"):
        pytest.skip("needs the interpreter, where a function of a kernel can be exchanged")
    from nar_kernels.ops.kernels import corrupt as kernel

    low = (1 << 32 - bits) - 1
    load_tile, words = kernel._load_tile, reference.words

    def crowded_words(seed, stream, *place):
        drawn = words(seed, stream, *place)
        return drawn | low if stream == Stream.MASK_KEY else drawn

    def crowded_tile(*arguments):
        tile = load_tile(*arguments)
        return tile._replace(keys=tile.keys | low)

    monkeypatch.setattr(kernel, "_load_tile", crowded_tile)
    monkeypatch.setattr(reference, "words", crowded_words)
    masking = MaskingConfig(9, 8, no_replace_prob=0.3, random_token_prob=0.3, never_mask_ids=(5,))
    tokens = clean_batch(masking, 4 if length < 1000 else 1, length)
    assert_same(
        corrupt(tokens, masking, seed=1, backend="triton"),
        corrupt(tokens, masking, seed=1, backend="reference"),
    )


@pytest.mark.triton
@pytest.mark.parametrize("row", [0, 1, 31, 32, 33, 64, 100])
@pytest.mark.parametrize("summed", [0, 1, 30, 70, 99])
def test_look_back_over_several_windows(row, summed):
    """Where rows run one after the other, the one before has always summed up already."""
    device = device_of("triton")
    own, up_to = 1 << 60, 2 << 60  # the flags of the kernel
    counts = torch.arange(1, 101)
    published = own + counts
    if summed < row:
        published[: summed + 1] = 0  # what is further back is not looked at
        published[summed] = up_to + counts[: summed + 1].sum()
    else:
        published[0] += up_to - own
    record = torch.cat([torch.zeros(NUM_INVALID + 1, dtype=torch.int64), published]).to(device)
    out = torch.zeros(1, dtype=torch.int64, device=device)
    rows_before_kernel[(1,)](out, record, torch.tensor([row], device=device), WINDOW=32)
    assert out.item() == counts[:row].sum()


# ---- slots and windows found by the kernel


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("num_windows", [1, 5, 256, 257, 3000])
def test_step(num_windows, shuffle, backend):
    """Equals `corrupt` with the slots and starts written out, step and seed as numbers or not."""
    masking = MaskingConfig(50, 49, no_replace_prob=0.1, random_token_prob=0.1)
    length, stride, phase, seed = 9, 4, 3, -7
    device = torch.empty(0, device=device_of(backend)).device  # with its index
    corpus = clean_batch(masking, 1, phase + (num_windows - 1) * stride + length, torch.int16)[0]
    order = WindowOrder(num_windows, phase, stride, shuffle)
    for step, rank, batch, world_size in [(0, 0, 7, 1), (2**33, 70, 4, 75)]:
        slots = (step * world_size + rank) * batch + torch.arange(batch)
        index = slots % num_windows
        if shuffle:
            rounds = slots // num_windows
            index = permute_rounds(seed, Stream.WINDOW_ORDER, rounds, index, num_windows)
        expected = corrupt(
            corpus,
            masking,
            seed=seed,
            starts=phase + index * stride,
            seq_len=length,
            sample_ids=slots,
            global_batch=batch * world_size,
            backend="reference",
        )
        for scalar in (int, lambda x: torch.tensor([x], device=device)):
            make = CorruptStep(
                corpus.to(device),
                masking,
                order,
                batch_size=batch,
                rank=rank,
                global_batch=batch * world_size,
                seq_len=length,
                seed=scalar(seed),
                device=device,
                backend=backend,
            )
            assert_same(make(scalar(step)).to("cpu"), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_scalars_on_the_device(backend):
    masking = MaskingConfig(50, 49)
    tokens = clean_batch(masking, 3, 20)
    device = device_of(backend)
    seed = torch.tensor(5, device=device)
    got = corrupt(tokens, masking, seed=seed, backend=backend)
    assert_same(got, corrupt(tokens, masking, seed=5, backend="reference"))
    with pytest.raises(ValueError, match="int64 with one element; got torch.float32"):
        corrupt(tokens, masking, seed=seed.float(), backend=backend)
    with pytest.raises(ValueError, match=r"one element; got torch.int64 \[2\]"):
        corrupt(tokens, masking, seed=torch.zeros(2, dtype=torch.int64), backend=backend)


# ---- counts that the host finds by itself


@pytest.mark.cpp
@pytest.mark.parametrize("times", ["stratified", "uniform"])
@pytest.mark.parametrize("schedule", ["linear", "arccos"])
@pytest.mark.parametrize("draw", ["exact", "bernoulli"])
def test_counts_on_the_host(times, schedule, draw, simd_level):
    masking = MaskingConfig(9, 8, schedule=schedule, times=times, draw=draw)
    for batch, length, first, global_batch in [
        *((7, 1, 0, 7), (40, 129, 2**40, 1000), (0, 5, 0, 1), (21, 3001, 5, 26)),
    ]:
        tokens = clean_batch(masking, batch, length)
        slots = torch.arange(first, first + batch)
        got = corrupt(tokens, masking, seed=-3, sample_ids=slots, global_batch=global_batch)
        a = arguments(tokens, masking, seed=-3, first_sample=first, global_batch=global_batch)
        assert torch.equal(count_on_host(a, masking, range(first, first + batch))(), got.num_masked)
        # Those of a rank, with gaps.
        slots = range(first, first + 3 * batch, 3)
        args = dict(seed=-3, global_batch=global_batch, sample_ids=torch.tensor([*slots]).long())
        got = corrupt(tokens, masking, **args)
        a = arguments(tokens, masking, **args)
        assert torch.equal(count_on_host(a, masking, slots)(), got.num_masked)


def test_what_the_host_cannot_know():
    masking = MaskingConfig(9, 8)
    tokens = clean_batch(masking, 4, 12)
    a = arguments(tokens, masking)
    assert count_on_host(a, masking, None) is None
    for name in ("step", "maskable", "prompt_lengths", "never_mask", "seed_tensor"):
        assert count_on_host(a._replace(**{name: 1}), masking, range(4)) is None


@pytest.mark.cpp
def test_the_host_counts_when_asked(monkeypatch):
    """Once for a batch and all of its parts, which may travel before that; nothing of the batch is
    kept for it."""
    masking = MaskingConfig(50, 49)
    tokens = clean_batch(masking, 10, 12)
    batch = corrupt(tokens, masking, seed=1)
    a = arguments(tokens, masking, seed=1)
    kept = weakref.ref(a.tokens)
    calls = []
    fake = SimpleNamespace(count_masked=lambda *args: calls.append(cpp.count_masked(*args)))
    monkeypatch.setattr(host_counts, "cpp", fake)
    counts = count_on_host(a, masking, range(10))
    part = counts[2:5]
    del a, tokens
    assert not calls and kept() is None
    assert torch.equal(part(), batch.num_masked[2:5])
    assert torch.equal(counts(), batch.num_masked) and torch.equal(part(), counts()[2:5])
    assert len(calls) == 1
    sent = pickle.dumps(part)
    assert torch.equal(pickle.loads(sent)(), batch.num_masked[2:5])
    assert len(calls) == 1


def test_counts_of_the_host_are_used():
    """They travel with the batch and its parts; the device is not asked."""
    masking = MaskingConfig(50, 49)
    whole = corrupt(clean_batch(masking, 10, 12), masking, seed=1)
    told = replace(
        whole, counts_on_host=HostCounts.of(whole.num_masked), num_masked=torch.zeros(10, dtype=int)
    )
    assert torch.equal(told.masked_rows, whole.masked_rows)
    for a, b in zip(told.to("cpu").microbatches(4), whole.microbatches(4), strict=True):
        assert torch.equal(a.masked_rows, b.masked_rows)


# ---- inside torch


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_gradient_of_a_batch_whose_memory_was_taken_over(backend):
    """The ids that autograd keeps of it have other values by then."""
    masking = MaskingConfig(20, 19)
    tokens = clean_batch(masking, 6, 32).to(device_of(backend))
    table = torch.randn(20, 4, device=tokens.device, requires_grad=True)
    batch = nar_kernels.corrupt(tokens, masking, seed=1, backend=backend)
    total = torch.nn.functional.embedding(batch.input_ids, table).sum()
    nar_kernels.corrupt(tokens, masking, seed=2, out=batch, backend=backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()


def test_opcheck():
    # Everything is masked, so that no part of row_buffer is undefined and runs can be compared.
    masking = MaskingConfig(9, 8, schedule=lambda t: 0 * t + 1)
    for backend in [name for name, state in backends().items() if state == "available"]:
        device = torch.device(device_of(backend))
        a = arguments(clean_batch(masking, 2, 12).to(device), masking)
        a = a._replace(
            sample_ids=torch.arange(2, device=device),
            maskable=torch.ones(2, 12, dtype=torch.bool, device=device),
            prompt_lengths=torch.zeros(2, dtype=torch.int64, device=device),
        )
        torch.library.opcheck(torch.ops.nar_kernels.corrupt.default, (*a, backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_in_one_graph(backend):
    masking = MaskingConfig(9, 8)
    graphs = []

    def count(module, inputs):
        graphs.append(module)
        return module

    def step(tokens, ids, seed):
        got = nar_kernels.corrupt(
            tokens, masking, seed=seed, sample_ids=ids, global_batch=4, backend=backend
        )
        return (got.input_ids * got.masked_indices).sum(), got.labels

    compiled = torch.compile(step, fullgraph=True, backend=count)
    device = device_of(backend)
    for seed in range(4):
        tokens = clean_batch(masking, 4, 12).to(device)
        ids = torch.arange(4 * seed, 4 * seed + 4, device=device)
        args = (tokens, ids, seed)
        for got, expected in zip(compiled(*args), step(*args), strict=True):
            assert torch.equal(got, expected)
    assert len(graphs) <= 2  # one with the seed as a constant, one with any seed
