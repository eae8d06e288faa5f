"""Files that name the sources of a mixture: :func:`read_mixture`."""

import json
import os
import re
from pathlib import Path
from typing import NamedTuple

from nar_kernels.data.opened import BUILT_IN
from nar_kernels.errors import CorpusFormatError

_HEAD_BYTES = 1 << 10


class MixtureSource(NamedTuple):
    """One of a mixture, or the only one.

    Attributes:
        data: as ``--data``.
        weight: above 0; only ratios matter.
        dtype, column: as of ``Corpus``.
    """

    data: str
    weight: float = 1.0
    dtype: str | None = None
    column: str | None = None


def read_mixture(name: str, folder: Path | None = None) -> list[MixtureSource] | None:
    """The sources that ``{"mixture": [{"data": "a.bin", "weight": 0.7}, ...]}`` names, relative to
    its own folder; None if this is no such file.

    Args:
        name: path of a JSON file, or of anything else.
        folder: where else to look for a relative path.

    Raises:
        CorpusFormatError: an entry is wrong.
    """
    path = Path(name)
    if folder is not None and not path.exists():
        path = folder / path
    if not _is_mixture(path):
        return None
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise CorpusFormatError(f"{path} is no JSON ({error}): {_how(path)}") from error
    if others := sorted(set(content) - {"mixture"}):
        raise CorpusFormatError(f"{path} has {others[0]!r} beside mixture: {_how(path)}")
    entries = content["mixture"]
    if not isinstance(entries, list) or not entries:
        raise CorpusFormatError(f"mixture is {entries!r}: {_how(path)}")
    return [_source(path, i, entry) for i, entry in enumerate(entries)]


def _is_mixture(path: Path) -> bool:
    """Whether it begins like one; other JSON is text, or lists files."""
    if path.suffix != ".json" or not path.is_file():
        return False
    with path.open("rb") as file:
        return re.match(rb'\s*\{\s*"mixture"\s*:', file.read(_HEAD_BYTES)) is not None


def _source(path: Path, i: int, entry: object) -> MixtureSource:
    if not isinstance(entry, dict) or not isinstance(entry.get("data"), str):
        raise CorpusFormatError(f"mixture[{i}] is {entry!r}: {_how(path)}")
    if unknown := sorted(set(entry) - {*MixtureSource._fields}):
        raise CorpusFormatError(f"mixture[{i}] has {unknown[0]!r}: {_how(path)}")
    weight = entry.get("weight", 1)
    if isinstance(weight, bool) or not isinstance(weight, int | float):
        raise CorpusFormatError(f"mixture[{i}] has the weight {weight!r}: {_how(path)}")
    for option in ("dtype", "column"):
        if not isinstance(entry.get(option), str | None):
            raise CorpusFormatError(
                f"mixture[{i}] has the {option} {entry[option]!r}: {_how(path)}"
            )
    data = entry["data"]
    if data not in BUILT_IN:
        data = os.fspath(path.parent / data)
        if data in BUILT_IN:  # a file of such a name
            data = os.path.join(os.curdir, data)
        if _is_mixture(Path(data)):
            raise CorpusFormatError(
                f"mixture[{i}] is a mixture itself, {data}: name its sources here, with weights"
            )
    return MixtureSource(data, weight, entry.get("dtype"), entry.get("column"))


def _how(path: Path) -> str:
    return f'{path} must be like {{"mixture": [{{"data": "a.bin", "weight": 0.7}}, ...]}}'
