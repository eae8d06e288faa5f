"""Which document each token of a window is in."""

import numpy as np
import torch
from torch import Tensor

from nar_kernels.data.corpus import Corpus


def document_ids(corpus: Corpus, starts: Tensor, seq_len: int) -> Tensor:
    """int64 ``[B, L]``: the document of each token of the windows of ``seq_len`` tokens that begin
    at ``starts`` ``[B]``, counted from 0.

    Raises:
        ValueError: the corpus does not say where documents end.
    """
    ends = corpus.document_ends
    if ends is None:
        raise ValueError(
            f"{corpus.name} does not say where its documents end: give eos_id, the id that ends "
            "each, to its Corpus or TokenDataset"
        )
    begin = starts.cpu().numpy()
    first = np.searchsorted(ends, begin, "right")
    num_ends = np.searchsorted(ends, begin + seq_len - 1, "right") - first
    # Each end within a window raises the number from there on; those of empty documents do, too.
    row = np.repeat(np.arange(len(begin)), num_ends)
    within = np.arange(len(row)) - np.repeat(np.cumsum(num_ends) - num_ends, num_ends)
    ids = np.zeros((len(begin), seq_len), np.int64)
    np.add.at(ids, (row, ends[first[row] + within] - begin[row]), 1)
    ids[:, 0] += first
    return torch.from_numpy(ids.cumsum(1)).to(starts.device)
