"""The checks that all formats share, and which format a source has."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nar_kernels.data.corpus import Corpus
from nar_kernels.data.formats.base import Layout, malformed, merge_runs, parse_json, path_beside
from nar_kernels.data.formats.detect import SUFFIXES
from nar_kernels.data.sources import open_data
from nar_kernels.errors import CorpusFormatError
from tests.helpers.corpora import WRITERS, ids_of

MAX = (1 << 63) - 1


def layout(offsets: list[int], lengths: list[int], size: int = 20, dtype: str = "uint32") -> Layout:
    return Layout("test", "a.bin", dtype, np.array(offsets), np.array(lengths), size)


def test_runs_within_a_file() -> None:
    assert layout([0, 8, 3, 20], [5, 3, 4, 0]).num_tokens == 12
    assert layout([], []).num_tokens == 0
    assert layout([0], [MAX], MAX, "uint8").num_tokens == MAX


@pytest.mark.parametrize(
    ("offset", "length"),
    [(0, 6), (17, 1), (1, 5), (-1, 1), (0, -1), (21, 0), (MAX, MAX), (-MAX - 1, MAX), (4, 1 << 62)],
)
def test_runs_outside_of_a_file(offset: int, length: int) -> None:
    message = (
        rf"a\.bin: run 1 of its ids is {length} of uint32 from byte {offset}, but must be with"
    )
    with pytest.raises(CorpusFormatError, match=message):
        layout([0, offset], [1, length])


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 3)), max_size=12), st.integers(1, 4))
def test_merged_runs(runs: list[tuple[int, int]], itemsize: int) -> None:
    """They are the same bytes in the same order, and no two of them touch."""
    offsets, lengths = np.array(runs, np.int64).reshape(-1, 2).T

    def content(offsets: np.ndarray, lengths: np.ndarray) -> list[int]:
        return [
            int(byte)
            for offset, length in zip(offsets, lengths, strict=True)
            for byte in range(offset, offset + length * itemsize)
        ]

    merged = merge_runs(offsets, lengths, itemsize)
    assert content(*merged) == content(offsets, lengths)
    assert (merged[0][1:] != merged[0][:-1] + merged[1][:-1] * itemsize).all()
    assert len(merged[0]) == len(merged[1]) <= len(offsets)


def test_messages() -> None:
    error = malformed(Path("a.bin"), "version", 3, 1)
    assert isinstance(error, CorpusFormatError)
    assert str(error) == "a.bin: version is 3, but must be 1"
    with pytest.raises(CorpusFormatError, match=r"a\.json is not JSON \(.*\): write it again"):
        parse_json(Path("a.json"), b"[" * 100_000, "write it again")


@pytest.mark.parametrize("name", ["a\0", "\0", "\ud800", 3, None, ["a"]])
def test_names_that_no_file_has(name: Any) -> None:
    with pytest.raises(CorpusFormatError, match=r"a\.json: file is .*, but must be the name of a"):
        path_beside(Path("a.json"), name, "file")


def test_names_beside_a_file() -> None:
    assert path_beside(Path("b/a.json"), "c/d.bin", "file") == Path("b/c/d.bin")


def test_what_the_command_line_reads_as_ids(tmp_path: Path) -> None:
    """Folders, and files with a suffix of these."""
    documents = [np.arange(300, dtype="uint16"), np.arange(700, dtype="uint16")]
    for format, write in WRITERS.items():
        if format == "raw":
            continue
        source = write(tmp_path, documents).source
        assert source.is_dir() or source.suffix in SUFFIXES
        data = open_data(source, num_tokens=1001, seq_len=50)
        assert len(data.train.corpus) == 1000
        assert data.spec.render == "ids"


def test_a_pattern_that_matches_nothing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"\*\.arrow"):
        Corpus(str(tmp_path / "*.arrow"))


def test_folders_within_a_pattern(tmp_path: Path) -> None:
    """Each file once, in the natural order of their paths."""
    for i in (10, 9, 1):
        (tmp_path / str(i)).mkdir()
        np.save(tmp_path / str(i) / "a.npy", np.array([i]))
    for pattern in ("*", "**/*.npy", "*/*", "**"):
        assert ids_of(Corpus(str(tmp_path / pattern))) == [1, 9, 10]


@pytest.mark.parametrize("dtype", ["[1]", "3", "{}", "true", '",mnt17"', '"float32"', '"u2,u2"'])
def test_lists_with_no_dtype(tmp_path: Path, dtype: str) -> None:
    (tmp_path / "a.bin").write_bytes(bytes(8))
    (tmp_path / "list.json").write_text(f'{{"files": ["a.bin"], "dtype": {dtype}}}')
    message = r"list\.json: dtype is .*, but must be a name|a\.bin was given dtype='.*': a raw file"
    with pytest.raises(CorpusFormatError, match=message):
        Corpus(tmp_path / "list.json")


@pytest.mark.parametrize("files", ['["a\\u0000.bin"]', '["\\ud800"]'])
def test_lists_of_names_that_no_file_has(tmp_path: Path, files: str) -> None:
    (tmp_path / "list.json").write_text(f'{{"files": {files}}}')
    with pytest.raises(CorpusFormatError, match=r"list\.json: a name in the list is .*, but must"):
        Corpus(tmp_path / "list.json")
