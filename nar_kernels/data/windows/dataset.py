"""Clean windows of a corpus: :class:`TokenDataset`.

Shapes: B batch, L sequence length (``seq_len``), T corpus length in tokens, N windows.
"""

import copy
import operator
from collections.abc import Sequence
from functools import partial
from typing import SupportsIndex

import numpy as np
import torch
from numpy.typing import DTypeLike
from torch import Tensor
from torch.utils.data import Dataset

from nar_kernels.checks import as_int
from nar_kernels.data.corpus import Corpus, Source
from nar_kernels.data.inspect.scan import CorpusScan, find_bad, known_scan, scan
from nar_kernels.data.windows.documents import document_ids
from nar_kernels.data.windows.window_table import WindowTable
from nar_kernels.errors import InvalidTokenError
from nar_kernels.ops.masking import check_vocabulary
from nar_kernels.ops.scan import Covered
from nar_kernels.ops.windows import windows

_TOKENS_AT_ONCE = 1 << 22  # in which bad ids are listed, to leave out those in no window


class TokenDataset(Dataset[Tensor]):
    """Windows of exactly ``seq_len`` clean token ids, for ``torch.utils.data.DataLoader``.

    Window ``i`` is ``tokens[i * stride : i * stride + seq_len]`` as int64 ``[L]``. There are
    ``N = (T - seq_len) // stride + 1`` of them, none padded; a tail too short for one is dropped.
    They cross from one file or document into the next, unless ``within_documents`` is true: then
    this holds for each document, and shorter ones are left out.

    Args:
        source: a path, several, an array or a tensor: see
            :class:`~nar_kernels.data.corpus.Corpus`. Or a ``Corpus``.
        seq_len: L, at least 1.
        num_tokens: V, the number of embedding rows, in [2, 2**31). Default: what the manifest of a
            prepared corpus says.
        mask_id: the mask token, in [0, V). Clean data must not contain it. Default: as above.
        stride: tokens from one window's start to the next, at least 1. Default: ``seq_len``.
        within_documents: no window reaches beyond a document.
        dtype, column, eos_id: as of ``Corpus``.
        validate: check every fetched window. If false, invalid ids are replaced by 0 (1 if
            ``mask_id`` is 0), so that embedding lookups stay in bounds.

    Attributes:
        corpus: the :class:`Corpus`.

    Raises:
        CorpusFormatError, FileNotFoundError: the corpus cannot be read.
        ValueError: an argument is out of range or missing, or there is no window.
        InvalidTokenError: (on fetching) a token id is outside [0, V), or is ``mask_id``.
        IndexError: (on fetching) an index is outside [-N, N).
    """

    def __init__(
        self,
        source: Source | Corpus,
        seq_len: int,
        *,
        num_tokens: int | None = None,
        mask_id: int | None = None,
        stride: int | None = None,
        within_documents: bool = False,
        dtype: DTypeLike | torch.dtype | None = None,
        column: str | None = None,
        eos_id: int | None = None,
        validate: bool = True,
    ) -> None:
        seq_len = as_int("seq_len", seq_len)
        stride = seq_len if stride is None else as_int("stride", stride)
        for name, value in (("seq_len", seq_len), ("stride", stride)):
            if not 1 <= value < 1 << 62:
                raise ValueError(f"{name} is {value}: it must be in [1, 2**62)")
        if num_tokens is not None and mask_id is not None:  # before anything is opened
            check_vocabulary(as_int("num_tokens", num_tokens), as_int("mask_id", mask_id))
        if isinstance(source, Corpus):
            if (dtype, column, eos_id) != (None, None, None):
                raise ValueError("dtype, column and eos_id belong to the Corpus that was given")
            self.corpus = source
        else:
            self.corpus = Corpus(source, dtype=dtype, column=column, eos_id=eos_id)
        self.num_tokens, self.mask_id = _vocabulary(self.corpus, num_tokens, mask_id)
        self.seq_len, self.stride = seq_len, stride
        self.within_documents = bool(within_documents)
        self.validate = validate
        self._table = self._make_table()
        self._first, self._num_windows = 0, len(self._table)

    def _make_table(self) -> WindowTable:
        corpus, total = self.corpus, len(self.corpus)
        if total < self.seq_len:
            raise ValueError(
                f"{corpus.name} has {total} tokens, less than one window of seq_len {self.seq_len}"
            )
        begins, lengths = np.array([0]), np.array([total])
        if self.within_documents:
            ends = corpus.document_ends
            if ends is None:
                raise ValueError(
                    f"within_documents is true, but {corpus.name} does not say where its documents "
                    "end: give eos_id, the id that ends each, or leave it out"
                )
            lengths = np.diff(ends, prepend=0)
            begins = ends - lengths
        table = WindowTable(begins, lengths, self.seq_len, self.stride)
        if not len(table):
            raise ValueError(
                f"the longest of {len(lengths)} documents of {corpus.name} has {lengths.max()} "
                f"tokens, less than one window of seq_len {self.seq_len}"
            )
        return table

    def __len__(self) -> int:
        """N, the number of windows."""
        return self._num_windows

    @property
    def phase(self) -> int:
        """Corpus offset of window 0: 0, except of windows that ``split`` held out."""
        return int(self.starts([0]))

    @property
    def is_regular(self) -> bool:
        """Whether window i begins at ``phase + i * stride``."""
        return self._table.is_regular

    @property
    def table_digest(self) -> str | None:
        """Fingerprint of where windows begin, where ``phase`` and ``stride`` do not say it."""
        return self._table.digest

    def starts(self, indices: Tensor | Sequence[int]) -> Tensor:
        """int64 ``[B]``: corpus offsets of the windows with these indices; on the device of
        ``indices`` if that is a tensor.

        Raises:
            IndexError: an index is outside [-N, N).
            TypeError: an index is not an integer.
        """
        if isinstance(indices, Tensor):
            if indices.is_floating_point() or indices.dtype == torch.bool:
                raise TypeError(f"window indices are {indices.dtype}: they must be integers")
            index = indices.to(torch.int64)
        else:
            numbers = [as_int("window index", i) for i in indices]
            index = torch.tensor(numbers, dtype=torch.int64, device="cpu")
        outside = (index < -len(self)) | (index >= len(self))
        if outside.any():
            raise IndexError(
                f"window index {index[outside][0].item()} is outside [-{len(self)}, {len(self)})"
            )
        return self._table.starts(self._first + index.remainder(len(self)))

    def __getitem__(self, index: SupportsIndex) -> Tensor:
        """int64 ``[L]``: one window."""
        return self.__getitems__([operator.index(index)])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Tensor]:
        """Batched fetch for DataLoader: int64 ``[L]`` windows, rows of one ``[B, L]`` tensor."""
        return list(self.windows(indices))

    def windows(self, indices: Tensor | Sequence[int]) -> Tensor:
        """int64 ``[B, L]``: the windows with these indices."""
        stream = self.corpus.stream
        return windows(
            stream.flat,
            self.starts(indices),
            self.seq_len,
            runs=stream.runs,
            num_tokens=self.num_tokens,
            mask_id=self.mask_id,
            validate=self.validate,
            where=self.corpus.where,
        )

    def loss_mask(self, indices: Tensor | Sequence[int]) -> Tensor | None:
        """uint8 ``[B, L]`` of these windows: 0 where a token does not count in a loss, such as in a
        prompt. None if the corpus has no loss mask."""
        mask = self.corpus.loss_mask
        return None if mask is None else mask.windows(self.starts(indices), self.seq_len)

    def document_ids(self, indices: Tensor | Sequence[int]) -> Tensor:
        """int64 ``[B, L]``: which document of the corpus each token of these windows is in, counted
        from 0; such as for attention that does not cross from one into another.

        Raises:
            ValueError: the corpus does not say where documents end.
        """
        return document_ids(self.corpus, self.starts(indices), self.seq_len)

    def split(self, num_held_out: int) -> tuple["TokenDataset", "TokenDataset"]:
        """``(train, held_out)``: the last ``num_held_out`` windows are kept for evaluation.

        The two share the corpus but no token. If windows overlap (``stride < seq_len``), those that
        reach into the first held-out window belong to neither; so
        ``len(train) == N - num_held_out - (ceil(seq_len / stride) - 1)`` (or more within documents,
        where fewer overlap).

        Raises:
            ValueError: either side would be empty.
        """
        num_held_out = as_int("num_held_out", num_held_out)
        num_train = 0
        if 1 <= num_held_out < len(self):
            boundary = int(self.starts([len(self) - num_held_out]))
            num_train = self._table.num_before(boundary - self.seq_len + 1) - self._first
        if num_train < 1:
            dropped = -(-self.seq_len // self.stride) - 1
            raise ValueError(
                f"num_held_out is {num_held_out}: of {len(self)} windows, at least 1 must be held "
                f"out and at least {dropped + 1} not, so that one training window shares no token "
                "with them"
            )
        train, held_out = copy.copy(self), copy.copy(self)
        train._num_windows = num_train
        held_out._num_windows = num_held_out
        held_out._first = self._first + len(self) - num_held_out
        return train, held_out

    def at(self, corpus: Corpus, starts: Tensor) -> "TokenDataset":
        """Windows like these, of another corpus, that begin at ``starts`` ``[N]``, ascending."""
        other = copy.copy(self)
        other.corpus = corpus
        begins = starts.numpy()
        other._table = WindowTable(begins, np.full_like(begins, self.seq_len), self.seq_len, 1)
        other._first, other._num_windows = 0, len(other._table)
        return other

    def validate_all(self) -> None:
        """Checks every token that a window covers, on all threads of PyTorch.

        What a corpus in files holds is remembered in a cache folder (docs/data.md), so that it is
        read once, unless it has bad ids.

        Raises:
            InvalidTokenError: with the lowest offset of a bad id, and how many there are.
        """
        start, end = self.phase, int(self.starts([-1])) + self.seq_len
        known = self._known_scan(end - start)
        if known is not None and known.is_valid(self.num_tokens, self.mask_id):
            return
        # The bad ids may be where no window is.
        offset, count = self._bad_ids(start, end)
        if count:
            raise InvalidTokenError.at(
                self.corpus.where(offset),
                token_id=int(self.corpus.read(offset, offset + 1)),
                offset=offset,
                count=count,
                num_tokens=self.num_tokens,
                mask_id=self.mask_id,
            )

    def _bad_ids(self, start: int, end: int) -> tuple[int, int]:
        """The first offset, and how many, of the bad ids that windows between these offsets of the
        corpus cover."""
        find = partial(find_bad, self.corpus, num_tokens=self.num_tokens, mask_id=self.mask_id)
        if self.is_regular:
            covered = Covered(start, self.stride, self.seq_len)
            bad = find(start=start, stop=end, covered=covered)
            return next(iter(bad.offsets), 0), bad.count
        first, count = 0, 0
        views = (self._first, self._first + len(self) - 1)
        for begin in range(start, end, _TOKENS_AT_ONCE):
            stop = min(begin + _TOKENS_AT_ONCE, end)
            bad = find(start=begin, stop=stop, max_places=stop - begin)
            offsets = self._table.covered(np.array(bad.offsets, np.int64), self.seq_len, *views)
            first = int(offsets[0]) if len(offsets) and not count else first
            count += len(offsets)
        return first, count

    def _known_scan(self, length: int) -> CorpusScan | None:
        """A scan of the corpus that is remembered; or, if windows span most of it, is made now and
        will be."""
        if self.corpus.stream.files is not None and length > len(self.corpus) // 2:
            # If mask_id is the last id, as usual, the greatest id says whether it occurs.
            return scan(self.corpus, histogram=self.mask_id < self.num_tokens - 1)
        return known_scan(self.corpus)


def _vocabulary(corpus: Corpus, num_tokens: int | None, mask_id: int | None) -> tuple[int, int]:
    """``num_tokens`` and ``mask_id`` as given, or those of the manifest."""
    if corpus.manifests:
        num_tokens = corpus.manifests[0].num_tokens if num_tokens is None else num_tokens
        mask_id = corpus.manifests[0].mask_id if mask_id is None else mask_id
    if num_tokens is None or mask_id is None:
        missing = "num_tokens" if num_tokens is None else "mask_id"
        raise ValueError(
            f"{corpus.name} does not say what its vocabulary is: give {missing} (num_tokens counts "
            "the ids of its tokenizer and the mask token, which is mask_id)"
        )
    num_tokens, mask_id = as_int("num_tokens", num_tokens), as_int("mask_id", mask_id)
    check_vocabulary(num_tokens, mask_id)
    return num_tokens, mask_id
