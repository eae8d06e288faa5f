"""The files of a run: :func:`find_inputs`."""

import hashlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from itertools import accumulate
from pathlib import PurePosixPath
from typing import Any, BinaryIO, Literal

from nar_kernels.data.prepare.walk import files_below
from nar_kernels.extras import import_extra

Kind = Literal["text", "lines", "parquet", "images"]
Names = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]

_KINDS: dict[str, Kind] = {
    ".jsonl": "lines",
    ".ndjson": "lines",
    ".json": "lines",
    ".parquet": "parquet",
    ".npy": "images",
}
_COMPRESSED = (".gz", ".zst", ".bz2", ".xz", ".lz4")
_ARCHIVES = (".tar", ".tgz", ".zip", ".7z", ".rar")
_STAMPS = ("ETag", "etag", "mtime", "LastModified", "last_modified", "updated", "created")
# Of text to its compressed size, roughly.
_RATIO = 3


@dataclass(frozen=True)
class Input:
    """A file.

    Attributes:
        name: for messages.
        kind: by its suffix; what is nothing else is text.
        size: bytes, as stored.
        stamp: changes when the file is written to.
        compression: as fsspec names it, or None.
    """

    name: str
    kind: Kind
    size: int
    stamp: str
    compression: str | None
    _filesystem: Any
    _path: str

    @property
    def text_bytes(self) -> int:
        """Of its text, roughly."""
        return self.size * (_RATIO if self.compression or self.kind == "parquet" else 1)

    @contextmanager
    def open(self) -> Iterator[tuple[BinaryIO, BinaryIO]]:
        """The decompressed content, and the file as stored, whose position says how far it is."""
        file = import_extra("fsspec", "prepare").core.OpenFile(
            self._filesystem, self._path, "rb", compression=self.compression
        )
        with file as content:
            yield content, file.fobjects[0]


def find_inputs(names: Names, exclude: Sequence[str] = ()) -> list[Input]:
    """The files that names stand for, in the order of the names.

    Args:
        names: files, folders (all files below them, sorted by path, but hidden ones), globs
            (sorted, without hidden files); local, where links are followed, or URLs of fsspec; or a
            list of all that.
        exclude: folders of this machine, which are left out of other folders and of globs.

    Raises:
        FileNotFoundError: no such file, a folder or glob without any, or a link to nothing.
        OSError: a folder cannot be read.
        ValueError: an archive, or nothing is named.
        ImportError: a package that reads it is not installed.
    """
    if isinstance(names, str | os.PathLike):
        names = [names]
    inputs = [file for name in names for file in _find(os.fspath(name), exclude)]
    if not inputs:
        raise ValueError("there is no input: name files, folders, globs or URLs")
    kinds = {file.kind for file in inputs}
    if "images" in kinds and len(kinds) > 1:
        other = next(file for file in inputs if file.kind != "images")
        raise ValueError(
            f"{other.name} is among .npy files: a corpus is image codes or text, not both"
        )
    return inputs


def digest(inputs: Sequence[Input]) -> str:
    """Changes when one of the inputs does."""
    stamps = [[input.name, input.size, input.stamp] for input in inputs]
    return hashlib.sha256(json.dumps(stamps).encode()).hexdigest()


def bytes_before(inputs: Sequence[Input]) -> list[int]:
    """As stored, of all inputs before each; the last number is that of all."""
    return [0, *accumulate(input.size for input in inputs)]


def _find(name: str, exclude: Sequence[str]) -> list[Input]:
    if name == "":
        raise ValueError("the name of an input is empty: leave it out, or say what it is")
    filesystem, path = import_extra("fsspec", "prepare").core.url_to_fs(name)
    is_local = "file" in _protocols(filesystem)
    if filesystem.exists(path) and not filesystem.isdir(path):
        details = {path: filesystem.info(path)}
    elif is_local:
        details = {p: filesystem.info(p) for p in _local_files(filesystem, path, exclude)}
    else:
        details = _remote_files(filesystem, path)
    details = {p: d for p, d in details.items() if d["type"] == "file"}
    if not details:
        raise FileNotFoundError(f"there is no file {name}: an input is a file, folder, glob or URL")
    return [
        _input(p if is_local else filesystem.unstrip_protocol(p), p, details[p], filesystem)
        for p in sorted(details)
    ]


def _local_files(filesystem: Any, path: str, exclude: Sequence[str]) -> Iterator[str]:
    """Not by fsspec, which leaves out links, and folders that cannot be read, in silence."""
    if filesystem.isdir(path):
        yield from files_below(path, without=exclude)
        return
    root = _root_of_glob(path)
    if root is not None and filesystem.isdir(root + "/"):
        depth = None if "**" in path else path.count("/", len(root))
        pattern = re.compile(import_extra("fsspec.utils", "prepare").glob_translate(path))
        yield from filter(pattern.match, files_below(root + "/", without=exclude, depth=depth))


def _remote_files(filesystem: Any, path: str) -> dict[str, dict[str, Any]]:
    """With their details."""
    root: str | None = path.rstrip("/")
    if filesystem.isdir(path):
        found = filesystem.find(path, detail=True)
    else:
        root = _root_of_glob(path)
        found = {} if root is None else filesystem.glob(path, detail=True)
    return {p: d for p, d in found.items() if not (root and _is_hidden(p.removeprefix(root)))}


def _root_of_glob(path: str) -> str | None:
    """The folder that a glob begins with; None if it is none."""
    magic = re.search(r"[*?[]", path)
    return None if magic is None else path[: magic.start()].rpartition("/")[0]


def _protocols(filesystem: Any) -> Sequence[str]:
    protocol = filesystem.protocol
    return [protocol] if isinstance(protocol, str) else protocol


def _is_hidden(relative: str) -> bool:
    return any(part.startswith(".") for part in relative.split("/"))


def _input(name: str, path: str, details: dict[str, Any], filesystem: Any) -> Input:
    suffixes = [suffix.lower() for suffix in PurePosixPath(path).suffixes]
    last = suffixes[-1] if suffixes else ""
    if last in _ARCHIVES or suffixes[-2:-1] == [".tar"]:
        raise ValueError(f"{name} is an archive: unpack it, and name the folder")
    compression = None
    if last in _COMPRESSED:
        fsspec = import_extra("fsspec", "prepare")
        compression = fsspec.utils.infer_compression(path.lower())
        if compression is None or not _reads_all(compression):
            package = {".zst": "backports.zstd", ".lz4": "lz4"}.get(last)
            how = f"run `pip install {package}`" if package else "use a Python with that module"
            raise ImportError(f"{name} is compressed, and nothing here reads {last}: {how}")
        last = suffixes[-2] if len(suffixes) > 1 else ""
    kind = _KINDS.get(last, "text")
    if compression is not None and kind in ("parquet", "images"):
        raise ValueError(f"{name} is compressed as a whole: decompress it first")
    stamp = next((_text(details[key]) for key in _STAMPS if details.get(key) is not None), "")
    return Input(name, kind, details.get("size") or 0, stamp, compression, filesystem, path)


def _reads_all(compression: str) -> bool:
    """False for fsspec's reader by the package zstandard: it stops after the first of several
    frames, and at a cut, without an error."""
    reader = import_extra("fsspec", "prepare").compression.compr[compression]
    return compression != "zstd" or reader.__name__ == "ZstdFile"


def _text(stamp: Any) -> str:
    return str(stamp.timestamp() if isinstance(stamp, datetime) else stamp)
