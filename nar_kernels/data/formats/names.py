"""From names to paths: what a glob matches, in which order, and what of it is read on its own."""

import glob
import os
import re
from collections.abc import Sequence
from pathlib import Path

from nar_kernels.errors import CorpusFormatError

# Of datatrove: a glob that matches them without their .ds file matches nothing to read.
_OF_DATATROVE = (".ds.index", ".ds.loss", ".ds.metadata")

_CACHE_OF_DATASETS = re.compile(r"cache-[0-9a-f]{16}(_\d+_of_\d+)?\.arrow")  # of map and filter
_MAGIC = re.compile(r"[*?[]")


def is_pattern(name: str) -> bool:
    return bool(_MAGIC.search(name))


def matches(pattern: str) -> list[Path]:
    """What a glob matches, in order, without what is read with another match, folders of matches,
    and caches of ``datasets``. Empty if it matches nothing.

    Raises:
        CorpusFormatError: it matches nothing else.
    """
    found = set(map(Path, raw_matches(pattern)))
    folders = {folder for path in found for folder in path.parents}
    alone = [
        path
        for path in found - folders
        if not path.name.endswith(_OF_DATATROVE) and not is_cache(path.name)
    ]
    if found and not (alone := [Path(name) for name in without_companions(list(map(str, alone)))]):
        raise CorpusFormatError(
            f"{pattern} matches no corpus, but what is read with one, or caches of datasets: name "
            "the files themselves"
        )
    return sorted(alone, key=natural)


def raw_matches(pattern: str) -> list[str]:
    """In any order. What names a folder as it stands, brackets included, is that folder."""
    folder, name = os.path.split(pattern)
    if is_pattern(folder) and os.path.isdir(folder):
        pattern = os.path.join(glob.escape(folder), name)
    return glob.glob(pattern, recursive=True)


def without_companions(names: Sequence[str]) -> list[str]:
    """Without those that are read with another one of these: as a shell expands a glob, both are
    named."""
    given = set(names)
    return [n for n in names if (of := _read_with(n)) not in given or not os.path.isfile(of)]


def _read_with(name: str) -> str:
    """Which file a file of this name would be a companion of."""
    stem, suffix = os.path.splitext(name)
    if suffix == ".idx":
        return f"{stem}.bin"
    return stem if suffix == ".json" or name.endswith(_OF_DATATROVE) else ""


def is_cache(name: str) -> bool:
    """Whether ``datasets`` would call a cache so, which lies beside the data of a folder."""
    return bool(_CACHE_OF_DATASETS.fullmatch(name))


def natural(path: Path) -> tuple[list[tuple[int, str]], str]:
    """A sort key by which shard-9 comes before shard-10; no two paths have the same."""
    parts = re.split(r"(\d+)", str(path))
    key = [(int(part), "") if part.isdecimal() else (-1, part) for part in parts]
    return key, str(path)
