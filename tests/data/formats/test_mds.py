"""MosaicML MDS: shards written by its own library and by hand."""

import json
import shutil
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nar_kernels.data.corpus import Corpus
from tests.data.formats.fixtures.write_mds import LENGTHS, ids
from tests.helpers.corpora import (
    MDS_CODES,
    ids_of,
    mds_array,
    mds_shard,
    refused,
    write_mds_folder,
)

FIXTURES = Path(__file__).with_name("fixtures")

SAMPLES = [np.arange(3, dtype="<u2"), np.arange(300, dtype="<u2"), np.arange(1, dtype="<u2")]
IDS = np.concatenate(SAMPLES).tolist()


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("mds_ndarray_uint16", "uint16"),
        ("mds_ndarray", "int32"),
        ("mds_fixed", "int16"),
        ("mds_bytes", "int64"),
    ],
)
def test_folders_of_its_own_writer(name: str, dtype: str) -> None:
    options = {"dtype": dtype} if name == "mds_bytes" else {}
    samples = [ids(i, dtype) for i in range(len(LENGTHS))]
    if name == "mds_fixed":
        samples = [np.resize(sample, 40) for sample in samples]
    corpus = Corpus(FIXTURES / name, **options)
    assert ids_of(corpus) == np.concatenate(samples).tolist()
    assert corpus.stream.layouts[0].dtype == dtype
    assert corpus.document_ends.tolist() == np.cumsum([len(s) for s in samples]).tolist()
    # Each shard for itself, too.
    shards = Corpus(str(FIXTURES / name / "*.mds"), **options)
    assert ids_of(shards) == ids_of(corpus)
    assert shards.document_ends.tolist() == corpus.document_ends.tolist()


def test_samples_that_touch_are_one_run() -> None:
    layouts = Corpus(FIXTURES / "mds_fixed").stream.layouts
    assert [layout.lengths.tolist() for layout in layouts] == [[80], [80], [80]]


def test_compressed_shards(tmp_path: Path) -> None:
    import gzip

    folder = tmp_path / "mds"
    shutil.copytree(FIXTURES / "mds_compressed", folder)
    refused(folder, r"shard\.00000\.mds is there only compressed, by gz: decompress its files")
    # The way out that the message names.
    packed = (folder / "shard.00000.mds.gz").read_bytes()
    (folder / "shard.00000.mds").write_bytes(gzip.decompress(packed))
    assert len(Corpus(folder)) == sum(LENGTHS)


def test_shards_of_tests_are_those_of_its_own_writer() -> None:
    for name, dtype in (("mds_ndarray_uint16", True), ("mds_ndarray", False)):
        theirs = (FIXTURES / name / "shard.00000.mds").read_bytes()
        index = json.loads((FIXTURES / name / "index.json").read_text())["shards"][0]
        num = index["samples"]
        if dtype:
            columns = {"tokens": ("ndarray:uint16", None)}
            cells = [[mds_array(ids(i, "uint16"), dtype=False, shape=True)] for i in range(num)]
        else:
            columns = {
                "id": ("int", 8),
                "input_ids": ("ndarray", None),
                "text": ("str", None),
                "weights": ("ndarray:float32", None),
            }
            cells = [
                [
                    struct.pack("<q", i),
                    mds_array(ids(i, "int32"), dtype=True, shape=True),
                    b"x" * i,
                    bytes([4, i + 1]) + np.ones(i + 1, "<f4").tobytes(),
                ]
                for i in range(num)
            ]
        assert mds_shard(columns, cells, index["size_limit"]) == (theirs, index)


def write(folder: Path, encoding: str, cells: Sequence[bytes], size: int | None = None) -> Path:
    """A folder of one shard with one column."""
    shard = mds_shard({"tokens": (encoding, size)}, [[cell] for cell in cells])
    return write_mds_folder(folder / "mds", [shard]).source


@pytest.mark.parametrize("dtype", MDS_CODES)
def test_types(tmp_path: Path, dtype: str) -> None:
    info = np.iinfo(dtype)
    array = np.array([info.max, 0, info.min, 7], dtype)
    for encoding, size in (
        ("ndarray", None),
        (f"ndarray:{dtype}", None),
        (f"ndarray:{dtype}:4", 4),
    ):
        cell = mds_array(array, dtype=encoding == "ndarray", shape=size is None)
        path = write(tmp_path, encoding, [cell, cell], size and size * array.itemsize)
        corpus = Corpus(path)
        assert corpus.stream.layouts[0].dtype == dtype
        assert ids_of(corpus) == array.tolist() * 2
    path = write(tmp_path, "bytes", [array.tobytes(), b"", array.tobytes()])
    corpus = Corpus(path, dtype=dtype)
    assert ids_of(corpus) == array.tolist() * 2
    assert corpus.document_ends.tolist() == [4, 4, 8]


def test_shapes_in_more_bytes_than_needed(tmp_path: Path) -> None:
    cells = [
        bytes([4 | code]) + len(sample).to_bytes(1 << code, "little") + sample.tobytes()
        for code, sample in ((0, SAMPLES[0]), (1, SAMPLES[1]), (2, SAMPLES[1]), (3, SAMPLES[2]))
    ]
    corpus = Corpus(write(tmp_path, "ndarray:uint16", cells))
    assert corpus.document_ends.tolist() == [3, 303, 603, 604]
    assert corpus.read(303, 310).tolist() == list(range(7))


def test_columns(tmp_path: Path) -> None:
    """Fixed and varying ones on both sides."""
    columns = {
        "a": ("str", None),
        "b": ("int", 8),
        "more": ("ndarray:uint16", None),
        "tokens": ("ndarray:uint16", None),
        "z": ("bytes", None),
    }
    cells = [
        [b"x" * i, bytes(8), mds_array(s[:1], False, True), mds_array(s, False, True), b"z" * i]
        for i, s in enumerate(SAMPLES)
    ]
    path = write_mds_folder(tmp_path / "mds", [mds_shard(columns, cells)]).source
    assert ids_of(Corpus(path)) == IDS
    assert ids_of(Corpus(path, column="more")) == [0, 0, 0]
    assert ids_of(Corpus(path, column="z", dtype="uint8")) == list(b"zzz")
    refused(path, r"column 'b' of .* holds int, not token ids.*it has 'a' \(str\)", column="b")
    refused(path, "has no column 'ids': it has 'a'", column="ids")
    refused(path, "column 'z' of .* holds bytes, and nothing says of what dtype", column="z")
    del columns["tokens"]
    cells = [cell[:3] + cell[4:] for cell in cells]
    path = write_mds_folder(tmp_path / "mds", [mds_shard(columns, cells)]).source
    refused(path, "has several columns of lists of token ids .*: name the right one with column=;")
    path = write(tmp_path, "int", [bytes(8)], 8)
    refused(path, r"has no column of lists of token ids .*it has 'tokens' \(int\)")


GOOD = [mds_array(sample, dtype=True, shape=True) for sample in SAMPLES]


@pytest.mark.parametrize(
    ("encoding", "cells", "size", "message"),
    [
        ("ndarray", [*GOOD, b""], None, "sample 3 is 0 bytes in a column, but must be longer"),
        ("ndarray", [*GOOD, b"\x10"], None, "sample 3 is 0 bytes in a column"),
        ("ndarray", [*GOOD, b"\x10\x04"], None, "sample 3 is 1 bytes in a column"),
        ("ndarray", [*GOOD, b"\x10\x07" + bytes(7)], None, "sample 3 is 8 bytes in a column"),
        ("ndarray", [b"\x12" + GOOD[0][1:]], None, "code of the dtype is 18, but must be in all"),
        ("ndarray", [b"\x40" + GOOD[0][1:]], None, "code of the dtype is 64"),
        ("ndarray", [*GOOD, b"\x11" + GOOD[0][1:]], None, "code of the dtype is 16, 17, but"),
        ("ndarray", [GOOD[0] + b"\0"], None, r"shape of sample 0 is \(3,\), but must be what 7 by"),
        ("ndarray", [GOOD[0][:-1]], None, r"shape of sample 0 is \(3,\), but must be what 5 bytes"),
        ("ndarray", [b"\x10\x04\x04" + bytes(6)], None, r"shape of sample 0 is \(4,\)"),
        ("ndarray", [b"\x10\x07" + b"\xff" * 8], None, r"shape of sample 0 is \(184467440737"),
        ("ndarray", [b"\x10\x08\x01\x03" + bytes(6)], None, "number of axes of sample 0 is 2"),
        ("ndarray", [b"\x10\x00"], None, "number of axes of sample 0 is 0, but must be 1"),
        ("ndarray:uint16:3", [bytes(6)], 8, "size of column 'tokens' is 8, but must be 6"),
        ("ndarray:uint16:3", [bytes(6)], None, "size of column 'tokens' is None, but must be 6"),
        ("ndarray:uint16", [bytes(6)], 6, "size of column 'tokens' is 6, but must be null"),
        ("ndarray:uint16:1,3", [bytes(6)], 6, "shape of 'tokens' is 1,3, but must be one number"),
        ("ndarray:uint16:0", [b""], None, "shape of 'tokens' is 0, but must be one number"),
        ("ndarray:uint64", [bytes(8)], None, r"no column of lists .*'tokens' \(ndarray:uint64\)"),
        ("ndarray:float32", [bytes(8)], None, "no column of lists"),
        ("ndarray:uint16:3:4", [bytes(8)], None, "no column of lists"),
        ("ndarray:", [bytes(8)], None, "no column of lists"),
        ("json", [b"[1, 2, 3]"], None, "no column of lists"),
        ("list[png]", [bytes(8)], None, "no column of lists"),
    ],
)
def test_bad_samples(
    tmp_path: Path, encoding: str, cells: list[bytes], size: int | None, message: str
) -> None:
    refused(write(tmp_path, encoding, cells, size), message)


def test_bytes_of_no_whole_number_of_ids(tmp_path: Path) -> None:
    path = write(tmp_path, "bytes", [bytes(4), bytes(3)])
    message = "size of sample 1 is 3 bytes, but must be ids of uint16"
    refused(path, message, dtype="uint16")
    refused(path, "holds bytes, and nothing says of what dtype: pass dtype=")
    (path / "shard.00000.mds.json").write_text('{"dtype": "uint8"}')
    assert len(Corpus(path)) == 7


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write(tmp_path, "ndarray", GOOD)


def shard_of(folder: Path) -> Path:
    return folder / "shard.00000.mds"


def test_the_shard_of_tests_is_right(folder: Path) -> None:
    assert ids_of(Corpus(folder)) == ids_of(Corpus(shard_of(folder))) == IDS


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (0, 2, "list of offsets of samples is from"),
        (0, 1 << 31, "number of samples is 2147483648, but must be less, in"),
        (0, (1 << 32) - 1, "number of samples is 4294967295"),
        (
            4,
            0,
            "list of offsets of samples is from 0 to .*, but must be ascending from 20 or later",
        ),
        (4, 19, "list of offsets of samples is from 19"),
        (4, (1 << 32) - 1, "list of offsets of samples is from 4294967295"),
        (8, 0, "list of offsets of samples is"),
        (8, (1 << 32) - 1, "list of offsets of samples is"),
        (16, 0, "list of offsets of samples is"),
        (16, (1 << 32) - 1, "list of offsets of samples is from .* to 4294967295"),
    ],
)
def test_bad_heads(folder: Path, place: int, value: int, message: str) -> None:
    path = shard_of(folder)
    content = bytearray(path.read_bytes())
    content[place : place + 4] = value.to_bytes(4, "little")
    path.write_bytes(content)
    refused(path, rf"shard\.00000\.mds: {message}")
    refused(folder, message)


def test_offsets_between_samples(folder: Path) -> None:
    """Sizes in a sample add up to it."""
    path = shard_of(folder)
    content = bytearray(path.read_bytes())
    (begin,) = struct.unpack_from("<I", content, 8)
    struct.pack_into("<I", content, 8, begin + 1)
    path.write_bytes(content)
    refused(path, "size of sample 0 is 14 bytes, but must be 13")
    struct.pack_into("<I", content, 8, 4 + struct.unpack_from("<I", content, 4)[0] - 1)
    path.write_bytes(content)
    refused(path, "sample 0 is 3 bytes in a column, but must be longer")


def test_a_short_shard(folder: Path) -> None:
    for size in (1, 7):
        shard_of(folder).write_bytes(bytes(size))
        refused(shard_of(folder), f"size is {size} bytes, but must be at least 8, its header")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "json"}, "format is 'json', but must be mds"),
        ({"version": 1}, "version is 1, but must be 2"),
        ({"version": None}, "version is None, but must be 2"),
        ({"column_names": "tokens"}, "column_names is 'tokens', but must be a list"),
        ({"column_names": [1]}, r"column_names is \[1\]"),
        ({"column_names": ["a", "b"]}, "list of columns is "),
        ({"column_names": []}, "list of columns is "),
        ({"column_encodings": None}, "column_encodings is None"),
        ({"column_encodings": ["ndarray"] * 2}, "list of columns is "),
        ({"column_sizes": ["8"]}, r"column_sizes is \['8'\]"),
        ({"column_sizes": [-1]}, r"column_sizes is \[-1\], but must be numbers of 32 bits"),
        ({"column_sizes": [1 << 32]}, r"column_sizes is \[4294967296\]"),
        ({"column_sizes": [1.5]}, r"column_sizes is \[1.5\]"),
        (
            {"column_names": ["a"] * 2, "column_encodings": ["bytes"] * 2, "column_sizes": [1] * 2},
            "list of columns is .* one name, encoding and size each",
        ),
        ({"column_names": [], "column_encodings": [], "column_sizes": []}, "it has no columns"),
    ],
)
def test_bad_columns(folder: Path, changes: dict[str, Any], message: str) -> None:
    path = shard_of(folder)
    content = path.read_bytes()
    begins = np.frombuffer(content[4:20], "<u4")
    config = json.loads(content[20 : begins[0]])
    text = json.dumps(config | changes).encode()
    moved = begins + len(text) - (begins[0] - 20)
    new = content[:4] + moved.astype("<u4").tobytes() + text + content[begins[0] :]
    path.write_bytes(new)
    refused(path, message)
    for text in (b"", b"{", b"[]", b"[" * 100_000, b"\xff", b"null"):
        moved = begins + len(text) - (begins[0] - 20)
        path.write_bytes(content[:4] + moved.astype("<u4").tobytes() + text + content[begins[0] :])
        refused(path, "is not JSON|format is None")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 1}, r"index\.json: version is 1, but must be 2"),
        ({"version": None}, r"index\.json: version is None"),
        ({"shards": None}, r"index\.json: shards is None, but must be a list of shards"),
        ({"shards": {}}, "shards is {}, but must be a list"),
        ({"shards": [1]}, r"shards is \[1\]"),
        ({"shards": []}, "is empty: a corpus has at least one token"),
        ({"format": "xsv"}, "format of shard 0 is 'xsv', but must be mds"),
        ({"samples": 2}, r"samples of shard 0 is 2, but must be 3, as in .*mds"),
        ({"samples": "3"}, "samples of shard 0 is '3'"),
        (
            {"column_names": ["ids"]},
            r"column_names of shard 0 is \['ids'\], but must be \['tokens'",
        ),
        ({"column_encodings": ["bytes"]}, "column_encodings of shard 0 is"),
        ({"column_sizes": [8]}, "column_sizes of shard 0 is"),
        ({"raw_data": None}, "raw_data of shard 0 is None, but must be a file"),
        ({"raw_data": {}}, "basename of shard 0 is None, but must be the name of a file"),
        ({"raw_data": {"basename": "a\0b"}}, r"basename of shard 0 is 'a\\x00b', but must be the"),
        ({"raw_data": {"basename": "\ud800"}}, r"basename of shard 0 is '\\ud800'"),
        (
            {"raw_data": {"basename": "shard.00000.mds", "bytes": 1}},
            "size is .* bytes, but must be 1",
        ),
        ({"raw_data": {"basename": "shard.00000.mds"}}, "size is .* bytes, but must be None by"),
    ],
)
def test_bad_indices(folder: Path, changes: dict[str, Any], message: str) -> None:
    index = json.loads((folder / "index.json").read_text())
    for key, value in changes.items():
        (index if key in index else index["shards"][0])[key] = value
    (folder / "index.json").write_text(json.dumps(index))
    refused(folder, message)


def test_missing_shards(folder: Path) -> None:
    shard_of(folder).unlink()
    with pytest.raises(FileNotFoundError, match=r"shard\.00000\.mds"):
        Corpus(folder)


def test_folders_of_shards_in_folders(tmp_path: Path, folder: Path) -> None:
    """As indices that were merged name them."""
    index = json.loads((folder / "index.json").read_text())
    entry = index["shards"][0]
    shards = [entry | {"raw_data": entry["raw_data"] | {"basename": f"{i}/a.mds"}} for i in "12"]
    for i in "12":
        (tmp_path / i).mkdir()
        shutil.copy(shard_of(folder), tmp_path / i / "a.mds")
    (tmp_path / "index.json").write_text(json.dumps({"version": 2, "shards": shards}))
    assert ids_of(Corpus(tmp_path)) == IDS * 2


def test_other_folders_with_an_index(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.arange(5))
    for content in ("[]", "{}", '{"chunks": []}', "{"):
        (tmp_path / "index.json").write_text(content)
        assert ids_of(Corpus(tmp_path)) == list(range(5))
    (tmp_path / "a.mds").write_bytes(b"")
    refused(tmp_path, r"index\.json is not JSON")
