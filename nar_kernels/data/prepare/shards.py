"""Writes tokens into files of whole documents: :class:`ShardWriter`."""

import os
from contextlib import suppress
from pathlib import Path

import numpy as np

from nar_kernels.data.formats.manifest import Shard, sha256_of
from nar_kernels.data.prepare.encode import Encoded
from nar_kernels.files import errors_name

_ONES = np.ones(1 << 20, np.uint8)


class NpyWriter:
    """A 1-D ``.npy`` file, written piece by piece; until it is closed it has no header."""

    _HEADER_BYTES = 128

    def __init__(self, path: Path, dtype: str) -> None:
        self.path, self.length = path, 0
        self._dtype = np.dtype(dtype).newbyteorder("<")
        self._file = path.open("wb")
        self._file.write(bytes(self._HEADER_BYTES))

    def write(self, array: np.ndarray) -> None:
        assert array.dtype == self._dtype, "ids are never converted here"
        with errors_name(self.path):
            self._file.write(np.ascontiguousarray(array).data)
        self.length += len(array)

    def close(self) -> None:
        """Writes the header; the file is on disk when this returns."""
        text = (
            f"{{'descr': {self._dtype.str!r}, 'fortran_order': False, 'shape': ({self.length},), }}"
        )
        size = self._HEADER_BYTES - 10
        header = b"\x93NUMPY\x01\0" + size.to_bytes(2, "little") + text.ljust(size - 1).encode()
        with errors_name(self.path):
            self._file.seek(0)
            self._file.write(header + b"\n")
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()

    def discard(self) -> None:
        with suppress(OSError):  # what it cannot write is not wanted
            self._file.close()


class ShardWriter:
    """The files of one shard, in ``folder``.

    Attributes:
        num_tokens: written so far.
    """

    def __init__(self, folder: Path, number: int, dtype: str) -> None:
        self._mask_path = folder / f"loss-mask-{number:05d}.npy"
        self._mask_path.unlink(missing_ok=True)  # of a run that was stopped
        self._tokens = NpyWriter(folder / f"tokens-{number:05d}.npy", dtype)
        self._documents = NpyWriter(folder / f"documents-{number:05d}.npy", "int64")
        self._mask: NpyWriter | None = None
        self._min, self._max = np.iinfo(dtype).max, 0

    @property
    def num_tokens(self) -> int:
        return self._tokens.length

    @property
    def num_documents(self) -> int:
        return self._documents.length

    def add(self, encoded: Encoded) -> None:
        if encoded.loss_mask is not None and self._mask is None:
            self._mask = NpyWriter(self._mask_path, "uint8")
            write_ones(self._mask, self.num_tokens)
        self._documents.write(encoded.ends + self.num_tokens)
        self._tokens.write(encoded.ids)
        if len(encoded.ids):
            self._min = min(self._min, int(encoded.ids.min()))
            self._max = max(self._max, int(encoded.ids.max()))
        if encoded.loss_mask is not None:
            assert self._mask is not None
            self._mask.write(encoded.loss_mask)
        elif self._mask is not None:
            write_ones(self._mask, len(encoded.ids))

    def close(self) -> Shard:
        """The finished shard, whose files are on disk."""
        writers = [w for w in (self._tokens, self._documents, self._mask) if w is not None]
        for writer in writers:
            writer.close()
        return Shard(
            tokens=self._tokens.path.name,
            documents=self._documents.path.name,
            loss_mask=None if self._mask is None else self._mask.path.name,
            num_tokens=self.num_tokens,
            num_documents=self.num_documents,
            min_id=self._min,
            max_id=self._max,
            sha256={writer.path.name: sha256_of(writer.path) for writer in writers},
        )

    def discard(self) -> None:
        """Closes the files, unfinished."""
        for writer in (self._tokens, self._documents, self._mask):
            if writer is not None:
                writer.discard()


def write_ones(writer: NpyWriter, count: int) -> None:
    for start in range(0, count, len(_ONES)):
        writer.write(_ONES[: count - start])
