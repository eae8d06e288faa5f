"""Atomic writes, and OSErrors that name the file."""

import errno
import glob
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """Opens a temporary file that replaces ``path`` on success, so that ``path`` is complete at any
    time, old or new, even after a power cut.

    Anything but a regular file, such as a pipe, is written in place.

    Raises:
        OSError: the disk is full, or the folder is not writable. It names ``path``, which is
            unchanged.
    """
    target = Path(os.path.realpath(path))  # so that a symlink is kept
    in_place = target.exists() and not target.is_file()
    # In the same folder: a rename is atomic within one file system only. Unique to this writer.
    temporary = target.with_name(f"{target.name}.{uuid.uuid4().hex[:12]}.tmp")
    try:
        with target.open("wb") if in_place else temporary.open("xb") as file:
            yield file
            file.flush()
            if not in_place:
                os.fsync(file.fileno())
        if in_place:
            return
        os.replace(temporary, target)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename in (None, str(temporary)):
            raise with_filename(error, path) from error
        raise
    sync_folder(target.parent)


def sync_folder(path: Path) -> None:
    """New files and renames in a folder are durable only once it is synced."""
    if os.name == "posix":
        folder = os.open(path, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


@contextmanager
def errors_name(path: Path) -> Iterator[None]:
    """OSErrors of what is read from and written to an open file name it."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            raise with_filename(error, path) from error
        raise


def with_filename(error: OSError, path: Path | str) -> OSError:
    """``error`` with ``path`` as its filename, which errors from writes lack."""
    if error.errno is None:  # raised by a library
        return OSError(errno.EIO, str(error), str(path))
    return OSError(error.errno, os.strerror(error.errno), str(path))


def remove_temporary_files(path: Path) -> None:
    """Removes temporary files of killed writers of ``path``. No process may be writing it."""
    for temporary in path.parent.glob(f"{glob.escape(path.name)}.*tmp"):
        temporary.unlink()


def check_writable(path: Path) -> None:
    """Raises OSError if it is clear up front that ``path`` cannot be written."""
    folder = path.parent
    if path.is_dir():
        raise IsADirectoryError(f"cannot write {path}: it is a folder; name a file in it")
    if not folder.is_dir():
        raise FileNotFoundError(f"cannot write {path}: there is no folder {folder}; make it first")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(f"cannot write {path}: the folder {folder} is not writable")
