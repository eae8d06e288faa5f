"""Apache Parquet, by way of the cache."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nar_kernels.data.corpus import Corpus
from nar_kernels.data.formats import parquet
from nar_kernels.ops.tokens import TOKEN_DTYPES
from tests.helpers.corpora import ids_of, refused

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

ROWS = [[1, 2, 3], [4], [], [5, 6, 7, 8], [], [9]]
IDS = [1, 2, 3, 4, 5, 6, 7, 8, 9]
ENDS = [3, 4, 4, 8, 8, 9]


def write(folder: Path, columns: dict[str, Any], **how: Any) -> Path:
    pq.write_table(pa.table(columns), folder / "a.parquet", **how)
    return folder / "a.parquet"


@pytest.mark.parametrize("dtype", TOKEN_DTYPES)
def test_types(tmp_path: Path, dtype: str) -> None:
    info, of = np.iinfo(dtype), pa.from_numpy_dtype(dtype)
    rows = [[info.max, 0], [info.min], [], [7, 1, 3]]
    for type in (pa.list_(of), pa.large_list(of)):
        corpus = Corpus(write(tmp_path, {"input_ids": pa.array(rows, type)}))
        assert corpus.dtype == TOKEN_DTYPES[dtype]
        assert ids_of(corpus) == sum(rows, [])
        assert corpus.document_ends.tolist() == [2, 3, 3, 6]
    fixed = pa.array([[1, 2], [3, 4]], pa.list_(of, 2))
    corpus = Corpus(write(tmp_path, {"input_ids": fixed}))
    assert (ids_of(corpus), corpus.document_ends.tolist()) == ([1, 2, 3, 4], [2, 4])
    corpus = Corpus(write(tmp_path, {"n": pa.array([3, 1, 2], of)}), column="n")
    assert (ids_of(corpus), corpus.document_ends) == ([3, 1, 2], None)


@pytest.mark.parametrize("compression", ["none", "snappy", "gzip", "zstd", "lz4", "brotli"])
@pytest.mark.parametrize("rows_of_a_group", [1, 2, 100])
@pytest.mark.parametrize("rows_of_a_batch", [1, 2, 64])
def test_batches(
    tmp_path: Path,
    compression: str,
    rows_of_a_group: int,
    rows_of_a_batch: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of any size, row groups of any size, in any encoding."""
    monkeypatch.setattr(parquet, "_BATCH_ROWS", rows_of_a_batch)
    columns = {"text": list("abcdef"), "input_ids": ROWS, "input_ids.x": ROWS[::-1]}
    how = {"compression": compression, "row_group_size": rows_of_a_group}
    for more in ({}, {"use_dictionary": False, "data_page_version": "2.0"}):
        corpus = Corpus(write(tmp_path, columns, **how, **more))
        assert (ids_of(corpus), corpus.document_ends.tolist()) == (IDS, ENDS)


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, {"input_ids": [list(range(100))] * 500})
    sizes = [len(ids) for ids, _ in parquet._decode(path, "input_ids")]
    assert sum(sizes) == 50_000
    assert max(sizes) == 6400


def test_which_column(tmp_path: Path) -> None:
    path = write(tmp_path, {"a": ROWS, "b": ROWS[::-1], "text": list("abcdef")})
    refused(
        path, "has several columns of lists of token ids .*column=; it has 'a' .*'text' .string"
    )
    assert ids_of(Corpus(path, column="a")) == IDS
    # Each column has an entry of its own.
    assert ids_of(Corpus(path, column="b")) == sum(ROWS[::-1], [])
    refused(path, "column 'text' of .* holds string", column="text")
    refused(path, "has no column 'c'", column="c")
    refused(write(tmp_path, {"input_ids": [[1.5]]}), "has no column of lists of token ids")


@pytest.mark.parametrize("rows", [[[1], None], [[1, None]]])
def test_nulls(tmp_path: Path, rows: list[Any], cache: Path) -> None:
    refused(write(tmp_path, {"input_ids": rows}), "ids is null, but must be")
    assert not list(cache.glob("*.npy"))


def test_damage(tmp_path: Path) -> None:
    path = write(tmp_path, {"input_ids": ROWS})
    content = path.read_bytes()
    for damaged in (content[:-1], content[:-8], content[: len(content) // 2], b"PAR1\x15\0PAR1"):
        path.write_bytes(damaged)
        refused(path, r"a\.parquet is damaged, not all there, or")
    path.write_bytes(b"PARE" + content[4:-4] + b"PARE")
    refused(path, "is an encrypted Parquet file. This format is not supported yet")


def test_what_ended_the_process() -> None:
    """Found by tests/fuzz."""
    path = Path(__file__).with_name("fixtures") / "damaged_statistics.parquet"
    refused(path, "damaged_statistics.parquet is damaged, not all there, or")
