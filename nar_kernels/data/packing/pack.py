"""Documents into rows of limited length: :func:`pack`.

Shapes: n documents.
"""

from typing import Literal, NamedTuple, get_args

import numpy as np
import torch

from nar_kernels.checks import as_int
from nar_kernels.ops.backends import cpp, resolve_backend

PackMethod = Literal["first_fit_decreasing", "in_order"]

_ON_CPU = ("reference", "cpp")


class Packed(NamedTuple):
    """Where documents are.

    Attributes:
        rows: int64 ``[n]``: the row of each document, in [0, ``num_rows``).
        offsets: int64 ``[n]``: where in its row it begins. A row has no gaps before its end.
        num_rows: none of them empty.
    """

    rows: np.ndarray
    offsets: np.ndarray
    num_rows: int


def check_method(method: str) -> PackMethod:
    """``method``, if it is one; otherwise ValueError."""
    if method not in get_args(PackMethod):
        names = " or ".join(map(repr, get_args(PackMethod)))
        raise ValueError(f"method is {method!r}: it must be {names}")
    return method  # type: ignore[return-value]


def pack(
    lengths: np.ndarray,
    capacity: int,
    method: PackMethod = "first_fit_decreasing",
    *,
    backend: str = "auto",
) -> Packed:
    """Puts documents into rows that hold at most ``capacity`` tokens, none of them cut.

    * ``"first_fit_decreasing"``: the longest first, of equal ones that of lower index; each into
      the first row with room for it, at its end. Rows are numbered as they are opened. At most
      11/9 of the fewest possible rows and 2/3 (Dosa, 2007), in O(n log n).
    * ``"in_order"``: one after the other; one that does not fit begins the next row, and the one
      before is closed (next fit). At most twice the fewest possible rows, in O(n).

    Args:
        lengths: integers ``[n]`` in [1, ``capacity``], n below 2**32.
        capacity: in [1, 2**31).
        backend: ``"cpp"``, or ``"reference"``: O(n * rows), the same result.

    Raises:
        ValueError: an argument is out of range.
        TypeError: the lengths are not integers.
    """
    capacity = as_int("capacity", capacity)
    if not 1 <= capacity < 1 << 31:
        raise ValueError(f"capacity is {capacity}: it must be in [1, 2**31)")
    in_order = check_method(method) == "in_order"
    lengths = _checked(lengths, capacity)
    if resolve_backend(backend, torch.device("cpu"), _ON_CPU) == "reference":
        return _in_order_ref(lengths, capacity) if in_order else _decreasing_ref(lengths, capacity)
    assert cpp is not None
    rows, offsets = np.empty_like(lengths), np.empty_like(lengths)
    places = rows.ctypes.data, offsets.ctypes.data
    num_rows = cpp.pack(lengths.ctypes.data, len(lengths), capacity, in_order, *places)
    return Packed(rows, offsets, num_rows)


def _checked(lengths: np.ndarray, capacity: int) -> np.ndarray:
    lengths = np.asarray(lengths)
    if lengths.dtype.kind not in "iu" and lengths.size:
        raise TypeError(f"lengths are {lengths.dtype}: they must be integers")
    if lengths.ndim != 1 or len(lengths) >= 1 << 32:
        shape = list(lengths.shape)
        raise ValueError(f"lengths have the shape {shape}: it must be [n], with n below 2**32")
    outside = (lengths < 1) | (lengths > capacity)
    if outside.any():
        i = int(outside.argmax())
        raise ValueError(
            f"document {i} has {lengths[i]} tokens: a length must be in [1, capacity] = "
            f"[1, {capacity}]; leave out empty documents, and split or cut long ones"
        )
    return np.ascontiguousarray(lengths, np.int64)


def _decreasing_ref(lengths: np.ndarray, capacity: int) -> Packed:
    rows, offsets = np.empty_like(lengths), np.empty_like(lengths)
    room, num_rows = np.full(len(lengths), capacity), 0
    for i in np.argsort(-lengths, kind="stable").tolist():
        row = int((room[: num_rows + 1] >= lengths[i]).argmax())  # perhaps a new one
        rows[i], offsets[i] = row, capacity - room[row]
        room[row] -= lengths[i]
        num_rows = max(num_rows, row + 1)
    return Packed(rows, offsets, num_rows)


def _in_order_ref(lengths: np.ndarray, capacity: int) -> Packed:
    rows, offsets = np.empty_like(lengths), np.empty_like(lengths)
    row, used = -1, capacity
    for i, length in enumerate(lengths.tolist()):
        if length > capacity - used:
            row, used = row + 1, 0
        rows[i], offsets[i] = row, used
        used += length
    return Packed(rows, offsets, row + 1)
