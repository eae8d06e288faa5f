"""The files that names stand for: none is left out in silence."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from nar_kernels.data.prepare.inputs import find_inputs

pytest.importorskip("fsspec")
pytest.importorskip("tqdm")


def write(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    return folder


def found(names: Any, below: Path, exclude: Sequence[str] = ()) -> list[str]:
    return [str(Path(file.name).relative_to(below)) for file in find_inputs(names, exclude)]


def test_links_are_followed(tmp_path: Path) -> None:
    write(tmp_path / "real", "a.txt", "deep/b.txt", ".hidden")
    write(tmp_path / "s", "c.txt")
    (tmp_path / "s/a.txt").symlink_to("../real/a.txt")
    (tmp_path / "s/folder").symlink_to(tmp_path / "real", target_is_directory=True)
    everything = ["a.txt", "c.txt", "folder/a.txt", "folder/deep/b.txt"]
    assert found(tmp_path / "s", tmp_path / "s") == everything
    assert found(f"{tmp_path}/s/**/*.txt", tmp_path / "s") == everything
    assert found(f"{tmp_path}/s/*.txt", tmp_path / "s") == everything[:2]
    assert found(f"{tmp_path}/s/*/*.txt", tmp_path / "s") == everything[2:3]
    inputs = find_inputs(tmp_path / "s")
    assert [file.size for file in inputs] == [5, 5, 5, 10]  # of what the links lead to
    (tmp_path / "s/c.txt").unlink()
    (tmp_path / "s/folder").unlink()
    assert found(tmp_path / "s", tmp_path / "s") == ["a.txt"]


def test_a_link_in_a_circle(tmp_path: Path) -> None:
    write(tmp_path, "a.txt", "sub/b.txt")
    (tmp_path / "sub/up").symlink_to(tmp_path, target_is_directory=True)
    assert found(tmp_path, tmp_path) == ["a.txt", "sub/b.txt"]
    assert found(f"{tmp_path}/**/*.txt", tmp_path) == ["a.txt", "sub/b.txt"]


def test_a_link_to_nothing(tmp_path: Path) -> None:
    write(tmp_path, "a.txt")
    (tmp_path / "b.txt").symlink_to("no.txt")
    for name in (tmp_path, f"{tmp_path}/*.txt"):
        with pytest.raises(FileNotFoundError, match="b.txt is a link to no.txt, which is not the"):
            find_inputs(name)


def test_a_folder_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a user who may not: root may read all."""
    write(tmp_path, "a.txt", "sub/closed/b.txt")
    scandir = os.scandir

    def refusing(path: Any) -> Any:
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    for name in (tmp_path, f"{tmp_path}/**/*.txt"):
        with pytest.raises(PermissionError, match="sub/closed"):
            find_inputs(name)
    assert found(f"{tmp_path}/*.txt", tmp_path) == ["a.txt"]  # which need not be read


def test_what_is_left_out(tmp_path: Path) -> None:
    """Of folders and globs, by whatever path they are named; a file that is named is meant."""
    write(tmp_path / "in", "a.txt", "out/b.txt", "out.txt")
    (tmp_path / "link").symlink_to(tmp_path / "in", target_is_directory=True)
    exclude = [str(tmp_path / "in/out"), str(tmp_path / "in/none")]
    for name in ("in", "link"):
        folder = tmp_path / name
        assert found(folder, folder, exclude) == ["a.txt", "out.txt"]
        assert found(f"{folder}/**/*.txt", folder, exclude) == ["a.txt", "out.txt"]
        assert found(folder / "out/b.txt", folder, exclude) == ["out/b.txt"]
    with pytest.raises(FileNotFoundError, match="there is no file"):
        find_inputs(tmp_path / "in/out", exclude)


def test_a_glob_in_the_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, "a.txt", "b[1].txt", ".c.txt")
    monkeypatch.chdir(tmp_path)
    assert found("*.txt", tmp_path) == ["a.txt", "b[1].txt"]
    assert found("b[1].txt", tmp_path) == ["b[1].txt"]
    with pytest.raises(FileNotFoundError, match="there is no file no/"):
        find_inputs("no/*.txt")
