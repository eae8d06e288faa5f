"""The files of a source: a file, a folder, a list or a glob of them, to layouts."""

import errno
import glob
import os
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from nar_kernels.data.formats.base import (
    Layout,
    ReadOptions,
    check_column_is_not_given,
    is_file_name,
    malformed,
    parse_json,
    path_beside,
)
from nar_kernels.data.formats.detect import SUFFIXES, FolderFormat, folder_format, read_file
from nar_kernels.data.formats.names import (
    is_cache,
    is_pattern,
    matches,
    natural,
    without_companions,
)
from nar_kernels.data.formats.raw import dtype_name
from nar_kernels.errors import CorpusFormatError

PathSource = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]

_LIST = (
    'a .json file must be {"files": ["a.bin", "b.bin"], "dtype": "uint16"}, dtype for raw files '
    "only; to read it as text, pass dtype='uint8'"
)


class _Named(NamedTuple):
    """A file, or a folder that says itself what its files are, in a format."""

    path: Path
    options: ReadOptions
    by: str  # the name of the source, or the list, that names it
    format: FolderFormat | None = None


def read_layouts(source: PathSource, options: ReadOptions) -> list[Layout]:
    """The files of a source, in order, at least one, all of one dtype.

    Args:
        source: a file; a folder; a glob, such as ``"shards/*.bin"``; a JSON file
            ``{"files": [...], "dtype": "uint16"}`` that lists such, relative to its own folder
            (dtype for raw files only); or a list of all that.

    Raises:
        CorpusFormatError: a file is malformed, or nothing that is read; or two names of a list
            name the same file.
        FileNotFoundError: no such file.
    """
    names = [source] if isinstance(source, str | os.PathLike) else source
    if not names:
        raise CorpusFormatError("the list of files is empty: a corpus has at least one")
    found = [
        named
        for name in without_companions([os.fspath(name) for name in names])
        for named in _of_name(name, name, options)
    ]
    layouts, read_by = [], dict[str, str]()
    for named in found:
        path, options, _, format = named
        for layout in format.read(path, options) if format else [read_file(path, options)]:
            by = read_by.setdefault(layout.path, named.by)
            if by != named.by:
                raise CorpusFormatError(
                    f"{layout.path} is named twice, by {by} and by {named.by}: leave one out, or "
                    "repeat the same name to read it twice"
                )
            layouts.append(layout)
    if not (layouts := [layout for layout in layouts if layout.num_tokens]):
        raise CorpusFormatError(f"{source} is empty: a corpus has at least one token")
    for layout in layouts[1:]:
        if layout.dtype != layouts[0].dtype:
            raise CorpusFormatError(
                f"{layout.path} holds {layout.dtype} and {layouts[0].path} {layouts[0].dtype}: the "
                "files of one corpus have one dtype; write them again, or mix two corpora"
            )
    return layouts


def _of_name(
    name: str, pattern: str, options: ReadOptions, listed_in: Path | None = None
) -> list[_Named]:
    """What a name of the source or of a list names; ``pattern`` is the same as a glob."""
    if not name or not is_file_name(name):
        raise CorpusFormatError(f"no file can be called {name!r}: name a file, a folder or a glob")
    by, in_list = str(listed_in or Path(name)), listed_in is not None
    if os.path.lexists(name):
        return _of_path(Path(name), options, by, in_list)
    if os.path.isfile(index := name + ".idx"):  # as Megatron-LM names a corpus
        return _of_path(Path(index), options, by, in_list)
    # A list is no part of itself.
    if not is_pattern(name) or not (paths := [p for p in matches(pattern) if p != listed_in]):
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), name)
    _check_folders_are_not_taken_apart(name, paths)
    return [named for path in paths for named in _of_path(path, options, by, in_list)]


def _of_path(path: Path, options: ReadOptions, by: str, in_list: bool) -> list[_Named]:
    """What something that is there names."""
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError as error:
        if not path.is_symlink():
            raise
        where = f"it is a link to {os.readlink(path)}, which is not there"
        raise FileNotFoundError(errno.ENOENT, where, str(path)) from error
    if stat.S_ISDIR(mode):
        return _of_folder(path, options, by)
    if not stat.S_ISREG(mode):
        raise CorpusFormatError(
            f"{path} is no file, but a pipe or a device: a corpus is mapped into memory; write it "
            "to a file first"
        )
    if path.suffix != ".json" or _is_uint8(path, options):
        return [_Named(path, options, by)]
    if in_list:
        raise CorpusFormatError(f"{by} names another list, {path}: name its files instead")
    return _of_list(path, options)


def _is_uint8(path: Path, options: ReadOptions) -> bool:
    given = options.dtype
    return given is not None and dtype_name(given, f"{path} was given dtype=") == "uint8"


def _check_folders_are_not_taken_apart(pattern: str, paths: list[Path]) -> None:
    """Raises CorpusFormatError if some are files of a folder that says what its files are, and
    would not be the same without it."""
    for folder in dict.fromkeys(path.parent for path in paths):
        if (format := folder_format(folder)) and any(
            path.parent == folder and path.is_file()
            for path in paths
            if not (format.is_table and path.suffix in SUFFIXES)
        ):
            raise CorpusFormatError(
                f"{pattern} matches files of {folder}, a folder that says itself what its files "
                "are: name the folder"
            )


def _of_folder(folder: Path, options: ReadOptions, by: str) -> list[_Named]:
    if format := folder_format(folder):
        if not format.is_table:
            check_column_is_not_given(folder, options)
        return [_Named(folder, options, by, format)]
    files = [
        path
        for path in folder.iterdir()
        if path.suffix in SUFFIXES
        and not path.name.startswith(".")
        and not is_cache(path.name)
        and not path.is_dir()
    ]
    if not files:
        raise CorpusFormatError(
            f"{folder} is a folder without files that end in {', '.join(SUFFIXES)}: name the files"
        )
    return [
        named
        for path in sorted(files, key=natural)
        for named in _of_path(path, options, by, in_list=False)
    ]


def _of_list(path: Path, options: ReadOptions) -> list[_Named]:
    content = parse_json(path, path.read_bytes(), _LIST)
    names = content.get("files") if isinstance(content, dict) else None
    if not isinstance(names, list) or not names or not all(isinstance(n, str) for n in names):
        raise CorpusFormatError(f"{path} does not list files: {_LIST}")
    if unknown := sorted(content.keys() - {"files", "dtype"}):
        raise CorpusFormatError(f"{path} has the unknown key {unknown[0]!r}: {_LIST}")
    dtype = content.get("dtype")
    if not isinstance(dtype, str | None):
        raise malformed(path, "dtype", repr(dtype), "a name, such as 'uint16'")
    if dtype is not None:
        if options.dtype is not None:
            given = dtype_name(options.dtype, f"{path} was given dtype=")
            if given != dtype_name(dtype, f"{path} says "):
                raise CorpusFormatError(
                    f"dtype= says {given} but {path} says {dtype}: leave out dtype=, or correct "
                    "the list"
                )
        options = options._replace(dtype=dtype)
    folder = glob.escape(str(path.parent))
    return [
        named
        for name in names
        for named in _of_name(
            str(path_beside(path, name, "a name in the list")),
            os.path.join(folder, name),
            options,
            listed_in=path,
        )
    ]
