"""`TokenDataset`: windows of a corpus, checked, split, and sent to other processes."""

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from nar_kernels.data.inspect import scan as scan_module
from nar_kernels.data.loader import MaskedLoader
from nar_kernels.data.windows.dataset import TokenDataset
from nar_kernels.errors import CorpusFormatError, InvalidTokenError
from nar_kernels.ops.tokens import TOKEN_DTYPES
from tests.helpers.windows import (
    MASK_ID,
    MASKING,
    V,
    assert_same,
    make_dataset,
    masking_for,
)

INT64_MIN = -(1 << 63)


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
        ({"seq_len": 0}, "seq_len is 0: it must be in"),
        ({"seq_len": -3}, "seq_len is -3"),
        ({"stride": 0}, "stride is 0: it must be in"),
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
    good = {*range(dataset.num_tokens)} - {dataset.mask_id}
    return [i for i in covered if tokens[i] not in good]


def assert_validated(dataset: TokenDataset) -> None:
    bad = all_bad(dataset)
    if not bad:
        return dataset.validate_all()
    with pytest.raises(InvalidTokenError, match=f"at offset {bad[0]} of ") as caught:
        dataset.validate_all()
    error = caught.value
    assert (error.offset, error.count) == (bad[0], len(bad))
    assert error.token_id == dataset.corpus.tokens[bad[0]]


COVERED = [(7, 7), (7, 3), (7, 9), (1, 1), (3, 50), (90, 1)]
BAD = {0: -1, 8: V, 49: MASK_ID, 51: 1 << 40, 52: INT64_MIN, 120: -1, 199: -1}


@pytest.mark.parametrize("scanned", [1, 5, 64, 1 << 18])
@pytest.mark.parametrize(("seq_len", "stride"), COVERED)
def test_validate_all(
    monkeypatch: pytest.MonkeyPatch, seq_len: int, stride: int, scanned: int
) -> None:
    """Each token that a window covers, once; neither gaps nor tails."""
    monkeypatch.setattr(scan_module, "_PORTION_BYTES", 8 * scanned)
    tokens = np.arange(200)
    make_dataset(tokens, seq_len, stride=stride).validate_all()
    tokens[[*BAD]] = [*BAD.values()]
    whole = make_dataset(tokens, seq_len, stride=stride, validate=False)
    for dataset in (whole, *whole.split(2)):
        assert_validated(dataset)


@pytest.mark.parametrize("mask_id", [MASK_ID, 120])
@pytest.mark.parametrize(("seq_len", "stride"), COVERED)
def test_validate_all_of_files(tmp_path: Path, seq_len: int, stride: int, mask_id: int) -> None:
    """What is remembered of a file is of all its tokens, so it may not say where bad ones are."""
    for bad in ([], [199], [0], [8, 51], [120]):
        tokens = np.arange(200)
        tokens[bad] = [BAD[place] for place in bad]
        np.save(tmp_path / "a.npy", tokens)
        whole = make_dataset(tmp_path / "a.npy", seq_len, stride=stride, mask_id=mask_id)
        for dataset in (*whole.split(2), whole) * 2:
            assert_validated(dataset)


@pytest.mark.parametrize("at_once", [1, 7, 1 << 22])
def test_validate_all_within_documents(monkeypatch: pytest.MonkeyPatch, at_once: int) -> None:
    """However many bad ids are in documents that no window fits into."""
    monkeypatch.setattr("nar_kernels.data.windows.dataset._TOKENS_AT_ONCE", at_once)
    tokens = np.array([*[1] * 9, 0, *[V, 0] * 50, *[1] * 9, 0, V, 0, *[1] * 7, 0])
    dataset = make_dataset(tokens, 5, eos_id=0, within_documents=True)
    dataset.validate_all()
    tokens[[112, 116, 126]] = V
    with pytest.raises(InvalidTokenError, match="offset 112 of array .* .3 bad"):
        dataset.validate_all()


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
