"""The folder of a run that is not finished, and what it has done: :class:`Staging`."""

import json
import os
import sys
from contextlib import suppress
from dataclasses import asdict
from itertools import takewhile
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from nar_kernels.data.formats.manifest import FORMAT, Manifest, Shard
from nar_kernels.data.formats.prepared import PROGRESS_FILE, is_begun
from nar_kernels.data.prepare.batches import START, Position
from nar_kernels.data.prepare.folders import (
    clear,
    make_way,
    partial_folder,
    remove_temporary_files,
    tidy,
)
from nar_kernels.files import errors_name, sync_folder

_VERSION = 1


class Done(NamedTuple):
    """What there is up to the end of some shards.

    Attributes:
        shards: the finished ones.
        at: the batch in which the last of them ends.
        num_documents: of that batch, in finished shards.
        counts: numbers to report, by name, up to that batch, including it.
    """

    shards: list[Shard]
    at: Position
    num_documents: int
    counts: dict[str, int]


class Staging:
    """``<out>.partial``: a record of the inputs and options of a run, and of its finished shards.

    Args:
        out: folder of the corpus to be, which may be there if :func:`check_out` lets it.
        record: inputs and options that decide what is in it. Those of a folder that is there must
            be the same: the run goes on after the last shard whose files are there.
        overwrite: whether to replace the folder of another run.

    Raises:
        FileExistsError: there is the folder of a run with another record, or of something else.
        OSError: another process writes there, or the folder cannot be written.
    """

    def __init__(self, out: Path, record: dict[str, Any], overwrite: bool) -> None:
        self.out, self.folder = out, partial_folder(out)
        self._progress = self.folder / PROGRESS_FILE
        self.folder.mkdir(parents=True, exist_ok=True)
        # A run that was stopped at once leaves an empty record.
        is_empty = not any(path != self._progress or _size(path) for path in self.folder.iterdir())
        if not is_empty and not is_begun(self.folder):
            raise FileExistsError(
                f"{self.folder} is not of a run of prepare: remove it, or name another folder"
            )
        self._file = self._progress.open("a+b")
        try:
            _lock(self._file, self.folder)
            self.done = self._read({"format": FORMAT, "version": _VERSION, **record}, overwrite)
        except BaseException:
            self.close()
            raise

    def _read(self, header: dict[str, Any], overwrite: bool) -> Done:
        """What was done before; empties the folder if that was another run."""
        remove_temporary_files(self.folder)
        self._file.seek(0)
        # The last line may be cut off.
        lines = self._file.read().split(b"\n")[:-1]
        before = _parsed(lines[0]) if lines else None
        if before != header:
            if before is not None and len(lines) > 1 and not overwrite:
                changed = [name for name in header if before.get(name) != header[name]]
                raise FileExistsError(
                    f"{self.folder} was begun with other {' and '.join(changed)}: give the same "
                    "ones to go on there, pass overwrite= to begin anew, or remove it"
                )
            clear(self.folder)
            self._file.truncate(0)
            self._append(header)
            return Done([], START, 0, {})
        entries = list(takewhile(self._is_whole, map(_parsed, lines[1:])))
        self._file.truncate(sum(len(line) + 1 for line in lines[: len(entries) + 1]))
        if not entries:
            return Done([], START, 0, {})
        shards = [Shard(**entry["shard"]) for entry in entries]
        last = entries[-1]
        return Done(shards, Position(*last["at"]), last["num_documents"], last["counts"])

    def _is_whole(self, entry: Any) -> bool:
        """Whether the files of a shard are there, as far as their sizes say."""
        if entry is None:
            return False
        paths = {self.folder / name: size for name, size in entry["sizes"].items()}
        return all(path.is_file() and _size(path) == paths[path] for path in paths)

    def _append(self, entry: dict[str, Any]) -> None:
        with errors_name(self._progress):
            self._file.write(json.dumps(entry).encode() + b"\n")
            self._file.flush()
            os.fsync(self._file.fileno())

    def add(self, shard: Shard, at: Position, num_documents: int, counts: dict[str, int]) -> None:
        """Records a shard, whose files are on disk, and where it ends: see :class:`Done`."""
        sync_folder(self.folder)  # or the files may have no names after a power cut
        self.done = Done([*self.done.shards, shard], at, num_documents, counts)
        self._append(
            {
                "shard": asdict(shard),
                "sizes": {name: _size(self.folder / name) for name in shard.files},
                "at": at,
                "num_documents": num_documents,
                "counts": counts,
            }
        )

    def finish(self, manifest: Manifest) -> None:
        """Writes the manifest, and gives the folder its name."""
        manifest.write(self.folder)
        self.close()
        make_way(self.out)
        self.folder.rename(self.out)
        with suppress(PermissionError):  # a folder in which others may not look
            sync_folder(self.out.parent)
        # Last: a run that was stopped before goes on by the record.
        tidy(self.out)

    def close(self) -> None:
        with suppress(OSError):  # what counts was written before
            self._file.close()

    def __enter__(self) -> "Staging":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _size(path: Path) -> int:
    return path.stat().st_size


def _parsed(line: bytes) -> Any:
    """None if it is damaged."""
    try:
        return json.loads(line)
    except ValueError:
        return None


if sys.platform == "win32":

    def _lock(file: BinaryIO, folder: Path) -> None:
        """Windows does not let two processes rename a folder with open files."""

else:
    import fcntl

    def _lock(file: BinaryIO, folder: Path) -> None:
        """Locks the file until it is closed, or the process ends."""
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BlockingIOError(
                f"{folder} is in use by another process: wait until it ends, or name another folder"
            ) from error
        except OSError:
            pass  # a file system without locks
