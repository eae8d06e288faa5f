"""Apache Arrow: IPC files (Feather, version 2) and streams, and folders as ``datasets`` saves them.

A column of lists of integers is a corpus; each row is a document. The values of a record batch lie
together in the file, and are one run. What is not so, such as compressed buffers, goes through the
cache. Needs pyarrow.
"""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
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
    parse_json,
    path_beside,
)
from nar_kernels.data.formats.cache import Decoded, cached_layout
from nar_kernels.data.formats.tables import choose_column
from nar_kernels.errors import CorpusFormatError
from nar_kernels.extras import import_extra
from nar_kernels.ops.tokens import TOKEN_DTYPES

_FILE_MAGIC = b"ARROW1\0\0"
_CONTINUATION = b"\xff\xff\xff\xff"  # a message of a stream follows
_END = _CONTINUATION + b"\0\0\0\0"

# As the C++ library, and so datasets, begins a stream: length and root of the first message.
_STREAM = re.compile(rb"\xff{4}.{2}[\0-\x0f]\0\x10\0{5}\n\0", re.DOTALL)

_REMEDY = "save the dataset again"


class _Values(NamedTuple):
    """Ids of one batch."""

    array: Any  # pyarrow.Array
    ends: np.ndarray | None  # int64, as of Decoded


def is_arrow(path: Path, ends: bytes) -> bool:
    is_stream = ends.startswith(_CONTINUATION) and path.suffix in (".arrow", ".arrows")
    return ends.startswith(_FILE_MAGIC) or is_stream or bool(_STREAM.match(ends))


def arrow_layout(path: Path, options: ReadOptions) -> Layout:
    check_dtype_is_not_given(path, options, "an Arrow file, which says the types of its columns")
    pa = import_extra("pyarrow", "arrow")
    with arrow_errors(path), pa.memory_map(os.fsencode(path)) as file:
        with _open(file) as reader:
            column, dtype, has_rows = column_of_ids(path, reader.schema, options)
        base, size = _buffer(file).address, file.size()
        offsets, lengths = [], []
        for values in _batches(path, file, column, alone=False):
            data = values.array.buffers()[1]
            if not len(values.array):
                continue
            offset = data.address - base
            if not 0 <= offset < size:
                decode = partial(_decode, path, column)
                return cached_layout("arrow", path, column, dtype, has_rows, decode)
            offsets.append(offset + values.array.offset * np.dtype(dtype).itemsize)
            lengths.append(len(values.array))
    return Layout(
        "arrow",
        str(path.absolute()),
        dtype,
        np.array(offsets, np.int64),
        np.array(lengths, np.int64),
        size,
        partial(_document_ends, str(path.absolute()), column) if has_rows else None,
    )


def is_dataset(folder: Path) -> bool:
    """Whether ``save_to_disk`` of ``datasets`` made it."""
    return is_described(folder, "state.json", "_data_files", "*.arrow") or _is_dict(folder)


def _is_dict(folder: Path) -> bool:
    return is_described(folder, "dataset_dict.json", "splits", "*/state.json")


def dataset_layouts(folder: Path, options: ReadOptions) -> list[Layout]:
    if _is_dict(folder):
        splits = folder / "dataset_dict.json"
        names = parse_json(splits, splits.read_bytes(), _REMEDY)["splits"]
        raise CorpusFormatError(
            f"{folder} is a DatasetDict with the splits {names}: name the folder of one of them"
        )
    state_file = folder / "state.json"
    state = parse_json(state_file, state_file.read_bytes(), _REMEDY)
    files = state["_data_files"]
    if not isinstance(files, list) or not all(isinstance(file, dict) for file in files):
        raise malformed(state_file, "_data_files", repr(files), "a list of files")
    if state.get("_indices_data_files") or state.get("_indices_files"):
        raise CorpusFormatError(
            f"{folder} selects rows of its files by indices: save it again, with a newer datasets"
        )
    paths = [path_beside(state_file, file.get("filename"), "_data_files") for file in files]
    return [arrow_layout(path, options) for path in paths]


def column_of_ids(path: Path, schema: Any, options: ReadOptions) -> tuple[str, str, bool]:
    """Of an Arrow schema: the name of the column with the ids, their dtype, and whether it holds
    lists, so that its rows are documents."""
    pa = import_extra("pyarrow", "arrow")
    names = schema.names
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise CorpusFormatError(f"{path} has several columns {twice[0]!r}: rename all but one")
    kinds = {
        name: schema.field(i).type.value_type
        for i, name in enumerate(names)
        if _is_list(pa, schema.field(i).type)
    }
    lists = {name for name, kind in kinds.items() if str(kind) in TOKEN_DTYPES}
    numbers = {name for i, name in enumerate(names) if str(schema.field(i).type) in TOKEN_DTYPES}
    columns = {name: str(schema.field(i).type) for i, name in enumerate(names)}
    name = choose_column(path, columns, lists, options.column, numbers)
    return name, str(kinds.get(name, columns[name])), name in kinds


def values_of(path: Path, column: Any) -> _Values:
    """The ids of a column of one record batch."""
    pa = import_extra("pyarrow", "arrow")
    column.validate(full=True)
    ends = None
    values = column
    if column.null_count:
        raise malformed(path, "a row of its ids", "null", "a list of ids")
    if _is_list(pa, column.type):
        if pa.types.is_fixed_size_list(column.type):
            width = column.type.list_size
            offsets = np.arange(column.offset, column.offset + len(column) + 1) * width
        else:
            # Of no rows there may be no offsets.
            offsets = column.offsets.to_numpy() if len(column) else np.zeros(1)
            offsets = offsets.astype(np.int64)
        values = column.values.slice(offsets[0], offsets[-1] - offsets[0])
        ends = offsets[1:] - offsets[0]
    if values.null_count:
        raise malformed(path, "one of its ids", "null", "an integer")
    return _Values(values, ends)


@contextmanager
def arrow_errors(path: Path) -> Iterator[None]:
    """Errors of pyarrow as those of a malformed file."""
    pa = import_extra("pyarrow", "arrow")
    try:
        yield
    # Some exceptions of its C++ code come as those of Python.
    except (pa.ArrowException, OSError, RuntimeError, MemoryError, UnicodeError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise CorpusFormatError(
            f"{path} is damaged, not all there, or of a kind that pyarrow cannot read ({error}): "
            "write it again"
        ) from error


def _is_list(pa: Any, kind: Any) -> bool:
    of = pa.types
    return of.is_list(kind) or of.is_large_list(kind) or of.is_fixed_size_list(kind)


def _buffer(file: Any) -> Any:
    """All of a file."""
    file.seek(0)
    return file.read_buffer()


def _open(file: Any, column: int | None = None) -> Any:
    """A reader of an IPC file or stream; of one column, by its index."""
    ipc = import_extra("pyarrow", "arrow").ipc
    options = ipc.IpcReadOptions(included_fields=[] if column is None else [column])
    file.seek(0)
    is_file = file.read(len(_FILE_MAGIC)) == _FILE_MAGIC
    file.seek(0)
    return (ipc.open_file if is_file else ipc.open_stream)(file, options=options)


def _batches(path: Path, file: Any, column: str, alone: bool = True) -> Iterator[_Values]:
    """``alone``: other columns are not decompressed; but that of an IPC file is copied."""
    with _open(file) as reader:
        index = reader.schema.names.index(column)
    with _open(file, index if alone else None) as reader:
        is_file = hasattr(reader, "num_record_batches")
        for batch in _of_file(reader) if is_file else _of_stream(reader, path, file):
            yield values_of(path, batch.column(0 if alone else index))


def _of_file(reader: Any) -> Iterator[Any]:
    return map(reader.get_batch, range(reader.num_record_batches))


def _of_stream(reader: Any, path: Path, file: Any) -> Iterator[Any]:
    """The batches of a stream, which must be all of the file."""
    yield from reader
    end, size = file.tell(), file.size()
    file.seek(max(end - len(_END), 0))
    if file.read(len(_END)) != _END:
        raise malformed(path, "the end of its stream", "missing", "marked by its writer")
    if end != size:
        raise malformed(path, "size", f"{size} bytes", f"{end}, where its stream ends")


def _decode(path: Path, column: str) -> Iterator[Decoded]:
    pa = import_extra("pyarrow", "arrow")
    with arrow_errors(path), pa.memory_map(os.fsencode(path)) as file:
        for values in _batches(path, file, column):
            yield values.array.to_numpy(), values.ends


def _document_ends(path: str, column: str) -> np.ndarray:
    pa = import_extra("pyarrow", "arrow")
    before, parts = 0, []
    with arrow_errors(Path(path)), pa.memory_map(os.fsencode(path)) as file:
        for values in _batches(Path(path), file, column, alone=False):
            if values.ends is not None:
                parts.append(values.ends + before)
            before += len(values.array)
    return np.concatenate(parts)
