"""Lock file: only one process at a time writes into a run's folder."""

import json
import os
import socket
import sys
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any, BinaryIO

if sys.platform == "win32":
    import msvcrt

    def _lock(file: BinaryIO) -> bool:
        file.seek(1 << 30)  # locked bytes cannot be read: lock one beyond the content
        try:
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        except OSError as error:
            raise BlockingIOError from error
        return True

else:
    import fcntl

    def _lock(file: BinaryIO) -> bool:
        """Locks the file until it is closed or the process ends, even by a crash. False if the file
        system has no locks. Raises BlockingIOError if another process holds the lock."""
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise
        except OSError:
            return False
        return True


class FolderInUseError(OSError):
    """Another process is writing into the folder, or may be."""


class FolderLock:
    """Exclusive lock on ``folder``, as a context manager or by :meth:`acquire` and :meth:`release`.

    The OS releases it when the process ends, even by a crash. The file ``run.lock`` names the
    holder. On file systems without locks only this file counts: two processes that start at the
    same moment may both get the lock.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / "run.lock"
        self._file: BinaryIO | None = None

    def acquire(self) -> None:
        """Creates the folder if needed, and locks it; no-op if this lock is already held.

        Raises:
            FolderInUseError: another process holds it, or one on another host did not release it.
                The message names the process.
            OSError: the folder is not writable.
        """
        self._path.parent.mkdir(parents=True, exist_ok=True)
        while self._file is None:
            file = self._path.open("a+b")
            try:
                self._claim(file)
                is_current = self._path.exists() and os.path.samestat(
                    os.fstat(file.fileno()), self._path.stat()
                )
            except BaseException:
                file.close()
                raise
            if is_current:
                self._file = file
            else:  # its former holder removed the file since it was opened
                file.close()

    def _claim(self, file: BinaryIO) -> None:
        folder, here = self._path.parent, socket.gethostname()
        try:
            is_locked, is_held = _lock(file), False
        except BlockingIOError:
            is_locked, is_held = False, True
        holder = _read(file)
        who = "another process"
        if holder is not None:
            who = f"process {holder['pid']} on {holder['host']}, since {holder['since']}"
            if not is_locked and not is_held:
                is_held = holder["host"] == here and _is_running(holder)
        if is_held:
            raise FolderInUseError(
                f"{folder} is in use by {who}: wait until it ends or stop it, or name another "
                "folder with --out"
            )
        if holder is not None and holder["host"] != here:
            raise FolderInUseError(
                f"{folder} may be in use by {who}: whether it still runs cannot be seen from "
                f"{here}; if it does not, remove {self._path} and try again"
            )
        file.truncate(0)
        file.write(json.dumps(_this_process()).encode())
        file.flush()

    def release(self) -> None:
        """Releases the lock; no-op if it is not held."""
        if self._file is None:
            return
        self._file.truncate(0)
        with suppress(PermissionError):  # Windows cannot remove an open file
            self._path.unlink(missing_ok=True)
        self._file.close()
        self._file = None

    def __enter__(self) -> "FolderLock":
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def _read(file: BinaryIO) -> dict[str, Any] | None:
    """The holder as written in the file, or None if it is empty or incomplete."""
    file.seek(0)
    try:
        holder = json.loads(file.read())
        return {name: holder[name] for name in ("pid", "host", "since", "start")}
    except (ValueError, TypeError, KeyError):  # empty, or still being written
        return None


def _this_process() -> dict[str, Any]:
    return {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "since": datetime.now().astimezone().isoformat(sep=" ", timespec="seconds"),
        "start": _start(os.getpid()),
    }


def _start(pid: int) -> str | None:
    """Start time of the process (Linux only), which tells it from a later one with the same pid."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return None
    return status.rpartition(")")[2].split()[19]  # after the name, which may hold anything


def _is_running(holder: dict[str, Any]) -> bool:
    try:
        os.kill(holder["pid"], 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # it runs, under another user
    return holder["start"] in (None, _start(holder["pid"]))
