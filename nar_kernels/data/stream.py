"""Memory-mapped runs of ids as one stream: :class:`Stream`.

Shapes: B windows, L ids of each, T ids in all, P runs.
"""

import mmap
import os
import sys
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nar_kernels.data.formats.base import Layout
from nar_kernels.errors import CorpusChangedError
from nar_kernels.ops.tokens import TOKEN_DTYPES
from nar_kernels.ops.windows import gather

_COPY_CHUNK = 1 << 24  # ids


class Stream:
    """Ids of any number of files, memory-mapped, or of one array, as one flat stream.

    Maps are copy-on-write: nothing that is written here reaches a file.

    Attributes:
        dtype: of the ids.
        runs: int64 ``[2, P + 1]``: how many ids come before each run, and the address of the run in
            memory, which need not be aligned. The last column has T, and no address. None if all
            ids lie in one aligned run.
        flat: ``[T]``, that run; otherwise empty, of the same dtype.
        layouts: of the files; empty for an array.
        signatures: of the files as they were opened: size, time of the last write, inode.
    """

    dtype: torch.dtype
    runs: Tensor | None
    flat: Tensor
    layouts: Sequence[Layout]
    signatures: Sequence[tuple[int, int, int]]

    def __init__(self, source: Sequence[Layout] | Tensor) -> None:
        self._files: list[mmap.mmap] = []
        if isinstance(source, Tensor):
            self.layouts, self.signatures, self.dtype = (), (), source.dtype
            self.flat, self.runs, self._length = source, None, len(source)
            return
        self.layouts, self.dtype = source, TOKEN_DTYPES[source[0].dtype]
        self._map()

    def _map(self) -> None:
        itemsize = self.dtype.itemsize
        bases = []
        for layout in self.layouts:
            self._files.append(_memory_map(layout))
            bases.append(torch.frombuffer(self._files[-1], dtype=torch.uint8).data_ptr())
        self.signatures = [_signature(layout.path) for layout in self.layouts]
        lengths = np.concatenate([layout.lengths for layout in self.layouts])
        self._length = int(lengths.sum())
        offset = int(self.layouts[0].offsets[0]) if len(lengths) == 1 else 0
        if len(lengths) == 1 and offset % itemsize == 0:
            self.runs = None
            self.flat = torch.frombuffer(
                self._files[0], dtype=self.dtype, count=self._length, offset=offset
            )
            return
        self.flat = torch.empty(0, dtype=self.dtype, device="cpu")
        runs = np.zeros((2, len(lengths) + 1), np.int64)
        np.cumsum(lengths, out=runs[0, 1:])
        addresses = [
            base + layout.offsets for base, layout in zip(bases, self.layouts, strict=True)
        ]
        runs[1, :-1] = np.concatenate(addresses)
        self.runs = torch.from_numpy(runs)

    def __len__(self) -> int:
        """T."""
        return self._length

    @property
    def nbytes(self) -> int:
        return self._length * self.dtype.itemsize

    def windows(self, starts: Tensor, seq_len: int, out: Tensor | None = None) -> Tensor:
        """Copies windows: ``[B, L]`` in the stream's dtype.

        Raises:
            IndexError: one reaches outside the stream.
        """
        return gather(self.flat, self.runs, starts, seq_len, out)

    def read(self, start: int, stop: int) -> Tensor:
        """``[stop - start]``: the ids from ``start`` to ``stop``; a view if all lie together."""
        if self.runs is None:
            return self.flat[start:stop]
        starts = torch.tensor([start], device="cpu")
        return self.windows(starts, stop - start)[0]

    def copy_to(self, out: Tensor) -> Tensor:
        """Copies all ids to ``out`` ``[T]``, on any device, and returns it."""
        if self.runs is None:
            return out.copy_(self.flat)
        for start in range(0, len(self), _COPY_CHUNK):
            stop = min(start + _COPY_CHUNK, len(self))
            out[start:stop].copy_(self.read(start, stop))
        return out

    def check_unchanged(self, layouts: slice = slice(None)) -> None:
        """Raises CorpusChangedError if a file is not what it was when it was opened: smaller,
        larger, written to, replaced or gone."""
        for layout, was in zip(self.layouts[layouts], self.signatures[layouts], strict=True):
            try:
                now = _signature(layout.path)
            except OSError as error:
                raise CorpusChangedError(
                    f"{layout.path} cannot be read any more ({error.strerror}): a corpus must stay "
                    "where it is while it is in use"
                ) from error
            if now == was:
                continue
            what = f"it has {now[0]} bytes now, and had {was[0]}"
            if now[0] == was[0]:
                what = "it was written to, or replaced"
            raise CorpusChangedError(
                f"{layout.path} changed while it was in use: {what}; write new data to a new file, "
                "and start again"
            )

    def release_memory(self) -> None:
        """Returns the pages of the maps that were read to the system, which keeps what it likes of
        them in its cache: they no longer count as memory of this process."""
        if hasattr(mmap, "MADV_DONTNEED"):
            for file in self._files:
                file.madvise(mmap.MADV_DONTNEED)

    def __getstate__(self) -> dict[str, Any]:
        # A tensor would be pickled with its whole storage, and torch cannot unpickle uint16.
        array = None if self.layouts else self.flat.numpy()
        return {"layouts": self.layouts, "array": array}

    def __setstate__(self, state: dict[str, Any]) -> None:
        array = state["array"]
        self.__init__(state["layouts"] if array is None else as_tensor(array))  # type: ignore[misc]

    def __deepcopy__(self, memo: dict[int, Any]) -> "Stream":
        return self


def as_tensor(array: np.ndarray) -> Tensor:
    """An array as a tensor that shares its memory, if it is aligned and contiguous."""
    with warnings.catch_warnings():
        # Read-only arrays, such as np.load(..., mmap_mode="r"), are fine: nothing here writes.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(np.require(array, requirements=("C", "ALIGNED")))


def _memory_map(layout: Layout) -> mmap.mmap:
    """The whole file. Copy-on-write: torch has no read-only tensors."""
    with open(layout.path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size != layout.size:
            raise CorpusChangedError(
                f"{layout.path} changed while it was opened: it has {size} bytes now, and had "
                f"{layout.size}"
            )
        if sys.platform != "linux":
            return mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY)
        # Linux refuses private writable mappings larger than RAM and swap, except with
        # MAP_NORESERVE (which Python names from 3.13 on).
        flags = mmap.MAP_PRIVATE | getattr(mmap, "MAP_NORESERVE", 0x4000)
        return mmap.mmap(file.fileno(), size, flags, mmap.PROT_READ | mmap.PROT_WRITE)


def _signature(path: str) -> tuple[int, int, int]:
    """Size, time of the last write, and inode."""
    status = os.stat(path)
    return status.st_size, status.st_mtime_ns, status.st_ino
