"""Files that are never half written, and errors that name theirs."""

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
    """A file to write, which takes the place of ``path`` at the end. So ``path`` is whole at any
    moment, even in a power cut: old or new.

    What is no regular file, such as a pipe, is written to as it is.

    Raises:
        OSError: the disk is full, or the folder is not writable. It names ``path``, which is then
            as it was.
    """
    target = Path(os.path.realpath(path))  # so that a link stays one
    in_place = target.exists() and not target.is_file()
    # In the same folder, because a rename is atomic within one file system only. Its name is no
    # other writer's.
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
    if os.name == "posix":
        # The rename itself is on the disk only when the folder is.
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def with_filename(error: OSError, path: Path) -> OSError:
    """``error`` with the name of its file, which it lacks if it came from writing."""
    if error.errno is None:  # a library's own
        return OSError(errno.EIO, str(error), str(path))
    return OSError(error.errno, os.strerror(error.errno), str(path))


def remove_temporary_files(path: Path) -> None:
    """Removes what died before it took the place of ``path``. Nobody else may be writing it."""
    for temporary in path.parent.glob(f"{glob.escape(path.name)}.*tmp"):
        temporary.unlink()


def check_writable(path: Path) -> None:
    """Raises OSError if it is plain to see that no file can be written at ``path``."""
    folder = path.parent
    if path.is_dir():
        raise IsADirectoryError(f"cannot write {path}: it is a folder; name a file in it")
    if not folder.is_dir():
        raise FileNotFoundError(f"cannot write {path}: there is no folder {folder}; make it first")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(f"cannot write {path}: the folder {folder} is not writable")
