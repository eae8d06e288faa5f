"""MosaicML Streaming, MDS version 2: folders of an ``index.json`` and uncompressed shards.

A shard, little-endian and unaligned: u32 n, the number of samples; u32 ``[n + 1]`` the byte where
each begins, and the size of the file; the columns, in JSON; and the samples. A sample is the u32
sizes of its columns that vary in size, then their bytes. Each sample is a document, and a run of
its own unless it touches the next.
"""

import mmap
import os
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from nar_kernels.data.formats.base import (
    Layout,
    ReadOptions,
    check_dtype_is_not_given,
    is_described,
    malformed,
    merge_runs,
    parse_json,
    path_beside,
)
from nar_kernels.data.formats.raw import stated_dtype
from nar_kernels.data.formats.tables import choose_column
from nar_kernels.errors import CorpusFormatError
from nar_kernels.ops.tokens import TOKEN_DTYPES

# Dtypes of arrays that say theirs in each sample. Codes of those that are no ids are left out.
_DTYPES = {
    8: "uint8",
    9: "int8",
    16: "uint16",
    17: "int16",
    32: "uint32",
    33: "int32",
    65: "int64",
}
_COLUMNS = ("column_names", "column_encodings", "column_sizes")
_REMEDY = "write it again with MDSWriter"


class _Shard(NamedTuple):
    """Maps of a file, and what its header says."""

    path: Path
    content: np.ndarray  # uint8
    begins: np.ndarray  # int64 [n + 1], of samples
    columns: dict[str, Any]


def is_mds(path: Path, ends: bytes) -> bool:
    """By its name, since a shard begins with a number."""
    return path.suffix == ".mds"


def is_mds_folder(folder: Path) -> bool:
    return is_described(folder, "index.json", "shards", "*.mds")


def mds_layouts(folder: Path, options: ReadOptions) -> list[Layout]:
    index_file = folder / "index.json"
    index = parse_json(index_file, index_file.read_bytes(), _REMEDY)
    if index.get("version") != 2:
        raise malformed(index_file, "version", repr(index.get("version")), 2)
    shards = index["shards"]
    if not isinstance(shards, list) or not all(isinstance(shard, dict) for shard in shards):
        raise malformed(index_file, "shards", repr(shards)[:100], "a list of shards")
    return [_layout_of(index_file, i, shard, options) for i, shard in enumerate(shards)]


def _layout_of(index: Path, i: int, entry: dict[str, Any], options: ReadOptions) -> Layout:
    """The layout of a shard, as it must be by its entry in the index."""
    for field, expected in (("format", "mds"), ("version", 2)):
        if entry.get(field) != expected:
            raise malformed(index, f"{field} of shard {i}", repr(entry.get(field)), expected)
    raw_data = entry.get("raw_data")
    if not isinstance(raw_data, dict):
        raise malformed(index, f"raw_data of shard {i}", repr(raw_data), "a file")
    path = path_beside(index, raw_data.get("basename"), f"basename of shard {i}")
    if entry.get("zip_data") and not path.exists():
        raise CorpusFormatError(
            f"{path} is there only compressed, by {entry.get('compression')}: decompress its files "
            "to the names without the last suffix, or write the dataset without compression"
        )
    shard = _read_shard(path)
    facts = {"samples": len(shard.begins) - 1, **{key: shard.columns[key] for key in _COLUMNS}}
    for field, found in facts.items():
        if entry.get(field) != found:
            expected = f"{found!r}, as in {path}"
            raise malformed(index, f"{field} of shard {i}", repr(entry.get(field)), expected)
    if raw_data.get("bytes") != len(shard.content):
        expected = f"{raw_data.get('bytes')!r} by {index}"
        raise malformed(path, "size", f"{len(shard.content)} bytes", expected)
    return _layout(shard, options)


def mds_layout(path: Path, options: ReadOptions) -> Layout:
    return _layout(_read_shard(path), options)


def _layout(shard: _Shard, options: ReadOptions) -> Layout:
    path = shard.path
    names, kinds, _ = shard.columns.values()
    encodings = dict(zip(names, kinds, strict=True))
    usable = [name for name, encoding in encodings.items() if _may_hold_ids(encoding)]
    column = choose_column(path, encodings, usable, options.column)
    raw_dtype = None
    if encodings[column] == "bytes":
        raw_dtype = stated_dtype(path, options)
        if raw_dtype is None:
            raise CorpusFormatError(
                f"column {column!r} of {path} holds bytes, and nothing says of what dtype: pass "
                "dtype=, that of the arrays whose tobytes() was written, such as 'int64' or "
                "'uint16'"
            )
    else:
        what = f"an MDS shard, whose column {column!r} is {encodings[column]}"
        check_dtype_is_not_given(path, options, what)
    dtype, offsets, lengths = _samples(shard, column, raw_dtype)
    offsets, lengths = merge_runs(offsets, lengths, np.dtype(dtype).itemsize)
    ends = partial(_document_ends, str(path.absolute()), column, raw_dtype)
    return Layout("mds", str(path.absolute()), dtype, offsets, lengths, len(shard.content), ends)


def _document_ends(path: str, column: str, raw_dtype: str | None) -> np.ndarray:
    _, _, lengths = _samples(_read_shard(Path(path)), column, raw_dtype)
    return np.cumsum(lengths)


def _may_hold_ids(encoding: str) -> bool:
    """Whether it is ``bytes``, ``ndarray``, ``ndarray:<dtype>`` or ``ndarray:<dtype>:<shape>``."""
    kind, dtype, *shape = encoding.split(":") + ["any"] * (":" not in encoding)
    is_array = kind == "ndarray" and dtype in (*TOKEN_DTYPES, "any") and len(shape) < 2
    return encoding == "bytes" or is_array


def _read_shard(path: Path) -> _Shard:
    size = os.stat(path).st_size
    if size < 8:
        raise malformed(path, "size", f"{size} bytes", "at least 8, its header")
    content = np.memmap(path, np.uint8, "r")
    if hasattr(mmap, "MADV_RANDOM"):
        # A few bytes of each sample are read, and nothing around them.
        content._mmap.madvise(mmap.MADV_RANDOM)  # type: ignore[attr-defined]
    num_samples = int(content[:4].view("<u4")[0])
    head = 8 + 4 * num_samples
    if head > size:
        raise malformed(path, "number of samples", num_samples, f"less, in {size} bytes")
    begins = content[4:head].view("<u4").astype(np.int64)
    if begins[0] < head or begins[-1] != size or (begins[1:] < begins[:-1]).any():
        found = f"from {begins[0]} to {begins[-1]}"
        expected = f"ascending from {head} or later to its size, {size}"
        raise malformed(path, "list of offsets of samples", found, expected)
    config = parse_json(path, content[head : begins[0]].tobytes(), _REMEDY)
    return _Shard(path, content, begins, _columns(path, config))


def _columns(path: Path, config: Any) -> dict[str, Any]:
    config = config if isinstance(config, dict) else {}
    for field, expected in (("format", "mds"), ("version", 2)):
        if config.get(field) != expected:
            raise malformed(path, field, repr(config.get(field)), expected)
    columns = {key: config.get(key) for key in _COLUMNS}
    for key, kind in zip(_COLUMNS, (str, str, int | None), strict=True):
        values = columns[key]
        if not isinstance(values, list) or not all(isinstance(value, kind) for value in values):
            raise malformed(path, key, repr(values), "a list, of one for each column")
    names, encodings, sizes = columns.values()
    if len(set(names)) != len(names) or not len(names) == len(encodings) == len(sizes):
        raise malformed(
            path, "list of columns", repr(columns), "of one name, encoding and size each"
        )
    if not all(0 <= (size or 0) < 1 << 32 for size in sizes):
        raise malformed(path, "column_sizes", repr(sizes), "numbers of 32 bits, and null")
    return columns


def _samples(
    shard: _Shard, column: str, raw_dtype: str | None
) -> tuple[str, np.ndarray, np.ndarray]:
    """Dtype of the ids; int64 ``[n]``, the byte where those of each sample begin, and how many."""
    names, encodings, sizes = (shard.columns[key] for key in _COLUMNS)
    index = names.index(column)
    kind, dtype, shape = (encodings[index].split(":") + ["", ""])[:3]
    if shape and not (shape.isascii() and shape.isdecimal() and 0 < int(shape[:10]) < 1 << 32):
        raise malformed(shard.path, f"shape of {column!r}", shape, "one number: of ids in a row")
    fixed_size = int(shape) * np.dtype(dtype).itemsize if shape else 0
    if (sizes[index] or 0) != fixed_size:
        raise malformed(
            shard.path, f"size of column {column!r}", sizes[index], fixed_size or "null"
        )
    offsets, nbytes = _cells(shard, sizes, index)
    if kind == "bytes":
        assert raw_dtype is not None
        dtype = raw_dtype
    elif not shape:
        if not dtype:
            dtype, offsets, nbytes = _skip_dtype(shard, offsets, nbytes)
        offsets, nbytes = _skip_shape(shard, offsets, nbytes, np.dtype(dtype).itemsize)
    itemsize = np.dtype(dtype).itemsize
    if (nbytes % itemsize).any():
        i = int((nbytes % itemsize).argmax())
        raise malformed(shard.path, f"size of sample {i}", f"{nbytes[i]} bytes", f"ids of {dtype}")
    return dtype, offsets, nbytes // itemsize


def _cells(shard: _Shard, sizes: list[int | None], column: int) -> tuple[np.ndarray, np.ndarray]:
    """Where each sample has a column, and how many bytes."""
    num_varying = sum(not size for size in sizes)
    begins, total = shard.begins[:-1], np.diff(shard.begins)
    _check_room(shard, total, 4 * num_varying)
    heads = _gather(shard.content, begins, 4 * num_varying).view("<u4").astype(np.int64)
    varying = iter(heads.T)
    widths = [np.full(len(begins), size) if size else next(varying) for size in sizes]
    needed = np.asarray(sum(widths)) + 4 * num_varying
    if (needed != total).any():
        i = int((needed != total).argmax())
        raise malformed(shard.path, f"size of sample {i}", f"{total[i]} bytes", needed[i])
    return begins + 4 * num_varying + sum(widths[:column]), widths[column]


def _skip_dtype(
    shard: _Shard, offsets: np.ndarray, nbytes: np.ndarray
) -> tuple[str, np.ndarray, np.ndarray]:
    """The dtype in the first byte of all arrays, and what follows it."""
    _check_room(shard, nbytes, 1)
    codes = np.unique(shard.content[offsets])
    if len(codes) != 1 or int(codes[0]) not in _DTYPES:
        known = ", ".join(f"{code} ({name})" for code, name in _DTYPES.items())
        found = ", ".join(map(str, codes)) or "missing"
        raise malformed(shard.path, "code of the dtype", found, f"in all samples one of {known}")
    return _DTYPES[int(codes[0])], offsets + 1, nbytes - 1


def _skip_shape(
    shard: _Shard, offsets: np.ndarray, nbytes: np.ndarray, itemsize: int
) -> tuple[np.ndarray, np.ndarray]:
    """What follows the shape of all arrays, which must have one axis. Its first byte is four times
    the number of axes, plus the binary logarithm of the bytes of each."""
    _check_room(shard, nbytes, 1)
    kinds = shard.content[offsets].astype(np.int64)
    if (kinds >> 2 != 1).any():
        i = int((kinds >> 2 != 1).argmax())
        raise malformed(shard.path, f"number of axes of sample {i}", kinds[i] >> 2, 1)
    widths = 1 << (kinds & 3)
    _check_room(shard, nbytes, 1 + widths)
    lengths = np.zeros(len(offsets), np.uint64)
    for width in np.unique(widths):
        of_width = widths == width
        cells = _gather(shard.content, offsets[of_width] + 1, int(width))
        lengths[of_width] = cells.view(f"<u{width}")[:, 0]
    offsets, nbytes = offsets + 1 + widths, nbytes - 1 - widths
    wrong = (lengths != (nbytes // itemsize).astype(np.uint64)) | (nbytes % itemsize != 0)
    if wrong.any():
        i = int(wrong.argmax())
        expected = f"what {nbytes[i]} bytes hold, with {itemsize} each"
        raise malformed(shard.path, f"shape of sample {i}", f"({lengths[i]},)", expected)
    return offsets, nbytes


def _check_room(shard: _Shard, nbytes: np.ndarray, needed: np.ndarray | int) -> None:
    short = nbytes < needed
    if short.any():
        i = int(short.argmax())
        raise malformed(shard.path, f"sample {i}", f"{nbytes[i]} bytes in a column", "longer")


def _gather(content: np.ndarray, offsets: np.ndarray, width: int) -> np.ndarray:
    """uint8 ``[n, width]``: this many bytes from each offset."""
    return np.ascontiguousarray(content[offsets[:, None] + np.arange(width)])
