"""The cache of decoded corpora: where it is, when it is used, and by how many at once."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from nar_kernels.data.corpus import Corpus
from nar_kernels.data.formats import cache as cache_module
from nar_kernels.data.formats import parquet
from nar_kernels.data.inspect.inspection import inspect_corpus
from nar_kernels.errors import CorpusChangedError
from tests.helpers.corpora import ids_of
from tests.helpers.paths import ROOT

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

ROWS = [[1, 2, 3], [4], [5, 6]]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    pq.write_table(pa.table({"input_ids": ROWS, "other": ROWS[::-1]}), tmp_path / "a.parquet")
    return tmp_path / "a.parquet"


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The columns that were decoded, in order."""
    decode, columns = parquet._decode, []

    def counted(path, column):
        columns.append(column)
        return decode(path, column)

    monkeypatch.setattr(parquet, "_decode", counted)
    return columns


def test_a_file_is_decoded_once(path: Path, decoded: list[str]) -> None:
    for _ in range(3):
        assert ids_of(Corpus(path)) == [1, 2, 3, 4, 5, 6]
        assert ids_of(Corpus(path, column="input_ids")) == [1, 2, 3, 4, 5, 6]
    assert decoded == ["input_ids"]
    assert ids_of(Corpus(path, column="other")) == [5, 6, 4, 1, 2, 3]
    assert decoded == ["input_ids", "other"]


def test_a_changed_file_is_decoded_again(path: Path, decoded: list[str], tmp_path: Path) -> None:
    Corpus(path)
    for rows, time in ((ROWS[:2], 1), (ROWS[1:], 2)):
        pq.write_table(pa.table({"input_ids": rows, "other": rows}), path)
        os.utime(path, (time, time))
        assert ids_of(Corpus(path)) == sum(rows, [])
    os.utime(path, (3, 3))
    assert ids_of(Corpus(path)) == [4, 5, 6]
    assert len(decoded) == 4
    moved = path.rename(tmp_path / "b.parquet")
    assert ids_of(Corpus(moved)) == [4, 5, 6]
    assert len(decoded) == 5


def test_entries_are_npy_files(path: Path, cache: Path) -> None:
    Corpus(path)
    ends, ids = sorted(cache.iterdir())
    assert np.load(ids).tolist() == [1, 2, 3, 4, 5, 6]
    assert np.load(ends).tolist() == [3, 4, 6]
    assert ids_of(Corpus(ids)) == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("which", ["ids", "ends"])
@pytest.mark.parametrize("size", [None, 0, 100, -5])
def test_damaged_entries_are_decoded_again(
    path: Path, cache: Path, decoded: list[str], which: str, size: int | None
) -> None:
    Corpus(path)
    (entry,) = cache.glob(f"*.{which}.npy")
    if size is None:
        entry.unlink()
    else:
        os.truncate(entry, size % entry.stat().st_size)
    corpus = Corpus(path)
    assert ids_of(corpus) == [1, 2, 3, 4, 5, 6]
    assert corpus.document_ends.tolist() == [3, 4, 6]
    assert len(decoded) == 2


def test_a_corpus_is_called_by_its_own_file(path: Path) -> None:
    corpus = Corpus([path, path])
    assert corpus.where(7) == f"offset 1 of {path}"
    facts = inspect_corpus(corpus, num_tokens=7, mask_id=6).facts
    assert facts["files"]["bytes"] == 2 * path.stat().st_size
    expected = {"path": str(path), "bytes": path.stat().st_size, "tokens": 6}
    assert facts["files"]["first"] == [expected] * 2
    places = [(bad["file"], bad["offset_in_file"]) for bad in facts["bad_ids"]["first"]]
    assert places == [(str(path), 5)] * 2
    pq.write_table(pa.table({"input_ids": ROWS[::-1]}), path)
    with pytest.raises(CorpusChangedError, match=r"a\.parquet changed while it was in use"):
        corpus.stream.check_unchanged()


def test_a_file_that_changes_while_it_is_decoded(
    path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decode = parquet._decode

    def interrupted(path, column):
        yield from decode(path, column)
        os.utime(path, (1, 1))

    monkeypatch.setattr(parquet, "_decode", interrupted)
    with pytest.raises(CorpusChangedError, match=r"a\.parquet changed while it was decoded"):
        Corpus(path)
    assert not list(cache.glob("*.ids.npy"))


@pytest.mark.skipif(sys.platform != "linux", reason="names are bytes there")
@pytest.mark.parametrize("name", ["\N{SNOWMAN}" * 60, "\N{SNAKE}" * 60, "a\udcff\udcfe"])
@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_names_of_any_bytes(path: Path, tmp_path: Path, name: str, kind: str) -> None:
    other = tmp_path / f"{name}.{kind}"
    if kind == "parquet":
        path.rename(other)
    else:
        with pa.OSFile(os.fsencode(other), "wb") as sink:
            table = pa.table({"input_ids": ROWS})
            with pa.ipc.new_file(sink, table.schema) as writer:
                writer.write_table(table)
    corpus = Corpus(other)
    assert ids_of(corpus) == [1, 2, 3, 4, 5, 6]
    assert corpus.document_ends.tolist() == [3, 4, 6]


def test_what_was_not_written_to_the_end_does_not_count(
    path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decode = parquet._decode

    def interrupted(path, column):
        yield from decode(path, column)
        raise KeyboardInterrupt

    monkeypatch.setattr(parquet, "_decode", interrupted)
    with pytest.raises(KeyboardInterrupt):
        Corpus(path)
    assert not list(cache.glob("*.npy*"))
    monkeypatch.setattr(parquet, "_decode", decode)
    assert ids_of(Corpus(path)) == [1, 2, 3, 4, 5, 6]
    assert len(list(cache.iterdir())) == 2


def test_where_it_is(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("NAR_KERNELS_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    places = [tmp_path / "home/.cache/nar_kernels"]
    Corpus(path)
    for variable, value, place in (
        ("XDG_CACHE_HOME", tmp_path / "xdg", tmp_path / "xdg/nar_kernels"),
        ("NAR_KERNELS_CACHE", tmp_path / "own", tmp_path / "own"),
    ):
        assert not place.exists()
        monkeypatch.setenv(variable, str(value))
        Corpus(path)
        places.append(place)
    for place in places:
        assert len(list(place.iterdir())) == 2


def test_where_it_cannot_be(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("NAR_KERNELS_CACHE", str(tmp_path / "file"))
    with pytest.raises(
        OSError, match="in the cache of decoded corpora; .* NAR_KERNELS_CACHE names"
    ):
        Corpus(path)
    monkeypatch.setenv("NAR_KERNELS_CACHE", str(tmp_path / "file" / "folder"))
    with pytest.raises(OSError, match="NAR_KERNELS_CACHE names another folder .*file/folder"):
        Corpus(path)


def test_a_full_disk(path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache_module, "_write_header", full)
    with pytest.raises(
        OSError, match="No space left on device in the cache of decoded corpora; .*"
    ):
        Corpus(path)
    assert not list(cache.glob("*.npy*"))


READ = """
import json, sys
from nar_kernels.data.corpus import Corpus
from nar_kernels.data.formats import parquet
from nar_kernels.data.inspect.inspection import inspect_corpus
from nar_kernels.errors import CorpusChangedError

decode, count = parquet._decode, 0

def counted(path, column):
    global count
    count += 1
    return decode(path, column)

parquet._decode = counted
print("ready", flush=True)
sys.stdin.readline()
corpus = Corpus(sys.argv[1])
ends = corpus.document_ends
assert corpus.read(0, len(corpus)).tolist() == [i % 60000 for i in range(len(corpus))]
corpus.stream.check_unchanged()
print(json.dumps([count, len(corpus), len(ends)]))
"""


@pytest.mark.seconds
def test_several_processes_at_once(tmp_path: Path, cache: Path) -> None:
    ids = (np.arange(3_000_000) % 60000).astype("uint16")
    lists = pa.ListArray.from_arrays(pa.array(range(0, 3_000_001, 1000), pa.int32()), pa.array(ids))
    pq.write_table(pa.table({"input_ids": lists}), tmp_path / "a.parquet")
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", READ, str(tmp_path / "a.parquet")],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(3)
    ]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    results = [json.loads(process.communicate(timeout=120)[0]) for process in processes]
    assert [result[1:] for result in results] == [[3_000_000, 3000]] * 3
    if sys.platform != "win32":
        assert sum(count for count, *_ in results) == 1
        assert len(list(cache.iterdir())) == 2
