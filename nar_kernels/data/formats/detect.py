"""Which format a file or a folder has.

A new format is a module in this folder and a row in :data:`FILE_FORMATS` or :data:`FOLDER_FORMATS`.
"""

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from nar_kernels.data.formats.arrow import arrow_layout, dataset_layouts, is_arrow, is_dataset
from nar_kernels.data.formats.base import Layout, ReadOptions, check_column_is_not_given
from nar_kernels.data.formats.datatrove import datatrove_layout, is_datatrove
from nar_kernels.data.formats.litpkds import is_litpkds, litpkds_layout
from nar_kernels.data.formats.llmc import is_llmc, llmc_layout
from nar_kernels.data.formats.mds import is_mds, is_mds_folder, mds_layout, mds_layouts
from nar_kernels.data.formats.megatron import is_megatron, megatron_layout
from nar_kernels.data.formats.names import raw_matches
from nar_kernels.data.formats.npy import is_npy, npy_layout
from nar_kernels.data.formats.parquet import is_parquet, parquet_layout
from nar_kernels.data.formats.prepared import is_prepared, prepared_layouts
from nar_kernels.data.formats.raw import has_sidecar, raw_layout
from nar_kernels.data.formats.unread import HEAD_BYTES, TAIL_BYTES, reject_unsupported_formats
from nar_kernels.errors import CorpusFormatError


class FileFormat(NamedTuple):
    """A format of one file, and those beside it. ``recognises`` sees the path, and the first and
    last bytes: by content where that can be, since some projects name raw files .npy, and .npy
    files .bin."""

    recognises: Callable[[Path, bytes], bool]
    read: Callable[[Path, ReadOptions], Layout]
    is_table: bool = False  # so that ``column`` means something


class FolderFormat(NamedTuple):
    """A format of a folder, which says itself what its files are."""

    recognises: Callable[[Path], bool]
    read: Callable[[Path, ReadOptions], list[Layout]]
    is_table: bool = True  # so that ``column`` means something, and a file says all on its own


# The first that recognises a file reads it. What none does is raw, unless it looks like something
# that is not read.
FILE_FORMATS: tuple[FileFormat, ...] = (
    FileFormat(is_npy, npy_layout),
    FileFormat(is_megatron, megatron_layout),
    FileFormat(is_llmc, llmc_layout),
    FileFormat(is_litpkds, litpkds_layout),
    FileFormat(is_arrow, arrow_layout, is_table=True),
    FileFormat(is_parquet, parquet_layout, is_table=True),
    FileFormat(is_mds, mds_layout, is_table=True),
    FileFormat(is_datatrove, datatrove_layout),
)
FOLDER_FORMATS: tuple[FolderFormat, ...] = (
    FolderFormat(is_prepared, prepared_layouts, is_table=False),
    FolderFormat(is_mds_folder, mds_layouts),
    FolderFormat(is_dataset, dataset_layouts),
)

# A .json file that lists files, by so many bytes of it.
_LIST_HEAD = 1 << 16
_BEGINS_A_LIST = re.compile(rb'\s*\{.*"files"\s*:', re.DOTALL)

# Of files in a folder that says nothing of its own; others, such as indices, are left alone.
SUFFIXES = (".npy", ".bin", ".ds", ".mds", ".arrow", ".parquet")


def holds_ids(path: str | os.PathLike[str]) -> bool:
    """Whether a file says that it holds token ids, or is of a format that is known but not read,
    by its content or a file beside it. False of raw ids without a sidecar, and of text."""
    path = Path(path)
    if not path.is_file():
        return False
    if has_sidecar(path):
        return True
    head, tail = _ends(path)
    if path.suffix == ".json":
        with path.open("rb") as file:
            return bool(_BEGINS_A_LIST.match(file.read(_LIST_HEAD)))
    if any(format.recognises(path, head + tail) for format in FILE_FORMATS):
        return True
    try:
        reject_unsupported_formats(path, head, tail)
    except CorpusFormatError:
        return True
    return False


def exists(name: str) -> bool:
    """Whether a name of a source names anything: a file, a folder, the common prefix of the files
    of a Megatron-LM corpus, or a glob that matches something."""
    try:
        is_path = os.path.lexists(name) or os.path.isfile(name + ".idx")
        return is_path or bool(raw_matches(name))
    except ValueError:  # no file can have such a name
        return False


def folder_format(folder: Path) -> FolderFormat | None:
    """None of a folder that does not say what its files are."""
    return next((format for format in FOLDER_FORMATS if format.recognises(folder)), None)


def _ends(path: Path) -> tuple[bytes, bytes]:
    """The first and the last bytes of a file."""
    with path.open("rb") as file:
        head = file.read(HEAD_BYTES)
        file.seek(max(os.fstat(file.fileno()).st_size - TAIL_BYTES, 0))
        return head, file.read()


def read_file(path: Path, options: ReadOptions) -> Layout:
    """Raises CorpusFormatError if the file is malformed, or nothing that is read."""
    head, tail = _ends(path)
    ends = head + tail
    for format in FILE_FORMATS:
        if format.recognises(path, ends):
            if not format.is_table:
                check_column_is_not_given(path, options)
            return format.read(path, options)
    if not head:
        raise CorpusFormatError(f"{path} is empty: a corpus has at least one token")
    reject_unsupported_formats(path, head, tail)
    check_column_is_not_given(path, options)
    return raw_layout(path, options)
