"""Some documents of a corpus: :class:`DocumentRange`.

Shapes: L row length (``seq_len``), n pieces.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from nar_kernels.data.corpus import Corpus

_AT_ONCE = 1 << 20  # ids


class DocumentRange(NamedTuple):
    """Documents ``first`` to ``last - 1`` of a corpus that says where they end.

    Attributes:
        seq_len: L, the most tokens of a row that they are packed into.
        num_tokens, mask_id: of their vocabulary.
        overlong: what becomes of longer documents, ``"split"`` or ``"truncate"``, as of
            ``PackingPlan``.
    """

    corpus: Corpus
    first: int
    last: int
    seq_len: int
    num_tokens: int
    mask_id: int
    overlong: str = "split"

    @property
    def num_documents(self) -> int:
        return self.last - self.first

    def spans(self) -> tuple[np.ndarray, np.ndarray]:
        """int64 ``[num_documents]`` both: where each begins in the corpus, and its length."""
        ends = self.corpus.document_ends
        assert ends is not None
        before = int(ends[self.first - 1]) if self.first else 0
        here = np.asarray(ends[self.first : self.last])
        begins = np.concatenate([[before], here[:-1]])
        return begins, here - begins

    @property
    def num_longer(self) -> int:
        """How many documents are longer than a row."""
        return int((self.spans()[1] > self.seq_len).sum())

    def pieces(self) -> tuple[Tensor, Tensor]:
        """int64 ``[n]`` both: starts and lengths of the documents, without the empty ones; longer
        ones in pieces of L and what is left, or cut."""
        begins, lengths = self.spans()
        if self.overlong == "truncate":
            lengths = np.minimum(lengths, self.seq_len)
        counts = -(-lengths // self.seq_len)
        of = np.repeat(np.arange(len(lengths)), counts)
        before = (np.arange(len(of)) - (np.cumsum(counts) - counts)[of]) * self.seq_len
        starts, rest = begins[of] + before, lengths[of] - before
        return torch.from_numpy(starts), torch.from_numpy(np.minimum(rest, self.seq_len))

    def counted_ids(self, most: int) -> Tensor:
        """int64: the first ids that count in the loss, some more than ``most`` at most."""
        begins, lengths = self.spans()
        found: list[Tensor] = []
        end = int(begins[-1] + lengths[-1])
        for start in range(int(begins[0]), end, _AT_ONCE):
            stop = min(start + _AT_ONCE, end)
            ids = torch.from_numpy(self.corpus.read(start, stop).numpy().astype(np.int64))
            mask = self.corpus.loss_mask
            found.append(ids if mask is None else ids[mask.read(start, stop) != 0])
            if sum(map(len, found)) >= most:
                break
        return torch.cat(found) if found else torch.empty(0, dtype=torch.int64, device="cpu")

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
