"""The folder of a run that is not finished, and what it has done: :class:`Staging`."""

import json
import os
import shutil
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from nar_kernels.data.formats.prepared import PROGRESS_FILE, is_prepared
from nar_kernels.data.manifest import Manifest, Shard
from nar_kernels.data.prepare.batches import START, Position

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
        out: folder of the corpus to be.
        record: inputs and options that decide what is in it. Those of a folder that is there must
            be the same: the run goes on.
        overwrite: whether to replace ``out``, and the folder of another run.

    Raises:
        FileExistsError: ``out`` exists, or the folder of a run with another record.
        OSError: another process writes there, or the folder cannot be written.
    """

    def __init__(self, out: Path, record: dict[str, Any], overwrite: bool) -> None:
        self.out, self.folder = out, partial_folder(out)
        self._overwrite = overwrite
        self._check_out()
        progress = self.folder / PROGRESS_FILE
        if self.folder.exists() and not progress.exists() and any(self.folder.iterdir()):
            raise FileExistsError(
                f"{self.folder} is not of a run of prepare: remove it, or name another folder"
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        self._file = progress.open("a+b")
        try:
            _lock(self._file, self.folder)
            self.done = self._read(record)
        except BaseException:
            self._file.close()
            raise

    def _check_out(self) -> None:
        if not self.out.exists():
            return
        if not self._overwrite:
            raise FileExistsError(
                f"{self.out} exists: name another folder, or pass overwrite= to replace it"
            )
        is_empty = self.out.is_dir() and not any(self.out.iterdir())
        if not self.out.is_dir() or not (is_empty or is_prepared(self.out)):
            raise FileExistsError(
                f"{self.out} is no prepared corpus, and not overwritten: name another folder"
            )

    def _read(self, record: dict[str, Any]) -> Done:
        """What was done before; empties the folder if that was another run."""
        self._file.seek(0)
        # The last line may be cut off.
        lines = self._file.read().split(b"\n")[:-1]
        entries = [json.loads(line) for line in lines]
        header = {"version": _VERSION, **record}
        if entries and entries[0] != header:
            if not self._overwrite and len(entries) > 1:
                changed = [name for name in header if entries[0].get(name) != header[name]]
                raise FileExistsError(
                    f"{self.folder} was begun with other {' and '.join(changed)}: give the same "
                    "ones to go on there, pass overwrite= to begin anew, or remove it"
                )
            entries = []
        self._file.truncate(sum(len(line) + 1 for line in lines) if entries else 0)
        done = Done([Shard(**entry["shard"]) for entry in entries[1:]], START, 0, {})
        if entries[1:]:
            last = entries[-1]
            at = Position(*last["at"])
            done = done._replace(at=at, num_documents=last["num_documents"], counts=last["counts"])
        if not entries:
            self._remove_all()
            self._append(header)
        return done

    def _remove_all(self) -> None:
        for path in self.folder.iterdir():
            if path.name != PROGRESS_FILE:
                path.unlink()

    def _append(self, entry: dict[str, Any]) -> None:
        self._file.write(json.dumps(entry).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def add(self, shard: Shard, at: Position, num_documents: int, counts: dict[str, int]) -> None:
        """Records a shard, whose files are on disk, and where it ends: see :class:`Done`."""
        self.done = Done([*self.done.shards, shard], at, num_documents, counts)
        self._append(
            {
                "shard": asdict(shard),
                "at": at,
                "num_documents": num_documents,
                "counts": counts,
            }
        )

    def finish(self, manifest: Manifest) -> None:
        """Writes the manifest, and gives the folder its name."""
        manifest.write(self.folder)
        self.close()
        old = self.folder.with_name(self.folder.name + ".old")
        if self.out.exists():
            if is_prepared(old):  # of a run that was stopped here
                shutil.rmtree(old)
            self.out.rename(old)
        self.folder.rename(self.out)
        if is_prepared(old):
            shutil.rmtree(old)
        # Last: a run that was stopped before goes on by it.
        (self.out / PROGRESS_FILE).unlink()

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> "Staging":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def partial_folder(out: Path) -> Path:
    return out.with_name(out.name + ".partial")


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
