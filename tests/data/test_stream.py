"""Runs of ids in several files as one stream: every backend reads what a plain array holds."""

import mmap
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nar_kernels import Corpus, MaskedLoader, MaskingConfig, TokenDataset
from nar_kernels.data.formats.base import Layout
from nar_kernels.data.stream import TokenStream
from nar_kernels.errors import CorpusChangedError, CorpusFormatError, InvalidTokenError
from nar_kernels.ops.tokens import TOKEN_DTYPES
from nar_kernels.ops.windows import gather, read_ahead, windows
from tests.helpers.corpora import WRITERS
from tests.helpers.windows import assert_same

BACKENDS = ["reference", "cpp"]


def files_of(folder: Path, ids: np.ndarray, cuts: list[int], shift: int = 0) -> list[Layout]:
    """Files that hold the parts of ``ids`` between cuts, ``shift`` bytes after their beginning."""
    layouts = []
    for i, part in enumerate(np.split(ids, cuts)):
        path = folder / f"{i}.part"
        path.write_bytes(b"\xff" * shift + part.tobytes() + b"\xff")
        layouts.append(Layout.of_one_run("raw", path, ids.dtype.name, shift, len(part)))
    return layouts


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", TOKEN_DTYPES)
@pytest.mark.parametrize("shift", [0, 1, 3, 8])
def test_windows_across_files(tmp_path: Path, dtype: str, shift: int, backend: str) -> None:
    ids = (np.arange(100) * 37 % 101).astype(dtype)
    stream = TokenStream.of_files(files_of(tmp_path, ids, [1, 7, 7, 30, 99], shift))
    assert len(stream) == 100 and stream.runs is not None
    starts = torch.arange(100 - 13 + 1)
    expected = torch.from_numpy(np.stack([ids[s : s + 13] for s in starts.tolist()]))
    gathered = gather(stream.flat, stream.runs, starts, 13, backend=backend)
    assert gathered.dtype == TOKEN_DTYPES[dtype]
    assert torch.equal(gathered.view(torch.uint8), expected.view(torch.uint8))
    how = {"num_tokens": 102, "mask_id": 101, "runs": stream.runs, "backend": backend}
    clean = windows(stream.flat, starts, 13, **how)  # type: ignore[arg-type]
    assert clean.tolist() == expected.tolist()
    for bad in (-1, 88):
        with pytest.raises(IndexError, match=f"window start {bad} .* corpus of 100 tokens"):
            windows(stream.flat, torch.tensor([0, bad]), 13, **how)  # type: ignore[arg-type]
        with pytest.raises(IndexError, match=f"window start {bad} .* corpus of 100 tokens"):
            gather(stream.flat, stream.runs, torch.tensor([bad]), 13, backend=backend)


@given(
    st.sampled_from(list(TOKEN_DTYPES)),
    st.integers(1, 60),
    st.lists(st.integers(0, 60), max_size=12),
    st.integers(0, 9),
    st.data(),
)
def test_any_cuts(tmp_path, dtype, length, cuts, shift, data) -> None:
    ids = np.arange(length).astype(dtype)
    layouts = files_of(tmp_path, ids, sorted(min(cut, length) for cut in cuts), shift)
    corpus = Corpus(np.zeros(1, "uint8"))
    corpus.stream = TokenStream.of_files(layouts)
    start = data.draw(st.integers(0, length))
    stop = data.draw(st.integers(start, length))
    assert corpus.read(start, stop).tolist() == ids[start:stop].tolist()
    assert corpus.digest == Corpus(ids).digest
    assert pickle.loads(pickle.dumps(corpus)).read(0, length).tolist() == ids.tolist()
    out = torch.empty(length, dtype=TOKEN_DTYPES[dtype])
    assert corpus.stream.copy_to(out).tolist() == ids.tolist()


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("draw", ["exact", "bernoulli"])
def test_batches_do_not_depend_on_the_files(tmp_path: Path, draw: str, backend: str) -> None:
    ids = (np.arange(5000) * 997 % 250).astype("uint8")
    for i, part in enumerate(np.split(ids, [3, 1000, 1001, 4096])):
        part.tofile(tmp_path / f"shard-{i + 8}.bin")  # 8, 9, 10, ...: in the order of the numbers
    masking = MaskingConfig(256, 255, draw=draw, random_token_prob=0.1)  # type: ignore[arg-type]
    whole, parts = (
        MaskedLoader(
            TokenDataset(source, 64, num_tokens=256, mask_id=255, stride=5, dtype=dtype),
            masking,
            16,
            seed=3,
            backend=backend,
        )
        for source, dtype in ((ids, None), (tmp_path, "uint8"))
    )
    assert parts.state_dict() == whole.state_dict()
    for step in (0, 61, 62):
        assert_same(whole.batch(step), parts.batch(step))


def test_sources_of_several_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    ids = np.arange(30, dtype="uint16")
    for i, part in enumerate(np.split(ids, 3)):
        np.save(f"a-{i}.npy", part)
    (tmp_path / "notes.txt").write_text("no corpus")
    (tmp_path / "list.json").write_text('{"files": ["a-0.npy", "a-[12].npy"]}')
    names = ["a-0.npy", "a-1.npy", Path("a-2.npy")]
    for source in (names, "a-*.npy", tmp_path, "list.json", ["a-0.npy", "a-[12].npy"]):
        corpus = Corpus(source)
        assert corpus.read(0, 30).tolist() == ids.tolist()
        with pytest.raises(ValueError, match=r"lie in 3 places.*corpus.read\(start, stop\)"):
            _ = corpus.tokens
        for bad in ((-1, 3), (3, 31), (5, 4)):
            with pytest.raises(IndexError, match=f"tokens {bad[0]} to {bad[1]} are not all in"):
                corpus.read(*bad)
    np.save("a-3.npy", np.arange(3, dtype="uint32"))
    with pytest.raises(CorpusFormatError, match=r"a-3\.npy holds uint32 and .*a-0\.npy uint16: "):
        Corpus("a-*.npy")
    unaligned = Corpus(np.zeros(1, "uint8"))
    unaligned.stream = TokenStream.of_files(files_of(tmp_path, ids, [], shift=1))
    with pytest.raises(ValueError, match=r"are not aligned in memory, .* use corpus\.read\(start"):
        _ = unaligned.tokens
    with pytest.raises(CorpusFormatError, match="list of files is empty"):
        Corpus([])
    with pytest.raises(FileNotFoundError, match="b-"):
        Corpus("b-*.npy")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[", "is not JSON"),
        ("[1]", "does not list files"),
        ('{"files": []}', "does not list files"),
        ('{"files": ["a.npy", 3]}', "does not list files"),
        ('{"files": ["a.npy"], "dtyp": "uint16"}', "has the unknown key 'dtyp': a .json file must"),
        ('{"files": ["list.json"]}', r"names another list, .*list\.json"),
    ],
)
def test_bad_lists(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "list.json"
    path.write_text(content)
    with pytest.raises(CorpusFormatError, match=rf"list\.json {message}"):
        Corpus(path)
    assert bytes(Corpus(path, dtype="uint8").tokens.tolist()).decode() == content


def test_bad_ids_name_the_file(tmp_path: Path) -> None:
    ids = np.arange(30, dtype="uint16")
    ids[17] = 99
    for i, part in enumerate(np.split(ids, 3)):
        np.save(tmp_path / f"{i}.npy", part)
    dataset = TokenDataset(tmp_path, 4, num_tokens=50, mask_id=49)
    loader = MaskedLoader(dataset, MaskingConfig(50, 49), 7)
    for fetch in (lambda: dataset[4], lambda: loader.batch(0), dataset.validate_all):
        with pytest.raises(InvalidTokenError, match=r"id 99 at offset 7 of .*1\.npy is outside"):
            fetch()


# Files that change


def open_loader(path: Path) -> MaskedLoader:
    dataset = TokenDataset(path, 16, num_tokens=256, mask_id=255, dtype="uint8")
    return MaskedLoader(dataset, MaskingConfig(256, 255), 4)


@pytest.mark.parametrize("change", ["shrinks", "grows", "is written to", "is replaced", "is gone"])
def test_a_file_that_changes(tmp_path: Path, change: str) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(bytes(16 * 40))
    loader = open_loader(path)
    next(loader)
    message = {
        "shrinks": "it has 320 bytes now, and had 640",
        "grows": "it has 641 bytes now, and had 640",
        "is gone": "cannot be read any more",
    }.get(change, "it was written to, or replaced")
    if change == "shrinks":
        os.truncate(path, 320)
    elif change == "grows":
        with path.open("ab") as file:
            file.write(b"\0")
    elif change == "is written to":
        path.write_bytes(bytes(16 * 40))
        os.utime(path, ns=(1, 1))
    elif change == "is replaced":
        (tmp_path / "b.bin").write_bytes(bytes(16 * 40))
        os.replace(tmp_path / "b.bin", path)
    else:
        path.unlink()
    loader.step = 10  # an epoch begins
    with pytest.raises(CorpusChangedError, match=rf"a\.bin .*{message}"):
        next(loader)
    with pytest.raises(CorpusChangedError):
        loader.dataset.corpus.stream.check_unchanged()
    if change != "is gone":
        assert Corpus(path, dtype="uint8").read(0, 1).tolist() == [0]  # opened again, it is fine


def test_a_worker_does_not_map_another_file(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(bytes(640))
    pickled = pickle.dumps(open_loader(path))
    path.write_bytes(bytes(600))
    with pytest.raises(CorpusChangedError, match="has 600 bytes now, and had 640; open it again"):
        pickle.loads(pickled)


def test_a_pickled_corpus_does_not_map_other_ids(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(bytes(640))
    time = path.stat().st_mtime_ns
    pickled = pickle.dumps(Corpus(path, dtype="uint8"))
    path.write_bytes(bytes([7]) * 640)
    os.utime(path, ns=(time, time + 1))
    with pytest.raises(CorpusChangedError, match="written to, or replaced; open it again"):
        pickle.loads(pickled)
    # A copy that keeps the time may have another inode.
    (tmp_path / "b.bin").write_bytes(bytes(640))
    os.utime(tmp_path / "b.bin", ns=(time, time))
    os.replace(tmp_path / "b.bin", path)
    arrived = pickle.loads(pickled)
    assert arrived.read(0, 640).tolist() == [0] * 640
    arrived.stream.check_unchanged()


def test_the_signature_is_of_what_is_mapped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even if the file is replaced in between."""
    (layout,) = files_of(tmp_path, np.zeros(9, "uint8"), [])
    memory_map = mmap.mmap

    def replaced(*args: Any, **kwargs: Any) -> mmap.mmap:
        (tmp_path / "new").write_bytes(bytes([7]) * 10)
        os.replace(tmp_path / "new", layout.path)
        return memory_map(*args, **kwargs)

    monkeypatch.setattr(mmap, "mmap", replaced)
    stream = TokenStream.of_files([layout])
    assert stream.read(0, 9).tolist() == [0] * 9
    with pytest.raises(CorpusChangedError, match="it was written to, or replaced"):
        stream.check_unchanged()


@pytest.mark.parametrize(
    ("format", "suffix"),
    [("datatrove", ".ds.index"), ("datatrove", ".ds.loss"), ("megatron", ".idx")],
)
def test_a_companion_that_changes(tmp_path: Path, format: str, suffix: str) -> None:
    source = WRITERS[format](tmp_path, [np.arange(64, dtype="uint16")] * 4).source
    companion = source.with_suffix(suffix)
    loader = MaskedLoader(
        TokenDataset(source, 16, num_tokens=65, mask_id=64), MaskingConfig(65, 64), 4
    )
    pickled = pickle.dumps(loader.dataset.corpus)
    next(loader)
    os.utime(companion, ns=(1, 1))
    loader.step = 4  # an epoch begins
    name = re.escape(companion.name)
    with pytest.raises(CorpusChangedError, match=rf"{name} changed while it was in use: it was wr"):
        next(loader)
    with pytest.raises(CorpusChangedError, match=rf"{name} changed since it was opened"):
        pickle.loads(pickled)
    os.truncate(companion, 8)
    with pytest.raises(CorpusChangedError, match=rf"{name} .* it has 8 bytes now"):
        loader.dataset.corpus.stream.check_unchanged()


# Pages

_STREAMING = """
import sys, numpy as np
from pathlib import Path
from nar_kernels import MaskedLoader, MaskingConfig, TokenDataset
from nar_kernels.data.residency import Residency

def resident():
    return int(Path("/proc/self/statm").read_bytes().split()[1]) * 4096

dataset = TokenDataset(
    sys.argv[1], 1 << 12, stride=1 << 15, num_tokens=9, mask_id=8, dtype="uint16"
)
loader = MaskedLoader(dataset, MaskingConfig(9, 8), 64)
loader._residency = Residency(dataset.corpus.stream, most_resident=200 << 20)
before, most = None, 0
for _ in range(len(loader)):
    assert next(loader).clean_ids.max() == 0
    before = before or resident()
    most = max(most, resident())
print(most - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_file_of_20_gb_streams_at_constant_memory(tmp_path: Path) -> None:
    """Systems map 64 KiB around a page that is read: in an epoch, all of the file."""
    path = tmp_path / "sparse.bin"
    with path.open("wb") as file:
        file.truncate(20_000_000_000)
    run = subprocess.run(
        [sys.executable, "-c", _STREAMING, str(path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) < 300 << 20


def test_read_ahead_changes_nothing(tmp_path: Path) -> None:
    ids = np.arange(10_000, dtype="uint16")
    stream = TokenStream.of_files(files_of(tmp_path, ids, [5000], shift=1))
    read_ahead(stream.flat, stream.runs, torch.tensor([4990, 0, 9980]), 20)
    assert stream.read(0, 10_000).tolist() == ids.tolist()
    flat = TokenStream.of_files(files_of(tmp_path, ids, []))
    read_ahead(flat.flat, flat.runs, torch.tensor([9980]), 20)
    with pytest.raises(IndexError, match="window start 9981"):
        read_ahead(flat.flat, flat.runs, torch.tensor([9981]), 20)
    assert flat.read(0, 10_000).tolist() == ids.tolist()
