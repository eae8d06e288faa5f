"""Where files that save work are kept."""

from pathlib import Path

import pytest

from nar_kernels.cache import cache_folder


@pytest.mark.parametrize(
    ("own", "common", "expected"),
    [
        ("/a/b", "/c", "/a/b"),
        ("~/b", None, "/users/me/b"),
        (None, "/c", "/c/nar_kernels"),
        ("", "/c", "/c/nar_kernels"),
        (None, "relative", "/users/me/.cache/nar_kernels"),
        (None, "", "/users/me/.cache/nar_kernels"),
        (None, None, "/users/me/.cache/nar_kernels"),
    ],
)
def test_the_folder(
    monkeypatch: pytest.MonkeyPatch, own: str | None, common: str | None, expected: str
) -> None:
    monkeypatch.setenv("HOME", "/users/me")
    for name, value in (("NAR_KERNELS_CACHE", own), ("XDG_CACHE_HOME", common)):
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)
    assert cache_folder() == Path(expected)


def test_a_relative_folder_stays_where_it_is(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NAR_KERNELS_CACHE", "here")
    assert cache_folder() == tmp_path / "here"
