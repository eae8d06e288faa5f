"""Where the documents of a ragged or packed batch lie.

Shapes: n documents, N positions of the batch: ``[N]``, or ``[B, L]`` with B L = N.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from nar_kernels.checks import as_int
from nar_kernels.ops.tokens import check_ids, check_range


@dataclass(frozen=True, eq=False)
class Documents:
    """The documents of a batch, one after the other in the flat batch. A document has a space of
    its own, which it fills from the beginning; what it leaves is padding. No space reaches over the
    end of a row.

    All of it is on the host, which needs it for shapes; properties of :class:`Corrupted` have it
    on the device of the batch.

    Attributes:
        begins: int64 ``[n + 1]``, where each space begins; last N.
        stored: int64 ``[n]``, how many ids of each document are in the corpus; ``eos_id`` follows.
        lengths: int64 ``[n]``, how many positions each has.
        ids_on_host: int64 ``[n]``, the sample slot of each: its global id, of which its time and
            noise are functions.
        row_length: L, or None for a flat batch ``[N]``.
    """

    begins: Tensor
    stored: Tensor
    lengths: Tensor
    ids_on_host: Tensor
    row_length: int | None = None

    def __len__(self) -> int:
        return len(self.lengths)

    @cached_property
    def num_positions(self) -> int:
        return int(self.begins[-1])

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the batch."""
        if self.row_length is None:
            return (self.num_positions,)
        return self.num_positions // self.row_length, self.row_length

    @cached_property
    def longest(self) -> int:
        """Positions of the longest space, at least 1."""
        return max(int(self.begins.diff().max()), 1) if len(self) else 1

    def spans(self, device: torch.device) -> Tensor:
        """int64 ``[4, n + 1]``: the rows of ``CorruptArgs.spans``, and the ids; on a device, which
        is not waited for."""
        last = self.lengths.new_zeros(1)
        others = (torch.cat([x, last]) for x in (self.stored, self.lengths, self.ids_on_host))
        spans = torch.stack([self.begins, *others])
        if device.type != "cuda":
            return spans.to(device)
        return spans.pin_memory().to(device, non_blocking=True)

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
        begins = torch.cat([spaces.new_zeros(1), spaces[chosen].cumsum(0)])
        part = replace(
            self,
            begins=begins,
            stored=self.stored[chosen],
            lengths=self.lengths[chosen],
            ids_on_host=self.ids_on_host[chosen],
        )
        return part, chosen, positions

    @classmethod
    def cat(cls, parts: Sequence["Documents"]) -> "Documents":
        """One after the other."""
        spaces = torch.cat([part.begins.diff() for part in parts])
        return replace(
            parts[0],
            begins=torch.cat([spaces.new_zeros(1), spaces.cumsum(0)]),
            stored=torch.cat([part.stored for part in parts]),
            lengths=torch.cat([part.lengths for part in parts]),
            ids_on_host=torch.cat([part.ids_on_host for part in parts]),
        )


def _ranges(begins: Tensor, lengths: Tensor, chosen: Sequence[int]) -> Tensor:
    """int64: the concatenated ranges ``begins[i] .. begins[i] + lengths[i]`` of the chosen."""
    index = torch.tensor(chosen, dtype=torch.int64, device="cpu")
    counts = lengths[index]
    first = (begins[index] - (counts.cumsum(0) - counts)).repeat_interleave(counts)
    return first + torch.arange(len(first), device="cpu")


def check_documents(
    lengths: Tensor,
    *,
    eos_lengths: Tensor | None,
    places: Tensor | None,
    num_rows: int | None,
    seq_len: int | None,
    sample_ids: Tensor | range | None,
) -> Documents:
    """The arguments of :func:`nar_kernels.corrupt` of these names, checked, and copied.

    Raises:
        TypeError, ValueError: wrong dtypes or shapes; lengths below 0; documents that overlap or
            reach over the end of a row; a row that does not begin with a document; 2**31 positions
            or more.
    """
    stored = _counts("lengths", lengths, None)
    n = len(stored)
    total = stored
    if eos_lengths is not None:
        total = stored + _counts("eos_lengths", eos_lengths, n)
    _check_size(float(total.double().sum()))
    ids = _slots(sample_ids, n)
    if (places is None) != (num_rows is None):
        raise ValueError("places and num_rows go together: where documents begin, in so many rows")
    if seq_len is None:
        if places is not None:
            raise ValueError("places are of rows: give seq_len, the length of a row")
        begins = torch.cat([total.new_zeros(1), total.cumsum(0)])
        return Documents(begins, stored, total, ids)
    if places is None:
        num_rows, places = n, torch.arange(n, device="cpu") * seq_len
    num_rows = as_int("num_rows", num_rows)
    if num_rows < 0:
        raise ValueError(f"num_rows is {num_rows}: it must be at least 0")
    _check_size(float(num_rows) * seq_len)
    places = _counts("places", places, n)
    begins = torch.cat([places, places.new_tensor([num_rows * seq_len])])
    _check_places(begins, total, seq_len)
    return Documents(begins, stored, total, ids, seq_len)


def _check_size(num_positions: float) -> None:
    if num_positions >= 1 << 31:
        raise ValueError(
            f"the batch has {num_positions:.0f} positions: documents in one batch may have less "
            "than 2**31, since cu_seqlens are int32; make several"
        )


def _slots(sample_ids: Tensor | range | None, n: int) -> Tensor:
    """int64 ``[n]`` on the CPU."""
    if sample_ids is None:
        return torch.arange(n, device="cpu")
    if isinstance(sample_ids, range):
        check_range("sample_ids", sample_ids)
        ids = torch.arange(sample_ids.start, sample_ids.stop, sample_ids.step, device="cpu")
    else:
        ids = _on_host("sample_ids", sample_ids)
    if len(ids) != n:
        raise ValueError(f"there are {n} lengths but {len(ids)} sample_ids")
    if len(ids) and int(ids.min()) < 0:
        raise ValueError(f"sample id {int(ids.min())} is negative: slots count from 0")
    return ids


def _on_host(name: str, values: Tensor) -> Tensor:
    """int64 ``[n]`` on the CPU, a copy."""
    if not isinstance(values, Tensor):
        raise TypeError(f"{name} is a {type(values).__name__}: it must be a tensor, int64 [n]")
    if not values.is_cpu:
        raise ValueError(
            f"{name} is on {values.device}: of documents it must be on the CPU, since the shape of "
            "the batch, or what the host knows of it, depends on it"
        )
    return check_ids(name, values, torch.device("cpu")).clone()


def _counts(name: str, counts: Tensor, n: int | None) -> Tensor:
    """int64 ``[n]`` on the CPU, at least 0, a copy."""
    counts = _on_host(name, counts)
    if n is not None and len(counts) != n:
        raise ValueError(f"there are {n} lengths but {len(counts)} {name}")
    if len(counts) and int(counts.min()) < 0:
        at = int(counts.argmin())
        raise ValueError(f"{name}[{at}] is {int(counts[at])}: it must be at least 0")
    return counts


def _check_places(begins: Tensor, lengths: Tensor, seq_len: int) -> None:
    places, end = begins[:-1], int(begins[-1])
    wrong = places >= end
    if wrong.any():
        at = int(wrong.nonzero()[0])
        raise ValueError(
            f"document {at} begins at position {int(places[at])}, behind the last row, which ends "
            f"at {end}: leave it out if it is empty, or give more rows"
        )
    wrong = places + lengths > begins[1:]
    if wrong.any():
        at = int(wrong.nonzero()[0])
        raise ValueError(
            f"document {at} has {int(lengths[at])} tokens from position {int(places[at])} on, but "
            f"the next begins at {int(begins[at + 1])}: places must ascend and leave each its "
            f"length (rows have {seq_len} positions)"
        )
    row_end = (torch.div(places, seq_len, rounding_mode="floor") + 1) * seq_len
    wrong = places + lengths > row_end
    if wrong.any():
        at = int(wrong.nonzero()[0])
        raise ValueError(
            f"document {at} has {int(lengths[at])} tokens from position {int(places[at])} on, "
            f"which reaches over the end of its row of {seq_len}: split it, or use longer rows"
        )
    num_rows = int(begins[-1]) // seq_len
    first = torch.arange(num_rows, device="cpu") * seq_len
    has_begin = torch.isin(first, places)
    if not has_begin.all():
        row = int((~has_begin).nonzero()[0])
        raise ValueError(
            f"no document begins at position {row * seq_len}, where row {row} does: put one there, "
            "of length 0 if the row is empty"
        )
