"""What holds of every format: the same documents give the same corpus, and no damage does harm."""

import json
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nar_kernels.data.corpus import Corpus
from nar_kernels.data.loader import MaskedLoader
from nar_kernels.errors import CorpusFormatError
from nar_kernels.ops.windows import windows
from tests.helpers.corpora import (
    WITH_DOCUMENTS,
    WRITERS,
    check_runs,
    ends_of,
    ids_of,
    read_or_refuse,
)
from tests.helpers.windows import MASKING, assert_same, make_dataset

BACKENDS = ["reference", pytest.param("cpp", marks=pytest.mark.cpp)]

# As many as a list has at the least; one is empty.
LENGTHS = (5, 1, 300, 0, 17, 2, 64)


def documents(seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 1000, length).astype("uint16") for length in LENGTHS]


@pytest.mark.parametrize("format", WRITERS)
def test_the_same_documents(tmp_path: Path, format: str) -> None:
    written = WRITERS[format](tmp_path, documents())
    before = {path: path.read_bytes() for path in written.files}
    corpus = Corpus(written.source, **written.options)
    expected = np.concatenate(documents())
    assert corpus.dtype == torch.uint16
    assert ids_of(corpus) == expected.tolist()
    assert corpus.digest == Corpus(expected).digest
    assert corpus.read(300, 311).tolist() == expected[300:311].tolist()
    if format in WITH_DOCUMENTS:
        assert corpus.document_ends.tolist() == ends_of(documents())
        assert corpus.document_ends.dtype == np.int64
    else:
        assert corpus.document_ends is None
        by_eos = Corpus(written.source, eos_id=int(expected[4]), **written.options)
        assert by_eos.document_ends[0] == 5
    if format == "datatrove":
        mask = corpus.loss_mask.read(0, len(corpus))
        assert mask.dtype == torch.uint8
        assert mask.tolist() == (np.arange(len(corpus)) % 3 == 0).tolist()
    else:
        assert corpus.loss_mask is None
    check_runs(corpus)
    assert before == {path: path.read_bytes() for path in written.files}


@pytest.mark.parametrize("format", WRITERS)
def test_a_corpus_travels_as_its_paths(
    tmp_path: Path, format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = WRITERS[format](tmp_path, [*documents(), np.zeros(50_000, "uint16")])
    monkeypatch.chdir(tmp_path)
    corpus = Corpus(written.source.relative_to(tmp_path), **written.options)
    expected = ids_of(corpus), corpus.document_ends
    pickled = pickle.dumps(corpus)
    assert len(pickled) < 5000
    monkeypatch.chdir(tmp_path.parent)
    arrived = pickle.loads(pickled)
    assert ids_of(arrived) == expected[0]
    assert np.array_equal(arrived.document_ends, expected[1])


def write_all(folder: Path, names: list[str]) -> tuple[list[Path], list[np.ndarray]]:
    """A corpus in each of these formats, all different: what names them, and their documents."""
    paths, parts = [], []
    for seed, name in enumerate(names):
        part = documents(seed)
        paths.append(WRITERS[name](folder, part).source)
        parts += part
    (folder / "datatrove.ds.loss").unlink(missing_ok=True)  # others have none
    return paths, parts


def test_lists(tmp_path: Path) -> None:
    paths, parts = write_all(tmp_path, WITH_DOCUMENTS)
    names = [str(path.relative_to(tmp_path)) for path in paths]
    (tmp_path / "list.json").write_text(json.dumps({"files": names}))
    for source in (paths, tuple(map(str, paths)), tmp_path / "list.json"):
        corpus = Corpus(source)
        assert ids_of(corpus) == np.concatenate(parts).tolist()
        assert corpus.document_ends.tolist() == ends_of(parts)
        assert corpus.digest == Corpus(np.concatenate(parts)).digest


# In the order of the names of their files.
IN_A_FOLDER = [
    "npy",
    "datatrove",
    "arrow",
    "litpkds",
    "llm.c",
    "megatron",
    "scattered megatron",
    "arrow stream",
    "parquet",
    "compressed arrow",
]


def test_folders_and_globs(tmp_path: Path) -> None:
    folder = tmp_path / "corpus"
    folder.mkdir()
    paths, parts = write_all(folder, IN_A_FOLDER)
    assert paths == sorted(paths)
    (folder / "README.md").write_text("Companions and other files are not read.")
    expected = np.concatenate(parts).tolist()
    assert ids_of(Corpus(folder)) == expected
    (folder / "README.md").unlink()
    for pattern in (folder / "*", folder / "**", tmp_path / "**", tmp_path / "corp*"):
        assert ids_of(Corpus(str(pattern))) == expected
    only = Corpus(str(folder / "megatron*"))
    assert len(only) == len(expected) // len(IN_A_FOLDER)


def test_files_of_several_types(tmp_path: Path) -> None:
    WRITERS["arrow"](tmp_path, documents())
    WRITERS["parquet"](tmp_path, [document.astype("int64") for document in documents()])
    with pytest.raises(CorpusFormatError, match="holds int64 and .* uint16: .* have one dtype"):
        Corpus(tmp_path)


def test_parts_without_tokens_are_left_out(tmp_path: Path) -> None:
    nothing = [np.zeros(0, "uint16")] * 2
    for name in ("arrow stream", "compressed arrow", "parquet", "llm.c", "litpkds"):
        folder = tmp_path / name
        folder.mkdir()
        empty = WRITERS[name](folder, nothing)
        with pytest.raises(CorpusFormatError, match="is empty: a corpus has at least one token"):
            Corpus(empty.source)
        full = WRITERS["arrow"](folder, documents())
        corpus = Corpus([empty.source, full.source, empty.source])
        assert ids_of(corpus) == np.concatenate(documents()).tolist()
        assert corpus.document_ends.tolist() == ends_of(documents())


@pytest.mark.parametrize("format", WRITERS)
def test_options_that_a_format_has_no_use_for(tmp_path: Path, format: str) -> None:
    written = WRITERS[format](tmp_path, documents())
    is_table = format in ("arrow", "arrow stream", "compressed arrow", "parquet", "mds")
    if not is_table:
        with pytest.raises(CorpusFormatError, match="column='a' was given, but .* is not a table"):
            Corpus(written.source, column="a", **written.options)
    if format not in ("raw", "datatrove"):
        for dtype in ("uint16", "int64"):
            with pytest.raises(CorpusFormatError, match=r"dtype= is for raw binary files; leave"):
                Corpus(written.source, dtype=dtype)


@pytest.mark.parametrize("format", WRITERS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_windows_are_those_of_the_array(tmp_path: Path, format: str, backend: str) -> None:
    (tmp_path / "0").mkdir()
    (tmp_path / "1").mkdir()
    written = [WRITERS[format](tmp_path / str(i), documents(i)) for i in range(2)]
    sources = [part.source for part in written]
    array = np.concatenate(documents(0) + documents(1))
    for seq_len, stride in ((1, 1), (7, 5), (350, 61)):
        kwargs = {"seq_len": seq_len, "stride": stride}
        of_files = make_dataset(sources, **kwargs, **written[0].options)
        of_array = make_dataset(array, **kwargs)
        everything = torch.arange(len(of_array))
        assert len(of_files) == len(of_array)
        assert torch.equal(of_files.windows(everything), of_array.windows(everything))
        stream = of_files.corpus.stream
        got = windows(
            stream.flat,
            of_files.starts(everything),
            seq_len,
            runs=stream.runs,
            num_tokens=1001,
            mask_id=1000,
            backend=backend,
        )
        assert torch.equal(got, of_array.windows(everything))
        of_array.corpus.loss_mask = of_files.corpus.loss_mask
        loaders = [
            MaskedLoader(dataset, MASKING, 6, seed=3, backend=backend)
            for dataset in (of_files, of_array)
        ]
        for _, ours, theirs in zip(range(3), *loaders, strict=False):
            assert_same(ours, theirs)


# Values that are special in some header.
EXTREMES = [0, 1, 2, 3, 7, 8, 255, 1 << 15, 1 << 31, (1 << 31) - 1, (1 << 32) - 1]


@st.composite
def mutations(draw: st.DrawFn, content: bytes) -> bytes:
    """A file with some of it changed, cut out, put in or cut off."""
    changed = bytearray(content)
    for _ in range(draw(st.integers(1, 3))):
        # Headers are short, and at either end.
        near = draw(st.integers(0, min(len(changed), 64)))
        place = draw(st.sampled_from([near, len(changed) - near]) | st.integers(0, len(changed)))
        kind = draw(st.sampled_from(["byte", "number", "cut", "insert", "truncate", "append"]))
        if kind == "byte" and place < len(changed):
            changed[place] = draw(st.integers(0, 255))
        elif kind == "number":
            code = draw(st.sampled_from(["<H", "<I", "<Q", "<q"]))
            value = draw(st.sampled_from(EXTREMES) | st.integers(0, 1000))
            if code == "<Q":
                value = draw(st.sampled_from([value, (1 << 64) - 1 - value, 1 << 63, 1 << 40]))
            elif code == "<q":
                value = -value
            elif code == "<H":
                value &= 0xFFFF
            packed = struct.pack(code, value)
            changed[place : place + len(packed)] = packed
        elif kind == "cut":
            del changed[place : place + draw(st.integers(1, 16))]
        elif kind == "insert":
            changed[place:place] = draw(st.binary(min_size=1, max_size=16))
        elif kind == "truncate":
            del changed[place:]
        else:
            changed += draw(st.binary(min_size=1, max_size=16))
    return bytes(changed)


@pytest.mark.parametrize("format", WRITERS)
@given(data=st.data())
def test_damaged_files(tmp_path: Path, format: str, data: st.DataObject) -> None:
    """Nothing but a CorpusFormatError may come of them; what still reads lies within them."""
    written = WRITERS[format](tmp_path, documents())
    path = data.draw(st.sampled_from(written.files))
    path.write_bytes(data.draw(mutations(path.read_bytes())))
    read_or_refuse(written.source, **written.options)


@pytest.mark.parametrize("format", WRITERS)
def test_truncated_files(tmp_path: Path, format: str) -> None:
    """No file may lose its last byte, its last eight, its last half, or all of it."""
    written = WRITERS[format](tmp_path, documents())
    for path in written.files:
        content = path.read_bytes()
        for size in (len(content) - 1, len(content) - 8, len(content) // 2, 0):
            if path.suffix == ".metadata" and size:
                continue  # the end is for human readers
            if format == "raw" and size % 2 == 0 and size:
                continue  # nothing says how long it was
            path.write_bytes(content[:size])
            with pytest.raises(CorpusFormatError) as caught:
                assert Corpus(written.source, **written.options).document_ends is not None
            assert str(tmp_path) in str(caught.value)
        path.write_bytes(content)


@pytest.mark.parametrize("format", WRITERS)
def test_files_to_which_something_was_appended(tmp_path: Path, format: str) -> None:
    written = WRITERS[format](tmp_path, documents())
    for path in written.files:
        if path.suffix in (".metadata", ".parquet", ".arrow") or format == "raw":
            continue
        content = path.read_bytes()
        for more in (b"\0", bytes(8)):
            path.write_bytes(content + more)
            with pytest.raises(CorpusFormatError):
                assert Corpus(written.source, **written.options).document_ends is not None
        path.write_bytes(content)
