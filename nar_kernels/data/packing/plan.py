"""Which documents each row of a run holds: :class:`PackingPlan`.

Shapes: D documents, L row length (``seq_len``), P the most pieces of a document, n pieces.
"""

import threading
from array import array
from bisect import bisect_right
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor

from nar_kernels.checks import as_int, check_seed
from nar_kernels.data.packing.pack import PackMethod, check_method, pack
from nar_kernels.data.packing.spans import DocumentSpans
from nar_kernels.ops.windows import permute
from nar_kernels.spec.philox import Stream

Overlong = Literal["split", "refuse", "truncate"]

_MOST = 1 << 63  # rows and sample slots are below

_OPTIONS = (
    *("num_documents", "seq_len", "seed", "shuffle", "method"),
    *("window", "overlong", "round_to", "alone"),
)
_NOT_PICKLED = ("_windows", "_lock")


class Pieces(NamedTuple):
    """Documents, or parts of them, in rows, in the order of (row, offset). All are int64 ``[n]``.

    Attributes:
        row: the row of the run.
        offset: where in its row the piece begins.
        start: where in the corpus it begins.
        length: its tokens, in [1, L].
        space: the positions that are its own: ``length``, rounded up to a multiple of ``round_to``.
        sample: its sample slot, ``(epoch * P + p) * D + document`` for piece p of a document: the
            same in any packing. The document is ``sample % D``.
    """

    row: np.ndarray
    offset: np.ndarray
    start: np.ndarray
    length: np.ndarray
    space: np.ndarray
    sample: np.ndarray


class _Window(NamedTuple):
    pieces: Pieces  # rows are counted from the first of the window
    num_rows: int


class _RowTable:
    """The first row of each window from some window on, found as far as it was needed."""

    def __init__(self, window: int, first_row: int) -> None:
        self.window, self.rows = window, array("q", [first_row])  # the last is of no window yet

    @property
    def next_window(self) -> int:
        return self.window + len(self.rows) - 1


class PackingPlan:
    """How documents are packed into rows of ``seq_len`` tokens: an endless sequence of rows, each
    a pure function of (seed, row).

    Epoch e visits every document once, in the order in which a
    :class:`~nar_kernels.data.loader.MaskedLoader` visits windows (the permutation ``WINDOW_ORDER``
    of e), and ``window`` documents at a time are packed together (:func:`pack`), so no row holds
    documents of two epochs. Rows of a window come

    * with ``"first_fit_decreasing"``, by a permutation (``ROW_ORDER``) of their own, so that not
      all windows begin with their longest documents; without ``shuffle``, as they were opened;
    * with ``"in_order"`` or ``alone``, in the order of the documents.

    Within a row, documents are in the order in which :func:`pack` placed them. Empty ones are left
    out.

    A row is found by packing the windows before it, once: their numbers of rows are remembered.
    :meth:`resume` with the :meth:`state` of a row makes that unnecessary. Memory: that of a few
    windows, and eight bytes for each window before. Several threads may use a plan. It is pickled
    with its ``document_ends``.

    Args:
        document_ends: integers ``[D]``, as ``Corpus.document_ends``: not copied.
        seq_len: L, in [1, 2**31).
        seed: 64-bit key of the order.
        shuffle: if false, each epoch visits the documents in the order of the corpus.
        method: as of :func:`pack`.
        window: how many documents are packed together, the empty ones among them included: the
            more, the less padding, and the longer it takes to find a row.
        overlong: a document of more than ``seq_len`` tokens is ``"split"``: its pieces are
            documents of ``seq_len`` tokens, and what is left; or ``"truncate"``: cut; or
            ``"refuse"``: an error.
        round_to: the space of each piece is rounded up to a multiple of this, which divides
            ``seq_len``; such as for blocks that end with padding.
        alone: one piece a row, whatever ``method`` says.

    Attributes:
        num_documents: D.
        num_empty: how many documents have no token.
        max_pieces: P, the most pieces that a document has.
        num_windows: of an epoch.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is out of range, no document has a token, one is too long and
            ``overlong`` is ``"refuse"``, or not one epoch has slots below 2**63.
    """

    def __init__(
        self,
        document_ends: np.ndarray | Tensor,
        seq_len: int,
        *,
        seed: int,
        shuffle: bool = True,
        method: PackMethod = "first_fit_decreasing",
        window: int = 4096,
        overlong: Overlong = "split",
        round_to: int = 1,
        alone: bool = False,
    ) -> None:
        self.seq_len, self.seed = as_int("seq_len", seq_len), as_int("seed", seed)
        self.window, self.round_to = as_int("window", window), as_int("round_to", round_to)
        if not 1 <= self.seq_len < 1 << 31:
            raise ValueError(f"seq_len is {seq_len}: it must be in [1, 2**31)")
        if self.window < 1:
            raise ValueError(f"window is {window}: it must be at least 1 document")
        if self.round_to < 1 or self.seq_len % self.round_to:
            raise ValueError(f"round_to is {round_to}: it must divide seq_len, which is {seq_len}")
        check_seed(self.seed)
        self.method, self.overlong = check_method(method), overlong
        if overlong not in get_args(Overlong):
            raise ValueError(
                f"overlong is {overlong!r}: it must be 'split', 'truncate' or 'refuse'"
            )
        self.shuffle, self.alone = bool(shuffle), bool(alone)
        self._documents = DocumentSpans(document_ends)
        self.num_documents, self.num_empty = len(self._documents), self._documents.num_empty
        self.max_pieces = self._most_pieces()
        self.num_windows = -(-self.num_documents // self.window)
        self._num_epochs = _MOST // (self.max_pieces * self.num_documents)
        if not self._num_epochs:
            raise ValueError(
                f"{self.num_documents} documents of up to {self.max_pieces} pieces have sample "
                "slots from 2**63 on: use a longer seq_len, or overlong='truncate'"
            )
        # From the first row on, and from that of a state.
        self._tables = [_RowTable(0, 0)]
        self._windows: dict[int, _Window] = {}  # the last that were packed
        self._lock = threading.Lock()

    def _most_pieces(self) -> int:
        longest = self._documents.longest
        if self.overlong == "refuse" and longest > self.seq_len:
            raise ValueError(
                f"document {self._documents.longest_document} has {longest} tokens, more than "
                f"seq_len {self.seq_len}: give overlong='split' or 'truncate', or a longer seq_len"
            )
        return -(-longest // self.seq_len) if self.overlong == "split" else 1

    def rows(self, first: int, count: int) -> Pieces:
        """What rows ``first`` to ``first + count - 1`` hold; each at least one piece.

        Raises:
            ValueError: these are not in [0, 2**63), or of an epoch whose slots are not.
        """
        first, count = as_int("first", first), as_int("count", count)
        if not 0 <= first <= first + count < _MOST:
            raise ValueError(
                f"rows {first} to {first + count} are asked for: they must ascend, in [0, 2**63)"
            )
        parts = []
        row, end = first, first + count
        with self._lock:
            while row < end:
                number, begin = self._find(row)
                pieces, num_rows = self._window(number)
                within = row - begin, min(end - begin, num_rows)
                here = slice(*np.searchsorted(pieces.row, within))
                part = Pieces(*(field[here].copy() for field in pieces))
                parts.append(part._replace(row=part.row + begin))
                row = begin + within[1]
        if len(parts) == 1:
            return parts[0]
        if not parts:
            return Pieces(*(np.empty(0, np.int64) for _ in Pieces._fields))
        return Pieces(*map(np.concatenate, zip(*parts, strict=True)))

    def state(self, row: int) -> dict[str, Any]:
        """Where ``row`` is, as plain values: ``row``, ``epoch``, ``window`` of the epoch, and
        ``first_row`` of that window; and ``plan``, the :attr:`options`.

        Raises:
            ValueError: as of :meth:`rows`.
        """
        row = as_int("row", row)
        if not 0 <= row < _MOST:
            raise ValueError(f"row is {row}: it must be in [0, 2**63)")
        with self._lock:
            number, first_row = self._find(row)
        epoch, window = divmod(number, self.num_windows)
        where = {"row": row, "epoch": epoch, "window": window, "first_row": first_row}
        return where | {"plan": self.options}

    def resume(self, state: Mapping[str, Any]) -> None:
        """Rows from ``state["row"]`` on, of a plan with the same options, are found from there.

        What rows hold does not change, and earlier ones are found from the beginning as ever.

        Raises:
            ValueError: the state is not one of this plan.
        """
        names = ("row", "epoch", "window", "first_row")
        plan = state.get("plan") if isinstance(state, Mapping) else None
        if not isinstance(plan, Mapping) or not all(type(state.get(name)) is int for name in names):
            raise ValueError(f"the state is {state!r}: it is not one of PackingPlan.state")
        for name, here in self.options.items():
            if plan.get(name) != here:
                raise ValueError(
                    f"cannot continue: {name} is {plan.get(name)!r} in the state, but {here!r} "
                    "here; make the plan with the arguments it had when the state was taken"
                )
        row, epoch, window, first_row = (state[name] for name in names)
        number = epoch * self.num_windows + window
        # A window of an epoch that has rows: an epoch has at least one.
        is_possible = 0 <= epoch < self._num_epochs and 0 <= window < self.num_windows
        if not is_possible or not epoch <= first_row <= row < _MOST or (first_row and not number):
            raise ValueError(
                f"the state has row {row} in window {window} of epoch {epoch}, which begins at row "
                f"{first_row}: this plan has no such place"
            )
        with self._lock:
            self._tables = [self._tables[0], _RowTable(number, first_row)]

    @property
    def options(self) -> dict[str, Any]:
        """What decides the rows, as plain values."""
        options = {name: getattr(self, name) for name in _OPTIONS}
        return options | {"documents_digest": self._documents.digest}

    def num_rows(self, epoch: int = 0) -> int:
        """Of one epoch: they differ a little, with the order. Packs all of it, at every call."""
        epoch = as_int("epoch", epoch)
        if not 0 <= epoch < self._num_epochs:
            raise ValueError(f"epoch is {epoch}: it must be in [0, {self._num_epochs})")
        first = epoch * self.num_windows
        return sum(self._packed(first + i).num_rows for i in range(self.num_windows))

    def padding_share(self, epoch: int = 0) -> float:
        """The share, in [0, 1), of the positions of an epoch that hold no token of the corpus, what
        ``round_to`` adds included. As :meth:`num_rows`, it packs the epoch."""
        at_most = self.seq_len if self.overlong == "truncate" else self._documents.longest
        return 1 - self._documents.num_tokens(at_most) / (self.num_rows(epoch) * self.seq_len)

    def _find(self, row: int) -> tuple[int, int]:
        """The window, counted from that of the first row of all, that holds a row; and the first
        row of that window."""
        table = next(table for table in reversed(self._tables) if table.rows[0] <= row)
        while table.rows[-1] <= row:
            table.rows.append(table.rows[-1] + self._window(table.next_window).num_rows)
        # Of windows without rows, which begin where the next does, the next.
        i = bisect_right(table.rows, row) - 1
        return table.window + i, table.rows[i]

    def _window(self, number: int) -> _Window:
        """As :meth:`_packed`; the last two are remembered, which a batch may straddle."""
        if number not in self._windows:
            window = self._packed(number)
            while len(self._windows) > 1:
                del self._windows[next(iter(self._windows))]
            self._windows[number] = window
        return self._windows[number]

    def _packed(self, number: int) -> _Window:
        """The rows of a window, counted from that of the first row of all."""
        epoch, window = divmod(number, self.num_windows)
        if epoch >= self._num_epochs:
            raise ValueError(f"epoch {epoch} has sample slots from 2**63 on: no run is so long")
        pieces = self._pieces(epoch, self._visited(epoch, window * self.window))
        if self.alone or not len(pieces.row):
            return _Window(pieces, len(pieces.row))
        row, offset, num_rows = pack(pieces.space, self.seq_len, self.method)
        if self.shuffle and self.method == "first_fit_decreasing":
            row = self._permuted(range(num_rows), num_rows, Stream.ROW_ORDER, number)[row]
        order = np.argsort(row * self.seq_len + offset)
        pieces = pieces._replace(row=row, offset=offset)
        return _Window(Pieces(*(field[order] for field in pieces)), num_rows)

    def _visited(self, epoch: int, begin: int) -> np.ndarray:
        """The documents of a window that begins at this place of an epoch."""
        places = range(begin, min(begin + self.window, self.num_documents))
        if not self.shuffle:
            return np.arange(places.start, places.stop)
        return self._permuted(places, self.num_documents, Stream.WINDOW_ORDER, epoch)

    def _permuted(self, of: range, n: int, stream: Stream, round: int) -> np.ndarray:
        index = torch.arange(of.start, of.stop, device="cpu")
        return permute(index, n, seed=self.seed, stream=stream, round=round).numpy()

    def _pieces(self, epoch: int, documents: np.ndarray) -> Pieces:
        """The pieces of documents, one after the other, each in a row of its own."""
        starts, lengths = self._documents.of(documents)
        if self.overlong == "truncate":
            lengths = np.minimum(lengths, self.seq_len)
        counts = -(-lengths // self.seq_len)
        of = np.repeat(np.arange(len(documents)), counts)
        row = np.arange(len(of))
        part = row - (np.cumsum(counts) - counts)[of]
        length = np.minimum(lengths[of] - part * self.seq_len, self.seq_len)
        return Pieces(
            row=row,
            offset=np.zeros_like(row),
            start=starts[of] + part * self.seq_len,
            length=length,
            space=-(-length // self.round_to) * self.round_to,
            sample=(epoch * self.max_pieces + part) * self.num_documents + documents[of],
        )

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in _NOT_PICKLED}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._windows, self._lock = {}, threading.Lock()
