"""Documents into rows: the same as by hand."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nar_kernels.data.packing.pack import pack
from tests.helpers.packing import METHODS, pack_by_hand

pytestmark = [
    pytest.mark.parametrize("method", METHODS),
    pytest.mark.parametrize(
        "backend", ["reference", pytest.param("cpp", marks=pytest.mark.cpp)], ids=str
    ),
]


def check(lengths: list[int], capacity: int, method: str, backend: str) -> int:
    """Compares with packing by hand; returns the number of rows."""
    given = np.array(lengths, np.int64)
    packed = pack(given, capacity, method, backend=backend)
    assert given.tolist() == lengths  # not written to
    assert packed.rows.dtype == packed.offsets.dtype == np.int64
    assert len(packed.rows) == len(packed.offsets) == len(lengths)
    rows = pack_by_hand(lengths, capacity, method)
    assert packed.num_rows == len(rows)
    for number, row in enumerate(rows):
        places = np.cumsum([0, *(lengths[i] for i in row)]).tolist()
        assert places[-1] <= capacity
        assert [packed.rows[i] for i in row] == [number] * len(row)
        assert [packed.offsets[i] for i in row] == places[:-1]
    return packed.num_rows


@pytest.mark.parametrize(
    ("lengths", "capacity", "num_rows"),
    [
        ([], 5, 0),
        ([], 1, 0),
        ([1], 1, 1),
        ([1, 1, 1], 1, 3),
        ([5], 5, 1),
        ([5, 5, 5], 5, 3),
        ([3] * 7, 5, 7),
        ([2] * 7, 5, 4),
        ([1] * 11, 4, 3),
        ([7], (1 << 31) - 1, 1),
        ([(1 << 31) - 1] * 3, (1 << 31) - 1, 3),
        ([(1 << 30) - 1, 1 << 30, (1 << 31) - 1], (1 << 31) - 1, 2),
    ],
)
def test_edges(method, backend, lengths, capacity, num_rows):
    assert check(lengths, capacity, method, backend) == num_rows


def test_the_two_differ(method, backend):
    """A short document goes back to the first row with room, or does not."""
    want = 2 if method == "first_fit_decreasing" else 3
    assert check([6, 6, 4, 4], 10, method, backend) == want


@given(data=st.data(), capacity=st.integers(1, 40))
def test_any_lengths(method, backend, data, capacity):
    lengths = data.draw(st.lists(st.integers(1, capacity), max_size=80))
    check(lengths, capacity, method, backend)


@pytest.mark.parametrize("capacity", [64, 1000, 100_000])
def test_many(method, backend, capacity):
    """More rows than the tree of one level; ties, and lengths of all sizes."""
    rng = np.random.default_rng(capacity)
    lengths = np.minimum(rng.lognormal(3, 1.2, 3000).astype(np.int64) + 1, capacity)
    assert check(lengths.tolist(), capacity, method, backend) > 1
    check(rng.integers(1, capacity + 1, 1500).tolist(), capacity, method, backend)
    # Just above a half, and a third: most rows for their sum.
    assert check([capacity // 2 + 1] * 1000, capacity, method, backend) == 1000
    check([capacity // 2 + 1, capacity // 3 + 1] * 700, capacity, method, backend)


@pytest.mark.parametrize("dtype", ["uint8", "int32", ">i8", "uint64"])
def test_any_type_and_stride(method, backend, dtype):
    lengths = np.array([3, 0, 9, 0, 4, 0, 5, 0], dtype)[::2]
    packed = pack(lengths, np.int64(9), method, backend=backend)
    rows = pack_by_hand([3, 9, 4, 5], 9, method)
    assert [np.flatnonzero(packed.rows == i).tolist() for i in range(packed.num_rows)] == [
        sorted(row) for row in rows
    ]


def test_errors(method, backend):
    def refused(error, message, lengths, capacity=5, method=method):
        with pytest.raises(error, match=message):
            pack(lengths, capacity, method, backend=backend)

    refused(ValueError, "document 1 has 6 tokens.*capacity.*5", np.array([5, 6]))
    refused(ValueError, "document 0 has 0 tokens.*leave out", np.array([0, 5]))
    refused(ValueError, "document 2 has -1 tokens", np.array([1, 2, -1]))
    refused(ValueError, f"has {(1 << 64) - 1} tokens", np.array([(1 << 64) - 1], np.uint64))
    refused(ValueError, r"capacity is 0.*\[1, 2\*\*31\)", np.array([1]), 0)
    refused(ValueError, "capacity is 2147483648", np.array([1]), 1 << 31)
    refused(TypeError, "capacity is 1.5.*int", np.array([1]), 1.5)
    refused(TypeError, "float64.*integers", np.array([1.0]))
    refused(ValueError, r"shape \[1, 2\].*\[n\]", np.array([[1, 2]]))
    refused(ValueError, "method is 'best'.*'first_fit_decreasing' or 'in_order'", [1], 5, "best")
    many = np.broadcast_to(np.int64(1), (1 << 32,))  # no memory
    refused(ValueError, r"below 2\*\*32", many)
