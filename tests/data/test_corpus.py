"""Readers: the right tokens, never copied or written, and a clear error for all else."""

import bz2
import copy
import gzip
import hashlib
import io
import json
import lzma
import os
import pickle
import re
import sqlite3
import struct
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nar_kernels.data.corpus import Corpus
from nar_kernels.errors import CorpusFormatError
from nar_kernels.ops.tokens import TOKEN_DTYPES

DTYPES = list(TOKEN_DTYPES)


def extremes(dtype: str) -> np.ndarray:
    """Some ids of a type, the least and the greatest among them; an odd number of them."""
    info = np.iinfo(dtype)
    return np.array([info.max, 0, 1, info.min, info.max // 2 + 1, info.max - 1, 7], dtype)


def write(path: Path, content: bytes | np.ndarray) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.tobytes())
    return path


def npy_bytes(array: np.ndarray, version: tuple[int, int] | None = None) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array(file, array, version=version)
    return file.getvalue()


def values(corpus: Corpus) -> list[int]:
    return corpus.tokens.tolist()


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_source_gives_the_same_tokens(tmp_path: Path, dtype: str) -> None:
    array = extremes(dtype)
    raw = write(tmp_path / "raw.bin", array)
    declared = write(tmp_path / "declared.bin", array)
    write(tmp_path / "declared.bin.json", json.dumps({"dtype": dtype, "vocab": 9}).encode())
    corpora = [
        Corpus(array),
        Corpus(torch.from_numpy(array)),
        Corpus(write(tmp_path / "a.npy", npy_bytes(array))),
        Corpus(str(write(tmp_path / "npy_named.bin", npy_bytes(array, (2, 0))))),
        Corpus(raw, dtype=dtype),
        Corpus(raw, dtype=np.dtype(dtype)),
        Corpus(raw, dtype=TOKEN_DTYPES[dtype]),
        Corpus(write(tmp_path / "raw_named.npy", array), dtype=dtype),
        Corpus(declared),
        Corpus(declared, dtype=dtype),
    ]
    for corpus in corpora:
        assert corpus.tokens.dtype == TOKEN_DTYPES[dtype]
        assert values(corpus) == array.tolist()
        assert len(corpus) == 7
        assert corpus.digest == corpora[0].digest


def test_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a.bin", b"abc")
    assert Corpus("a.bin", dtype="uint8").name == "a.bin"
    assert Corpus(tmp_path / "a.bin", dtype="uint8").name == str(tmp_path / "a.bin")
    assert Corpus(np.zeros(3, "int8")).name == "array"
    assert Corpus(torch.zeros(3, dtype=torch.int8)).name == "tensor"


def test_memory_is_shared() -> None:
    array, tensor = np.zeros(5, "uint16"), torch.zeros(5, dtype=torch.int32)
    of_array, of_tensor = Corpus(array), Corpus(tensor)
    array[3], tensor[4] = 65535, 9
    assert values(of_array) == [0, 0, 0, 65535, 0]
    assert values(of_tensor) == [0, 0, 0, 0, 9]


def test_what_is_not_contiguous_is_copied() -> None:
    array, tensor = np.arange(12, dtype="uint16"), torch.arange(12)
    unaligned = np.frombuffer(b"\xff" + array.tobytes(), "<u2", offset=1)
    assert values(Corpus(array[::-3])) == [11, 8, 5, 2]
    assert values(Corpus(tensor[1::4])) == [1, 5, 9]
    assert values(Corpus(unaligned)) == array.tolist()
    assert Corpus(unaligned).tokens.data_ptr() % 2 == 0


def test_read_only_arrays_are_welcome(tmp_path: Path) -> None:
    array = np.arange(9, dtype="uint16")
    array.flags.writeable = False
    np.save(tmp_path / "a.npy", array)
    assert values(Corpus(array)) == array.tolist()
    assert values(Corpus(np.load(tmp_path / "a.npy", mmap_mode="r"))) == array.tolist()


@pytest.mark.parametrize("name", ["a.npy", "a.bin"])
def test_a_write_to_the_tokens_does_not_reach_the_file(tmp_path: Path, name: str) -> None:
    array = np.arange(5000, dtype="uint16")
    path = write(tmp_path / name, npy_bytes(array) if name == "a.npy" else array)
    before, time = path.read_bytes(), path.stat().st_mtime_ns
    dtype = None if name == "a.npy" else "uint16"
    corpus = Corpus(path, dtype=dtype)
    corpus.tokens.fill_(7)
    assert values(corpus) == [7] * 5000
    del corpus
    assert path.read_bytes() == before
    assert path.stat().st_mtime_ns == time
    assert values(Corpus(path, dtype=dtype)) == array.tolist()


def test_a_corpus_larger_than_memory_opens_at_once(tmp_path: Path) -> None:
    """Fails for maps that reserve memory, and for anything that reads the file."""
    path = tmp_path / "sparse.bin"
    try:
        with path.open("wb") as file:
            file.truncate(1 << 40)
            file.seek(-2, os.SEEK_END)
            file.write(b"\xfe\xff")
    except OSError as error:
        pytest.skip(f"no sparse file of 1 TiB here: {error}")
    corpus = Corpus(path, dtype="uint16")
    assert len(corpus) == 1 << 39
    assert corpus.tokens[-3:].tolist() == [0, 0, 0xFFFE]
    assert len(corpus.digest) == 64


def test_a_file_travels_as_its_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    array = np.arange(100_000, dtype="uint32")
    np.save(tmp_path / "a.npy", array)
    monkeypatch.chdir(tmp_path)
    corpus = Corpus("a.npy")
    digest = corpus.digest
    pickled = pickle.dumps(corpus)
    assert len(pickled) < 1000
    monkeypatch.chdir(tmp_path.parent)
    arrived = pickle.loads(pickled)
    assert torch.equal(arrived.tokens.view(torch.int32), corpus.tokens.view(torch.int32))
    assert (arrived.name, arrived.digest) == ("a.npy", digest)


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_array_travels_whole(dtype: str) -> None:
    array = extremes(dtype)
    for source, name in ((array, "array"), (torch.from_numpy(array), "tensor")):
        corpus = Corpus(source)
        arrived = pickle.loads(pickle.dumps(corpus))
        assert arrived.tokens.dtype == TOKEN_DTYPES[dtype]
        assert values(arrived) == array.tolist()
        assert (arrived.name, arrived.digest) == (name, corpus.digest)


def test_a_part_of_an_array_travels_alone() -> None:
    array = np.arange(100_000, dtype="uint16")
    for part in (array[500:600], torch.from_numpy(array)[500:600], array[::1000]):
        pickled = pickle.dumps(Corpus(part))
        assert len(pickled) < 1000
        assert values(pickle.loads(pickled)) == part.tolist()


def test_copies_share_the_tokens(tmp_path: Path) -> None:
    path = write(tmp_path / "a.bin", IDS)
    for corpus in (Corpus(np.arange(9)), Corpus(path, dtype="uint16")):
        assert copy.deepcopy(corpus).tokens.data_ptr() == corpus.tokens.data_ptr()


def digest_by_hand(array: np.ndarray) -> str:
    content = array.tobytes()
    sha = hashlib.sha256(f"torch.{array.dtype} {len(array)}".encode())
    last = max(0, len(content) - 4096)
    for i in range(64):
        start = i * last // 63
        sha.update(content[start : start + 4096])
    return sha.hexdigest()


@pytest.mark.parametrize("length", [1, 3, 2048, 2049, 131_072, 131_073, 1_000_000])
def test_digest(length: int) -> None:
    array = np.arange(length).astype("uint16")
    digest = Corpus(array).digest
    assert digest == digest_by_hand(array)
    seen = {digest, Corpus(array.view("int16")).digest, Corpus(np.append(array, array[:1])).digest}
    # The first and the last token always count; all do up to 256 KiB.
    inside = [length // 2, length // 3] if length <= 131_072 else []
    places = {0, length - 1, *inside}
    for place in places:
        changed = array.copy()
        changed[place] ^= 1
        seen.add(Corpus(changed).digest)
    assert len(seen) == 3 + len(places)


SOURCES_REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "2-D": (lambda: np.zeros((2, 3), "uint16"), r"array has shape \(2, 3\).*array.reshape\(-1\)"),
    "0-D": (lambda: np.array(3), r"array has shape \(\).*array.reshape\(-1\)"),
    "empty": (lambda: np.zeros(0, "uint16"), "array is empty: .* at least one token"),
    "float": (lambda: np.zeros(3), r"array has dtype float64.*uint8.*array.astype\('int64'\)"),
    "bool": (lambda: np.zeros(3, bool), "array has dtype bool"),
    "uint64": (lambda: np.zeros(3, "uint64"), "array has dtype uint64"),
    "complex": (lambda: np.zeros(3, complex), "array has dtype complex128"),
    "object": (lambda: np.array([[1], [2, 3]], object), "array has dtype object"),
    "big-endian": (
        lambda: np.zeros(3, ">u2"),
        r"array has dtype >u2, whose byte order .* array.astype\('uint16'\)",
    ),
    "2-D tensor": (lambda: torch.zeros(2, 3, dtype=torch.uint8), r"tensor has shape \(2, 3\)"),
    "empty tensor": (lambda: torch.zeros(0, dtype=torch.int64), "tensor is empty"),
    "float tensor": (
        lambda: torch.zeros(3),
        r"tensor has dtype float32.*tensor.to\(torch.int64\)",
    ),
    "bfloat16 tensor": (lambda: torch.zeros(3, dtype=torch.bfloat16), "dtype bfloat16"),
    "bool tensor": (lambda: torch.zeros(3, dtype=torch.bool), "tensor has dtype bool"),
    "uint64 tensor": (lambda: torch.zeros(3, dtype=torch.uint64), "tensor has dtype uint64"),
    "another device": (
        lambda: torch.zeros(3, dtype=torch.int64, device="meta"),
        r"on meta: .*tensor.to_dense\(\).cpu\(\)",
    ),
    "sparse": (lambda: torch.zeros(3, dtype=torch.int64).to_sparse(), "tensor is torch.sparse_coo"),
}


@pytest.mark.parametrize("case", SOURCES_REFUSED)
def test_arrays_that_are_no_stream_of_ids(case: str) -> None:
    make, message = SOURCES_REFUSED[case]
    with pytest.raises(CorpusFormatError, match=message):
        Corpus(make())


def test_columns_and_masks_of_arrays() -> None:
    for array in (np.zeros(3, "uint16"), torch.zeros(3, dtype=torch.int64)):
        with pytest.raises(
            CorpusFormatError, match="column='x' was given with an array of .*leave"
        ):
            Corpus(array, column="x")
    for mask in ([False, True, False], False):
        with pytest.raises(
            CorpusFormatError, match=r"masked one.*array\.compressed\(\).*array\.data"
        ):
            Corpus(np.ma.array([1, 2, 3], mask=mask))


def test_an_id_that_ends_no_document() -> None:
    corpus = Corpus(np.array([1, 2, 3]), eos_id=7)
    with pytest.warns(UserWarning, match="eos_id 7 does not occur in array, .* one document"):
        assert corpus.document_ends.tolist() == [3]


@pytest.mark.parametrize("source", [[1, 2, 3], None, b"abc", np.uint16(3)])
def test_other_types(source: Any) -> None:
    with pytest.raises(
        TypeError, match="a path, a list of paths, a numpy array or a torch tensor, not "
    ):
        Corpus(source)


def test_dtype_is_for_raw_files(tmp_path: Path) -> None:
    array = np.zeros(8, "uint16")
    path = write(tmp_path / "a.npy", npy_bytes(array))
    for dtype in ("uint16", "uint8"):
        with pytest.raises(
            CorpusFormatError, match=r"a\.npy is a \.npy file, .* uint16: .*leave it"
        ):
            Corpus(path, dtype=dtype)
        with pytest.raises(CorpusFormatError, match=r"an array of uint16: .*leave it out"):
            Corpus(array, dtype=dtype)
        with pytest.raises(CorpusFormatError, match=r"an array of torch\.uint16: .*leave it out"):
            Corpus(torch.from_numpy(array), dtype=dtype)


@pytest.mark.parametrize(
    "dtype", ["float32", "bool", "uint64", ">u2", "nonsense", "u2,u2", torch.bfloat16, np.float16]
)
def test_types_that_are_no_ids(tmp_path: Path, dtype: Any) -> None:
    path = write(tmp_path / "a.bin", b"\0" * 16)
    with pytest.raises(
        CorpusFormatError, match=rf"a\.bin was given dtype={re.escape(repr(dtype))}: .*uint8, i"
    ):
        Corpus(path, dtype=dtype)


IDS = np.arange(8, dtype="<u2")

# name: (content of the file, dtype=, message); the message must also name the file
FILES_REFUSED: dict[str, tuple[bytes, str | None, str]] = {
    "empty.bin": (b"", "uint16", "is empty"),
    "untyped.bin": (
        b"abcd",
        None,
        r"pass dtype= \(nanoGPT's \.bin files are dtype='uint16'; dtype='uint8' reads any file as"
        r" bytes\), or write \{\"dtype\": \"uint16\"\} to untyped\.bin\.json",
    ),
    "text.txt": (b"once upon a time", None, "dtype='uint8' reads any file as bytes"),
    "raw.npy": (
        IDS.tobytes(),
        None,
        r"has no \.npy header and .* if it is raw binary, pass dtype",
    ),
    "odd.bin": (b"abc", "uint16", "has 3 bytes, not a whole number of uint16 tokens of 2 bytes"),
    "short.bin": (b"a", "int64", "has 1 bytes, not a whole number of int64"),
    "truncated.npy": (
        npy_bytes(IDS)[:-1],
        None,
        "has 143 bytes, but .* promises 8 tokens of uint16, which makes 144: it is truncated",
    ),
    "header_only.npy": (npy_bytes(IDS)[:128], None, "has 128 bytes.*truncated"),
    "appended.npy": (npy_bytes(IDS) + npy_bytes(IDS), None, "has 288 bytes.*was appended"),
    "damaged.npy": (npy_bytes(IDS)[:60], None, r"damaged \.npy header"),
    "magic_only.npy": (npy_bytes(IDS)[:6], None, r"damaged \.npy header"),
    "unaligned.npy": (
        b"\x93NUMPY\1\0\x37\0 {'descr':'<i4', 'fortran_order':False, 'shape':(2,) }\n" + b"\0" * 8,
        None,
        "begin at byte 65, which is not aligned for int32: write it again with np.save",
    ),
    "two_d.npy": (npy_bytes(IDS.reshape(2, 4)), None, r"\(2, 4\).*np.load\(.*\).reshape\(-1\)"),
    "fortran.npy": (npy_bytes(np.asfortranarray(IDS.reshape(2, 4))), None, r"reshape\(-1\)"),
    "fortran_1d.npy": (
        npy_bytes(IDS).replace(b"'fortran_order': False", b"'fortran_order': True "),
        None,
        r"is stored in Fortran order.*reshape\(-1\)",
    ),
    "no_tokens.npy": (npy_bytes(IDS[:0]), None, "is empty"),
    "big_endian.npy": (npy_bytes(IDS.astype(">u2")), None, r">u2.*np.load\(.*astype\('uint16'\)"),
    "float.npy": (npy_bytes(IDS.astype("f4")), None, r"dtype float32.*np.load\(.*astype\('int64'"),
    "bool.npy": (npy_bytes(IDS.astype(bool)), None, "dtype bool"),
    "uint64.npy": (npy_bytes(IDS.astype("u8")), None, "dtype uint64"),
    "complex.npy": (npy_bytes(IDS.astype(complex)), None, "dtype complex128"),
    "object.npy": (npy_bytes(IDS.astype(object)), None, "dtype object"),
    "npy.bin": (npy_bytes(IDS), "uint16", r"is a \.npy file.*leave it out"),
}


@pytest.mark.parametrize("name", FILES_REFUSED)
def test_files_that_are_no_stream_of_ids(tmp_path: Path, name: str) -> None:
    content, dtype, message = FILES_REFUSED[name]
    path = write(tmp_path / name, content)
    with pytest.raises(CorpusFormatError, match=message) as caught:
        Corpus(path, dtype=dtype)
    assert str(path) in str(caught.value)
    assert path.read_bytes() == content


def saved(save: Callable[[Any], Any]) -> bytes:
    file = io.BytesIO()
    save(file)
    return file.getvalue()


def tar_bytes() -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        tar.addfile(tarfile.TarInfo("ids.npy"))
    return file.getvalue()


def sqlite_bytes() -> bytes:
    with sqlite3.connect(":memory:") as database:
        database.execute("CREATE TABLE ids (id INTEGER)")
        return database.serialize() if hasattr(database, "serialize") else b"SQLite format 3\0"


def safetensors_bytes() -> bytes:
    header = b'{"ids":{"dtype":"U16","shape":[8],"data_offsets":[0,16]}}'
    return struct.pack("<Q", len(header)) + header + IDS.tobytes()


# As TensorFlow writes it.
TFRECORD = bytes.fromhex("0e00000000000000c5e5693f") + b"fourteen bytes" + b"\x8c\xd1\x66\x49"

# What errors call them: files, or what they begin with.
OTHER_FORMATS: dict[str, list[bytes]] = {
    "a zip archive, as np.savez": [
        saved(lambda file: np.savez(file, ids=IDS)),
        saved(lambda file: np.savez_compressed(file, ids=IDS)),
        saved(lambda file: torch.save(torch.arange(9), file)),
    ],
    "a pickle": [
        pickle.dumps(value, protocol)
        for protocol in range(2, 6)
        for value in (IDS, [1, 2, 3, 4, 5], {"ids": [1, 2, 3]}, {1: 2, 3: 4})
    ],
    "a torch.save file in its legacy format": [
        saved(lambda file: torch.save(torch.arange(9), file, _use_new_zipfile_serialization=False))
    ],
    "compressed by gzip": [gzip.compress(IDS.tobytes(), level) for level in (1, 6, 9)],
    "compressed by bzip2": [bz2.compress(IDS.tobytes()), bz2.compress(b"")],
    "compressed by xz": [lzma.compress(IDS.tobytes())],
    "compressed by zstd": [bytes.fromhex("28b52ffd200021000000")],
    "compressed by lz4": [bytes.fromhex("04224d18684003000000")],
    "a tar archive": [tar_bytes()],
    "an encrypted Parquet file": [b"PARE" + bytes(32) + b"PARE"],
    "a Feather file, version 1": [b"FEA1" + bytes(32) + b"FEA1"],
    "questions with answers for llm.c": [np.array([20240522] + [0] * 255, "<i4").tobytes()],
    "a checkpoint or tokenizer of llm.c": [
        np.array([magic] + [3] * 255, "<i4").tobytes() for magic in (20240326, 20240327, 20240328)
    ],
    "a safetensors file": [safetensors_bytes()],
    "an HDF5 file": [b"\x89HDF\r\n\x1a\n" + bytes(32)],
    "an SQLite database": [sqlite_bytes()],
    "a TFRecord file": [TFRECORD],
    "a PNG image": [b"\x89PNG\r\n\x1a\n" + bytes(32)],
    "a JPEG image": [b"\xff\xd8\xff\xe0\0\x10JFIF\0" + bytes(32)],
}


@pytest.mark.parametrize("what", OTHER_FORMATS)
def test_other_formats(tmp_path: Path, what: str) -> None:
    for content in OTHER_FORMATS[what]:
        path = write(tmp_path / "a.bin", content)
        for dtype in (None, "uint8", "uint16", "int64"):
            with pytest.raises(CorpusFormatError, match=rf"a\.bin is {what}.*not supported yet: "):
                Corpus(path, dtype=dtype)
        # The way out that the message names.
        assert bytes(values(Corpus(np.memmap(path, dtype="uint8", mode="r")))) == content


@pytest.mark.parametrize(
    "content",
    [
        b"PK, the magic number of zip",
        b"PAR1 is what Parquet files begin with",
        b"PAR1",
        b"BZh91 is a bzip2 header",
        b"SQLite format 3 is a header",
        b"ARROW1 is a header",
        b"x" * 257 + b"ustar is a header",
        b"\x1f\x8b\x08\x00\0\0\0\0\x07\x03",  # gzip has no such level
        b"\x1f\x8b\x09\x00" + bytes(8),  # nor this method
        b"\x80\x04\x95\x05" + b"\x01" * 8,  # a frame of exabytes
        b"\x80\x02as ids",
        b"\xff\xff\xff\xff\x10\0\0\0" + bytes(8),
        bytes(32),
        b"\xff" * 32,
        np.array([19280, 7], "<u2").tobytes(),
        np.array([35615, 8, 9, 10, 11, 12], "<u2").tobytes(),
        # `{"` alone is no header of safetensors: 8827 as an id.
        np.array([16, 8827, 3], "<i8").tobytes(),
        np.array([16, 0, 8827, 3], "<i4").tobytes(),
        np.array([16, 0, 0, 0, 8827, 3], "<u2").tobytes(),
    ],
)
def test_ids_and_text_that_begin_like_other_formats(tmp_path: Path, content: bytes) -> None:
    path = write(tmp_path / "a.txt", content)
    assert bytes(values(Corpus(path, dtype="uint8"))) == content


def test_chunks_of_litdata(tmp_path: Path) -> None:
    path = write(tmp_path / "chunk-0-0.bin", IDS)
    index = {"chunks": [{"filename": "chunk-0-0.bin", "dim": 8}], "config": {}}
    write(tmp_path / "index.json", json.dumps(index).encode())
    for source in (path, tmp_path):
        with pytest.raises(CorpusFormatError, match="a chunk of a LitData dataset.*not supported"):
            Corpus(source, dtype="uint16")
    # Other indices do not matter.
    for content in (b"{", b"[]", b'{"chunks": [{"filename": "b.bin"}]}', b'{"chunks": 1}'):
        write(tmp_path / "index.json", content)
        assert values(Corpus(path, dtype="uint16")) == IDS.tolist()


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"missing\.bin"):
        Corpus(tmp_path / "missing.bin", dtype="uint16")


def test_a_folder_without_corpora(tmp_path: Path) -> None:
    write(tmp_path / "notes.txt", b"some text")
    with pytest.raises(CorpusFormatError, match=f"{re.escape(str(tmp_path))} is a folder without"):
        Corpus(tmp_path)


@pytest.mark.parametrize(
    ("sidecar", "message"),
    [
        (b"", "is not JSON"),
        (b"\xff", "is not JSON"),
        (b"[]", "names no dtype"),
        (b'{"type": "uint16"}', "names no dtype"),
        (b'{"dtype": null}', "names no dtype"),
        (b'{"dtype": "float16"}', "says 'float16'"),
        (b'{"dtype": ">u2"}', "says '>u2'"),
        (b'{"dtype": ",mnt17"}', "says ',mnt17'"),  # a SyntaxError, to numpy
    ],
)
def test_bad_sidecar(tmp_path: Path, sidecar: bytes, message: str) -> None:
    path = write(tmp_path / "a.bin", IDS)
    write(tmp_path / "a.bin.json", sidecar)
    with pytest.raises(CorpusFormatError, match=rf"a\.bin\.json {message}"):
        Corpus(path)


def test_sidecar_and_dtype_disagree(tmp_path: Path) -> None:
    path = write(tmp_path / "a.bin", IDS)
    write(tmp_path / "a.bin.json", b'{"dtype": "uint32"}')
    with pytest.raises(CorpusFormatError, match=r"says uint16 but .*a\.bin\.json says uint32"):
        Corpus(path, dtype="uint16")


def test_no_damage_to_a_header_gives_another_kind_of_error(tmp_path: Path) -> None:
    good = npy_bytes(IDS)
    path, num_refused = tmp_path / "a.npy", 0
    for place in range(128):
        for byte in b"\0'-":
            write(path, good[:place] + bytes([byte]) + good[place + 1 :])
            try:
                Corpus(path)
            except CorpusFormatError:
                num_refused += 1
    assert num_refused > 100


NPY_TYPES = [*DTYPES, ">u2", "<u8", "f2", "f4", "?", "c8", "S3", "U2", "M8[s]", "O", "u1,i4"]


def read_or_refuse(path: Path, **how: Any) -> Corpus | None:
    """Nothing but a CorpusFormatError may come of any file."""
    try:
        return Corpus(path, **how)
    except CorpusFormatError as error:
        assert str(path) in str(error)
        return None


@given(
    st.sampled_from(NPY_TYPES),
    st.lists(st.integers(0, 4), max_size=3),
    st.booleans(),
    st.sampled_from([(1, 0), (2, 0), (3, 0)]),
    st.data(),
)
def test_npy_files_of_any_kind(tmp_path, dtype, shape, fortran, version, data) -> None:
    array = np.zeros(shape, dtype)
    if dtype in DTYPES:
        info = np.iinfo(dtype)
        numbers = st.integers(int(info.min), int(info.max))
        array.flat = data.draw(st.lists(numbers, min_size=array.size, max_size=array.size))
    array = np.asfortranarray(array) if fortran else array
    corpus = read_or_refuse(write(tmp_path / "a.npy", npy_bytes(array, version)))
    assert (corpus is not None) == (dtype in DTYPES and array.ndim == 1 and array.size > 0)
    assert corpus is None or values(corpus) == array.tolist()


# What may stand in a header, right and wrong.
ENTRIES = {
    "descr": st.sampled_from([*(f"<{c}{n}" for c in "iuf" for n in (0, 1, 2, 4, 8)), "|u1", "O"])
    | st.text(max_size=3)
    | st.none()
    | st.lists(st.tuples(st.text("ab", max_size=1), st.sampled_from(["<i4", "<u2"])), max_size=2),
    "fortran_order": st.booleans() | st.none() | st.integers(0, 1),
    "shape": st.lists(st.integers(-2, 5) | st.just(1 << 62) | st.just(1 << 80), max_size=2).map(
        tuple
    )
    | st.none()
    | st.integers(0, 5),
}


@given(st.fixed_dictionaries(ENTRIES), st.binary(max_size=24), st.integers(0, 64))
def test_npy_headers_of_any_kind(tmp_path, header, content, padding) -> None:
    text = repr(header).encode("latin-1", "replace") + b" " * padding + b"\n"
    head = b"\x93NUMPY\1\0" + struct.pack("<H", len(text)) + text
    corpus = read_or_refuse(write(tmp_path / "a.npy", head + content))
    if corpus is not None:
        dtype = np.dtype(header["descr"])
        assert header["shape"] == (len(content) // dtype.itemsize,)
        assert values(corpus) == np.frombuffer(content, dtype).tolist()


@given(st.sampled_from(DTYPES), st.integers(0, 20), st.data())
def test_npy_files_that_are_cut_or_changed(tmp_path, dtype, number, data) -> None:
    whole = npy_bytes(np.arange(number).astype(dtype))
    cut = data.draw(st.integers(0, len(whole) - 1))
    assert read_or_refuse(write(tmp_path / "a.npy", whole[:cut])) is None
    place, byte = data.draw(st.integers(0, 127)), data.draw(st.integers(0, 255))
    corpus = read_or_refuse(
        write(tmp_path / "a.npy", whole[:place] + bytes([byte]) + whole[place + 1 :])
    )
    # What still reads is what numpy reads.
    assert corpus is None or values(corpus) == np.load(tmp_path / "a.npy").tolist()


@given(st.binary(max_size=40), st.sampled_from(DTYPES), st.sampled_from(["a.bin", "a.npy", "a"]))
def test_raw_files_of_any_content(tmp_path, content, dtype, name) -> None:
    corpus = read_or_refuse(write(tmp_path / name, content), dtype=dtype)
    if corpus is not None:
        assert values(corpus) == np.frombuffer(content, dtype).tolist()
    elif content and len(content) % np.dtype(dtype).itemsize == 0:
        with pytest.raises(CorpusFormatError, match="npy|not supported yet|must be|leave"):
            Corpus(tmp_path / name, dtype=dtype)


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(), st.lists) | st.binary())
def test_sidecars_of_any_content(tmp_path, content) -> None:
    path = write(tmp_path / "a.bin", IDS)
    sidecar = content if isinstance(content, bytes) else json.dumps({"dtype": content}).encode()
    write(tmp_path / "a.bin.json", sidecar)
    corpus = read_or_refuse(path)
    assert corpus is None or len(corpus) * np.dtype(content).itemsize == IDS.nbytes
