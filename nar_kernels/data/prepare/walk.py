"""Files of this machine below a folder: :func:`files_below`."""

import os
from collections.abc import Iterator, Sequence

_Identity = tuple[int, int]


def files_below(
    folder: str, *, without: Sequence[str] = (), depth: int | None = None
) -> Iterator[str]:
    """Paths of the files below a folder, but hidden ones. Links are followed, unless to a folder
    that they are in.

    Args:
        without: folders that are left out.
        depth: how many names a path may add to that of the folder; None: any number.

    Raises:
        OSError: a folder cannot be read, or a link leads nowhere.
    """
    passed = {_identity(path) for path in without if os.path.isdir(path)}
    yield from _below(folder, passed, depth)


def _below(folder: str, passed: set[_Identity], depth: int | None) -> Iterator[str]:
    if depth == 0 or _identity(folder) in passed:
        return
    passed = passed | {_identity(folder)}
    with os.scandir(folder) as listing:
        entries = [entry for entry in listing if not entry.name.startswith(".")]
    for entry in entries:
        path = f"{folder.rstrip('/')}/{entry.name}"
        if entry.is_dir():
            yield from _below(path, passed, None if depth is None else depth - 1)
        elif entry.is_file():
            yield path
        elif entry.is_symlink() and not os.path.exists(path):
            raise FileNotFoundError(
                f"{path} is a link to {os.readlink(path)}, which is not there: remove or mend it"
            )


def _identity(folder: str) -> _Identity:
    """The same by whatever path."""
    status = os.stat(folder)
    return status.st_dev, status.st_ino
