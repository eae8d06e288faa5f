"""Pages of a corpus's files in memory: :class:`Residency`."""

import itertools
import os
from pathlib import Path

import torch
from torch import Tensor

from nar_kernels.data.stream import TokenStream
from nar_kernels.ops.windows import read_ahead

try:
    import resource
except ImportError:  # not on Windows
    resource = None  # type: ignore[assignment]

_OFTEN, _SELDOM = 8, 64  # batches
_RESIDENT_FRACTION = 1 / 8  # of the machine's memory
_STATM = Path("/proc/self/statm")


class Residency:
    """What a loop over batches does for the files that it reads:

    * Notices that a file has changed, before a map of one that shrank ends the process.
    * Where pages had to be read from disk, asks for those of the next batch ahead, in the order of
      the files.
    * Returns pages once so much of files is resident (default: an eighth of the memory), which
      stays in the system's cache. Otherwise a run through a large corpus seems to take all memory.

    Args:
        stream: whose parts are looked after.
        loss_mask: that of the corpus, likewise.
        most_resident: bytes.

    Attributes:
        is_cold: whether batches have lately come from a disk: then :meth:`read_ahead` helps.
    """

    def __init__(
        self,
        stream: TokenStream,
        loss_mask: TokenStream | None = None,
        most_resident: int | None = None,
    ) -> None:
        self._stream = stream
        self._parts = (*stream.parts, *(() if loss_mask is None else loss_mask.parts))
        self._turn = itertools.cycle(self._parts)
        self.is_cold, self._cold_until, self._reads = False, 0, _disk_reads()
        self._batches = 0
        if most_resident is None:
            most_resident = int(_memory_bytes() * _RESIDENT_FRACTION)
        self._most_resident = most_resident

    def before(self, begins_epoch: bool) -> None:
        """To be called before each batch.

        Raises:
            CorpusChangedError: a file is not what it was. All are looked at where an epoch begins;
                otherwise one, now and then.
        """
        if begins_epoch:
            for part in self._parts:
                part.check_unchanged()
        self._batches += 1
        if self._batches % _OFTEN:
            return
        next(self._turn).check_unchanged()
        if (reads := _disk_reads()) > self._reads:
            self._cold_until, self._reads = self._batches + _SELDOM, reads
        self.is_cold = self._batches < self._cold_until
        if self._batches % _SELDOM == 0 and _resident_file_bytes() > self._most_resident:
            for part in self._parts:
                part.release_memory()

    def read_ahead(self, starts: Tensor, seq_len: int) -> None:
        """Asks for the pages of windows that begin at ``starts``, int64 ``[B]``."""
        read_ahead(self._stream.flat, self._stream.runs, starts, seq_len)


def _disk_reads() -> int:
    """A count that grows when this process waits for a page from a disk, or asks for one ahead."""
    if resource is None:
        return 0
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_majflt + usage.ru_inblock


def _resident_file_bytes() -> int:
    """Resident memory of this process that files back; 0 where the system does not say."""
    try:
        return int(_STATM.read_bytes().split()[2]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def _memory_bytes() -> int:
    if "SC_PHYS_PAGES" not in getattr(os, "sysconf_names", {}):
        return torch.iinfo(torch.int64).max
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
