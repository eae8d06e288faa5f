"""How long the documents of a corpus are: :func:`document_lengths`.

Shapes: D documents, U different lengths.
"""

from dataclasses import dataclass

import numpy as np

from nar_kernels.data.corpus import Corpus
from nar_kernels.data.inspect.remembered import recall, remember


@dataclass(frozen=True, eq=False)
class DocumentLengths:
    """Lengths are in tokens, the one that ends a document included.

    Attributes:
        lengths: int64 ``[U]``, ascending.
        counts: int64 ``[U]``, at least 1: how many documents have each length.
        num_empty: documents without a token, or with none but their end.
    """

    lengths: np.ndarray
    counts: np.ndarray
    num_empty: int

    @property
    def num_documents(self) -> int:
        """D."""
        return int(self.counts.sum())

    @property
    def mean(self) -> float:
        return float(self.lengths @ self.counts) / self.num_documents

    def at_least(self, length: int) -> int:
        """How many documents have so many tokens, or more."""
        return int(self.counts[self.lengths >= length].sum())

    def quantile(self, share: float) -> int:
        """The least length such that this share of the documents, in [0, 1], is no longer."""
        ranks = np.cumsum(self.counts)
        return int(self.lengths[np.searchsorted(ranks, share * ranks[-1])])


def document_lengths(corpus: Corpus) -> DocumentLengths | None:
    """None if neither the source nor ``corpus.eos_id`` says where documents end.

    Where ``eos_id`` says, all ids are read, once: the lengths are remembered, except of arrays.

    Raises:
        CorpusFormatError: the index of the documents is not right.
        CorpusChangedError: a file has changed since it was opened.
    """
    corpus.stream.check_unchanged()
    if corpus.eos_id is None:
        ends = corpus.document_ends
        return None if ends is None else _lengths(ends, 0)
    what = f"documents that end with {corpus.eos_id}"
    known = recall(corpus, what)
    if known is not None:
        return DocumentLengths(known["lengths"], known["counts"], int(known["num_empty"]))
    ends = corpus.document_ends
    assert ends is not None
    last_id = int(corpus.read(len(corpus) - 1, len(corpus)))
    found = _lengths(ends, 1, last_is_ended=last_id == corpus.eos_id)
    corpus.stream.release_memory()
    remember(
        corpus,
        what,
        lengths=found.lengths,
        counts=found.counts,
        num_empty=np.array(found.num_empty),
    )
    return found


def _lengths(ends: np.ndarray, of_an_end: int, last_is_ended: bool = True) -> DocumentLengths:
    """Args:
    ends: as :attr:`Corpus.document_ends`.
    of_an_end: tokens of a document that is empty.
    last_is_ended: whether the last document has its end.
    """
    lengths = np.diff(ends, prepend=0)
    is_empty = lengths == of_an_end
    is_empty[-1] &= last_is_ended
    return DocumentLengths(*np.unique(lengths, return_counts=True), int(is_empty.sum()))
