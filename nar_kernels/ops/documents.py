"""Where the documents of a ragged or packed batch lie.

Shapes: n documents, N positions of the batch: ``[N]``, or ``[B, L]`` with B L = N.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from nar_kernels.checks import as_int
from nar_kernels.ops.backends import cpp
from nar_kernels.ops.dispatch import needs_dispatcher
from nar_kernels.ops.tokens import check_ids, check_range

_MOST_POSITIONS = 1 << 31  # a batch has fewer


class Extent(NamedTuple):
    """
    Attributes:
        num_positions: N.
        longest: positions of the longest space, at least 1.
        longest_stored: the most ids that a document has in the corpus.
        has_ends: whether ``eos_id`` follows one of them.
    """

    num_positions: int
    longest: int
    longest_stored: int
    has_ends: bool

    @classmethod
    def of(cls, table: np.ndarray) -> "Extent":
        begins, stored, lengths, _ = table
        longest = max(int(np.diff(begins).max(initial=0)), 1)
        return cls(int(begins[-1]), longest, int(stored.max()), bool((stored != lengths).any()))


@dataclass(eq=False)
class Documents:
    """The documents of a batch, one after the other in the flat batch. A document has a space of
    its own, which it fills from the beginning; what it leaves is padding. No space reaches over the
    end of a row.

    All of it is on the host, which needs it for shapes; properties of :class:`Corrupted` have it
    on the device of the batch.

    Attributes:
        table: int64 ``[4, n + 1]``, not to be changed: the rows of ``CorruptArgs.spans``, and the
            ids.
        extent: what it says of all of them.
        row_length: L, or None for a flat batch ``[N]``.
    """

    table: Tensor
    extent: Extent
    row_length: int | None = None

    @classmethod
    def of(
        cls, begins: Any, stored: Any, lengths: Any, ids: Any, row_length: int | None = None
    ) -> "Documents":
        """From arrays or tensors of integers, copied; ``begins`` are ``[n + 1]``."""
        table = np.zeros((4, len(begins)), np.int64)
        table[0] = begins
        table[1, :-1], table[2, :-1], table[3, :-1] = stored, lengths, ids
        return cls(torch.from_numpy(table), Extent.of(table), row_length)

    def __len__(self) -> int:
        return self.table.shape[1] - 1

    @property
    def begins(self) -> Tensor:
        """int64 ``[n + 1]``: where each space begins; last N."""
        return self.table[0]

    @property
    def stored(self) -> Tensor:
        """int64 ``[n]``: how many ids of each document are in the corpus; ``eos_id`` follows."""
        return self.table[1, :-1]

    @property
    def lengths(self) -> Tensor:
        """int64 ``[n]``: how many positions each has."""
        return self.table[2, :-1]

    @property
    def ids_on_host(self) -> Tensor:
        """int64 ``[n]``: the sample slot of each: its global id, of which its time and noise are
        functions."""
        return self.table[3, :-1]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the batch."""
        num_positions = self.extent.num_positions
        if self.row_length is None:
            return (num_positions,)
        return num_positions // self.row_length, self.row_length

    def spans(self, device: torch.device) -> Tensor:
        """The table on a device, which is not waited for; not to be changed."""
        if device.type != "cuda":
            return self.table.to(device)
        return self.table.pin_memory().to(device, non_blocking=True)

    def of_rows(self, rows: Sequence[int]) -> tuple["Documents", Tensor, Tensor]:
        """The documents of some rows (of a flat batch: some documents), which of these documents
        they are, int64 ``[n']``, and the positions they have, int64 ``[N']``."""
        if self.row_length is None:
            chosen = torch.tensor(rows, dtype=torch.int64, device="cpu")
        else:
            row_of = self.begins[:-1] // self.row_length
            bounds = torch.searchsorted(row_of, torch.arange(self.shape[0] + 1, device="cpu"))
            chosen = _ranges(bounds[:-1], bounds.diff(), rows)
        spaces = self.begins.diff()
        positions = _ranges(self.begins[:-1], spaces, chosen.tolist())
        return self._joined([self.table[:, :-1][:, chosen]], [spaces[chosen]]), chosen, positions

    @classmethod
    def cat(cls, parts: Sequence["Documents"]) -> "Documents":
        """One after the other."""
        tables = [part.table[:, :-1] for part in parts]
        return parts[0]._joined(tables, [part.begins.diff() for part in parts])

    def _joined(self, tables: list[Tensor], spaces: list[Tensor]) -> "Documents":
        """Of columns of tables, with their spaces one after the other."""
        table = torch.nn.functional.pad(torch.cat(tables, 1), (0, 1))
        table[0] = torch.nn.functional.pad(torch.cat(spaces).cumsum(0), (1, 0))
        return Documents(table, Extent.of(table.numpy()), self.row_length)


def _ranges(begins: Tensor, lengths: Tensor, chosen: Sequence[int]) -> Tensor:
    """int64: the concatenated ranges ``begins[i] .. begins[i] + lengths[i]`` of the chosen."""
    index = torch.tensor(chosen, dtype=torch.int64, device="cpu")
    counts = lengths[index]
    first = (begins[index] - (counts.cumsum(0) - counts)).repeat_interleave(counts)
    return first + torch.arange(len(first), device="cpu")


def check_documents(
    lengths: Tensor,
    *,
    eos_lengths: Tensor | None = None,
    places: Tensor | None = None,
    num_rows: int | None = None,
    seq_len: int | None = None,
    sample_ids: Tensor | range | None = None,
) -> Documents:
    """The arguments of :func:`nar_kernels.corrupt` of these names, checked, and copied.

    Raises:
        TypeError, ValueError: wrong dtypes or shapes; lengths below 0; documents that overlap or
            reach over the end of a row; a row that does not begin with a document; 2**31 positions
            or more.
    """
    lengths = _on_host("lengths", lengths)
    n = lengths.shape[0]
    if eos_lengths is not None:
        eos_lengths = _on_host("eos_lengths", eos_lengths, n)
    if sample_ids is None:
        sample_ids = range(n)
    elif isinstance(sample_ids, range):
        check_range("sample_ids", sample_ids)
        _check_number("sample_ids", len(sample_ids), n)
    else:
        sample_ids = _on_host("sample_ids", sample_ids, n)
    if (places is None) != (num_rows is None):
        raise ValueError("places and num_rows go together: where documents begin, in so many rows")
    if seq_len is None and places is not None:
        raise ValueError("places are of rows: give seq_len, the length of a row")
    if places is not None:
        places = _on_host("places", places, n)
    num_rows = n if num_rows is None else as_int("num_rows", num_rows)
    if num_rows < 0:
        raise ValueError(f"num_rows is {num_rows}: it must be at least 0")
    _check_size(num_rows * (seq_len or 0))
    arguments = _LayOutArgs(lengths, eos_lengths, places, sample_ids, num_rows, seq_len)
    slots = None if isinstance(sample_ids, range) else sample_ids
    if needs_dispatcher(lengths, eos_lengths, places, slots):
        # Raises where a trace would keep these very documents, or where they have no values.
        int(lengths.sum())
    elif cpp is not None and (documents := _lay_out_cpp(arguments)) is not None:
        return documents
    return _lay_out_ref(arguments)


class _LayOutArgs(NamedTuple):
    lengths: Tensor
    eos_lengths: Tensor | None
    places: Tensor | None
    sample_ids: Tensor | range
    num_rows: int
    seq_len: int | None


def _lay_out_cpp(a: _LayOutArgs) -> Documents | None:
    """As ``_lay_out_ref``, which says what is wrong where this is None. It takes 10 us of a batch
    in place of 50."""
    assert cpp is not None
    n = a.lengths.shape[0]
    table = a.lengths.new_empty(4, n + 1)
    if isinstance(a.sample_ids, range):
        slots = 0, a.sample_ids.start, a.sample_ids.step
    else:
        slots = a.sample_ids.data_ptr(), 0, 0
    extent = cpp.lay_out(
        a.lengths.data_ptr(),
        0 if a.eos_lengths is None else a.eos_lengths.data_ptr(),
        0 if a.places is None else a.places.data_ptr(),
        *slots,
        n,
        a.seq_len or 0,
        a.num_rows,
        table.data_ptr(),
    )
    return None if extent is None else Documents(table, Extent(*extent), a.seq_len)


def _lay_out_ref(a: _LayOutArgs) -> Documents:
    stored = total = _counts("lengths", a.lengths)
    if a.eos_lengths is not None:
        total = stored + _counts("eos_lengths", a.eos_lengths)
    if isinstance(a.sample_ids, range):
        ids = np.arange(a.sample_ids.start, a.sample_ids.stop, a.sample_ids.step)
    else:
        ids = a.sample_ids.numpy()
    if len(ids) and (lowest := ids.min()) < 0:
        raise ValueError(f"sample id {lowest} is negative: slots count from 0")
    begins = np.zeros(len(stored) + 1, np.int64)
    if a.seq_len is None:
        begins[1:] = np.cumsum(total)
        _check_size(begins[-1])
    else:
        places = None if a.places is None else _counts("places", a.places)
        begins[:-1] = np.arange(len(stored)) * a.seq_len if places is None else places
        begins[-1] = a.num_rows * a.seq_len
        _check_places(begins, total, a.seq_len)
    return Documents.of(begins, stored, total, ids, a.seq_len)


def _check_size(num_positions: int | np.int64) -> None:
    if num_positions >= _MOST_POSITIONS:
        raise ValueError(
            f"the batch has {num_positions} positions: documents in one batch may have less "
            "than 2**31, since cu_seqlens are int32; make several"
        )


def _check_number(name: str, number: int, n: int | None) -> None:
    if n is not None and number != n:
        raise ValueError(f"there are {n} lengths but {number} {name}")


def _on_host(name: str, values: Tensor, n: int | None = None) -> Tensor:
    """int64 ``[n]`` on the CPU, contiguous."""
    if not isinstance(values, Tensor):
        raise TypeError(f"{name} is a {type(values).__name__}: it must be a tensor, int64 [n]")
    if not values.is_cpu:
        raise ValueError(
            f"{name} is on {values.device}: of documents it must be on the CPU, since the shape of "
            "the batch, or what the host knows of it, depends on it"
        )
    values = check_ids(name, values, torch.device("cpu"))
    _check_number(name, values.shape[0], n)
    return values


def _counts(name: str, values: Tensor) -> np.ndarray:
    """int64 ``[n]``, at least 0, and each less than a batch may have."""
    counts = values.numpy()
    if (at := _first(counts < 0)) is not None:
        raise ValueError(f"{name}[{at}] is {counts[at]}: it must be at least 0")
    _check_size(int(counts.max(initial=0)))
    return counts


def _first(wrong: np.ndarray) -> int | None:
    """The index of the first that is true."""
    return int(wrong.argmax()) if wrong.any() else None


def _check_places(begins: np.ndarray, lengths: np.ndarray, seq_len: int) -> None:
    places, end = begins[:-1], begins[-1]
    if (at := _first(places >= end)) is not None:
        raise ValueError(
            f"document {at} begins at position {places[at]}, behind the last row, which ends "
            f"at {end}: leave it out if it is empty, or give more rows"
        )
    if (at := _first(places + lengths > begins[1:])) is not None:
        raise ValueError(
            f"document {at} has {lengths[at]} tokens from position {places[at]} on, but "
            f"the next begins at {begins[at + 1]}: places must ascend and leave each its "
            f"length (rows have {seq_len} positions)"
        )
    row, column = np.divmod(places, seq_len)
    if (at := _first(column + lengths > seq_len)) is not None:
        raise ValueError(
            f"document {at} has {lengths[at]} tokens from position {places[at]} on, "
            f"which reaches over the end of its row of {seq_len}: split it, or use longer rows"
        )
    is_empty = np.ones(end // seq_len, bool)
    is_empty[row[column == 0]] = False
    if (at := _first(is_empty)) is not None:
        raise ValueError(
            f"no document begins at position {at * seq_len}, where row {at} does: put one there, "
            "of length 0 if the row is empty"
        )
