"""How long the documents of a corpus are: :func:`document_lengths`.

Shapes: D documents, U different lengths.
"""

from dataclasses import dataclass

import numpy as np

from nar_kernels.data.corpus import Corpus
from nar_kernels.data.remembered import recall, remember


@dataclass(frozen=True, eq=False)
class DocumentLengths:
    """Attributes:
    lengths: int64 ``[U]``, tokens, ascending.
    counts: int64 ``[U]``, at least 1: how many documents have each length.
    """

    lengths: np.ndarray
    counts: np.ndarray

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
        """The shortest length such that this share of the documents, in [0, 1], is no longer."""
        ranks = np.cumsum(self.counts)
        return int(self.lengths[np.searchsorted(ranks, share * ranks[-1])])


def document_lengths(corpus: Corpus) -> DocumentLengths | None:
    """None if neither the source nor ``corpus.eos_id`` says where documents end.

    Where ``eos_id`` says, all ids are read, once: the lengths are remembered, except of arrays.

    Raises:
        CorpusFormatError: the index of the documents is not right.
        CorpusChangedError: a file has changed since it was opened.
    """
    what = None if corpus.eos_id is None else f"documents that end with {corpus.eos_id}"
    if what is not None and (known := recall(corpus, what)) is not None:
        return DocumentLengths(known["lengths"], known["counts"])
    ends = corpus.document_ends
    if ends is None:
        return None
    found = DocumentLengths(*np.unique(np.diff(ends, prepend=0), return_counts=True))
    if what is not None:
        corpus.stream.release_memory()
        remember(corpus, what, lengths=found.lengths, counts=found.counts)
    return found
