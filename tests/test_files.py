"""Files that are whole at any moment, and folders that one process at a time writes into."""

import errno
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from nar_kernels import files
from nar_kernels.data.sequence_spec import SequenceSpec
from nar_kernels.show import pictures, samples
from nar_kernels.training import checkpoint, lock
from nar_kernels.training.lock import FolderInUseError, FolderLock
from tests.helpers.paths import ROOT

resource = pytest.importorskip("resource")

IMAGE = SequenceSpec(3, 64, "image", (8, 8))


# Files


@contextmanager
def no_file_longer_than(size: int) -> Iterator[None]:
    """What a write beyond that is answered with goes the way of a full disk's answer."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def state(size: int) -> dict[str, object]:
    return {"config": {}, "model": {"a": torch.ones(size), "b": torch.ones(size)}}


IDS = torch.randint(0, 2, (500, 64), generator=torch.Generator().manual_seed(0))
WRITERS: dict[str, Callable[[Path], None]] = {
    "last.pt": lambda path: checkpoint.save(path, state(200)),  # torch passes the error on
    "best.pt": lambda path: checkpoint.save(path, state(1_000_000)),  # torch raises its own
    "samples.npy": lambda path: samples.write(path, IDS, IMAGE),
    "samples.txt": lambda path: samples.write(path, IDS, IMAGE),
    "samples.png": lambda path: samples.write(path, IDS, IMAGE),
    "report.json": lambda path: samples.write_text(path, "[" * 10_000),
    "filmstrip.png": lambda path: pictures.images(path, IDS[:40].view(4, 10, 8, 8), mask_id=2),
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_is_named_and_leaves_the_old_file(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(b"old")
    with no_file_longer_than(1000), pytest.raises(OSError) as raised:
        WRITERS[name](path)
    assert raised.value.filename == str(path) and raised.value.errno == errno.EFBIG
    assert str(path) in str(raised.value)
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == [name]
    WRITERS[name](path)
    assert path.stat().st_size > 1000 and os.listdir(tmp_path) == [name]


def test_a_device_that_is_full_is_named(tmp_path):
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("no /dev/full")
    with pytest.raises(OSError, match="No space left.*/dev/full"):
        samples.write_text(full, "a")
    assert full.is_char_device()


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError) as raised:
        checkpoint.save(str(tmp_path / "none" / "a.pt"), state(1))
    assert raised.value.filename == str(tmp_path / "none" / "a.pt")


def test_errors_of_other_files_keep_their_names(tmp_path):
    with pytest.raises(FileNotFoundError) as raised, files.atomic_write(tmp_path / "a"):
        open(tmp_path / "b")
    assert raised.value.filename == str(tmp_path / "b")
    assert os.listdir(tmp_path) == []


def test_an_error_without_a_number_keeps_its_words(tmp_path):
    with pytest.raises(OSError, match="7 requested and 3 written: .*/a'"):
        with files.atomic_write(tmp_path / "a"):
            raise OSError("7 requested and 3 written")


def test_two_writers_do_not_meet(tmp_path):
    path = tmp_path / "a"
    with files.atomic_write(path) as one, files.atomic_write(path) as other:
        other.write(b"other")
        one.write(b"one, and longer")
    assert path.read_bytes() == b"one, and longer"
    assert os.listdir(tmp_path) == ["a"]


def test_links_stay_and_devices_are_not_replaced(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere" / "a")
    samples.write_text(tmp_path / "link", "hello")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "elsewhere" / "a").read_text() == "hello"
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    found: list[str] = []
    reader = threading.Thread(target=lambda: found.append(pipe.read_text()), daemon=True)
    reader.start()
    samples.write_text(pipe, "hello")
    reader.join(timeout=60)
    assert found == ["hello"] and pipe.is_fifo()


def test_leftovers_are_removed_and_nothing_else(tmp_path):
    for name in ("last.pt", "other.pt.tmp", "last.pt.json", "last.shards-b"):
        (tmp_path / name).write_text("kept")
    for name in ("last.pt.tmp", "last.pt.0123456789ab.tmp"):
        (tmp_path / name).write_text("half")
    (tmp_path / "last.shards-b").unlink()
    for name in ("last.shards-a", "last.shards-b"):
        (tmp_path / name).mkdir()
    torch.save({"config": {}, "shards": "last.shards-a"}, tmp_path / "last.pt")
    checkpoint.remove_leftovers(tmp_path / "last.pt")
    assert sorted(os.listdir(tmp_path)) == [
        *("last.pt", "last.pt.json", "last.shards-a", "other.pt.tmp")
    ]


def test_shards_of_a_name_with_brackets_are_found(tmp_path):
    (tmp_path / "[a].shards-1").mkdir()
    (tmp_path / "a.shards-1").mkdir()
    checkpoint.remove_shards(tmp_path / "[a].pt")
    assert os.listdir(tmp_path) == ["a.shards-1"]


def test_paths_may_be_strings(tmp_path):
    path = str(tmp_path / "a.pt")
    checkpoint.save(path, state(3))
    assert checkpoint.read(path).keys() == checkpoint.load(path).keys() == state(3).keys()


# Locks


def holder(folder: Path) -> subprocess.Popen[str]:
    """Another process that holds the folder, until it is killed."""
    script = (
        "import pathlib, sys, time; from nar_kernels.training.lock import FolderLock\n"
        "held = FolderLock(pathlib.Path(sys.argv[1])); held.acquire(); print('held', flush=True)\n"
        "time.sleep(600)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(folder)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


def no_locks(*arguments: object) -> None:
    raise OSError(errno.ENOLCK, "No locks available")


@pytest.fixture(params=["locks", "no locks"])
def file_system(request, monkeypatch) -> None:
    if request.param == "no locks":
        monkeypatch.setattr(lock.fcntl, "flock", no_locks)


@pytest.mark.usefixtures("file_system")
def test_a_folder_has_one_holder(tmp_path):
    process = holder(tmp_path)
    try:
        for _ in range(2):
            with pytest.raises(
                FolderInUseError, match=f"in use by process {process.pid} on .*--out"
            ):
                FolderLock(tmp_path).acquire()
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert (tmp_path / "run.lock").exists()
    with FolderLock(tmp_path) as ours:
        ours.acquire()
        ours.acquire()
        with pytest.raises(FolderInUseError, match=f"in use by process {os.getpid()} on"):
            FolderLock(tmp_path).acquire()
    assert os.listdir(tmp_path) == []
    with FolderLock(tmp_path / "new" / "folder") as ours:
        assert not (tmp_path / "new").exists()
        ours.acquire()
        assert (tmp_path / "new" / "folder" / "run.lock").exists()


def left_behind(folder: Path) -> None:
    """What a process leaves that was killed."""
    held = FolderLock(folder)
    held.acquire()
    assert held._file is not None
    held._file.close()


def test_a_later_process_of_the_same_number_is_not_the_holder(tmp_path, monkeypatch):
    if lock._start(os.getpid()) is None:
        pytest.skip("this system does not say when processes started")
    monkeypatch.setattr(lock.fcntl, "flock", no_locks)
    left_behind(tmp_path)
    with pytest.raises(FolderInUseError):
        FolderLock(tmp_path).acquire()
    monkeypatch.setattr(lock, "_start", lambda pid: "another")
    with FolderLock(tmp_path) as ours:
        ours.acquire()


@pytest.mark.usefixtures("file_system")
def test_another_host_is_asked_about(tmp_path, monkeypatch):
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr("socket.gethostname", lambda: "elsewhere")
        left_behind(tmp_path)
    with pytest.raises(FolderInUseError, match="on elsewhere, since .*remove .*run.lock and try"):
        FolderLock(tmp_path).acquire()
    (tmp_path / "run.lock").unlink()
    with FolderLock(tmp_path) as ours:
        ours.acquire()


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b"\xff"])
def test_what_is_written_in_a_lock_may_be_anything(tmp_path, content):
    (tmp_path / "run.lock").write_bytes(content)
    with FolderLock(tmp_path) as ours:
        ours.acquire()


def test_a_lock_that_was_removed_while_somebody_opened_it(tmp_path, monkeypatch):
    """The holder lets go between another one's opening of the file and its locking."""
    first, second = FolderLock(tmp_path), FolderLock(tmp_path)
    first.acquire()
    claim = second._claim

    def late(file):
        first.release()
        claim(file)

    monkeypatch.setattr(second, "_claim", late)
    second.acquire()
    with pytest.raises(FolderInUseError):
        FolderLock(tmp_path).acquire()
    second.release()
