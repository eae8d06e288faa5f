"""Which ids a whole corpus holds: :func:`scan`, and where bad ones are: :func:`find_bad`.

Shapes: T corpus length in tokens, V vocabulary (``num_tokens``).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from nar_kernels.data.corpus import Corpus
from nar_kernels.data.inspect.remembered import recall, remember
from nar_kernels.ops import scan as ops
from nar_kernels.ops.masking import check_vocabulary
from nar_kernels.ops.scan import Covered, Scanned

# What is mapped at a time. In between, pages are released, and Ctrl-C is heard.
_PORTION_BYTES = 1 << 30

_MOST_BINS = 1 << 20  # above every vocabulary there is
_MOST_TOKENS = (1 << 31) - 1  # of a vocabulary


@dataclass(frozen=True, eq=False)
class CorpusScan:
    """What a corpus holds.

    Attributes:
        num_ids: T.
        min_id, max_id: the least and the greatest id.
        counts: int64 ``[min(max_id + 1, 2**20)]`` (at least ``[0]``), how often each id occurs; or
            None, if that was not asked for.
    """

    num_ids: int
    min_id: int
    max_id: int
    counts: np.ndarray | None

    def has(self, id: int) -> bool | None:
        """Whether an id occurs; None if it may."""
        if not self.min_id <= id <= self.max_id:
            return False
        if id in (self.min_id, self.max_id):
            return True
        if self.counts is None or not 0 <= id < len(self.counts):
            return None
        return bool(self.counts[id])

    def is_valid(self, num_tokens: int, mask_id: int) -> bool:
        """Whether all ids are known to be in [0, V), and none to be ``mask_id``."""
        in_range = self.min_id >= 0 and self.max_id < num_tokens
        return in_range and self.has(mask_id) is False


@dataclass(frozen=True)
class BadIds:
    """Ids that clean windows must not hold.

    Attributes:
        outside: how many are not in [0, V).
        masked: how many are ``mask_id``.
        offsets: in the corpus: the lowest ones, ascending.
    """

    outside: int
    masked: int
    offsets: list[int]

    @property
    def count(self) -> int:
        return self.outside + self.masked


def scan(corpus: Corpus, *, histogram: bool = True) -> CorpusScan:
    """Reads a corpus once, on all threads of PyTorch. What was found is remembered (see
    :func:`known_scan`), except of arrays.

    Args:
        histogram: count how often each id occurs, which takes some times as long.

    Raises:
        CorpusChangedError: a file has changed since it was opened.
    """
    corpus.stream.check_unchanged()
    known = known_scan(corpus)
    if known is not None and (known.counts is not None or not histogram):
        return known
    # Ids of no more than two bytes have a bin each.
    bins = min(torch.iinfo(corpus.dtype).max + 1, _MOST_BINS)
    counts = torch.zeros(bins, dtype=torch.int64, device="cpu") if histogram else None
    least, greatest = (1 << 63) - 1, -1 << 63
    for found in _portions(corpus, 0, len(corpus), counts=counts):
        least, greatest = min(least, found.least), max(greatest, found.greatest)
    kept = None if counts is None else counts[: max(min(greatest + 1, bins), 0)].numpy()
    result = CorpusScan(len(corpus), least, greatest, kept)
    range_ = np.array([least, greatest])
    remember(corpus, "ids", range=range_, **({} if kept is None else {"counts": kept}))
    return result


def known_scan(corpus: Corpus) -> CorpusScan | None:
    """What an earlier :func:`scan` of the same files has found, in this process or another one."""
    arrays = recall(corpus, "ids")
    if arrays is None:
        return None
    least, greatest = arrays["range"].tolist()
    return CorpusScan(len(corpus), least, greatest, arrays.get("counts"))


def find_bad(
    corpus: Corpus,
    *,
    num_tokens: int | None = None,
    mask_id: int | None = None,
    start: int = 0,
    stop: int | None = None,
    covered: Covered = ops.EVERYTHING,
    max_places: int = 1,
) -> BadIds:
    """Counts the bad ids of a corpus in a single pass, and locates the first ones.

    Args:
        num_tokens: V. Default: all ids are in it that are not negative.
        mask_id: in [0, V). Default: no id is taken for a mask.
        start, stop: which tokens to look at. Default: all.
        covered: by which windows.
        max_places: how many to locate.

    Raises:
        CorpusChangedError: a file has changed since it was opened.
        IndexError: ``start`` or ``stop`` is outside the corpus.
        ValueError: ``num_tokens`` or ``mask_id`` is out of range.
    """
    check_vocabulary(
        _MOST_TOKENS if num_tokens is None else num_tokens, 0 if mask_id is None else mask_id
    )
    stop = len(corpus) if stop is None else stop
    if not 0 <= start <= stop <= len(corpus):
        raise IndexError(
            f"tokens {start} to {stop} are not all in {corpus.name}, which has {len(corpus)}"
        )
    outside = masked = 0
    offsets: list[int] = []
    for found in _portions(
        corpus,
        start,
        stop,
        covered=covered,
        num_tokens=num_tokens,
        mask_id=mask_id,
        max_places=max_places,
    ):
        outside, masked = outside + found.outside, masked + found.masked
        offsets += found.places
    return BadIds(outside, masked, offsets[:max_places])


def _portions(corpus: Corpus, start: int, stop: int, **looked_for: Any) -> Iterator[Scanned]:
    portion = max(_PORTION_BYTES // corpus.dtype.itemsize, 1)
    stream = corpus.stream
    for first in range(start, stop, portion):
        stream.check_unchanged()  # to read what a file has lost would end the process
        last = min(first + portion, stop)
        yield ops.scan(stream.flat, stream.runs, first, last, **looked_for)
        if stop - start > portion:
            stream.release_memory()
