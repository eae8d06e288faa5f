"""Which format a source has: files, folders, lists and globs of them, to layouts.

A new format is a module in this folder and a row in :data:`FILE_FORMATS` or :data:`FOLDER_FORMATS`.
"""

import glob
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from nar_kernels.data.formats.arrow import arrow_layout, dataset_layouts, is_arrow, is_dataset
from nar_kernels.data.formats.base import Layout, ReadOptions, malformed, parse_json, path_beside
from nar_kernels.data.formats.datatrove import datatrove_layout, is_datatrove
from nar_kernels.data.formats.litpkds import is_litpkds, litpkds_layout
from nar_kernels.data.formats.llmc import is_llmc, llmc_layout
from nar_kernels.data.formats.mds import is_mds, is_mds_folder, mds_layout, mds_layouts
from nar_kernels.data.formats.megatron import is_megatron, megatron_layout
from nar_kernels.data.formats.npy import is_npy, npy_layout
from nar_kernels.data.formats.parquet import is_parquet, parquet_layout
from nar_kernels.data.formats.prepared import is_prepared, prepared_layouts
from nar_kernels.data.formats.raw import has_sidecar, raw_layout
from nar_kernels.data.formats.unread import HEAD_BYTES, TAIL_BYTES, reject_unsupported_formats
from nar_kernels.errors import CorpusFormatError

PathSource = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]


class FileFormat(NamedTuple):
    """A format of one file, and those beside it. ``recognises`` sees the path, and the first and
    last bytes: by content where that can be, since some projects name raw files .npy, and .npy
    files .bin."""

    recognises: Callable[[Path, bytes], bool]
    read: Callable[[Path, ReadOptions], Layout]
    is_table: bool = False  # so that ``column`` means something


class FolderFormat(NamedTuple):
    """A format of a folder, which says itself what its files are. All are tables."""

    recognises: Callable[[Path], bool]
    read: Callable[[Path, ReadOptions], list[Layout]]


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
    FolderFormat(is_prepared, prepared_layouts),
    FolderFormat(is_mds_folder, mds_layouts),
    FolderFormat(is_dataset, dataset_layouts),
)

# A .json file that lists files, by so many bytes of it.
_LIST_HEAD = 1 << 16
_BEGINS_A_LIST = re.compile(rb'\s*\{.*"files"\s*:', re.DOTALL)

# Of files in a folder that says nothing of its own; others, such as indices, are left alone.
SUFFIXES = (".npy", ".bin", ".ds", ".mds", ".arrow", ".parquet")

# Of files that others read with their own, which a glob may match too.
_COMPANIONS = (".ds.index", ".ds.loss", ".ds.metadata")

_LIST = (
    'a .json file must be {"files": ["a.bin", "b.bin"], "dtype": "uint16"}, dtype for raw files '
    "only; to read it as text, pass dtype='uint8'"
)


def read_layouts(source: PathSource, options: ReadOptions) -> list[Layout]:
    """The files of a source, in order, at least one, all of one dtype.

    Args:
        source: a file; a folder; a glob, such as ``"shards/*.bin"``; a JSON file
            ``{"files": [...], "dtype": "uint16"}`` that lists such, relative to its own folder
            (dtype for raw files only); or a list of all that.

    Raises:
        CorpusFormatError: a file is malformed, or nothing that is read.
        FileNotFoundError: no such file.
    """
    if isinstance(source, str | os.PathLike):
        layouts = _of_path(os.fspath(source), options)
    else:
        layouts = [layout for part in source for layout in _of_path(os.fspath(part), options)]
        if not layouts:
            raise CorpusFormatError("the list of files is empty: a corpus has at least one")
    if not (layouts := [layout for layout in layouts if layout.num_tokens]):
        raise CorpusFormatError(f"{source} is empty: a corpus has at least one token")
    for layout in layouts[1:]:
        if layout.dtype != layouts[0].dtype:
            raise CorpusFormatError(
                f"{layout.path} holds {layout.dtype} and {layouts[0].path} {layouts[0].dtype}: the "
                "files of one corpus have one dtype; write them again, or mix two corpora"
            )
    return layouts


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
        return is_path or bool(glob.glob(name, recursive=True))
    except ValueError:  # no file can have such a name
        return False


def _of_path(name: str, options: ReadOptions) -> list[Layout]:
    path = Path(name)
    if path.is_dir():
        return _of_folder(path, options)
    if not path.exists():
        if (index := Path(name + ".idx")).is_file():  # as Megatron-LM names a corpus
            return [_of_file(index, options)]
        if paths := _matches(name):
            return [layout for path in paths for layout in _of_path(str(path), options)]
    if path.suffix == ".json" and options.dtype is None:
        return _of_list(path, options)
    return [_of_file(path, options)]


def _matches(pattern: str) -> list[Path]:
    """What a glob matches, in order, but what is read with something else that it matches."""
    found = set(map(Path, glob.glob(pattern, recursive=True)))
    folders = {folder for path in found for folder in path.parents}
    names = set(map(str, found))
    alone = (
        path
        for path in found - folders
        if not path.name.endswith(_COMPANIONS)
        and not (path.suffix == ".json" and str(path.with_suffix("")) in names)
        and not (path.suffix == ".idx" and str(path.with_suffix(".bin")) in names)
    )
    return sorted(alone, key=_natural)


def _of_folder(folder: Path, options: ReadOptions) -> list[Layout]:
    for format in FOLDER_FORMATS:
        if format.recognises(folder):
            return format.read(folder, options)
    files = [path for path in folder.iterdir() if path.suffix in SUFFIXES and path.is_file()]
    if not files:
        raise CorpusFormatError(
            f"{folder} is a folder without files that end in {', '.join(SUFFIXES)}: name the files"
        )
    return [_of_file(path, options) for path in sorted(files, key=_natural)]


def _of_list(path: Path, options: ReadOptions) -> list[Layout]:
    content = parse_json(path, path.read_bytes(), _LIST)
    names = content.get("files") if isinstance(content, dict) else None
    if not isinstance(names, list) or not names or not all(isinstance(n, str) for n in names):
        raise CorpusFormatError(f"{path} does not list files: {_LIST}")
    if nested := [name for name in names if name.endswith(".json")]:
        raise CorpusFormatError(f"{path} names another list, {nested[0]}: name its files instead")
    dtype = content.get("dtype")
    if not isinstance(dtype, str | None):
        raise malformed(path, "dtype", repr(dtype), "a name, such as 'uint16'")
    options = options._replace(dtype=dtype)
    paths = [path_beside(path, name, "a name in the list") for name in names]
    return [layout for path in paths for layout in _of_path(str(path), options)]


def _ends(path: Path) -> tuple[bytes, bytes]:
    """The first and the last bytes of a file."""
    with path.open("rb") as file:
        head = file.read(HEAD_BYTES)
        file.seek(max(os.fstat(file.fileno()).st_size - TAIL_BYTES, 0))
        return head, file.read()


def _of_file(path: Path, options: ReadOptions) -> Layout:
    head, tail = _ends(path)
    if not head:
        raise CorpusFormatError(f"{path} is empty: a corpus has at least one token")
    ends = head + tail
    for format in FILE_FORMATS:
        if format.recognises(path, ends):
            if options.column is not None and not format.is_table:
                _refuse_column(path, options)
            return format.read(path, options)
    reject_unsupported_formats(path, head, tail)
    if options.column is not None:
        _refuse_column(path, options)
    return raw_layout(path, options)


def _refuse_column(path: Path, options: ReadOptions) -> None:
    raise CorpusFormatError(
        f"column={options.column!r} was given, but {path} is not a table: leave it out"
    )


def _natural(path: Path) -> list[tuple[int, str]]:
    """A sort key by which shard-9 comes before shard-10."""
    parts = re.split(r"(\d+)", str(path))
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in parts]
