"""Some documents of a corpus: :class:`DocumentRange`.

Shapes: L row length (``seq_len``), n pieces.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from nar_kernels.data.corpus import Corpus


class DocumentRange(NamedTuple):
    """Documents ``first`` to ``last - 1`` of a corpus that says where they end.

    Attributes:
        seq_len: L, the most tokens of a row that they are packed into.
        num_tokens, mask_id: of their vocabulary.
    """

    corpus: Corpus
    first: int
    last: int
    seq_len: int
    num_tokens: int
    mask_id: int

    @property
    def num_documents(self) -> int:
        return self.last - self.first

    def spans(self) -> tuple[np.ndarray, np.ndarray]:
        """int64 ``[num_documents]`` both: where each begins in the corpus, and its length."""
        ends = self.corpus.document_ends
        assert ends is not None
        begins = np.concatenate([[0], ends])[self.first : self.last]
        return begins, np.asarray(ends[self.first : self.last]) - begins

    def pieces(self) -> tuple[Tensor, Tensor]:
        """int64 ``[n]`` both: starts and lengths of the documents, without the empty ones; longer
        ones in pieces of L and what is left."""
        begins, lengths = self.spans()
        counts = -(-lengths // self.seq_len)
        of = np.repeat(np.arange(len(lengths)), counts)
        before = (np.arange(len(of)) - (np.cumsum(counts) - counts)[of]) * self.seq_len
        starts, rest = begins[of] + before, lengths[of] - before
        return torch.from_numpy(starts), torch.from_numpy(np.minimum(rest, self.seq_len))

    def counted_ids(self, most: int) -> Tensor:
        """int64 ``[at most most]``: ids that count in the loss, from the first document on."""
        begins, lengths = self.spans()
        start, stop = int(begins[0]), int(begins[-1] + lengths[-1])
        stop = min(stop, start + most)
        ids = torch.from_numpy(self.corpus.read(start, stop).numpy().astype(np.int64))
        mask = self.corpus.loss_mask
        return ids if mask is None else ids[mask.read(start, stop) != 0]

    def prompts(self, most: int) -> list[Tensor]:
        """The tokens of at most so many documents up to the first that counts in the loss."""
        found: list[Tensor] = []
        mask = self.corpus.loss_mask
        for begin, length in zip(*self.spans(), strict=True):
            if mask is None or len(found) == most:
                break
            counts = mask.read(int(begin), int(begin + length)).numpy()
            answer = int(counts.argmax()) if counts.any() else 0
            if 0 < answer < self.seq_len:
                ids = self.corpus.read(int(begin), int(begin) + answer).numpy()
                found.append(torch.from_numpy(ids.astype(np.int64)))
        return found
