"""What a name of a source names, and what says that it holds ids."""

import gzip
import os
from pathlib import Path

import numpy as np
import pytest

from nar_kernels.data.formats.detect import exists, holds_ids
from tests.helpers.corpora import WRITERS

DOCUMENTS = [np.arange(9, dtype="uint16")] * 2


@pytest.mark.parametrize("format", WRITERS)
def test_files_that_say_that_they_hold_ids(tmp_path: Path, format: str) -> None:
    written = WRITERS[format](tmp_path, DOCUMENTS)
    if written.source.is_file():
        assert holds_ids(written.source) == (format != "raw")
        assert holds_ids(str(written.source)) == (format != "raw")


def test_what_says_that_a_file_holds_ids(tmp_path: Path) -> None:
    contents = {
        "text.txt": b"once upon a time",
        "empty": b"",
        "text.bin": b"once upon a time",
        "one.json": b'{"text": "files"}',
        "many.json": b'["files"]',
        "list.json": b' {"dtype": "uint16", "files": ["a.bin"]}',
        "text.gz": gzip.compress(b"once upon a time"),
        "typed.txt": b"ab",
        "typed.txt.json": b'{"dtype": "uint16"}',
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    np.save(tmp_path / "a.npy", DOCUMENTS[0])
    (tmp_path / "a.npy").rename(tmp_path / "npy.txt")
    found = {path.name for path in tmp_path.iterdir() if holds_ids(path)}
    assert found == {"list.json", "text.gz", "typed.txt", "npy.txt"}
    assert not holds_ids(tmp_path) and not holds_ids(tmp_path / "missing")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert not holds_ids(tmp_path / "pipe")
    assert exists(str(tmp_path / "pipe"))


def test_what_a_name_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("folder [1]").mkdir()
    for name in ("a.bin", "x.idx", "folder [1]/b.npy"):
        Path(name).write_bytes(b"ab")
    there = ["a.bin", ".", "x", "*.bin", "folder [1]", "**/b.npy", str(tmp_path / "x")]
    assert all(map(exists, there))
    missing = ["a", "b.bin", "*.npy", "x.bin", "a\0b", "\udc80\ud800", "", "folder/*"]
    assert not any(map(exists, missing))
