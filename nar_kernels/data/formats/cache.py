"""Ids that cannot be mapped where they are, decoded once into a folder of ``.npy`` files.

The folder is :func:`nar_kernels.cache.cache_folder`. An entry belongs to one state of one file: its
path, size, time of the last write, and the column. Nothing is ever removed from it; all of it may
be, while no process uses it.
"""

import hashlib
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import BinaryIO

import numpy as np

from nar_kernels.cache import cache_folder
from nar_kernels.data.formats.base import Layout
from nar_kernels.errors import CorpusChangedError
from nar_kernels.files import atomic_write

if sys.platform != "win32":
    import fcntl

# Ids of one batch, and how many of them precede the end of each row; None where a row is one id.
Decoded = tuple[np.ndarray, np.ndarray | None]

_HEADER_BYTES = 128


def cached_layout(
    format: str,
    path: Path,
    column: str,
    dtype: str,
    has_rows: bool,
    decode: Callable[[], Iterator[Decoded]],
) -> Layout:
    """The layout of ids of this dtype that ``decode`` gives, batch by batch. It is called unless
    they are in the cache; by one process, for which others wait.

    Raises:
        CorpusChangedError: the file changed meanwhile.
        OSError: the cache cannot be written.
    """
    state = _state(path)
    key = hashlib.sha256(os.fsencode(repr((str(path.absolute()), *state, column, dtype))))
    # Names of files have a limit in bytes.
    stem = f"{os.fsencode(path.stem)[:64].decode(errors='ignore')}-{key.hexdigest()[:24]}"
    with _cache_folder() as folder:
        ids = folder / f"{stem}.ids.npy"
        ends = folder / f"{stem}.ends.npy"
        if not _is_complete(ids, ends):
            with _one_process(folder / f"{stem}.lock"):
                if not _is_complete(ids, ends):
                    _write(ids, ends, dtype, decode())
                    if _state(path) != state:
                        ids.unlink()
                        raise CorpusChangedError(
                            f"{path} changed while it was decoded: open it again when it is written"
                        )
    size = ids.stat().st_size
    return Layout(
        format,
        str(path.absolute()),
        dtype,
        np.array([_HEADER_BYTES]),
        np.array([(size - _HEADER_BYTES) // np.dtype(dtype).itemsize]),
        size,
        partial(_read_ends, str(ends)) if has_rows else None,
        decoded=str(ids),
        beside=(str(ends),) if has_rows else (),
    )


def _state(path: Path) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_size, status.st_mtime_ns


def _is_complete(*paths: Path) -> bool:
    """Whether these files are as they were written: some may have been removed, or cut off."""
    try:
        arrays = [np.load(path, mmap_mode="r") for path in paths]
    except Exception:  # numpy lets TokenError and others through on a damaged header
        return False
    sizes = [_HEADER_BYTES + array.nbytes for array in arrays]
    return sizes == [path.stat().st_size for path in paths]


@contextmanager
def _cache_folder() -> Iterator[Path]:
    """Makes it; errors within, of writing to it, say what it is."""
    folder = cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield folder
    except OSError as error:
        if error.errno is None or not str(error.filename or "").startswith(str(folder)):
            raise
        raise OSError(
            error.errno,
            f"{os.strerror(error.errno)} in the cache of decoded corpora; the variable "
            "NAR_KERNELS_CACHE names another folder for it",
            error.filename,
        ) from error


@contextmanager
def _one_process(path: Path) -> Iterator[None]:
    """Waits for other processes in here. (On Windows, and file systems without locks, it does not:
    then each decodes for itself, and the last one wins, with equal content.)"""
    with path.open("ab") as file:
        if sys.platform != "win32":
            with suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_EX)  # until it is closed
        yield
    with suppress(OSError):  # Windows keeps it while others have it open
        path.unlink()


def _write(ids_path: Path, ends_path: Path, dtype: str, batches: Iterator[Decoded]) -> None:
    """The ids last, so that the ends of an entry with ids are those of the same file."""
    num_tokens = num_documents = 0
    with atomic_write(ids_path) as ids:
        with atomic_write(ends_path) as ends:
            ids.write(bytes(_HEADER_BYTES))
            ends.write(bytes(_HEADER_BYTES))
            for batch, batch_ends in batches:
                ids.write(np.ascontiguousarray(batch, dtype).data)
                if batch_ends is not None:
                    ends.write((batch_ends.astype(np.int64) + num_tokens).data)
                    num_documents += len(batch_ends)
                num_tokens += len(batch)
            _write_header(ends, "int64", num_documents)
        _write_header(ids, dtype, num_tokens)


def _write_header(file: BinaryIO, dtype: str, length: int) -> None:
    """As of a ``.npy`` file of version 1, where there is room for it."""
    entries = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": (length,)}
    text = repr(entries).encode()
    file.seek(0)
    file.write(b"\x93NUMPY\1\0" + (_HEADER_BYTES - 10).to_bytes(2, "little"))
    file.write(text.ljust(_HEADER_BYTES - 11) + b"\n")


def _read_ends(path: str) -> np.ndarray:
    return np.load(path, mmap_mode="r")
