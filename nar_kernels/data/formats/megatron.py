"""Megatron-LM corpora: the ids in ``.bin``, and an index beside them in ``.idx``.

The index, little-endian and unaligned: 9 bytes of magic number; u64 version, 1; u8 code of the
dtype; u64 S, the number of sequences; u64 D, that of documents plus one; i32 ``[S]`` lengths in
tokens; i64 ``[S]`` the byte of ``.bin`` where each begins; i64 ``[D]`` the first sequence of each
document, then S; and i8 ``[S]`` modes if the corpus is multimodal.
"""

import os
import struct
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from nar_kernels.data.formats.base import (
    Layout,
    ReadOptions,
    check_dtype_is_not_given,
    dtype_of_code,
    malformed,
    merge_runs,
)
from nar_kernels.errors import CorpusFormatError

_MAGIC = b"MMIDIDX\0\0"
_HEADER = struct.Struct("<9sQBQQ")
_FLOATS = {6: "float64", 7: "float32"}

_CHUNK = 1 << 20  # sequences


class _Index(NamedTuple):
    """Arrays are maps of the file."""

    path: Path
    dtype: str
    lengths: np.ndarray
    pointers: np.ndarray
    documents: np.ndarray


def is_megatron(path: Path, ends: bytes) -> bool:
    """Whether the file is an index, or has one beside it."""
    if ends.startswith(_MAGIC[:7]):
        return True
    index = path.with_suffix(".idx")
    if path.suffix != ".bin" or not index.is_file():
        return False
    with index.open("rb") as file:
        return file.read(7) == _MAGIC[:7]


def megatron_layout(path: Path, options: ReadOptions) -> Layout:
    if path.suffix not in (".bin", ".idx"):
        raise CorpusFormatError(
            f"{path} is the index of a Megatron-LM corpus: its name must end in .idx, and the ids "
            "lie beside it in a file of the same name that ends in .bin"
        )
    index, ids = _read_index(path.with_suffix(".idx")), path.with_suffix(".bin")
    what = f"part of a Megatron-LM corpus, whose index says {index.dtype}"
    check_dtype_is_not_given(path, options, what)
    size = os.stat(ids).st_size
    offsets, lengths = _runs(index, ids, size)
    # Where all lie together, ends of documents are where the next ones begin.
    origin = int(offsets[0]) if len(offsets) == 1 else None
    ends = partial(_document_ends, str(index.path.absolute()), origin)
    return Layout(
        "megatron",
        str(ids.absolute()),
        index.dtype,
        offsets,
        lengths,
        size,
        ends,
        beside=(str(index.path.absolute()),),
    )


def _read_index(path: Path) -> _Index:
    with path.open("rb") as file:
        head, size = file.read(_HEADER.size), os.fstat(file.fileno()).st_size
    if len(head) < _HEADER.size:
        raise malformed(path, "size", f"{size} bytes", f"at least {_HEADER.size}, its header")
    magic, version, code, num_sequences, num_documents = _HEADER.unpack(head)
    if magic != _MAGIC:
        raise malformed(path, "magic number", magic, _MAGIC)
    if version != 1:
        raise malformed(path, "version", version, 1)
    dtype = dtype_of_code(path, code, _FLOATS)
    if num_documents < 1:
        raise malformed(path, "number of document boundaries", 0, "at least 1")
    expected = _HEADER.size + 12 * num_sequences + 8 * num_documents
    if size not in (expected, expected + num_sequences):
        raise malformed(
            path,
            "size",
            f"{size} bytes",
            f"{expected} ({expected + num_sequences} if multimodal), with {num_sequences} sequences"
            f" and {num_documents} document boundaries",
        )
    offset, arrays = _HEADER.size, []
    for kind, count in (("<i4", num_sequences), ("<i8", num_sequences), ("<i8", num_documents)):
        array = np.memmap(path, kind, "r", offset, (count,)) if count else np.empty(0, kind)
        offset += array.nbytes
        arrays.append(array)
    index = _Index(path, dtype, *arrays)
    for place, boundary in ((0, 0), (-1, num_sequences)):
        if index.documents[place] != boundary:
            which = "last" if place else "first"
            found = index.documents[place]
            raise malformed(path, f"{which} document boundary", found, f"sequence {boundary}")
    return index


def _runs(index: _Index, ids: Path, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Where sequences lie, neighbours made one."""
    itemsize, none = np.dtype(index.dtype).itemsize, np.empty(0, np.int64)
    parts = [(none, none)]
    for start in range(0, len(index.lengths), _CHUNK):
        pointers = index.pointers[start : start + _CHUNK].astype(np.int64)
        lengths = index.lengths[start : start + _CHUNK].astype(np.int64)
        outside = (pointers < 0) | (pointers > size) | (lengths < 0)
        outside |= lengths * itemsize > size - pointers
        if outside.any():
            i = int(outside.argmax())
            raise malformed(
                index.path,
                f"sequence {start + i}",
                f"{lengths[i]} tokens from byte {pointers[i]}",
                f"within the {size} bytes of {ids}",
            )
        parts.append(merge_runs(pointers, lengths, itemsize))
    offsets, lengths = map(np.concatenate, zip(*parts, strict=True))
    end = int((offsets + lengths * itemsize).max(initial=0))
    if end != size:
        raise malformed(ids, "size", f"{size} bytes", f"{end}, where the last of {index.path} ends")
    return merge_runs(offsets, lengths, itemsize)


def _document_ends(path: str, origin: int | None) -> np.ndarray:
    """``origin``: the byte where the only run begins; None if there are several."""
    index = _read_index(Path(path))
    documents = index.documents.astype(np.int64)
    if (documents[1:] < documents[:-1]).any():
        raise malformed(path, "list of document boundaries", "not sorted", "ascending")
    if origin is None:
        before = np.zeros(len(index.lengths) + 1, np.int64)
        np.cumsum(index.lengths, out=before[1:])
        return before[documents[1:]]
    last = len(index.lengths) - 1
    ends = index.pointers[np.minimum(documents[1:], last)] - origin
    ends //= np.dtype(index.dtype).itemsize
    ends[documents[1:] > last] += index.lengths[last]
    return ends
