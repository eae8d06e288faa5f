"""Megatron-LM: what its index says, and what it may not say."""

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nar_kernels.data.corpus import Corpus
from nar_kernels.data.formats import megatron
from nar_kernels.errors import CorpusFormatError
from tests.helpers.corpora import MEGATRON_CODES, ids_of, megatron_index, refused

IDS = np.arange(10, dtype="<u2")


def write(folder: Path, index: bytes, ids: np.ndarray | bytes = IDS) -> Path:
    (folder / "a.idx").write_bytes(index)
    (folder / "a.bin").write_bytes(ids if isinstance(ids, bytes) else ids.tobytes())
    return folder / "a.bin"


@pytest.mark.parametrize("dtype", MEGATRON_CODES)
def test_types(tmp_path: Path, dtype: str) -> None:
    info = np.iinfo(dtype)
    ids = np.array([info.max, 0, info.min, 7, 1], dtype)
    index = megatron_index([2, 3], [0, 2 * ids.itemsize], [0, 1, 2], MEGATRON_CODES[dtype])
    corpus = Corpus(write(tmp_path, index, ids))
    assert corpus.stream.layouts[0].dtype == dtype
    assert ids_of(corpus) == ids.tolist()


def test_what_names_it(tmp_path: Path) -> None:
    write(tmp_path, megatron_index([4, 6], [0, 8], [0, 1, 2]))
    for name in ("a.bin", "a.idx", "a", "*.bin", "*.idx", "a.*"):
        corpus = Corpus(str(tmp_path / name))
        assert ids_of(corpus) == IDS.tolist()
        assert corpus.document_ends.tolist() == [4, 10]
    dotted = tmp_path / "v1.0_text_document"
    (tmp_path / "a.bin").rename(f"{dotted}.bin")
    (tmp_path / "a.idx").rename(f"{dotted}.idx")
    assert ids_of(Corpus(dotted)) == IDS.tolist()


def test_sequences_in_one_place_are_one_run_in_one_tensor(tmp_path: Path) -> None:
    corpus = Corpus(write(tmp_path, megatron_index([4, 0, 6], [0, 8, 8], [0, 1, 2, 3])))
    assert corpus.tokens.tolist() == IDS.tolist()
    assert corpus.document_ends.tolist() == [4, 4, 10]


@pytest.mark.parametrize("chunk", [1, 2, 1 << 20])
def test_sequences_anywhere(tmp_path: Path, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Backwards, twice, unaligned, empty: runs of those that touch."""
    monkeypatch.setattr(megatron, "_CHUNK", chunk)
    content = b"x" + IDS.tobytes()
    lengths, pointers = [2, 3, 0, 4, 2, 1], [13, 1, 5, 5, 13, 19]
    corpus = Corpus(write(tmp_path, megatron_index(lengths, pointers, [0, 2, 2, 6]), content))
    expected = [6, 7, 0, 1, 2, 2, 3, 4, 5, 6, 7, 9]
    assert ids_of(corpus) == expected
    assert corpus.stream.layouts[0].lengths.tolist() == [2, 3, 6, 1]
    assert corpus.document_ends.tolist() == [5, 5, 12]


def test_documents_of_several_sequences(tmp_path: Path) -> None:
    index = megatron_index([1, 2, 3, 4], [0, 2, 6, 12], [0, 0, 3, 3, 4, 4])
    assert Corpus(write(tmp_path, index)).document_ends.tolist() == [0, 6, 6, 10, 10]


def test_multimodal_corpora(tmp_path: Path) -> None:
    index = megatron_index([4, 6], [0, 8], [0, 1, 2], modes=True)
    assert ids_of(Corpus(write(tmp_path, index))) == IDS.tolist()


def test_more_than_32_bits(tmp_path: Path) -> None:
    """Sequences beyond 4 GiB, in a sparse file."""
    far = 5 << 30
    path = write(tmp_path, megatron_index([2, 3], [far, 8], [0, 1, 2]), b"")
    with path.open("wb") as file:
        try:
            file.seek(8)
            file.write(IDS[:3].tobytes())
            file.seek(far)
            file.write(IDS[5:7].tobytes())
        except OSError as error:
            pytest.skip(f"no sparse file of 5 GiB here: {error}")
    assert ids_of(Corpus(path)) == [5, 6, 0, 1, 2]


def header(**changes: Any) -> bytes:
    """An index of one sequence of all ids, as one document; with other fields."""
    fields = {
        "magic": b"MMIDIDX\0\0",
        "version": 1,
        "code": 8,
        "sequences": 1,
        "documents": 2,
        "length": 10,
        "pointer": 0,
        "first": 0,
        "last": 1,
    }
    return struct.pack("<9sQBQQiqqq", *(fields | changes).values())


def test_the_header_of_tests_is_right(tmp_path: Path) -> None:
    assert header() == megatron_index([10], [0], [0, 1])
    assert Corpus(write(tmp_path, header())).document_ends.tolist() == [10]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"magic": b"MMIDIDX\0\1"}, r"a\.idx: magic number is b'MMIDIDX\\x00\\x01', but must be"),
        ({"version": 2}, r"a\.idx: version is 2, but must be 1"),
        ({"version": 1 << 63}, "version is 9223372036854775808"),
        ({"code": 0}, r"code of the dtype is 0, but must be one of 1 \(uint8\)"),
        ({"code": 6}, r"code of the dtype is 6 \(float64\), but must be"),
        ({"code": 7}, r"code of the dtype is 7 \(float32\), but must be"),
        ({"code": 9}, "code of the dtype is 9"),
        ({"sequences": 0}, "size is 62 bytes, but must be 50 .50 if multimodal., with 0 sequences"),
        ({"sequences": 2}, r"size is 62 bytes, but must be 74 \(76 if multimodal\)"),
        ({"sequences": (1 << 64) - 1}, "size is 62 bytes"),
        ({"documents": 0}, "number of document boundaries is 0, but must be at least 1"),
        ({"documents": 3}, "size is 62 bytes, but must be 70"),
        ({"documents": (1 << 64) - 1}, "size is 62 bytes"),
        (
            {"length": 11},
            r"sequence 0 is 11 tokens from byte 0, but must be within the 20 bytes of",
        ),
        (
            {"length": 9},
            r"a\.bin: size is 20 bytes, but must be 18, where the last of .*a\.idx ends",
        ),
        ({"length": -1}, "sequence 0 is -1 tokens"),
        ({"length": -(1 << 31)}, "sequence 0 is -2147483648 tokens"),
        ({"length": (1 << 31) - 1}, "sequence 0 is 2147483647 tokens"),
        ({"pointer": 1}, "sequence 0 is 10 tokens from byte 1"),
        ({"pointer": -2}, "sequence 0 is 10 tokens from byte -2"),
        ({"pointer": (1 << 63) - 1}, "sequence 0 is 10 tokens from byte 9223372036854775807"),
        ({"pointer": -(1 << 63)}, "sequence 0 is 10 tokens from byte -9223372036854775808"),
        ({"first": 1}, "first document boundary is 1, but must be sequence 0"),
        ({"first": -1}, "first document boundary is -1, but must be sequence 0"),
        ({"last": 0}, "last document boundary is 0, but must be sequence 1"),
        ({"last": 2}, "last document boundary is 2, but must be sequence 1"),
    ],
)
def test_bad_fields(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = write(tmp_path, header(**changes))
    refused(path, message)
    refused(tmp_path / "a.idx", message)


def test_bad_sizes(tmp_path: Path) -> None:
    good = header()
    for size in (33, 34, 61):
        refused(write(tmp_path, good[:size]), rf"a\.idx: size is {size} bytes, but must be")
    refused(write(tmp_path, good + b"\0\0"), "size is 64 bytes, but must be 62 .63 if multimodal")
    ids = IDS.tobytes()
    refused(write(tmp_path, good, ids[:-2]), "sequence 0 .* within the 18 bytes")
    refused(write(tmp_path, good, ids + b"\0"), r"a\.bin: size is 21 bytes, but must be 20")


def test_documents_that_do_not_ascend(tmp_path: Path) -> None:
    index = megatron_index([1, 2, 7], [0, 2, 6], [0, 2, 1, 3])
    corpus = Corpus(write(tmp_path, index))
    assert ids_of(corpus) == IDS.tolist()
    with pytest.raises(CorpusFormatError, match="boundaries is not sorted, but must be ascending"):
        corpus.document_ends  # noqa: B018
    scattered = megatron_index([3, 7], [14, 0], [0, -5, 2])
    refused(write(tmp_path, scattered), "boundaries is not sorted, but must be ascending")


def test_half_of_a_corpus(tmp_path: Path) -> None:
    path = write(tmp_path, header())
    path.unlink()
    for name in ("a.idx", "a"):
        with pytest.raises(FileNotFoundError, match=r"a\.bin"):
            Corpus(tmp_path / name)
    renamed = (tmp_path / "a.idx").rename(tmp_path / "index")
    refused(renamed, r"index is the index of a Megatron-LM corpus: its name must end in \.idx")


def test_other_files_named_idx(tmp_path: Path) -> None:
    path = write(tmp_path, b"something else")
    assert ids_of(Corpus(path, dtype="uint16")) == IDS.tolist()
    refused(path, "does not say what dtype")
