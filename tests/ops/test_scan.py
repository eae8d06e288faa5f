"""`scan`: every figure of every backend, against plain numpy."""

import ctypes
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from nar_kernels.ops import backends
from nar_kernels.ops.backends import cpp
from nar_kernels.ops.scan import Covered, Scanned, scan
from nar_kernels.ops.tokens import TOKEN_DTYPES

INT64_MAX, INT64_MIN = (1 << 63) - 1, -1 << 63

# Lengths around those of vectors, blocks (16 KiB) and chunks (at least 64 KiB).
SIZES = [1, 2, 3, 15, 16, 17, 63, 64, 65, 1000, 2047, 2049, 8191, 16385, 70_000, 140_001]


class Case:
    """Ids in runs of any length, of which every second one is not aligned."""

    def __init__(self, ids: np.ndarray, cuts: list[int]) -> None:
        self.ids, itemsize = ids, ids.dtype.itemsize
        begins = [0, *sorted(cuts), len(ids)]
        self.memory = np.zeros(ids.nbytes + 16 * len(begins), np.uint8)
        base, place, addresses = self.memory.ctypes.data, 0, []
        for i, (begin, end) in enumerate(zip(begins, begins[1:], strict=False)):
            place += -(base + place) % itemsize + i % 2
            addresses.append(base + place)
            ctypes.memmove(base + place, ids[begin:].ctypes.data, (end - begin) * itemsize)
            place += (end - begin) * itemsize
        self.flat = torch.from_numpy(ids[:0])
        self.runs: Tensor | None = torch.tensor([begins, [*addresses, 0]])
        if not cuts:
            self.flat, self.runs = torch.from_numpy(ids), None

    def scan(self, backend: str, start: int, stop: int, **looked_for: Any) -> Scanned:
        return scan(self.flat, self.runs, start, stop, backend=backend, **looked_for)

    def expected(
        self,
        start: int,
        stop: int,
        covered: Covered,
        num_tokens: int | None,
        mask_id: int | None,
        bins: int,
        max_places: int,
    ) -> tuple[Scanned, list[int]]:
        places = [i for i in range(start, stop) if (i - covered[0]) % covered[1] < covered[2]]
        ids = [int(self.ids[i]) for i in places]
        limit = 1 << 63 if num_tokens is None else num_tokens
        outside = [not 0 <= id < limit for id in ids]
        masked = [id == mask_id for id in ids]
        bad = [i for i, *why in zip(places, outside, masked, strict=True) if any(why)]
        counts = [0] * bins
        for id in ids:
            if 0 <= id < bins:
                counts[id] += 1
        least, greatest = (min(ids), max(ids)) if ids else (INT64_MAX, INT64_MIN)
        uncounted = len(ids) - sum(counts) if bins else 0
        found = Scanned(least, greatest, sum(outside), sum(masked), uncounted, bad[:max_places])
        return found, counts


@st.composite
def cases(draw: st.DrawFn) -> tuple[Case, dict[str, Any], int]:
    dtype = np.dtype(draw(st.sampled_from(sorted(TOKEN_DTYPES))))
    info = np.iinfo(dtype)
    size = draw(st.sampled_from(SIZES))
    highest = min(draw(st.sampled_from([1, 5, 300, INT64_MAX])), info.max)
    rng = np.random.default_rng(draw(st.integers(0, 1 << 30)))
    ids = rng.integers(0, highest, size, dtype=dtype, endpoint=True)
    places = st.integers(0, size - 1)
    extremes = st.sampled_from([info.min, info.max, 0, min(7, info.max)])
    for place, id in draw(st.dictionaries(places, extremes, max_size=4)).items():
        ids[place] = id
    cuts = draw(st.lists(st.integers(0, size), max_size=6))
    start, stop = sorted(draw(st.tuples(st.integers(0, size), st.integers(0, size))))
    if draw(st.booleans()):
        start, stop = 0, size
    window = st.sampled_from([1, 2, 7, 100, 5000])
    covered = Covered(draw(st.integers(0, start)), draw(window), draw(window))
    num_tokens = draw(st.sampled_from([None, 1, 7, 256, 301, 1 << 31]))
    mask_id = draw(st.sampled_from([None, 0, 4, 300]))
    looked_for = {
        "start": start,
        "stop": stop,
        "covered": covered,
        "num_tokens": num_tokens,
        "mask_id": mask_id,
        "max_places": draw(st.sampled_from([0, 1, 3, 50])),
    }
    return Case(ids, cuts), looked_for, draw(st.sampled_from([0, 1, 6, 256, 1000]))


def check(case: Case, looked_for: dict[str, Any], bins: int, backend: str) -> None:
    expected, counts = case.expected(bins=bins, **looked_for)
    found = torch.full((bins,), 3) if bins else None
    assert case.scan(backend, counts=found, **looked_for) == expected
    if found is not None:
        assert (found - 3).tolist() == counts


@given(cases(), st.integers(1, 3))
def test_cpp(simd_level: int, case: tuple[Case, dict[str, Any], int], threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        check(*case, "cpp")
    finally:
        torch.set_num_threads(before)


@given(cases())
def test_reference(case: tuple[Case, dict[str, Any], int]) -> None:
    check(*case, "reference")


def test_auto_without_the_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(backends._present, "cpp", False)
    monkeypatch.setattr("nar_kernels.ops.scan.cpp", None)
    case = Case(np.array([3, 1, -1], np.int16), [1])
    assert case.scan("auto", 0, 3, max_places=2) == Scanned(-1, 3, 1, 0, 0, [2])


@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_of_many_bad_ids_the_first_are_found(backend: str) -> None:
    """Whichever thread comes to them first."""
    if backend == "cpp" and cpp is None:
        pytest.skip("the C++ extension is not built")
    ids = torch.full((1 << 20,), 9, dtype=torch.uint16)
    found = scan(ids, None, 5, len(ids), num_tokens=9, max_places=1000, backend=backend)
    assert found.outside == len(ids) - 5
    assert found.places == list(range(5, 1005))


@pytest.mark.parametrize("dtype", TOKEN_DTYPES)
def test_many_ids(simd_level: int, dtype: str) -> None:
    """Of many chunks and blocks, some of them with an id that has no bin."""
    highest = min(np.iinfo(dtype).max, 70_000)
    ids = np.random.default_rng(0).integers(0, highest, 1 << 20, dtype=dtype)
    bins = highest - 1
    ids[[5, 300_000]] = highest
    case = Case(ids, [3, 100_000, 100_001, 900_000])
    counts = torch.zeros(bins, dtype=torch.int64)
    found = case.scan("cpp", 0, len(ids), counts=counts)
    assert (found.least, found.greatest) == (ids.min(), highest)
    expected = np.bincount(ids)
    assert counts.tolist() == expected[:bins].tolist()
    assert found.uncounted == expected[bins:].sum() >= 2


@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_too_many_to_count(backend: str) -> None:
    """Counts of a thread have 32 bits."""
    length = 1 << 32
    runs = torch.tensor([[0, length], [0, 0]])  # never read
    counts = torch.zeros(1, dtype=torch.int64)
    with pytest.raises(ValueError, match="4294967296 tokens are too many to count"):
        scan(torch.zeros(0, dtype=torch.uint8), runs, 0, length, counts=counts, backend=backend)


@pytest.mark.parametrize(("start", "stop"), [(-1, 3), (2, 1), (0, 6)])
def test_outside_the_corpus(start: int, stop: int) -> None:
    with pytest.raises(IndexError, match=f"tokens {start} to {stop} are not all in .* has 5"):
        scan(torch.zeros(5, dtype=torch.int64), None, start, stop)


def test_other_types() -> None:
    with pytest.raises(TypeError, match="float32"):
        scan(torch.zeros(5), None, 0, 5)
