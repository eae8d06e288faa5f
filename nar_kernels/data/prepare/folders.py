"""The folders of a run: what may be there, and what is removed of them."""

import re
from collections.abc import Iterator
from pathlib import Path

from nar_kernels.data.formats.manifest import FILE
from nar_kernels.data.formats.prepared import PROGRESS_FILE, is_begun, is_prepared

_TEMPORARY = re.compile(r"(manifest|tokenizer)\.json\.[0-9a-f]+\.tmp")
_WRITTEN = re.compile(
    rf"(tokens|documents|loss-mask)-\d+\.npy|labels\.npy|(manifest|tokenizer)\.json"
    rf"|{re.escape(PROGRESS_FILE)}|{_TEMPORARY.pattern}"
)


def partial_folder(out: Path) -> Path:
    """Of a run that is not finished."""
    return out.with_name(out.name + ".partial")


def replaced_folder(out: Path) -> Path:
    """Where the corpus before is, until it is removed."""
    return out.with_name(out.name + ".partial.old")


def check_out(out: Path, overwrite: bool) -> None:
    """Raises FileExistsError unless a corpus may be written to ``out``, in place of what is there
    if ``overwrite``."""
    if (out / FILE).is_file() and is_begun(out):
        tidy(out)
    if not out.exists():
        return
    if not overwrite:
        raise FileExistsError(
            f"{out} exists: name another folder, or pass overwrite= to replace it"
        )
    if not out.is_dir() or (any(out.iterdir()) and not is_prepared(out)):
        raise FileExistsError(
            f"{out} is no prepared corpus, and not overwritten: name another folder"
        )
    check_content(out)
    check_content(replaced_folder(out))


def check_content(folder: Path) -> None:
    """Raises FileExistsError if there is anything in a folder that ``prepare`` does not write."""
    for path in _files(folder):
        if not _WRITTEN.fullmatch(path.name):
            raise FileExistsError(
                f"{folder} holds {path.name}, which prepare did not write, and is not overwritten: "
                "move it elsewhere, or name another folder"
            )


def clear(folder: Path) -> None:
    """Removes what a run wrote, but its record."""
    check_content(folder)
    for path in _files(folder):
        if path.name != PROGRESS_FILE:
            path.unlink()


def remove_temporary_files(folder: Path) -> None:
    """Of a run that was killed as it wrote them."""
    for path in _files(folder):
        if _TEMPORARY.fullmatch(path.name):
            path.unlink()


def make_way(out: Path) -> None:
    """For another corpus, before which that in ``out`` is not lost."""
    if out.exists() and not any(out.iterdir()):
        out.rmdir()
    elif out.exists():
        _remove(replaced_folder(out))
        out.rename(replaced_folder(out))


def tidy(out: Path) -> None:
    """Removes what is left when ``out`` is complete: a run may have been stopped before."""
    _remove(replaced_folder(out))
    (out / PROGRESS_FILE).unlink(missing_ok=True)


def _remove(folder: Path) -> None:
    if folder.exists():
        clear(folder)
        (folder / PROGRESS_FILE).unlink(missing_ok=True)
        folder.rmdir()


def _files(folder: Path) -> Iterator[Path]:
    return folder.iterdir() if folder.exists() else iter(())
