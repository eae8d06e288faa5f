"""Masked rows padded to a fixed number: the same loss and gradients, with shapes that do not depend
on data."""

import dataclasses
import warnings

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd
from torch.torch_version import TorchVersion

import nar_kernels
from nar_kernels import Corrupted, MaskingConfig, masked_nll
from nar_kernels.ops import linear
from nar_kernels.ops.masked_nll import head_nll
from nar_kernels.spec.schedules import NUM_TIMES, SCHEDULES
from tests.helpers.batches import clean_batch
from tests.helpers.devices import device_of
from tests.helpers.losses import (
    BACKENDS_AND_DTYPES,
    REDUCTIONS,
    TOLERANCE,
    assert_near,
    check,
    corrupted_batch,
    cross_entropy,
    random_inputs,
    results,
)

pytestmark = [
    pytest.mark.usefixtures("one_thread", "any_cpu"),
    pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning"),
]


def static_nll(*args, **kwargs):
    return masked_nll(*args, static_shapes=True, **kwargs)


def padded(function):
    """`function` with reduction "none", padded by zeros."""

    def call(hidden, weight, corrupted, **kwargs):
        value = function(hidden, weight, corrupted, **kwargs)
        if kwargs["reduction"] != "none":
            return value
        return torch.nn.functional.pad(value, (0, corrupted.row_capacity - len(value)))

    return call


# ---- how many rows there can be


def most_rows(masking: MaskingConfig, batch: int, length: int, num_strata: int) -> int:
    """The most that a step can mask, by trying every time in every stratum."""
    ratio = masking.table.ratio.to(torch.int64) & 0xFFFFFFFF
    counts = ((ratio * length + 0xFFFFFFFF) >> 32).clamp(min=1)
    if not num_strata:
        return batch * int(counts.max())
    of_strata = []
    for stratum in range(num_strata):
        first, last = ((stratum << 16) + word for word in (0, NUM_TIMES - 1))
        times = slice(first // num_strata, last // num_strata + 1)
        of_strata.append(int(counts[times].max()))
    return sum(sorted(of_strata, reverse=True)[:batch])


@pytest.mark.parametrize("schedule", [*SCHEDULES, lambda t: 0.15 + 0 * t, lambda t: 0 * t])
@pytest.mark.parametrize("length", [1, 7, 1024])
def test_capacity_is_a_close_bound(schedule, length):
    masking = MaskingConfig(9, 8, schedule=schedule)
    for batch, strata in [(1, 0), (5, 0), (1, 1), (8, 8), (3, 8), (48, 48), (64, 512), (300, 300)]:
        capacity = masking.row_capacity(batch, length, num_strata=strata)
        most = most_rows(masking, batch, length, strata)
        assert most <= capacity <= batch * length
        # The ratio within a 256th of time: all of them together fall by 1, of which the batch has
        # its share.
        assert capacity - most <= batch * length / 256 * 6 + batch


def test_capacity_of_other_draws():
    coins = MaskingConfig(9, 8, draw="bernoulli", schedule=lambda t: 0 * t + 0.1)
    assert coins.row_capacity(4, 10, num_strata=4) == 40  # every coin may fall that way
    exact = MaskingConfig(9, 8, schedule=lambda t: 0 * t + 0.1)
    assert exact.row_capacity(4, 10) == 4 and exact.row_capacity(4, 11) == 8
    assert MaskingConfig(9, 8).row_capacity(64, 1024, num_strata=64) == 65 * 1024 // 2
    for strata in (-1, 3):
        with pytest.raises(ValueError, match=f"num_strata is {strata}: it must be at least the 4"):
            exact.row_capacity(4, 10, num_strata=strata)


def halves_of_steps(masking):
    """Batches of a step and of parts of it, as two ranks make them, and the slots of the wrapper's
    ranks."""
    for seed in range(20):
        tokens = clean_batch(masking, 8, 33, seed=seed)
        yield nar_kernels.corrupt(tokens, masking, seed=seed)
        for rank in (0, 1):
            for slots in (range(24 + 8 * rank, 32 + 8 * rank), range(rank, 16, 2)):
                yield nar_kernels.corrupt(
                    tokens, masking, seed=seed, sample_ids=slots, global_batch=16
                )


@pytest.mark.parametrize("schedule", ["linear", "cosine", "sqrt"])
def test_no_batch_exceeds_its_capacity(schedule):
    masking = MaskingConfig(9, 8, schedule=schedule)
    strata = set()
    for batch in halves_of_steps(masking):
        strata.add(batch.num_strata)
        assert len(batch.masked_rows) <= batch.row_capacity < batch.labels.numel()
        for part in batch.microbatches(3):
            assert part.num_strata == batch.num_strata
            assert len(part.masked_rows) <= part.row_capacity
    assert strata == {8, 16}


def test_strata_that_nobody_knows():
    masking = MaskingConfig(9, 8)
    tokens = clean_batch(masking, 4, 12)
    whole = nar_kernels.corrupt(tokens, masking, seed=0)
    assert whole.num_strata == 4
    slots = torch.arange(4)
    uniform = MaskingConfig(9, 8, times="uniform")
    for unknown in (
        nar_kernels.corrupt(tokens, masking, seed=0, sample_ids=slots),
        nar_kernels.corrupt(tokens, masking, seed=0, global_batch=3),  # two steps
        nar_kernels.corrupt(tokens, uniform, seed=0),
        whole[[0, 0, 1, 2]],
        Corrupted.cat([whole, whole]),
    ):
        assert unknown.num_strata == 0 and unknown.row_capacity == unknown.labels.numel()


def test_a_range_of_slots():
    masking = MaskingConfig(9, 8)
    tokens = clean_batch(masking, 4, 12)
    for slots in (range(1, 12, 3), range(5, 9)):
        got = nar_kernels.corrupt(tokens, masking, seed=0, sample_ids=slots, global_batch=12)
        expected = nar_kernels.corrupt(
            tokens, masking, seed=0, sample_ids=torch.tensor([*slots]), global_batch=12
        )
        assert torch.equal(got.input_ids, expected.input_ids)
        assert (got.num_strata, expected.num_strata) == (12, 0)
    with pytest.raises(ValueError, match="there are 4 windows but 3 sample_ids"):
        nar_kernels.corrupt(tokens, masking, seed=0, sample_ids=range(3))
    for slots in (range(4, 0, -1), range(-4, 0), range(2**63 - 2, 2**63 + 2)):
        with pytest.raises(ValueError, match=r"a range must be in \[0, 2\*\*63\), with a step of"):
            nar_kernels.corrupt(tokens, masking, seed=0, sample_ids=slots)


# ---- padded rows


@pytest.mark.parametrize("draw", ["exact", "bernoulli"])
def test_padded_rows(draw):
    masking = MaskingConfig(9, 8, draw=draw)
    for seed in range(5):
        whole = nar_kernels.corrupt(clean_batch(masking, 6, 20), masking, seed=seed)
        for batch in (whole, *whole.microbatches(2), whole[[5, 0, 0]]):
            rows, is_padding = batch.padded_rows()
            real = len(batch.masked_rows)
            assert len(rows) == len(is_padding) == batch.row_capacity > real
            assert torch.equal(rows[:real], batch.masked_rows)
            assert is_padding.tolist() == [False] * real + [True] * (len(rows) - real)
            # None of them is read much more often than another.
            times = rows.bincount(minlength=batch.labels.numel())
            assert (times > 0).equal(batch.masked_indices.flatten())
            assert times[batch.masked_rows].max() <= times[batch.masked_rows].min() + 1


def test_padded_rows_of_nothing():
    masking = MaskingConfig(9, 8)
    for size in (0, 3):
        none = torch.zeros(size, 7, dtype=torch.bool)
        tokens = clean_batch(masking, size, 7)
        batch = nar_kernels.corrupt(tokens, masking, seed=0, maskable=none)
        for part in (batch, batch[: size // 2]):
            rows, is_padding = part.padded_rows()
            assert len(rows) == part.row_capacity and not rows.any() and is_padding.all()


def test_slices_without_the_counts_of_the_host():
    """As on a GPU: where the rows of a part begin is found there."""
    masking = MaskingConfig(9, 8, draw="bernoulli")
    whole = nar_kernels.corrupt(clean_batch(masking, 6, 20), masking, seed=1)
    for start, stop in [(0, 6), (0, 2), (2, 5), (5, 6), (4, 4), (6, 6)]:
        part = whole[start:stop]
        rows = whole._rows_from(start, part.row_capacity)
        assert len(rows) == part.row_capacity
        assert torch.equal(rows[: len(part.masked_rows)], part.masked_rows)


def test_more_rows_than_the_masking_draws():
    batch = corrupted_batch()
    everything = torch.ones_like(batch.masked_indices)
    batch = dataclasses.replace(batch, masked_indices=everything, num_masked=everything.sum(1))
    assert batch.row_capacity < 21
    with pytest.raises(ValueError, match="has 21 masked rows, but what its masking draws has at"):
        static_nll(*random_inputs(batch)[:2], batch)
    dataclasses.replace(batch, num_strata=0).padded_rows()


# ---- the loss


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("backend, dtype", BACKENDS_AND_DTYPES)
def test_equals_cross_entropy(backend, dtype, reduction, rows_of_a_chunk):
    rows_of_a_chunk(4, 11)
    for draw in ("exact", "bernoulli"):
        corrupted = corrupted_batch(draw=draw).to(device_of(backend))
        assert corrupted.row_capacity > len(corrupted.masked_rows)
        tensors = random_inputs(corrupted, dtype=dtype)
        for chosen in (tensors, tensors[:2]):
            got = results(static_nll, chosen, corrupted, reduction=reduction, backend=backend)
            wide = [x.double() for x in chosen]
            expected = results(padded(cross_entropy), wide, corrupted, reduction=reduction)
            for x, y in zip(got, expected, strict=True):
                assert_near(x, y, TOLERANCE[dtype])


@pytest.mark.parametrize("reduction", ["nelbo", "mean"])
@pytest.mark.parametrize("large_head", [0, 1 << 20])
def test_one_row_at_a_time_is_bit_for_bit_the_same(
    reduction, large_head, rows_of_a_chunk, monkeypatch
):
    """Where products do not differ by their number of rows."""
    rows_of_a_chunk(1, 11)
    monkeypatch.setattr(linear, "_LARGE_HEAD", large_head)
    corrupted = corrupted_batch()
    tensors = random_inputs(corrupted, dtype=torch.float32)
    got = results(static_nll, tensors, corrupted, reduction=reduction)
    for x, y in zip(
        got[1:], results(masked_nll, tensors, corrupted, reduction=reduction)[1:], strict=True
    ):
        assert torch.equal(x, y)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_what_is_not_masked_is_not_read(reduction):
    corrupted = corrupted_batch()
    hidden, weight, bias = random_inputs(corrupted)
    hidden[~corrupted.masked_indices] = torch.nan
    value, *gradients = results(static_nll, [hidden, weight, bias], corrupted, reduction=reduction)
    assert value.isfinite().all() and all(g.isfinite().all() for g in gradients)
    assert not gradients[0][~corrupted.masked_indices].any()


@pytest.mark.parametrize("reduction", ["nelbo", "mean", "sequence"])
def test_ignored_labels_are_not_counted(reduction):
    batch = corrupted_batch()
    batch.labels[:, :3] = -100
    assert (batch.masked_indices & (batch.labels == -100)).any()
    tensors = random_inputs(batch)
    got = results(static_nll, tensors, batch, reduction=reduction)
    expected = results(masked_nll, tensors, batch, reduction=reduction)
    for x, y in zip(got, expected, strict=True):
        assert_near(x, y, 1e-14)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_nothing_masked(reduction):
    for size in (0, 3):
        none = torch.zeros(size, 7, dtype=torch.bool)
        batch = corrupted_batch(batch=size, maskable=none)
        value, *gradients = results(static_nll, random_inputs(batch), batch, reduction=reduction)
        assert not value.any() and not any(g.any() for g in gradients)


def test_parts_add_up():
    batch = corrupted_batch(batch=6)
    hidden, weight, bias = random_inputs(batch)
    whole = masked_nll(hidden, weight, batch, bias=bias)
    count = batch.num_maskable.sum()
    parts = [
        static_nll(part_of, weight, part, bias=bias, normalizer=count)
        for part_of, part in zip(hidden.split(4), batch.microbatches(4), strict=True)
    ]
    assert_near(sum(parts), whole, 1e-14)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_other_heads(reduction):
    batch = corrupted_batch()
    hidden, weight, _ = random_inputs(batch)

    def with_head(hidden, weight, batch, **kwargs):
        return head_nll(hidden, lambda rows: rows @ weight.T, batch, static_shapes=True, **kwargs)

    got = results(with_head, [hidden, weight], batch, reduction=reduction)
    expected = results(padded(cross_entropy), [hidden, weight], batch, reduction=reduction)
    for x, y in zip(got, expected, strict=True):
        assert_near(x, y, 1e-14)


def test_under_autocast():
    def narrow(*args, **kwargs):
        with torch.autocast("cpu", torch.bfloat16):
            return static_nll(*args, **kwargs)

    batch = corrupted_batch()
    tensors = random_inputs(batch, dtype=torch.float32)
    check(tensors, batch, function=narrow, tolerance=1.5e-2)
    with pytest.raises(AssertionError):  # the products are in bfloat16
        check(tensors, batch, function=narrow, tolerance=2e-5)


# ---- torch.compile

# Dynamo of 2.6 does not know dataclasses.replace.
TRACES_PARTS = TorchVersion(torch.__version__) >= "2.7"


@pytest.mark.seconds
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_one_graph_from_ids_to_gradients(backend, reduction):
    """The batch, the loss of all of it, and those of its microbatches."""
    torch._dynamo.reset()
    masking = MaskingConfig(12, 11)
    tokens = clean_batch(masking, 3, 7)
    tensors = random_inputs(corrupted_batch(), dtype=torch.float32)

    def losses(hidden, weight, bias, seed):
        batch = nar_kernels.corrupt(tokens, masking, seed=seed)
        args = dict(bias=bias, reduction=reduction)
        yield static_nll(hidden, weight, batch, **args)
        if not TRACES_PARTS:
            return
        for part_of, part in zip(hidden.split(2), batch.microbatches(2), strict=True):
            yield static_nll(part_of, weight, part, **args)

    def total(hidden, weight, bias, seed):
        return sum(
            (1 + i) * loss.sum() for i, loss in enumerate(losses(hidden, weight, bias, seed))
        )

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of dynamo
        compiled = torch.compile(total, fullgraph=True, backend=backend)
        for seed in range(3):
            for needed in ((True, True, True), (False, True, False)):
                leaves = [x.clone().requires_grad_(n) for x, n in zip(tensors, needed, strict=True)]
                wanted = [x for x in leaves if x.requires_grad]
                got, expected = compiled(*leaves, seed), total(*leaves, seed)
                torch.testing.assert_close(got, expected)
                for x, y in zip(
                    torch.autograd.grad(got, wanted),
                    torch.autograd.grad(expected, wanted),
                    strict=True,
                ):
                    torch.testing.assert_close(x, y)
            with torch.no_grad():
                torch.testing.assert_close(compiled(*tensors, seed), total(*tensors, seed))


@pytest.mark.seconds
def test_compiled_gradients_are_not_computed_twice():
    """They are those that the forward pass made."""
    counts = []

    def count(graph, _):
        counts.append(sum("linear_nll" in str(node.target) for node in graph.graph.nodes))
        return graph.forward

    batch = corrupted_batch()
    tensors = [x.requires_grad_() for x in random_inputs(batch, dtype=torch.float32)]
    torch._dynamo.reset()
    backend = aot_autograd(fw_compiler=count, bw_compiler=count)
    compiled = torch.compile(lambda h, w, b: static_nll(h, w, batch, bias=b), backend=backend)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of dynamo
        compiled(*tensors).backward()
    assert counts == [1, 0]


def test_opcheck():
    batch = corrupted_batch()
    hidden, weight, bias = random_inputs(batch, dtype=torch.float32)
    rows = batch.masked_rows
    picked, labels = hidden.flatten(0, 1)[rows], batch.labels.flatten()[rows]
    for wanted in ((True, True, True), (False, True, False)):
        args = (picked, weight, bias, labels, torch.ones(len(rows)), *wanted, "reference")
        torch.library.opcheck(torch.ops.nar_kernels.linear_nll.default, args)
