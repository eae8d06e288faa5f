"""Apache Arrow: files, streams, and folders of datasets."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nar_kernels.data.corpus import Corpus
from nar_kernels.ops.tokens import TOKEN_DTYPES
from tests.helpers.corpora import ids_of, refused, write_ipc

pa = pytest.importorskip("pyarrow")

ROWS = [[1, 2, 3], [4], [], [5, 6, 7, 8], [], [9]]
IDS = [1, 2, 3, 4, 5, 6, 7, 8, 9]
ENDS = [3, 4, 4, 8, 8, 9]

KINDS = ("file", "stream")


def write(folder: Path, columns: dict[str, Any], kind: str = "file", **how: Any) -> Path:
    return write_ipc(folder / f"{kind}.arrow", pa.table(columns), kind == "stream", **how)


def cached(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", TOKEN_DTYPES)
def test_types(tmp_path: Path, kind: str, dtype: str, cache: Path) -> None:
    info, of = np.iinfo(dtype), pa.from_numpy_dtype(dtype)
    rows = [[info.max, 0], [info.min], [], [7, 1, 3]]
    for type in (pa.list_(of), pa.large_list(of)):
        corpus = Corpus(write(tmp_path, {"input_ids": pa.array(rows, type)}, kind))
        assert corpus.dtype == TOKEN_DTYPES[dtype]
        assert ids_of(corpus) == sum(rows, [])
        assert corpus.document_ends.tolist() == [2, 3, 3, 6]
        assert corpus.stream.layouts[0].lengths.tolist() == [3, 3]
    fixed = pa.array([[1, 2], [3, 4], [5, 6]], pa.list_(of, 2))
    corpus = Corpus(write(tmp_path, {"input_ids": fixed}, kind))
    assert (ids_of(corpus), corpus.document_ends.tolist()) == ([1, 2, 3, 4, 5, 6], [2, 4, 6])
    corpus = Corpus(write(tmp_path, {"n": pa.array([3, 1, 2], of)}, kind), column="n")
    assert (ids_of(corpus), corpus.document_ends) == ([3, 1, 2], None)
    # All of these are mapped where they are.
    assert cached(cache) == []


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("compression", ["lz4", "zstd"])
def test_compressed(tmp_path: Path, kind: str, compression: str, cache: Path) -> None:
    """In batches of two rows, of which some are without ids; a column beside is compressed too."""
    columns = {"text": ["x" * 500] * len(ROWS), "input_ids": ROWS}
    path = write(tmp_path, columns, kind, compression=compression)
    for _ in range(2):
        corpus = Corpus(path)
        assert (ids_of(corpus), corpus.document_ends.tolist()) == (IDS, ENDS)
        assert [layout.format for layout in corpus.stream.layouts] == ["arrow"]
    assert [name.split(".", 1)[1] for name in cached(cache)] == ["ends.npy", "ids.npy"]


def test_rows_that_begin_within_the_values(tmp_path: Path) -> None:
    """Slices of lists keep what lies before and after them."""
    rows = pa.array(ROWS)
    sliced = pa.ListArray.from_arrays(pa.array([2, 4, 4, 5], pa.int32()), rows.values)
    table = pa.table({"input_ids": sliced})
    for kind in KINDS:
        corpus = Corpus(write_ipc(tmp_path / f"{kind}.arrow", table, kind == "stream"))
        assert (ids_of(corpus), corpus.document_ends.tolist()) == ([3, 4, 5], [2, 2, 3])
    chunked = pa.table({"input_ids": pa.chunked_array([rows, rows[1:4], rows[:0]])})
    corpus = Corpus(write_ipc(tmp_path / "chunks.arrow", chunked, stream=True))
    assert ids_of(corpus) == IDS + [4, 5, 6, 7, 8]
    assert corpus.document_ends.tolist() == [*ENDS, 10, 10, 14]


def test_which_column(tmp_path: Path) -> None:
    ids, other = pa.array([[1, 2]]), pa.array([[3]])
    path = write(tmp_path, {"labels": other, "tokens": other, "input_ids": ids})
    assert ids_of(Corpus(path)) == [1, 2]
    assert ids_of(Corpus(path, column="labels")) == [3]
    assert ids_of(Corpus(write(tmp_path, {"labels": ids, "tokens": other}))) == [3]
    assert ids_of(Corpus(write(tmp_path, {"text": ["a"], "n": [7], "ids": ids}))) == [1, 2]
    refused(path, r"has no column 'id': it has .*'ids' \(list<item: int64>\)", column="id")
    path = write(tmp_path, {"a": ids, "b": ids, "text": ["a"]})
    refused(
        path, "has several columns of lists of token ids .*column=; it has 'a' .*'text' .string"
    )
    refused(path, "column 'text' of .* holds string, not token ids", column="text")
    path = write(tmp_path, {"text": ["a"], "n": [7]})
    refused(path, "has no column of lists of token ids")
    assert ids_of(Corpus(path, column="n")) == [7]
    twice = pa.Table.from_arrays([ids, other], ["a", "a"])
    refused(
        write_ipc(tmp_path / "twice.arrow", twice, False), "has several columns 'a': rename all"
    )
    refused(write(tmp_path, {}), "it has no columns")


@pytest.mark.parametrize(
    "type",
    [pa.list_(pa.float32()), pa.list_(pa.uint64()), pa.list_(pa.list_(pa.int32())), pa.uint64()],
)
def test_other_columns(tmp_path: Path, type: Any) -> None:
    nested = pa.types.is_list(type) and pa.types.is_list(type.value_type)
    rows = [5] if type == pa.uint64() else [[[1]]] if nested else [[1]]
    path = write(tmp_path, {"input_ids": pa.array(rows, type)})
    refused(path, r"has no column of lists of token ids \(uint8, ")
    refused(path, "column 'input_ids' of .* holds .*, not token ids", column="input_ids")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "column",
    [
        pa.array([[1], None]),
        pa.array([[1, None]]),
        pa.array([[1, 2], None], pa.list_(pa.int64(), 2)),
        pa.array([[1, None]], pa.list_(pa.int64(), 2)),
        pa.array([1, None]),
    ],
)
def test_nulls(tmp_path: Path, kind: str, column: Any) -> None:
    path = write(tmp_path, {"a": column}, kind)
    refused(path, "a row of its ids is null, but|one of its ids is null, but", column="a")
    # Those elsewhere do not matter.
    columns = {"a": column, "input_ids": pa.array([[3]] * len(column))}
    assert ids_of(Corpus(write(tmp_path, columns, kind))) == [3] * len(column)


def test_a_stream_must_end(tmp_path: Path) -> None:
    path = write(tmp_path, {"input_ids": ROWS}, "stream")
    content = path.read_bytes()
    path.write_bytes(content[:-8])
    refused(path, "the end of its stream is missing, but must be marked by its writer")
    for more in (b"\0", content):
        path.write_bytes(content + more)
        refused(path, f"size is {len(content + more)} bytes, but must be {len(content)}")


@pytest.mark.parametrize("kind", KINDS)
def test_truncated(tmp_path: Path, kind: str) -> None:
    path = write(tmp_path, {"input_ids": ROWS}, kind)
    content = path.read_bytes()
    for size in range(40, len(content) - 1, 9):
        path.write_bytes(content[:size])
        refused(path, r"\.arrow is damaged|the end of its stream is missing")


def test_streams_of_other_writers(tmp_path: Path) -> None:
    """Known by the suffix and the mark of a message only: the first message may be laid out in
    other ways."""
    path = write(tmp_path, {"input_ids": ROWS}, "stream")
    content = bytearray(path.read_bytes())
    content[8] = 0xFF  # the root of the first message, which no longer makes sense
    path.write_bytes(content)
    refused(path, "is damaged, not all there, or")
    other = path.rename(tmp_path / "a.bin")
    assert len(Corpus(other, dtype="uint8")) == len(content)


def save_to_disk(folder: Path, num_files: int = 2) -> list[int]:
    """A folder as datasets makes it; the ids in it."""
    folder.mkdir(parents=True)
    names = []
    for i in range(num_files):
        names.append(f"data-{i:05}-of-{num_files:05}.arrow")
        table = pa.table({"input_ids": [[10 * i], [10 * i + 1, 10 * i + 2]], "text": ["a", "b"]})
        write_ipc(folder / names[-1], table, stream=True)
    state = {"_data_files": [{"filename": name} for name in names], "_fingerprint": "0"}
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "dataset_info.json").write_text("{}")
    return [10 * i + j for i in range(num_files) for j in range(3)]


def test_datasets(tmp_path: Path) -> None:
    ids = save_to_disk(tmp_path / "a", 12)
    # What it does not name is not of it.
    write_ipc(tmp_path / "a" / "cache-0.arrow", pa.table({"input_ids": [[7]]}), stream=True)
    corpus = Corpus(tmp_path / "a")
    assert ids_of(corpus) == ids
    assert corpus.document_ends.tolist() == sorted([*range(1, 36, 3), *range(3, 37, 3)])


def test_dataset_dicts(tmp_path: Path) -> None:
    ids = save_to_disk(tmp_path / "all" / "train")
    save_to_disk(tmp_path / "all" / "test")
    (tmp_path / "all" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    refused(tmp_path / "all", r"DatasetDict with the splits \['train', 'test'\]: name the folder")
    assert ids_of(Corpus(tmp_path / "all" / "train")) == ids
    for pattern in ("all/*", "al[l]/*.json"):
        refused(str(tmp_path / pattern), "matches files of .*all, a folder .*: name the folder")
    (tmp_path / "all" / "dataset_dict.json").write_text("{")
    refused(tmp_path / "all", r"dataset_dict\.json is not JSON")


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ("{", r"state\.json is not JSON"),
        ('{"_data_files": 3}', "_data_files is 3, but must be a list of files"),
        ('{"_data_files": [3]}', r"_data_files is \[3\]"),
        ('{"_data_files": [{}]}', "_data_files is None, but must be the name of a file"),
        ('{"_data_files": [{"filename": "a\\u0000"}]}', "must be the name of a file"),
        ('{"_data_files": []}', "is empty"),
        ('{"_data_files": [], "_indices_data_files": [{}]}', "selects rows .* by indices: save it"),
    ],
)
def test_bad_states(tmp_path: Path, state: str, message: str) -> None:
    save_to_disk(tmp_path / "a")
    (tmp_path / "a" / "state.json").write_text(state)
    refused(tmp_path / "a", message)


@pytest.mark.parametrize("state", [None, "[]", '{"step": 7}'])
def test_a_folder_of_files_without_a_state(tmp_path: Path, state: str | None) -> None:
    """Or with one of something else."""
    ids = save_to_disk(tmp_path / "a")
    (tmp_path / "a" / "state.json").unlink()
    if state is not None:
        (tmp_path / "a" / "state.json").write_text(state)
    assert ids_of(Corpus(tmp_path / "a")) == ids


def test_a_state_of_something_else(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.arange(3))
    for name in ("state.json", "dataset_dict.json"):
        for content in ("{", "[]", '{"step": 7}', "\xff"):
            (tmp_path / name).write_text(content, encoding="latin-1")
            assert ids_of(Corpus(tmp_path)) == [0, 1, 2]


def test_caches_of_datasets(tmp_path: Path) -> None:
    ids = save_to_disk(tmp_path / "a")
    for name in ("cache-0123456789abcdef.arrow", "cache-0123456789abcdef_00001_of_00002.arrow"):
        write_ipc(tmp_path / "a" / name, pa.table({"input_ids": [[7]]}), stream=True)
    assert ids_of(Corpus(str(tmp_path / "a" / "*.arrow"))) == ids
    refused(str(tmp_path / "a" / "*"), "matches files of .*a, a folder .*: name the folder")
    refused(str(tmp_path / "a" / "cache-*"), "matches no corpus, but .* caches of datasets")
    (tmp_path / "a" / "state.json").unlink()
    assert ids_of(Corpus(tmp_path / "a")) == ids
    assert ids_of(Corpus(tmp_path / "a" / name)) == [7]


def test_missing_files_of_a_dataset(tmp_path: Path) -> None:
    save_to_disk(tmp_path / "a")
    next((tmp_path / "a").glob("*.arrow")).unlink()
    with pytest.raises(FileNotFoundError, match=r"data-0000.-of-00002\.arrow"):
        Corpus(tmp_path / "a")


def test_tokens_are_not_read_to_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A map of most of it stays untouched: the ids are where the file has them."""
    big = pa.array([np.arange(1 << 16, dtype="uint16")] * 4)
    for kind in KINDS:
        path = write(tmp_path, {"input_ids": big}, kind)
        corpus = Corpus(path)
        content = path.read_bytes()
        for offset, length in zip(
            corpus.stream.layouts[0].offsets, corpus.stream.layouts[0].lengths, strict=True
        ):
            assert length == 1 << 17
            assert np.array_equal(
                np.frombuffer(content, "<u2", 1 << 17, offset), np.tile(big[0].values, 2)
            )
        assert torch.equal(corpus.read(5, 9), torch.tensor([5, 6, 7, 8], dtype=torch.uint16))


def test_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    paths = [write(tmp_path, {"input_ids": ROWS}, kind) for kind in KINDS]
    parquet = tmp_path / "a.parquet"
    pytest.importorskip("pyarrow.parquet").write_table(pa.table({"input_ids": ROWS}), parquet)
    for name in ("pyarrow", "pyarrow.parquet"):
        monkeypatch.setitem(sys.modules, name, None)
    for path in (*paths, parquet):
        with pytest.raises(ImportError, match="pip install pyarrow"):
            Corpus(path)
