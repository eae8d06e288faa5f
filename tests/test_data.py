"""Windows and batches: the right ones, each once an epoch, whatever the ranks and the resume."""

import copy
import json
import os
import pickle
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader

from nar_kernels.data import loader as data
from nar_kernels.data.corpus import TOKEN_DTYPES
from nar_kernels.data.dataset import TokenDataset
from nar_kernels.data.loader import MaskedLoader
from nar_kernels.data.staging import Stager
from nar_kernels.errors import BackendUnavailableError, CorpusFormatError, InvalidTokenError
from nar_kernels.ops.backends import backends, device_type
from nar_kernels.ops.corrupted import Corrupted
from nar_kernels.ops.masking import MaskingConfig
from nar_kernels.spec.philox import Stream, permute

V, MASK_ID = 1001, 1000
MASKING = MaskingConfig(V, MASK_ID)
INT64_MIN = -(1 << 63)


def make_dataset(source: Any = None, seq_len: int = 7, **kwargs: Any) -> TokenDataset:
    source = np.arange(900, dtype="uint16") if source is None else source
    return TokenDataset(source, seq_len, **{"num_tokens": V, "mask_id": MASK_ID, **kwargs})


def numbered(num_windows: int, seq_len: int = 3) -> TokenDataset:
    """Every token of window i is i."""
    tokens = np.arange(num_windows).repeat(seq_len)
    return make_dataset(tokens, seq_len, num_tokens=num_windows + 1, mask_id=num_windows)


def masking_for(dataset: TokenDataset) -> MaskingConfig:
    return MaskingConfig(dataset.num_tokens, dataset.mask_id)


def tensors(batch: Corrupted) -> dict[str, Tensor]:
    names = [f.name for f in fields(batch) if f.name not in ("masking", "host_counts")]
    return {name: getattr(batch, name) for name in names} | {
        "row_buffer": batch.masked_rows  # the rest of the buffer is undefined
    }


def assert_same(a: Corrupted, b: Corrupted) -> None:
    for name, value in tensors(a).items():
        assert torch.equal(value, tensors(b)[name]), name


# TokenDataset


@pytest.mark.parametrize("stride", [None, 1, 3, 7, 11])
@pytest.mark.parametrize("num_tokens", [7, 8, 13, 14, 97])
def test_windows(num_tokens: int, stride: int | None) -> None:
    tokens = np.arange(num_tokens, dtype="uint16")
    dataset = make_dataset(tokens, 7, stride=stride)
    expected = [tokens[s : s + 7].tolist() for s in range(0, num_tokens, stride or 7)]
    expected = [window for window in expected if len(window) == 7]
    assert len(dataset) == len(expected)
    assert [window.tolist() for window in dataset] == expected
    assert dataset[0].dtype == torch.int64
    assert dataset[-1].tolist() == dataset[np.int64(len(dataset) - 1)].tolist() == expected[-1]
    rows = dataset.__getitems__(list(range(-len(expected), len(expected))))
    assert [row.tolist() for row in rows] == expected * 2
    assert dataset.__getitems__([]) == []


def test_rows_fetched_together_are_one_tensor() -> None:
    rows = make_dataset().__getitems__([5, 2, 2])
    assert len({row.untyped_storage().data_ptr() for row in rows}) == 1


@pytest.mark.parametrize("index", [128, -129, 1 << 40])
def test_index_out_of_range(index: int) -> None:
    dataset = make_dataset()
    assert len(dataset) == 128
    for fetch in (lambda: dataset[index], lambda: dataset.__getitems__([0, index])):
        with pytest.raises(IndexError, match=rf"window index {index} is outside \[-128, 128\)"):
            fetch()


@pytest.mark.parametrize("index", [1.0, "1", slice(3), None])
def test_index_of_another_type(index: Any) -> None:
    with pytest.raises(TypeError):
        make_dataset()[index]


@pytest.mark.parametrize("dtype", TOKEN_DTYPES)
def test_large_ids(tmp_path: Path, dtype: str) -> None:
    """Up to the largest id there can be; unsigned ones need care, as torch cannot index them."""
    largest = min(np.iinfo(dtype).max, (1 << 31) - 3)
    tokens = np.array([0, largest, largest - 1, largest // 2 + 1, 1], dtype)
    tokens.tofile(tmp_path / "a.bin")
    for source, given in ((tokens, None), (tmp_path / "a.bin", dtype)):
        dataset = make_dataset(source, 5, num_tokens=largest + 2, mask_id=largest + 1, dtype=given)
        assert dataset[0].tolist() == tokens.tolist()
        batch = MaskedLoader(dataset, masking_for(dataset), 2).batch(0)
        assert batch.clean_ids.tolist() == [tokens.tolist()] * 2


def test_uint32_above_the_signed_range_is_not_negative() -> None:
    tokens = np.array([5, 3_000_000_000], "uint32")
    with pytest.raises(InvalidTokenError, match="token id 3000000000 at offset 1 of array"):
        make_dataset(tokens, 2)[0]


@pytest.mark.parametrize("bad", [-1, V, V + 1, INT64_MIN, (1 << 63) - 1, MASK_ID])
@pytest.mark.parametrize("suffix", ["npy", "bin"])
def test_bad_ids_are_located(tmp_path: Path, suffix: str, bad: int) -> None:
    tokens = np.arange(100)
    tokens[[40, 44]] = bad
    path = tmp_path / f"corpus.{suffix}"
    if suffix == "npy":
        np.save(path, tokens)
    else:
        tokens.tofile(path)
    dataset = make_dataset(path, 7, dtype=None if suffix == "npy" else "int64")
    valid = "equals mask_id" if bad == MASK_ID else r"is outside \[0, 1001\)"
    message = rf"token id {bad} at offset 40 of .*corpus\.{suffix} {valid}"
    loader = MaskedLoader(dataset, MASKING, 14)
    for fetch in (lambda: dataset[5], lambda: dataset.__getitems__([6, 5]), lambda: next(loader)):
        with pytest.raises(InvalidTokenError, match=message) as caught:
            fetch()
        assert (caught.value.token_id, caught.value.offset) == (bad, 40)
    assert loader.step == 0
    assert caught.value.count == 2
    assert dataset[4].tolist() == list(range(28, 35))


@pytest.mark.parametrize("mask_id", [0, MASK_ID])
def test_without_validation_ids_are_made_valid(mask_id: int) -> None:
    tokens = np.array([-1, 5, V, INT64_MIN, mask_id, 7, 1 << 40])
    dataset = make_dataset(tokens, 7, mask_id=mask_id, validate=False)
    safe = 1 if mask_id == 0 else 0
    assert dataset[0].tolist() == [safe, 5, safe, safe, safe, 7, safe]
    assert make_dataset(tokens[[1, 5]], 2, mask_id=mask_id, validate=False)[0].tolist() == [5, 7]


def test_the_dropped_tail_is_not_looked_at() -> None:
    tokens = np.arange(20)
    tokens[14:] = -1
    dataset = make_dataset(tokens, 7)
    assert [len(window) for window in dataset] == [7, 7]
    assert MaskedLoader(dataset, MASKING, 8).batch(0).clean_ids.max() == 13


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"seq_len": 0}, "seq_len is 0: it must be at least 1"),
        ({"seq_len": -3}, "seq_len is -3"),
        ({"stride": 0}, "stride is 0: it must be at least 1"),
        ({"seq_len": 901}, "array has 900 tokens, less than one window of seq_len 901"),
        ({"num_tokens": 1}, "num_tokens is 1"),
        ({"mask_id": V}, "mask_id 1001 is not in"),
        ({"mask_id": -1}, "mask_id -1 is not in"),
    ],
)
def test_bad_arguments_of_a_dataset(kwargs: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_dataset(**kwargs)


def test_format_errors_pass_through(tmp_path: Path) -> None:
    with pytest.raises(CorpusFormatError, match="2, 3"):
        make_dataset(np.zeros((2, 3), int))
    with pytest.raises(FileNotFoundError):
        make_dataset(tmp_path / "missing.npy")


@pytest.mark.parametrize("seq_len", [1, 4, 7])
@pytest.mark.parametrize("stride", [1, 2, 4, 7, 9])
@pytest.mark.parametrize("num_held_out", [1, 2, 5])
def test_split(seq_len: int, stride: int, num_held_out: int) -> None:
    dataset = make_dataset(np.arange(100), seq_len, stride=stride)
    train, held_out = dataset.split(num_held_out)
    assert torch.equal(torch.stack(list(held_out)), torch.stack(list(dataset))[-num_held_out:])
    assert torch.equal(torch.stack(list(train)), torch.stack(list(dataset))[: len(train)])
    boundary = held_out[0].min()
    assert torch.stack(list(train)).max() < boundary
    # The next window would have shared a token with the held-out ones.
    assert dataset[len(train)].max() >= boundary
    assert train.corpus is held_out.corpus is dataset.corpus
    assert len(dataset) == (100 - seq_len) // stride + 1


def test_split_twice() -> None:
    train, test = make_dataset(np.arange(70), 7).split(2)
    train, validation = train.split(3)
    assert (len(train), len(validation), len(test)) == (5, 3, 2)
    assert [window[0].item() for window in validation] == [35, 42, 49]
    assert validation[-1].tolist() == list(range(49, 56))
    late, later = test.split(1)
    assert (late[0][0], later[0][0]) == (56, 63)


@pytest.mark.parametrize(("stride", "num_held_out"), [(7, 0), (7, -1), (7, 10), (1, 58), (1, 64)])
def test_bad_split(stride: int, num_held_out: int) -> None:
    dataset = make_dataset(np.arange(70), 7, stride=stride)
    with pytest.raises(ValueError, match=f"num_held_out is {num_held_out}: of {len(dataset)} wind"):
        dataset.split(num_held_out)
    if num_held_out == 58:
        assert len(dataset.split(57)[0]) == 1


def all_bad(dataset: TokenDataset) -> list[int]:
    """The offsets of bad ids that windows cover, found one by one."""
    tokens = dataset.corpus.tokens.tolist()
    starts = dataset.starts(torch.arange(len(dataset))).tolist()
    covered = sorted({s + i for s in starts for i in range(dataset.seq_len)})
    return [i for i in covered if not 0 <= tokens[i] < V or tokens[i] == MASK_ID]


@pytest.mark.parametrize("scanned", [1, 5, 64, 1 << 18])
@pytest.mark.parametrize(("seq_len", "stride"), [(7, 7), (7, 3), (7, 9), (1, 1), (3, 50), (90, 1)])
def test_validate_all(
    monkeypatch: pytest.MonkeyPatch, seq_len: int, stride: int, scanned: int
) -> None:
    """Each token that a window covers, once; neither gaps nor tails."""
    monkeypatch.setattr(data, "_SCAN_CHUNK", scanned)
    tokens = np.arange(200)
    make_dataset(tokens, seq_len, stride=stride).validate_all()
    tokens[[0, 8, 49, 51, 52, 120, 199]] = [-1, V, MASK_ID, 1 << 40, INT64_MIN, -1, -1]
    whole = make_dataset(tokens, seq_len, stride=stride, validate=False)
    for dataset in (whole, *whole.split(2)):
        bad = all_bad(dataset)
        if not bad:
            dataset.validate_all()
            continue
        with pytest.raises(InvalidTokenError, match=f"at offset {bad[0]} of array") as caught:
            dataset.validate_all()
        error = caught.value
        assert (error.offset, error.count) == (bad[0], len(bad))
        assert error.token_id == tokens[bad[0]]


@pytest.mark.parametrize("dtype", TOKEN_DTYPES)
def test_validate_all_of_every_type(dtype: str) -> None:
    info = np.iinfo(dtype)
    tokens = np.array([0, 1, 2, 3], dtype)
    dataset = make_dataset(tokens, 2, num_tokens=5, mask_id=4)
    dataset.validate_all()
    for bad in {info.max, info.min, 4} - {0}:
        tokens[3] = bad
        with pytest.raises(InvalidTokenError, match=f"token id {bad} at offset 3"):
            dataset.validate_all()
    tokens[3] = 3
    with pytest.raises(InvalidTokenError, match="token id 1 at offset 1 of array equals mask_id"):
        make_dataset(tokens, 2, num_tokens=5, mask_id=1).validate_all()
    if info.max < 1 << 16:  # a vocabulary that the type cannot exceed
        tokens[3] = info.max
        make_dataset(tokens, 2, num_tokens=1 << 17, mask_id=1 << 16).validate_all()


def test_numbers_of_numpy(tmp_path: Path) -> None:
    """A loader made of them is the loader made of ints, and its state holds no numpy."""
    plain = make_dataset(stride=3).split(5)[0]
    n = np.int64
    dataset = make_dataset(None, n(7), stride=np.uint8(3), num_tokens=n(V), mask_id=np.uint16(1000))
    dataset = dataset.split(n(5))[0]
    assert torch.equal(dataset[n(4)], plain[4])
    indices = [n(3), np.uint64(1), torch.tensor(2)]
    assert dataset.starts(indices).tolist() == plain.starts([3, 1, 2]).tolist() == [9, 3, 6]
    assert dataset.starts(np.array([3, -1])).tolist() == plain.starts([3, -1]).tolist()
    loader = MaskedLoader(dataset, MASKING, n(4), seed=n(5), rank=np.int32(1), world_size=n(2))
    expected = MaskedLoader(plain, MASKING, 4, seed=5, rank=1, world_size=2)
    assert_same(loader.batch(n(3)), expected.batch(3))
    assert torch.equal(loader.sample_ids(n(3)), expected.sample_ids(3))
    loader.step = n(3)
    state = loader.state_dict()
    assert json.loads(json.dumps(state)) == state == expected.state_dict() | {"step": 3}
    expected.load_state_dict(state | {"step": n(4)})
    assert type(expected.state_dict()["step"]) is int


@pytest.mark.parametrize("indices", [[0.5], np.array([1.0]), torch.tensor([1.0]), [None]])
def test_indices_that_are_no_integers(indices: Any) -> None:
    with pytest.raises(TypeError, match="window ind.* must be (an int|integers)"):
        make_dataset().starts(indices)


def test_a_bool_tensor_is_no_list_of_windows() -> None:
    with pytest.raises(TypeError, match=r"are torch\.bool: they must be integers"):
        make_dataset().starts(torch.ones(128, dtype=torch.bool))


@pytest.mark.parametrize("name", ["seq_len", "stride", "num_tokens", "mask_id"])
def test_numbers_of_a_dataset_are_integers(name: str) -> None:
    with pytest.raises(TypeError, match=f"{name} is 7.5: it must be an int"):
        make_dataset(**{name: 7.5})


def test_a_dataset_travels_without_its_data(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.arange(100_000) % V % MASK_ID)
    dataset = make_dataset(tmp_path / "a.npy")
    pickled = pickle.dumps(dataset)
    assert len(pickled) < 2000
    assert torch.equal(pickle.loads(pickled)[14_000], dataset[14_000])


def test_copies_of_a_dataset_share_the_corpus() -> None:
    dataset = make_dataset().split(5)[1]
    copied = copy.deepcopy(dataset)
    assert copied.corpus is dataset.corpus
    assert torch.equal(copied[0], dataset[0]) and len(copied) == 5


@pytest.mark.parametrize("in_file", [True, False])
@pytest.mark.parametrize(
    "start_method", [None, "fork", pytest.param("spawn", marks=pytest.mark.slow)]
)
@pytest.mark.filterwarnings("ignore:This process.*is multi-threaded:DeprecationWarning")
def test_data_loader(tmp_path: Path, start_method: str | None, in_file: bool) -> None:
    if start_method not in (None, *torch.multiprocessing.get_all_start_methods()):
        pytest.skip(f"no {start_method} here")
    np.save(tmp_path / "a.npy", np.arange(100, dtype="uint16"))
    dataset = make_dataset(tmp_path / "a.npy" if in_file else np.arange(100, dtype="uint16"))
    loader = DataLoader(
        dataset,
        batch_size=4,
        shuffle=True,
        generator=torch.Generator().manual_seed(0),
        num_workers=0 if start_method is None else 2,
        multiprocessing_context=start_method,
    )
    batches = list(loader)
    assert [batch.shape for batch in batches] == [(4, 7), (4, 7), (4, 7), (2, 7)]
    seen = torch.cat(batches)
    assert seen[:, 0].tolist() != list(range(0, 98, 7))
    assert torch.equal(seen[seen[:, 0].argsort()], torch.arange(98).view(14, 7))


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.filterwarnings("ignore:This process.*is multi-threaded:DeprecationWarning")
def test_the_error_survives_a_data_loader(num_workers: int) -> None:
    dataset = make_dataset(np.append(np.arange(20), -1))
    batches = iter(DataLoader(dataset, batch_size=2, num_workers=num_workers))
    assert len(next(batches)) == 2
    with pytest.raises(InvalidTokenError, match="token id -1 at offset 20 of array is outside"):
        next(batches)
    assert list(batches) == []  # so that the worker ends; else torch waits 5 s for it


# MaskedLoader


def expected_window(slot: int, num_windows: int, seed: int) -> int:
    epoch, position = divmod(slot, num_windows)
    index = torch.tensor([position])
    order = permute(index, num_windows, seed=seed, stream=Stream.WINDOW_ORDER, round=epoch)
    return int(order.item())


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("num_windows", [1, 3, 10, 300])
def test_a_batch_holds_the_windows_of_its_slots(num_windows: int, shuffle: bool) -> None:
    dataset = numbered(num_windows)
    for rank in range(2):
        loader = MaskedLoader(
            dataset, masking_for(dataset), 7, seed=5, rank=rank, world_size=2, shuffle=shuffle
        )
        for step in (0, 1, 50):
            slots = [step * 14 + rank * 7 + j for j in range(7)]
            expected = [
                expected_window(g, num_windows, 5) if shuffle else g % num_windows for g in slots
            ]
            batch = loader.batch(step)
            assert loader.sample_ids(step).tolist() == slots
            assert loader.window_indices(step).tolist() == expected
            assert torch.equal(batch.clean_ids, torch.stack(dataset.__getitems__(expected)))
            assert batch.clean_ids[:, 0].tolist() == expected


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize(
    ("num_windows", "batch_size"), [(24, 4), (10, 3), (5, 4), (1, 3), (300, 9)]
)
def test_every_epoch_visits_every_window_once(
    num_windows: int, batch_size: int, world_size: int
) -> None:
    dataset = numbered(num_windows)
    masking = masking_for(dataset)
    ranks = [
        MaskedLoader(dataset, masking, batch_size, rank=r, world_size=world_size)
        for r in range(world_size)
    ]
    num_steps = -(-3 * num_windows // (batch_size * world_size))
    order = [
        int(window)
        for step in range(num_steps)
        for loader in ranks
        for window in loader.batch(step).clean_ids[:, 0]
    ]
    epochs = [order[e * num_windows : (e + 1) * num_windows] for e in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(num_windows))
    if num_windows >= 10:
        assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


def test_the_order_depends_on_the_seed() -> None:
    dataset = numbered(50)
    orders = {
        tuple(MaskedLoader(dataset, masking_for(dataset), 50, seed=seed).window_indices(0).tolist())
        for seed in (0, 1, -1, 1 << 32)
    }
    assert len(orders) == 4


def test_the_order_is_frozen() -> None:
    """A change here breaks every run that is resumed."""
    loader = MaskedLoader(numbered(10), MaskingConfig(11, 10), 12, seed=1)
    assert loader.window_indices(0).tolist() == [2, 1, 7, 4, 3, 5, 9, 6, 0, 8, 6, 2]
    loader = MaskedLoader(numbered(1000), MaskingConfig(1001, 1000), 8, seed=1)
    assert loader.window_indices(1000).tolist() == [288, 660, 197, 146, 48, 930, 59, 526]


@pytest.mark.parametrize("world_size", [2, 3, 6])
def test_batches_do_not_depend_on_the_number_of_ranks(world_size: int) -> None:
    dataset = make_dataset()
    masking = MaskingConfig(V, MASK_ID, no_replace_prob=0.1, random_token_prob=0.1)
    whole = MaskedLoader(dataset, masking, 12, seed=3)
    parts = [
        MaskedLoader(dataset, masking, 12 // world_size, seed=3, rank=r, world_size=world_size)
        for r in range(world_size)
    ]
    for step in (0, 10, 11):  # 128 windows: step 10 straddles two epochs
        of_parts = [tensors(loader.batch(step)) for loader in parts]
        for name, value in tensors(whole.batch(step)).items():
            if name not in ("row_buffer", "invalid"):
                assert torch.equal(torch.cat([part[name] for part in of_parts]), value), name


def test_steps_have_masks_of_their_own() -> None:
    dataset = numbered(1, seq_len=64)  # one window, for ever
    loader = MaskedLoader(dataset, masking_for(dataset), 4)
    batches = torch.cat([loader.batch(step).masked_indices for step in range(3)])
    assert len(batches.unique(dim=0)) == 12


def test_iteration() -> None:
    loader = MaskedLoader(make_dataset(), MASKING, 5, seed=2)
    for step, batch in zip(range(4), loader, strict=False):
        assert loader.step == step + 1
        assert_same(batch, loader.batch(step))
    assert loader.step == 4
    assert_same(next(iter(loader)), loader.batch(4))  # another iterator goes on from there
    assert loader.step == 5


def test_resume() -> None:
    def make(**kwargs: Any) -> MaskedLoader:
        return MaskedLoader(make_dataset(), MASKING, **{"batch_size": 6, "seed": 9, **kwargs})

    loader = make()
    for _, _ in zip(range(5), loader, strict=False):
        state = pickle.loads(pickle.dumps(loader.state_dict()))
    rest = [batch for _, batch in zip(range(4), loader, strict=False)]

    resumed = make()
    resumed.load_state_dict(state)
    assert resumed.state_dict() == state
    for batch, again in zip(rest, resumed, strict=False):
        assert_same(batch, again)

    halves = [make(batch_size=3, rank=r, world_size=2) for r in range(2)]
    for half in halves:
        half.load_state_dict(state)
    for batch in rest:
        assert torch.equal(torch.cat([next(h).input_ids for h in halves]), batch.input_ids)


def test_state_can_be_saved_by_torch(tmp_path: Path) -> None:
    loader = MaskedLoader(make_dataset(), MASKING, 5)
    torch.save(loader.state_dict(), tmp_path / "state.pt")
    loader.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))


OTHER_CORPUS = np.arange(900, dtype="uint16")
OTHER_CORPUS[500] = 0


def test_a_state_is_plain() -> None:
    masking = MaskingConfig(
        V, MASK_ID, schedule=lambda t: 1 - t**3, never_mask_ids=(7, 3, 7), random_token_prob=0.1
    )
    loader = MaskedLoader(make_dataset(), masking, 5, shuffle=np.bool_(True))
    state = loader.state_dict()
    restored = json.loads(json.dumps(state))
    assert restored == state
    assert state["never_mask_ids"] == [3, 7]
    loader.load_state_dict(restored | {"step": 8})
    assert loader.step == 8


@pytest.mark.parametrize(
    ("dataset", "kwargs", "message"),
    [
        (make_dataset(OTHER_CORPUS), {}, "corpus_digest is .* of array here"),
        (make_dataset(), {"seed": 1}, "seed is 0 in the state, but 1 here"),
        (make_dataset(), {"batch_size": 5}, r"batch_size \* world_size is 6 .*, but 5 here"),
        (
            make_dataset(),
            {"rank": 0, "world_size": 2},
            r"batch_size \* world_size is 6 .*, but 12 here",
        ),
        (make_dataset(), {"shuffle": False}, "shuffle is True in the state, but False here"),
        (make_dataset(seq_len=8), {}, "seq_len is 7 in the state, but 8 here"),
        (make_dataset(stride=6), {}, "stride is 7 in the state, but 6 here"),
        (make_dataset().split(3)[0], {}, "num_windows is 128 in the state, but 125 here"),
    ],
)
def test_states_of_another_run(dataset: TokenDataset, kwargs: dict[str, Any], message: str) -> None:
    state = MaskedLoader(make_dataset(), MASKING, 6).state_dict() | {"step": 17}
    loader = MaskedLoader(dataset, MASKING, **{"batch_size": 6, **kwargs})
    with pytest.raises(ValueError, match=f"cannot continue: {message}"):
        loader.load_state_dict(state)
    assert loader.step == 0


def falling(t: Tensor) -> Tensor:
    return 1 - t.clamp(0.25, 0.75)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"mask_id": 999}, "mask_id is 1000 in the state, but 999 here"),
        ({"num_tokens": 1002}, "num_tokens is 1001 in the state, but 1002 here"),
        ({"schedule": "cosine"}, "schedule_digest is .* of 'cosine' here"),
        ({"schedule": falling}, "schedule_digest is .* of <function falling.* here"),
        ({"schedule": lambda t: 1 - t**1.001}, "schedule_digest is "),
        ({"draw": "bernoulli"}, "draw is exact in the state, but bernoulli here"),
        ({"times": "uniform"}, "times is stratified in the state, but uniform here"),
        ({"never_mask_ids": [3]}, r"never_mask_ids is \[\] in the state, but \[3\] here"),
        ({"no_replace_prob": 0.1}, "no_replace_prob is 0.0 in the state, but 0.1 here"),
        ({"random_token_prob": 0.1}, "random_token_prob is 0.0 in the state, but 0.1 here"),
        ({"corruption_prob": 0.5}, "corruption_prob is 1.0 in the state, but 0.5 here"),
    ],
)
def test_states_of_other_masking(changed: dict[str, Any], message: str) -> None:
    state = MaskedLoader(make_dataset(), MASKING, 6).state_dict() | {"step": 17}
    masking = replace(MASKING, **changed)
    dataset = make_dataset(num_tokens=masking.num_tokens, mask_id=masking.mask_id)
    loader = MaskedLoader(dataset, masking, 6)
    for theirs in (state, json.loads(json.dumps(state))):
        with pytest.raises(ValueError, match=f"cannot continue: {message}"):
            loader.load_state_dict(theirs)
    assert loader.step == 0


def test_the_state_knows_a_schedule_by_its_values() -> None:
    """However it is named, and whatever the last bits of a cosine are on this CPU."""

    def almost(t: Tensor) -> Tensor:
        return torch.cos(t * (torch.pi / 2)) * (1 - 1e-15 * t)

    def digest(schedule: Any) -> str:
        masking = replace(MASKING, schedule=schedule)
        return MaskedLoader(make_dataset(), masking, 6).state_dict()["schedule_digest"]

    assert digest("cosine") == digest(almost)
    assert digest("linear") == digest(lambda t: 1 - t) != digest("cosine")


def test_states_of_earlier_versions() -> None:
    """They say nothing of the masking."""
    loader = MaskedLoader(make_dataset(), MASKING, 6)
    names = "step seed global_batch shuffle corpus_digest seq_len stride phase num_windows"
    state = {name: loader.state_dict()[name] for name in names.split()}
    loader.load_state_dict(state | {"step": 17})
    assert loader.step == 17


def test_states_of_something_else() -> None:
    loader = MaskedLoader(make_dataset(), MASKING, 6)
    state = loader.state_dict()
    for name in ("step", "seed", "global_batch", "shuffle", "corpus_digest", "num_windows"):
        partial = copy.copy(state)
        del partial[name]
        with pytest.raises(ValueError, match=f"the state has no '{name}'"):
            loader.load_state_dict(partial)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0: it must be at least 1"),
        ({"rank": 2, "world_size": 2}, r"rank is 2: it must be in \[0, world_size\) = \[0, 2\)"),
        ({"rank": -1, "world_size": 1}, "rank is -1"),
        ({"rank": 1}, "rank is 1 and world_size is None: give both, or neither"),
        ({"world_size": 2}, "rank is None and world_size is 2: give both, or neither"),
        ({"rank": 0, "world_size": 0}, r"rank is 0: it must be in \[0, world_size\) = \[0, 0\)"),
        ({"masking": MaskingConfig(V + 1, MASK_ID)}, "masking has num_tokens 1002 but .* 1001"),
        ({"masking": MaskingConfig(V, 0)}, "masking has mask_id 0 but the dataset has 1000"),
        ({"backend": "fastest"}, "unknown backend 'fastest'"),
        ({"corpus_memory": "ram"}, "corpus_memory is 'ram': it must be 'auto', 'device'"),
    ],
)
def test_bad_arguments_of_a_loader(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MaskedLoader(make_dataset(), **{"masking": MASKING, "batch_size": 4, **kwargs})


def test_negative_step() -> None:
    with pytest.raises(ValueError, match="step is -1: it must be at least 0"):
        MaskedLoader(make_dataset(), MASKING, 4).batch(-1)


def test_backend() -> None:
    reference = MaskedLoader(make_dataset(), MASKING, 4, backend="reference").batch(3)
    for backend in ("auto", "triton", "cuda"):  # those of a GPU where they run on the CPU
        here = backend == "auto" or device_type(backend) == "cpu"
        if here and backends().get(backend, "available") == "available":
            loader = MaskedLoader(make_dataset(), MASKING, 4, backend=backend)
            assert_same(loader.batch(3), reference)
    if backends()["cpp"] != "available":
        with pytest.raises(BackendUnavailableError):
            MaskedLoader(make_dataset(), MASKING, 4, backend="cpp")


def test_a_step_on_a_device() -> None:
    with pytest.raises(ValueError, match="step is a tensor: .* here it is cpu .* pass an int"):
        MaskedLoader(make_dataset(), MASKING, 4).batch(torch.zeros(1, dtype=torch.int64))


def test_another_device() -> None:
    loader = MaskedLoader(make_dataset(), MASKING, 4)
    loader.device = torch.device("meta")  # the only other one that is everywhere
    batch = loader.batch(0)
    others = ("masking", "host_counts")
    assert {tensor.device.type for name, tensor in vars(batch).items() if name not in others} == {
        "meta"
    }
    assert batch.input_ids.shape == (4, 7)


@pytest.mark.parametrize("device", ["meta", "nonsense", "cpu:x", "cuda:99", "xla", "hpu", None])
def test_devices_where_no_batch_can_go(device: Any) -> None:
    with pytest.raises(ValueError, match=f"device is '{device}', where no batch can go: PyTorch"):
        MaskedLoader(make_dataset(), MASKING, 4, device=device)


def test_the_number_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    check = data.check_device
    assert [check(d).index for d in ("cuda", "cuda:0", torch.device("cuda:1"))] == [1, 0, 1]
    with pytest.raises(ValueError, match="'cuda:2', .* sees 2 CUDA devices"):
        check("cuda:2")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ValueError, match="'cuda', .* sees 0 CUDA devices"):
        check("cuda")


@pytest.mark.parametrize(
    ("num_windows", "batch_size", "world_size", "steps"),
    [(24, 4, 1, 6), (24, 4, 2, 3), (25, 4, 2, 3), (23, 4, 2, 2), (3, 4, 1, 1), (1, 1, 1, 1)],
)
def test_length(num_windows: int, batch_size: int, world_size: int, steps: int) -> None:
    dataset = numbered(num_windows)
    loader = MaskedLoader(dataset, masking_for(dataset), batch_size, rank=0, world_size=world_size)
    assert len(loader) == steps
    for _ in zip(range(steps + 2), loader, strict=False):  # it does not end there
        pass
    assert loader.step == steps + 2


# Copies of a MaskedLoader


def test_a_loader_travels_without_its_data(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", (np.arange(1_000_000) % MASK_ID).astype("uint16"))
    masking = MaskingConfig(V, MASK_ID, schedule="cosine", never_mask_ids=[3], draw="bernoulli")
    loader = MaskedLoader(make_dataset(tmp_path / "a.npy"), masking, 4, seed=3)
    next(loader)
    pickled = pickle.dumps(loader)
    assert len(pickled) < 4000
    arrived = pickle.loads(pickled)
    assert arrived.state_dict() == loader.state_dict()
    assert_same(next(arrived), next(loader))


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy])
def test_a_copy_of_a_loader_has_a_step_of_its_own(
    copied: Callable[[MaskedLoader], MaskedLoader],
) -> None:
    loader = MaskedLoader(make_dataset(), MASKING, 4)
    next(loader)
    other = copied(loader)
    assert other.dataset.corpus is loader.dataset.corpus
    assert other.masking is loader.masking
    assert_same(next(other), loader.batch(1))
    assert (loader.step, other.step) == (1, 2)


def test_what_belongs_to_a_device_stays_here() -> None:
    """Threads, buffers, events: those of a GPU, on the CPU."""
    loader = MaskedLoader(make_dataset(), MASKING, 4)
    loader._stager = Stager(loader._tokens, loader._window_starts, 4, 7, torch.device("cpu"))
    loader._stager.prefetch(0)
    loader._deferred_check._pending = torch.Event(), lambda record: None
    for arrived in (pickle.loads(pickle.dumps(loader)), copy.deepcopy(loader)):
        assert arrived._stager is None and arrived._deferred_check._pending is None
        assert_same(arrived.batch(5), MaskedLoader(make_dataset(), MASKING, 4).batch(5))


def test_a_loader_arrives_where_its_device_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    loader = MaskedLoader(make_dataset(), MASKING, 4)
    loader.device = torch.device("cuda:0")
    with pytest.raises(ValueError, match="device is 'cuda:0', where no batch can go"):
        pickle.loads(pickle.dumps(loader))


# Several processes


def as_a_rank(rank: int, folder: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    loader = MaskedLoader(make_dataset(), MASKING, 4)
    alone = MaskedLoader(make_dataset(), MASKING, 8, rank=0, world_size=1)
    torch.save([loader.batch(2).input_ids, alone.batch(2).input_ids], folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.skipif(
    not dist.is_available() or not dist.is_gloo_available() or os.name != "posix",
    reason="needs the gloo backend",
)
def test_the_process_group_says_which_rank_this_is(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(as_a_rank, (tmp_path,), 2)
    whole = MaskedLoader(make_dataset(), MASKING, 8).batch(2).input_ids
    halves = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    assert torch.equal(torch.cat([half[0] for half in halves]), whole)
    for half in halves:  # what is given counts
        assert torch.equal(half[1], whole)


def test_torchrun_without_a_process_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "is_torchelastic_launched", lambda: True)
    with pytest.warns(UserWarning, match="there is no process group yet.*init_process_group"):
        loader = MaskedLoader(make_dataset(), MASKING, 4)
    assert (loader.rank, loader.world_size) == (0, 1)
    MaskedLoader(make_dataset(), MASKING, 4, rank=0, world_size=1)


# The default device


def test_the_default_device_changes_nothing() -> None:
    dataset = make_dataset()
    expected = MaskedLoader(dataset, MASKING, 4, seed=3).batch(40)
    with torch.device("meta"):
        again = make_dataset()
        again.validate_all()
        train, _ = again.split(5)
        assert train.starts([3]).device.type == "cpu"
        loader = pickle.loads(pickle.dumps(MaskedLoader(again, MASKING, 4, seed=3)))
        loader.load_state_dict(loader.state_dict() | {"step": 40})
        assert loader.sample_ids(40).tolist() == [160, 161, 162, 163]
        stager = Stager(loader._tokens, loader._window_starts, 4, 7, torch.device("cpu"))
        assert torch.equal(stager.windows(40).to(torch.int64), expected.clean_ids)
