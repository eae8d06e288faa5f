"""Which ids a corpus holds: exact, and remembered as long as its files stay the same."""

import os
from pathlib import Path

import numpy as np
import pytest

from nar_kernels.data import sources
from nar_kernels.data.corpus import Corpus
from nar_kernels.data.inspect import remembered
from nar_kernels.data.inspect import scan as scan_module
from nar_kernels.data.inspect.document_lengths import document_lengths
from nar_kernels.data.inspect.inspection import inspect_corpus
from nar_kernels.data.inspect.scan import BadIds, CorpusScan, find_bad, known_scan, scan
from nar_kernels.data.sources import open_data
from nar_kernels.errors import CorpusChangedError, InvalidTokenError
from nar_kernels.ops.tokens import TOKEN_DTYPES

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NAR_KERNELS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Of each pass over a corpus, or part of it: whether ids were counted."""
    found: list[bool] = []
    plain = scan_module._portions

    def portions(*args, **kwargs):
        found.append(kwargs.get("counts") is not None)
        return plain(*args, **kwargs)

    monkeypatch.setattr(scan_module, "_portions", portions)
    return found


def save(path: Path, *ids: int, dtype: str = "uint16") -> Path:
    np.save(path, np.array(ids, dtype))
    return path


def figures(found: CorpusScan) -> tuple:
    return found.num_ids, found.min_id, found.max_id, found.counts.tolist()


@pytest.mark.parametrize("portion", [1, 24, 1 << 30])
@pytest.mark.parametrize("dtype", TOKEN_DTYPES)
def test_of_every_type(monkeypatch: pytest.MonkeyPatch, dtype: str, portion: int) -> None:
    monkeypatch.setattr(scan_module, "_PORTION_BYTES", portion)
    assert figures(scan(Corpus(np.array([2, 5, 2], dtype)))) == (3, 2, 5, [0, 0, 2, 0, 0, 1])
    info = np.iinfo(dtype)
    extremes = scan(Corpus(np.array([1, info.min, info.max], dtype)))
    assert (extremes.min_id, extremes.max_id) == (info.min, info.max)
    assert extremes.counts is not None and extremes.counts[1] == 1
    assert len(extremes.counts) == min(info.max + 1, 1 << 20)
    assert extremes.counts.sum() == 1 + (info.min == 0) + (info.bits <= 16)


def test_of_several_files(tmp_path: Path) -> None:
    parts = [save(tmp_path / f"{i}.npy", *ids) for i, ids in enumerate([[5], [1, 1], [3]])]
    assert figures(scan(Corpus(parts))) == (4, 1, 5, [0, 2, 0, 1, 0, 1])


def test_negative_ids_alone() -> None:
    assert figures(scan(Corpus(np.array([-4, -1])))) == (2, -4, -1, [])


def test_what_is_valid() -> None:
    found = scan(Corpus(np.array([1, 3, 3, 6])))
    for counts in (found.counts, None):
        known = CorpusScan(4, 1, 6, counts)
        assert known.is_valid(8, 7) and known.is_valid(7, 0)
        assert not known.is_valid(6, 0)
        assert not known.is_valid(8, 3) and not known.is_valid(8, 6) and not known.is_valid(8, 1)
        assert known.is_valid(8, 4) == (counts is not None)  # without counts it may occur
    assert not scan(Corpus(np.array([-1, 3]))).is_valid(8, 7)


def test_bad_ids() -> None:
    corpus = Corpus(np.array([1, -1, 3, 9, 3, 8]))
    assert find_bad(corpus) == BadIds(1, 0, [1])
    assert find_bad(corpus, num_tokens=8, mask_id=3, max_places=4) == BadIds(3, 2, [1, 2, 3, 4])
    assert find_bad(corpus, num_tokens=8, mask_id=3, max_places=0).count == 5
    assert find_bad(corpus, num_tokens=8, start=2, stop=5, max_places=9) == BadIds(1, 0, [3])


def test_a_scan_is_remembered(tmp_path: Path, cache: Path, passes: list[bool]) -> None:
    path = save(tmp_path / "a.npy", 1, 4, 1)
    first = scan(Corpus(path))
    assert passes == [True]
    for again in (
        scan(Corpus(path)),
        known_scan(Corpus(path)),
        scan(Corpus(path), histogram=False),
    ):
        assert again is not None and figures(again) == figures(first)
    assert passes == [True]
    moved = tmp_path / "moved.npy"
    path.rename(moved)
    assert figures(scan(Corpus([moved]))) == figures(first)
    assert passes == [True]


def test_counts_are_made_when_they_are_asked_for(tmp_path: Path, cache: Path, passes: list[bool]):
    path = save(tmp_path / "a.npy", 1, 4, 1)
    assert scan(Corpus(path), histogram=False).counts is None
    assert scan(Corpus(path), histogram=False).counts is None
    assert figures(scan(Corpus(path))) == (3, 1, 4, [0, 2, 0, 0, 1])
    assert scan(Corpus(path), histogram=False).counts is not None
    assert passes == [False, True]


def test_a_file_of_equal_size_is_another(tmp_path: Path, cache: Path, passes: list[bool]) -> None:
    """Also where the digest, a sample, does not see the change."""
    ids = np.zeros(1 << 20, np.uint8)
    ids.tofile(path := tmp_path / "a.bin")
    before = Corpus(path, dtype="uint8")
    assert scan(before).max_id == 0
    ids[110_000] = 7
    ids.tofile(path)
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))
    after = Corpus(path, dtype="uint8")
    assert after.digest == before.digest
    assert scan(after).max_id == 7
    assert len(passes) == 2


def test_a_file_that_changes_meanwhile(tmp_path: Path, cache: Path) -> None:
    path = save(tmp_path / "a.npy", 1, 2)
    corpus = Corpus(path)
    save(path, 1, 3)
    os.utime(path, ns=(0, 0))
    with pytest.raises(CorpusChangedError, match="a.npy changed while it was in use"):
        scan(corpus)
    assert not list(cache.rglob("*.npz"))


def test_the_same_bytes_of_another_type(tmp_path: Path, cache: Path) -> None:
    np.array([1, 2], "uint16").tofile(path := tmp_path / "a.bin")
    assert scan(Corpus(path, dtype="uint16")).num_ids == 2
    assert scan(Corpus(path, dtype="uint8")).num_ids == 4


def test_arrays_are_read_each_time(cache: Path, passes: list[bool]) -> None:
    ids = np.array([1, 2, 3])
    for last in (3, 9):
        ids[-1] = last
        assert scan(Corpus(ids)).max_id == last
    assert len(passes) == 2 and not cache.exists()


@pytest.mark.parametrize("broken", ["a file", "no home"])
def test_without_a_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, passes: list[bool], broken: str
) -> None:
    if broken == "a file":
        (tmp_path / "file").touch()
        monkeypatch.setenv("NAR_KERNELS_CACHE", str(tmp_path / "file"))
    else:

        def no_home() -> Path:
            raise RuntimeError("Could not determine home directory.")

        monkeypatch.setattr(remembered, "cache_folder", no_home)
    path = save(tmp_path / "a.npy", 1, 4, 1)
    for _ in range(2):
        assert scan(Corpus(path)).max_id == 4
    assert len(passes) == 2


@pytest.mark.parametrize("content", [b"", b"PK", b"junk" * 100, b"\x93NUMPY"])
def test_a_damaged_cache(tmp_path: Path, cache: Path, passes: list[bool], content: bytes) -> None:
    path = save(tmp_path / "a.npy", 1, 4, 1)
    first = scan(Corpus(path))
    (entry,) = cache.rglob("*.npz")
    entry.write_bytes(content)
    for _ in range(2):
        assert figures(scan(Corpus(path))) == figures(first)
    assert len(passes) == 2


def test_old_entries_are_removed(
    tmp_path: Path, cache: Path, passes: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remembered, "_MOST_FILES", 2)
    paths = [save(tmp_path / f"{i}.npy", i, 1) for i in range(4)]
    for i, path in enumerate(paths):
        scan(Corpus(path))
        for entry in cache.rglob("*.npz"):
            if entry.stat().st_mtime > 10:
                os.utime(entry, (i, i))
    assert len(list(cache.rglob("*.npz"))) == 2
    assert known_scan(Corpus(paths[1])) is None
    assert known_scan(Corpus(paths[2])) is not None and known_scan(Corpus(paths[3])) is not None


@pytest.mark.parametrize("is_known", [True, False])
def test_a_file_that_shrank(tmp_path: Path, cache: Path, is_known: bool) -> None:
    """To read what it has lost would end the process."""
    path = save(tmp_path / "a.npy", *range(9000))
    if is_known:
        scan(Corpus(path))
    corpus = Corpus(path, eos_id=0)
    os.truncate(path, 128)
    for look in (scan, find_bad, document_lengths, inspect_corpus):
        with pytest.raises(CorpusChangedError, match=r"a\.npy changed .* 128 bytes now"):
            look(corpus)


def test_a_file_that_shrinks_between_portions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save(tmp_path / "a.npy", *range(9000))
    corpus = Corpus(path)
    monkeypatch.setattr(scan_module, "_PORTION_BYTES", 8)
    monkeypatch.setattr(corpus.stream, "release_memory", lambda: os.truncate(path, 128))
    with pytest.raises(CorpusChangedError, match="128 bytes now"):
        find_bad(corpus)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_tokens": 0}, r"num_tokens is 0: it must be in \[2"),
        ({"num_tokens": 4, "mask_id": 4}, r"mask_id 4 is not in \[0, num_tokens\)"),
        ({"mask_id": -1}, "mask_id -1 is not in"),
        ({"start": 2, "stop": 1}, "tokens 2 to 1 are not all in array, which has 3"),
        ({"start": -1}, "tokens -1 to 3 are not all in array"),
        ({"stop": 4}, "tokens 0 to 4 are not all in array"),
    ],
)
def test_mistakes(options: dict[str, int], message: str) -> None:
    with pytest.raises((ValueError, IndexError), match=message):
        find_bad(Corpus(np.arange(3)), **options)


def test_memory_of_a_large_corpus_is_released(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = Corpus(save(tmp_path / "a.npy", *range(10)))
    released: list[int] = []
    monkeypatch.setattr(corpus.stream, "release_memory", lambda: released.append(1))
    find_bad(corpus)
    assert not released
    monkeypatch.setattr(scan_module, "_PORTION_BYTES", 8)
    find_bad(corpus)
    assert len(released) == 3


def test_the_trainer_validates_what_is_known(
    tmp_path: Path, cache: Path, passes: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A corpus above the limit is not read, but what is known of it holds."""
    path = save(tmp_path / "a.npy", *range(50), 99, *range(49))

    def data():
        return open_data(str(path), num_tokens=60, seq_len=10, num_held_out=2)

    with monkeypatch.context() as patch:
        patch.setattr(sources, "_MAX_VALIDATED", 10)
        data().validate()
        assert passes == []
        scan(Corpus(path))
        with pytest.raises(InvalidTokenError, match="token id 99 at offset 50"):
            data().validate()
    passes.clear()
    save(path, *range(50), *range(50))
    data().validate()
    assert passes == [False]
    data().validate()
    assert passes == [False]
