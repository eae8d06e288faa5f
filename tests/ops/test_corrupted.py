"""Batches as values: parts of them, several in one, and copies that travel."""

import copy
import io
import itertools
import pickle
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torch.utils.data._utils.pin_memory import pin_memory

from nar_kernels import corrupt
from nar_kernels.data.loader import MaskedLoader
from nar_kernels.data.windows.dataset import TokenDataset
from nar_kernels.ops.corrupted import OUTPUTS, Corrupted, Output
from nar_kernels.ops.host_counts import HostCounts
from nar_kernels.ops.masked_nll import head_nll, masked_nll, num_counted
from nar_kernels.ops.masking import MaskingConfig

MASKING = MaskingConfig(37, 36, never_mask_ids=(5,), random_token_prob=0.2, no_replace_prob=0.2)
PER_SAMPLE = ["input_ids", "labels", "masked_indices", "times", "loss_weight"]
PER_SAMPLE += ["num_masked", "num_maskable", "class_ids"]


def falling(t: Tensor) -> Tensor:
    return 1 - t**5


def make_batch(seed: int = 1, size: int = 5, masking: MaskingConfig = MASKING) -> Corrupted:
    ids = torch.randint(0, 36, (size, 16), generator=torch.Generator().manual_seed(seed))
    batch = corrupt(ids, masking, seed=seed)
    counts = HostCounts.of(batch.num_masked.clone())  # as on a GPU
    return replace(batch, counts_on_host=counts, class_ids=torch.arange(size) % 3)


def assert_is(batch: Corrupted, **expected: Tensor) -> None:
    for name, value in expected.items():
        assert torch.equal(getattr(batch, name), value), name
    assert torch.equal(batch.masked_rows, batch.masked_indices.flatten().nonzero().flatten())
    if batch.host_counts is not None:
        assert torch.equal(batch.host_counts, batch.num_masked)


def per_sample(batch: Corrupted) -> dict[str, Tensor]:
    of_batch = {name: getattr(batch, name) for name in PER_SAMPLE}
    return {name: value for name, value in of_batch.items() if value is not None}


def test_every_tensor_is_known_here() -> None:
    others = {
        "row_buffer",
        "invalid",
        "masking",
        "counts_on_host",
        "num_strata",
        "documents",
        "spans",
        "views",
        "num_classes",
    }
    assert {f.name for f in fields(Corrupted)} == {*PER_SAMPLE, *others}


# Parts


@pytest.mark.parametrize("knows_counts", [True, False])
@pytest.mark.parametrize(
    ("index", "samples"),
    [
        (slice(2, 4), [2, 3]),
        (slice(None), [0, 1, 2, 3, 4]),
        (slice(-2, 100), [3, 4]),
        (slice(3, 1), []),
        (slice(None, None, 2), [0, 2, 4]),
        (slice(None, None, -2), [4, 2, 0]),
        ([3, 0, 0, -1], [3, 0, 0, 4]),
        ([np.int64(1)], [1]),
        ([], []),
        (np.array([4, 1], "int32"), [4, 1]),
        (torch.tensor([4, -5]), [4, 0]),
        (torch.tensor([2], dtype=torch.uint8), [2]),
        (torch.tensor([True, False, False, True, True]), [0, 3, 4]),
    ],
)
def test_some_samples(index: Any, samples: list[int], knows_counts: bool) -> None:
    whole = make_batch()
    if not knows_counts:
        whole = replace(whole, counts_on_host=None)
    part = whole[index]
    assert_is(part, **{name: value[samples] for name, value in per_sample(whole).items()})
    assert (part.host_counts is not None) == knows_counts
    assert part.masking is MASKING
    assert torch.equal(part.clean_ids, whole.clean_ids[samples])
    # A part of a part.
    assert_is(part[1:], **{name: value[1:] for name, value in per_sample(part).items()})


def test_a_slice_asks_only_the_host() -> None:
    """The counts of the device are not looked at where the host knows them."""
    batch = make_batch()
    told = replace(batch, num_masked=torch.zeros(5, dtype=torch.int64))
    assert torch.equal(told[2:4].masked_rows, batch[2:4].masked_rows)


@pytest.mark.parametrize(
    "index",
    [3, np.int64(3), torch.tensor(3), (1, 2), "a", None, [1.5], [[1]], torch.ones(4) > 0, [True]],
)
def test_what_is_no_index(index: Any) -> None:
    with pytest.raises(TypeError, match="the index of a batch is .* must be a slice, a list or"):
        make_batch()[index]


@pytest.mark.parametrize("sample", [5, -6, 1 << 40])
def test_samples_that_are_not_there(sample: int) -> None:
    with pytest.raises(IndexError, match=rf"sample {sample} is outside \[-5, 5\)"):
        make_batch()[[0, sample]]


@pytest.mark.parametrize("size", [0, -1])
def test_microbatches_need_a_size(size: int) -> None:
    with pytest.raises(ValueError, match=f"size is {size}: it must be at least 1"):
        make_batch().microbatches(size)  # at once, not when somebody iterates


def test_microbatches_by_a_number_of_numpy() -> None:
    batch = make_batch()
    parts = list(batch.microbatches(np.int64(2)))
    assert [len(part) for part in parts] == [2, 2, 1]
    assert_is(Corrupted.cat(parts), **per_sample(batch))


# Several in one


def test_cat() -> None:
    batches = [make_batch(seed, size) for seed, size in ((1, 5), (2, 0), (3, 2))]
    whole = Corrupted.cat(iter(batches))
    for name in PER_SAMPLE:
        assert torch.equal(getattr(whole, name), torch.cat([getattr(b, name) for b in batches]))
    assert_is(whole)
    assert whole.host_counts is not None
    unknown = Corrupted.cat([batches[0], replace(batches[2], counts_on_host=None)])
    assert unknown.host_counts is None
    assert_is(unknown, masked_rows=whole.masked_rows)
    assert_is(Corrupted.cat(batches[:1]), **per_sample(batches[0]))


def test_cat_keeps_what_was_wrong() -> None:
    """The lowest offset of those that found something, and the counts of all."""
    batches = [make_batch() for _ in range(4)]
    for batch, record in zip(
        batches, ([0, 0, 0, 1, 0], [2, 70, 99, 0, 0], [1, 30, 36, 1, 2], [0] * 5), strict=True
    ):
        batch.invalid = torch.tensor(record)
    assert Corrupted.cat(batches).invalid.tolist() == [3, 30, 36, 2, 2]
    assert not Corrupted.cat(batches[-1:]).invalid.any()


def test_what_cannot_be_put_together() -> None:
    batch = make_batch()
    shorter = corrupt(batch.clean_ids[:, :9], MASKING, seed=1)
    other = make_batch(masking=MaskingConfig(37, 36))
    for batches in ([], [batch, shorter], [batch, other], [batch, batch.to("meta")]):
        with pytest.raises(
            ValueError, match="at least one, all of the same seq_len, device, dtype"
        ):
            Corrupted.cat(batches)


# Copies


def saved(batch: Corrupted) -> bytes:
    file = io.BytesIO()
    torch.save(batch, file)
    return file.getvalue()


def loaded(content: bytes) -> Corrupted:
    return torch.load(io.BytesIO(content), weights_only=False)


@pytest.mark.parametrize(("dump", "load"), [(pickle.dumps, pickle.loads), (saved, loaded)])
def test_a_batch_travels(
    dump: Callable[[Corrupted], bytes], load: Callable[[bytes], Corrupted]
) -> None:
    masking = MaskingConfig(50_000, 36, schedule=falling, never_mask_ids=[3], draw="bernoulli")
    batch = make_batch(masking=masking)
    pickled = dump(batch)
    assert len(pickled) < 10_000  # no table of 65536 times, nor one of the vocabulary
    arrived = load(pickled)
    assert_is(arrived, **per_sample(batch), invalid=batch.invalid)
    assert arrived.masking == masking
    for name in ("weight_table", "never_mask_table"):
        assert torch.equal(getattr(arrived.masking, name), getattr(masking, name))
    assert arrived.masking.shares == masking.shares


def test_a_part_travels_alone() -> None:
    batch = make_batch(size=1000)
    for part in (batch[10:12], batch[[10, 11]], next(batch.microbatches(2))):
        pickled = pickle.dumps(part)
        assert len(pickled) < 6000
        assert_is(pickle.loads(pickled), **per_sample(part))


def test_copies() -> None:
    batch = make_batch()
    shallow, deep = copy.copy(batch), copy.deepcopy(batch)
    assert shallow.labels is batch.labels and shallow.row_buffer is batch.row_buffer
    assert deep.labels is not batch.labels and deep.masking is batch.masking
    assert_is(deep, **per_sample(batch))
    assert copy.deepcopy(MASKING) is MASKING


def test_a_configuration_travels_as_its_arguments() -> None:
    masking = replace(MASKING, schedule="cosine", times="uniform", corruption_prob=0.5)
    pickled = pickle.dumps(masking)
    assert len(pickled) < 1000
    arrived = pickle.loads(pickled)
    assert arrived == masking and hash(arrived) == hash(masking)
    assert torch.equal(arrived.table.ratio, masking.table.ratio)
    assert arrived.shares == masking.shares


class Batches(Dataset[Corrupted]):
    def __init__(self, loader: MaskedLoader) -> None:
        self.loader = loader

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Corrupted:
        return self.loader.batch(index)


@pytest.mark.parametrize(
    "start_method", [None, "fork", pytest.param("spawn", marks=pytest.mark.slow)]
)
@pytest.mark.filterwarnings("ignore:This process.*is multi-threaded:DeprecationWarning")
def test_batches_of_a_data_loader(start_method: str | None) -> None:
    if start_method not in (None, *torch.multiprocessing.get_all_start_methods()):
        pytest.skip(f"no {start_method} here")
    tokens = np.arange(900, dtype="uint16") % 36
    dataset = TokenDataset(tokens, 7, num_tokens=37, mask_id=36)
    loader = MaskedLoader(dataset, MaskingConfig(37, 36, schedule=falling), 3, seed=4)
    ways: list[tuple[Any, Any]] = [(None, None), (2, Corrupted.cat)]
    for size, collate in ways[1:] if start_method == "spawn" else ways:
        batches = list(
            DataLoader(
                Batches(loader),
                batch_size=size,
                collate_fn=collate,
                num_workers=0 if start_method is None else 2,
                multiprocessing_context=start_method,
            )
        )
        assert [len(batch) for batch in batches] == ([3] * 4 if size is None else [6] * 2)
        whole = Corrupted.cat(batches)
        assert_is(whole, **per_sample(Corrupted.cat(loader.batch(i) for i in range(4))))


def test_pinned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a DataLoader does with ``pin_memory=True``."""
    pinned: list[Tensor] = []
    monkeypatch.setattr(Tensor, "pin_memory", lambda tensor: pinned.append(tensor) or tensor + 0)
    batch = make_batch()
    result = pin_memory(batch)
    assert len(pinned) == 10
    assert result is not batch and result.labels is not batch.labels
    assert result.counts_on_host is batch.counts_on_host and result.masking is MASKING
    assert_is(result, **per_sample(batch))


# What it says of itself


def test_repr() -> None:
    batch = make_batch()
    num_masked = int(batch.num_masked.sum())
    on_cpu = f"Corrupted(shape=[5, 16], device='cpu', num_masked={num_masked})"
    assert repr(batch) == repr(replace(batch, counts_on_host=None)) == on_cpu
    # No value of a tensor on the device "meta" can be looked at; nor must one of a GPU.
    assert repr(batch.to("meta")) == on_cpu.replace("cpu", "meta")
    unknown = replace(batch, counts_on_host=None).to("meta")
    assert repr(unknown) == "Corrupted(shape=[5, 16], device='meta', num_masked=on the device)"


@pytest.fixture
def default_device() -> Iterator[None]:
    torch.set_default_device("meta")
    yield
    torch.set_default_device(None)


@pytest.fixture
def batch() -> Corrupted:
    return make_batch()


def test_the_default_device_changes_nothing(batch: Corrupted, default_device: None) -> None:
    for part in (batch[1:3], batch[[1, 2]], batch[torch.tensor([1, 2], device="cpu")]):
        assert_is(part, **{name: value[1:3] for name, value in per_sample(batch).items()})
    assert_is(Corrupted.cat(batch.microbatches(2)), **per_sample(batch))
    assert_is(pickle.loads(pickle.dumps(batch)), **per_sample(batch))
    assert_is(copy.deepcopy(batch).to("cpu"), **per_sample(batch))
    batch.raise_if_invalid()


class Power:
    """A schedule that another process finds, whose parameter may change."""

    def __init__(self, power: float) -> None:
        self.power = power

    def __call__(self, t):
        return (1 - t) ** self.power


def test_callable_schedules_travel_as_they_were_tabulated():
    schedule = Power(2.0)
    masking = MaskingConfig(37, 36, schedule=schedule)
    batches = [corrupt(torch.zeros(2, 8, dtype=torch.int64), masking, seed=s) for s in range(2)]
    sent = [pickle.loads(pickle.dumps(batch)) for batch in batches]
    both = Corrupted.cat(sent)  # each has a schedule object of its own
    assert torch.equal(both.input_ids, Corrupted.cat(batches).input_ids)
    schedule.power = 3.0
    content = pickle.dumps(masking)
    with pytest.raises(ValueError, match="gives other ratios than when it was tabulated"):
        pickle.loads(content)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_device_that_is_not_there():
    with pytest.raises(ValueError, match="device is 'cuda', where no batch can go"):
        make_batch().to("cuda")


def test_a_lambda_cannot_travel():
    masking = MaskingConfig(37, 36, schedule=lambda t: 1 - t)
    with pytest.raises(
        pickle.PicklingError, match="the schedule of this MaskingConfig is .*lambda"
    ):
        pickle.dumps(masking)


# ---- outputs that are left out, and int32

SUBSETS = [subset for n in range(4) for subset in itertools.combinations(OUTPUTS, n)]


def make_part(
    outputs: Iterable[Output] = OUTPUTS,
    ids_dtype: torch.dtype = torch.int64,
    out: Corrupted | None = None,
    seed: int = 1,
) -> Corrupted:
    ids = torch.randint(0, 19, (6, 32), generator=torch.Generator().manual_seed(3))
    masking = MaskingConfig(20, 19)
    return corrupt(ids, masking, seed=seed, outputs=tuple(outputs), ids_dtype=ids_dtype, out=out)


FIELD_OF = {"labels": "labels", "masked_indices": "masked_indices", "masked_rows": "row_buffer"}


@pytest.mark.parametrize("outputs", SUBSETS)
def test_batches_without_some_outputs(outputs: tuple[Output, ...]) -> None:
    whole, part = make_part(), make_part(outputs)
    for name, field in FIELD_OF.items():
        assert (getattr(part, field) is not None) == (name in outputs)
    assert torch.equal(part.input_ids, whole.input_ids)
    halves = [part[:3], part[3:]]
    again = Corrupted.cat(halves)
    for batch in (again, pickle.loads(pickle.dumps(part)), part.to("cpu"), copy.copy(part)):
        for name, field in FIELD_OF.items():
            assert (getattr(batch, field) is not None) == (name in outputs)
        if "masked_rows" in outputs:
            assert torch.equal(batch.masked_rows, whole.masked_rows)
    other = make_part(() if outputs else OUTPUTS)
    with pytest.raises(ValueError, match="all of the same .* outputs and masking"):
        Corrupted.cat([part, other])


@pytest.mark.parametrize("name", OUTPUTS)
def test_what_is_missing_is_named(name: Output) -> None:
    batch = make_part([output for output in OUTPUTS if output != name])
    message = f"the batch has no {name}, which this needs: make it with outputs=... that include"
    hidden, weight = torch.zeros(6, 32, 4), torch.zeros(20, 4)
    uses = {
        "labels": [lambda: masked_nll(hidden, weight, batch), lambda: batch.clean_ids],
        "masked_indices": [lambda: batch[[0, 2]], lambda: batch.clean_ids],
        "masked_rows": [lambda: masked_nll(hidden, weight, batch), lambda: batch.masked_rows],
    }
    for use in uses[name]:
        with pytest.raises(ValueError, match=message):
            use()


def test_int32_ids() -> None:
    wide, narrow = make_part(), make_part(ids_dtype=torch.int32)
    for name in ("input_ids", "labels", "masked_rows", "clean_ids"):
        assert getattr(narrow, name).dtype == torch.int32
        assert torch.equal(getattr(narrow, name).long(), getattr(wide, name)), name
    assert narrow[[4, 1]].masked_rows.dtype == torch.int32
    hidden, weight = torch.randn(6, 32, 4), torch.randn(20, 4)
    assert torch.equal(masked_nll(hidden, weight, narrow), masked_nll(hidden, weight, wide))


@pytest.mark.parametrize("profiled", [False, True])
@pytest.mark.parametrize("outputs", SUBSETS)
def test_a_batch_takes_over_the_memory_of_another(
    outputs: tuple[Output, ...], profiled: bool
) -> None:
    old, expected = make_part(outputs, torch.int32), make_part(outputs, torch.int32, seed=2)
    with torch.profiler.profile() if profiled else nullcontext():  # as torch's operator
        new = make_part(outputs, torch.int32, out=old, seed=2)
    for name in ("input_ids", "times", "loss_weight", "num_masked", "num_maskable"):
        assert torch.equal(getattr(new, name), getattr(expected, name))
        assert getattr(new, name).data_ptr() == getattr(old, name).data_ptr()
    for name, field in FIELD_OF.items():
        if name in outputs:
            assert torch.equal(getattr(new, name), getattr(expected, name))
            assert getattr(new, field).data_ptr() == getattr(old, field).data_ptr()


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_rows_of_parts_of_an_empty_buffer(dtype: torch.dtype) -> None:
    """As of a batch without masked rows that was pickled."""
    maskable = torch.zeros(2, 3, dtype=torch.bool)
    ids = torch.zeros(2, 3, dtype=torch.int64)
    batch = corrupt(ids, MASKING, seed=1, maskable=maskable, ids_dtype=dtype)
    batch = pickle.loads(pickle.dumps(batch))
    assert len(batch.row_buffer) == 0
    assert batch._rows_from(0, 4).dtype == batch.padded_rows()[0].dtype == dtype
    assert batch.padded_rows()[1].all()


LOSSES: dict[str, Callable[[Corrupted, Tensor, Tensor], Tensor]] = {
    "linear": lambda batch, hidden, weight: masked_nll(hidden, weight, batch),
    "static": lambda batch, hidden, weight: masked_nll(hidden, weight, batch, static_shapes=True),
    "any head": lambda batch, hidden, weight: head_nll(hidden, lambda x: x @ weight.T, batch),
    "count": lambda batch, hidden, weight: 1.0 * num_counted(batch, "mean"),
}


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_what_the_loss_needs(loss: Callable[..., Tensor]) -> None:
    hidden, weight = torch.randn(6, 32, 4), torch.randn(20, 4)
    whole, part = make_part(), make_part(("labels", "masked_rows"))
    for batch in (whole, part):
        batch.labels[2] = -100
    for needs_grad in (False, True):
        hidden.requires_grad_(needs_grad)
        assert torch.equal(loss(part, hidden, weight), loss(whole, hidden, weight))
    without = make_part(("masked_indices", "masked_rows"))
    with pytest.raises(ValueError, match="the batch has no labels, which this needs"):
        loss(without, hidden, weight)


def test_a_batch_that_cannot_be_taken_over() -> None:
    with pytest.raises(TypeError, match="out is a Tensor: it must be a batch of `corrupt`"):
        make_part(out=torch.zeros(6, 32))  # type: ignore[arg-type]
    message = r"out is Corrupted.*: it must be a whole batch of shape \[6, 32\] and torch.int64"
    relabelled = replace(make_part(), labels=make_part().labels.int())
    others = make_part(("labels",)), make_part(ids_dtype=torch.int32), make_part()[:3], relabelled
    for other in others:
        with pytest.raises(ValueError, match=message):
            make_part(out=other)


def test_unknown_outputs_and_dtypes() -> None:
    with pytest.raises(ValueError, match=r"outputs is \('rows',\): it must be a tuple of any of"):
        make_part(("rows",))  # type: ignore[arg-type]
    ids = torch.zeros(2, 3, dtype=torch.int64)
    for outputs in ("labels", None, iter(("labels",))):
        with pytest.raises(TypeError, match="outputs is .*: it must be a tuple of any of 'labels'"):
            corrupt(ids, MASKING, seed=1, outputs=outputs)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="ids_dtype is torch.int16: it must be torch.int64 or"):
        make_part(ids_dtype=torch.int16)
