"""What was found out about a corpus by reading all of it, kept for the next time."""

import hashlib
import json
import zipfile
from pathlib import Path

import numpy as np

from nar_kernels.cache import cache_folder
from nar_kernels.data.corpus import Corpus
from nar_kernels.files import atomic_write

_VERSION = 1  # of what is kept; another one is not found
_MOST_FILES = 256  # the oldest are removed

Arrays = dict[str, np.ndarray]


def recall(corpus: Corpus, what: str) -> Arrays | None:
    """What :func:`remember` was given for the same files; None if it is not known.

    The same: their ids have the same digest, which is a sample, and the files the same sizes and
    times of the last write. They may have moved. Nothing is known of arrays, which may change.
    """
    if corpus.stream.files is None:
        return None
    try:
        with np.load(_file(corpus, what), allow_pickle=False) as arrays:
            return dict(arrays)
    # No such file, or not what was written.
    except (OSError, RuntimeError, ValueError, EOFError, zipfile.BadZipFile):
        return None


def remember(corpus: Corpus, what: str, **arrays: np.ndarray) -> None:
    """Keeps arrays for :func:`recall`, if the cache is writable.

    Raises:
        CorpusChangedError: a file has changed since it was opened.
    """
    if corpus.stream.files is None:
        return
    corpus.stream.check_unchanged()
    try:
        path = _file(corpus, what)
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as file:
            np.savez_compressed(file, allow_pickle=False, **arrays)
        files = sorted(path.parent.glob("*.npz"), key=lambda path: path.stat().st_mtime)
        for old in files[:-_MOST_FILES]:
            old.unlink(missing_ok=True)
    except (OSError, RuntimeError):  # of a user without a home
        pass


def _file(corpus: Corpus, what: str) -> Path:
    files = [file.signature[:2] for file in corpus.stream.files or ()]
    key = json.dumps([_VERSION, what, corpus.digest, files])
    return cache_folder() / "scans" / f"{hashlib.sha256(key.encode()).hexdigest()}.npz"
