"""What is in a prepared folder."""

from pathlib import Path

import numpy as np

from nar_kernels.data.corpus import Corpus


def contents(folder: Path) -> dict[str, bytes]:
    """All files, by name."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def documents(folder: Path) -> list[list[int]]:
    """The ids of each document."""
    corpus = Corpus(folder)
    ids = corpus.read(0, len(corpus)).tolist()
    ends = [0, *read_ends(corpus).tolist()]
    return [ids[a:b] for a, b in zip(ends, ends[1:], strict=False)]


def masks(folder: Path) -> list[list[int]]:
    """The loss mask of each document."""
    corpus = Corpus(folder)
    assert corpus.loss_mask is not None
    mask = corpus.loss_mask.read(0, len(corpus)).tolist()
    ends = [0, *read_ends(corpus).tolist()]
    return [mask[a:b] for a, b in zip(ends, ends[1:], strict=False)]


def read_ends(corpus: Corpus) -> np.ndarray:
    ends = corpus.document_ends
    assert ends is not None
    return ends
