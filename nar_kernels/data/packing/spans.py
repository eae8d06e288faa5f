"""Where documents lie in a corpus: :class:`DocumentSpans`.

Shapes: D documents.
"""

import hashlib
from collections.abc import Iterator
from functools import cached_property

import numpy as np
from torch import Tensor

_DOCUMENTS_AT_ONCE = 1 << 20


class DocumentSpans:
    """Where each document begins, and how many tokens it has. The ends stay where they are, such as
    in a map of a file, and are read once, in pieces.

    Args:
        ends: integers ``[D]``, ascending, as ``Corpus.document_ends``: how many tokens precede the
            end of each.

    Attributes:
        num_empty: how many have no token.
        longest, longest_document: the most tokens of a document, and the first that has so many.

    Raises:
        TypeError: the ends are not integers.
        ValueError: they do not ascend from 0, or no document has a token, or D is not below 2**32.
    """

    def __init__(self, ends: np.ndarray | Tensor) -> None:
        # Of a map, an array that shares its memory: what is indexed is no map then.
        self._ends = ends.cpu().numpy() if isinstance(ends, Tensor) else np.asarray(ends)
        if self._ends.dtype.kind not in "iu" and self._ends.size:
            raise TypeError(f"document_ends are {self._ends.dtype}: they must be integers")
        if self._ends.ndim != 1 or len(self) >= 1 << 32:
            raise ValueError(
                f"document_ends have the shape {list(self._ends.shape)}: it must be [D], with D "
                "below 2**32, as Corpus.document_ends"
            )
        self.num_empty, self.longest, self.longest_document = 0, 0, 0
        for first, lengths in self._chunks():
            if lengths.min() < 0:
                document = first + int((lengths < 0).argmax())
                raise ValueError(
                    f"document {document} ends before it begins, at {self._ends[document]}: "
                    "document_ends must ascend from 0, as Corpus.document_ends; give their "
                    "cumulative sum if these are lengths"
                )
            self.num_empty += len(lengths) - int(np.count_nonzero(lengths))
            if lengths.max() > self.longest:
                self.longest = int(lengths.max())
                self.longest_document = first + int(lengths.argmax())
        if not self.longest:
            what = f"none of {len(self)} documents has a token" if len(self) else "no document"
            raise ValueError(f"there is nothing to pack: {what}; give the ends of some that have")

    def __len__(self) -> int:
        """D, the empty ones included."""
        return len(self._ends)

    def of(self, documents: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where these begin, and how long they are: int64, like ``documents``."""
        begins = self._ends[documents - 1].astype(np.int64)
        begins[documents == 0] = 0
        return begins, self._ends[documents].astype(np.int64) - begins

    def num_tokens(self, at_most: int) -> int:
        """Of all documents, at most so many of each."""
        return sum(int(np.minimum(lengths, at_most).sum()) for _, lengths in self._chunks())

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the ends, as int64, in hex."""
        sha = hashlib.sha256()
        for start in range(0, len(self), _DOCUMENTS_AT_ONCE):
            ends = self._ends[start : start + _DOCUMENTS_AT_ONCE]
            sha.update(ends.astype("<i8").tobytes())
        return sha.hexdigest()

    def _chunks(self) -> Iterator[tuple[int, np.ndarray]]:
        """Lengths of documents, int64, with the number of the first."""
        before = 0
        for start in range(0, len(self), _DOCUMENTS_AT_ONCE):
            ends = self._ends[start : start + _DOCUMENTS_AT_ONCE].astype(np.int64)
            yield start, np.diff(ends, prepend=before)
            before = int(ends[-1])
