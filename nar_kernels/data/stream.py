"""Memory-mapped runs of ids as one stream: :class:`TokenStream`.

Shapes: B windows, L ids of each, T ids in all, P runs.
"""

import itertools
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

Signature = tuple[int, int, int]  # size, time of the last write, inode
Signatures = dict[str, Signature]  # by the path


class MappedFile:
    """A file in memory, copy-on-write: nothing that is written there reaches the file.

    It is pickled by its path, and mapped again where it arrives: there, all its files must have the
    sizes and times of the last write that they had, so copies must keep these.

    Attributes:
        addresses, lengths: int64 ``[P]``, where each run of ids is in memory, and how many it has.
        signatures: size, time of the last write and inode, as it was opened, of the file, and of
            all others by their paths that must not change either, such as an index.
    """

    def __init__(self, layout: Layout, opened: Signatures | None = None) -> None:
        self.layout, self.lengths = layout, layout.lengths
        self.dtype = TOKEN_DTYPES[layout.dtype]
        self.map, signature = _memory_map(layout)
        self.signatures = {layout.mapped: signature}
        self.signatures |= {path: _signature(os.stat(path)) for path in layout.others}
        for path, was in (opened or {}).items():
            # Another machine may count the inodes of a shared file in another way.
            if self.signatures[path][:2] != was[:2]:
                what = _change(was, self.signatures[path])
                raise CorpusChangedError(
                    f"{path} changed since it was opened: {what}; open it again"
                )
        base = torch.frombuffer(self.map, dtype=torch.uint8).data_ptr()
        self.addresses = base + layout.offsets

    @property
    def name(self) -> str:
        return self.layout.path

    @property
    def signature(self) -> Signature:
        """Of the file as users know it."""
        return self.signatures[self.layout.path]

    def whole(self) -> Tensor | None:
        """``[T]``, if all ids are in one place that is aligned."""
        if len(self.lengths) != 1 or self.addresses[0] % self.dtype.itemsize:
            return None
        offset, count = int(self.layout.offsets[0]), int(self.lengths[0])
        return torch.frombuffer(self.map, dtype=self.dtype, count=count, offset=offset)

    def check_unchanged(self) -> None:
        """Raises CorpusChangedError if a file is not what it was when it was opened: smaller,
        larger, written to, replaced or gone."""
        for path, was in self.signatures.items():
            try:
                now = _signature(os.stat(path))
            except OSError as error:
                raise CorpusChangedError(
                    f"{path} cannot be read any more ({error.strerror}): a corpus must stay where "
                    "it is while it is in use"
                ) from error
            if now != was:
                raise CorpusChangedError(
                    f"{path} changed while it was in use: {_change(was, now)}; write new data to a "
                    "new file, and start again"
                )

    def release_memory(self) -> None:
        if hasattr(mmap, "MADV_DONTNEED"):
            self.map.madvise(mmap.MADV_DONTNEED)

    def __reduce__(self) -> tuple[Any, ...]:
        return MappedFile, (self.layout, self.signatures)


class ArrayInMemory:
    """A contiguous tensor of ids, in the place of a :class:`MappedFile`."""

    name = "array"

    def __init__(self, ids: Tensor) -> None:
        self._ids, self.dtype = ids, ids.dtype
        self.addresses, self.lengths = np.array([ids.data_ptr()]), np.array([len(ids)])

    def whole(self) -> Tensor:
        return self._ids

    def check_unchanged(self) -> None:
        pass

    def release_memory(self) -> None:
        pass

    def __reduce__(self) -> tuple[Any, ...]:
        # A tensor would be pickled with its whole storage, and torch cannot unpickle uint16.
        return _array_in_memory, (self._ids.numpy(),)


class Ones:
    """So many uint8 that are 1, all of them one block of memory."""

    name, dtype = "ones", torch.uint8

    def __init__(self, count: int) -> None:
        self._block = np.ones(min(count, _COPY_CHUNK), np.uint8)
        full, rest = divmod(count, len(self._block)) if count else (0, 0)
        self.lengths = np.array([len(self._block)] * full + [rest] * (rest > 0), np.int64)
        self.addresses = np.full_like(self.lengths, self._block.ctypes.data)

    def whole(self) -> Tensor | None:
        return torch.from_numpy(self._block) if len(self.lengths) == 1 else None

    def check_unchanged(self) -> None:
        pass

    def release_memory(self) -> None:
        pass

    def __reduce__(self) -> tuple[Any, ...]:
        return Ones, (int(self.lengths.sum()),)


def _array_in_memory(array: np.ndarray) -> ArrayInMemory:
    return ArrayInMemory(as_tensor(array))


Part = MappedFile | ArrayInMemory | Ones


class TokenStream:
    """Ids of any number of files and arrays as one flat stream.

    Attributes:
        parts: the files and arrays.
        dtype: of the ids.
        runs: int64 ``[2, P + 1]``: how many ids come before each run, and the address of the run in
            memory, which need not be aligned. The last column has T, and no address. None if all
            ids lie in one aligned run.
        flat: ``[T]``, that run; otherwise empty, of the same dtype.
    """

    def __init__(self, parts: Sequence[Part]) -> None:
        self.parts, self.dtype = tuple(parts), parts[0].dtype
        self._part_begins = np.cumsum([0, *(int(part.lengths.sum()) for part in parts)])
        whole = parts[0].whole() if len(parts) == 1 else None
        self.flat = torch.empty(0, dtype=self.dtype, device="cpu") if whole is None else whole
        self.runs = None if whole is not None else self._table()

    @classmethod
    def of_files(cls, layouts: Sequence[Layout]) -> "TokenStream":
        return cls([MappedFile(layout) for layout in layouts])

    @classmethod
    def of_array(cls, ids: Tensor) -> "TokenStream":
        """Of a contiguous tensor ``[T]``."""
        return cls([ArrayInMemory(ids)])

    @classmethod
    def of_ones(cls, count: int) -> "TokenStream":
        """A loss mask by which all of so many tokens count."""
        return cls([Ones(count)])

    @classmethod
    def joined(cls, streams: "Sequence[TokenStream]") -> "TokenStream":
        """One after the other, of one dtype, in the same memory."""
        return cls(list(itertools.chain.from_iterable(stream.parts for stream in streams)))

    def _table(self) -> Tensor:
        lengths = np.concatenate([part.lengths for part in self.parts])
        runs = np.zeros((2, len(lengths) + 1), np.int64)
        np.cumsum(lengths, out=runs[0, 1:])
        runs[1, :-1] = np.concatenate([part.addresses for part in self.parts])
        return torch.from_numpy(runs)

    def __len__(self) -> int:
        """T."""
        return int(self._part_begins[-1])

    @property
    def nbytes(self) -> int:
        return len(self) * self.dtype.itemsize

    @property
    def files(self) -> list[MappedFile] | None:
        """The files of all ids; None if some are in arrays, which may change unseen."""
        files = [part for part in self.parts if isinstance(part, MappedFile)]
        return files if len(files) == len(self.parts) else None

    @property
    def layouts(self) -> list[Layout]:
        """Of the files among the parts."""
        return [part.layout for part in self.parts if isinstance(part, MappedFile)]

    def check_unchanged(self) -> None:
        """Raises CorpusChangedError if a file is not what it was when it was opened."""
        for part in self.parts:
            part.check_unchanged()

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

    def place(self, offset: int) -> tuple[Part, int]:
        """The part that an id lies in, and its offset there."""
        number = int(np.searchsorted(self._part_begins, offset, "right")) - 1
        return self.parts[number], offset - int(self._part_begins[number])

    def where(self, offset: int, name: str) -> str:
        """What errors call an offset of this stream, which has this name: of several files, the
        one that it lies in."""
        if len(self.parts) > 1:
            part, offset = self.place(offset)
            name = part.name
        return f"offset {offset} of {name}"

    def release_memory(self) -> None:
        """Returns the pages of files that were read to the system, which keeps what it likes of
        them in its cache: they no longer count as memory of this process."""
        for part in self.parts:
            part.release_memory()

    def __reduce__(self) -> tuple[Any, ...]:
        return TokenStream, (self.parts,)

    def __deepcopy__(self, memo: dict[int, Any]) -> "TokenStream":
        return self


def as_tensor(array: np.ndarray) -> Tensor:
    """An array as a tensor that shares its memory, if it is aligned and contiguous."""
    with warnings.catch_warnings():
        # Read-only arrays, such as np.load(..., mmap_mode="r"), are fine: nothing here writes.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(np.require(array, requirements=("C", "ALIGNED")))


def _memory_map(layout: Layout) -> tuple[mmap.mmap, Signature]:
    """The whole file. Copy-on-write: torch has no read-only tensors."""
    with open(layout.mapped, "rb") as file:
        signature = _signature(os.fstat(file.fileno()))
        size = signature[0]
        if size != layout.size:
            raise CorpusChangedError(
                f"{layout.mapped} changed since it was opened: it has {size} bytes now, and had "
                f"{layout.size}; open it again"
            )
        if sys.platform != "linux":
            return mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY), signature
        # Linux refuses private writable mappings larger than RAM and swap, except with
        # MAP_NORESERVE (which Python names from 3.13 on).
        flags = mmap.MAP_PRIVATE | getattr(mmap, "MAP_NORESERVE", 0x4000)
        whole = mmap.mmap(file.fileno(), size, flags, mmap.PROT_READ | mmap.PROT_WRITE)
        return whole, signature


def _change(was: Signature, now: Signature) -> str:
    if now[0] == was[0]:
        return "it was written to, or replaced"
    return f"it has {now[0]} bytes now, and had {was[0]}"


def _signature(status: os.stat_result) -> Signature:
    return status.st_size, status.st_mtime_ns, status.st_ino
