"""Format detection.

A new format is a module in this folder whose function returns a :class:`Layout`, and a branch here.
"""

import os
from pathlib import Path

import torch
from numpy.lib import format as npy
from numpy.typing import DTypeLike

from nar_kernels.data.formats.base import Layout
from nar_kernels.data.formats.npy import npy_layout
from nar_kernels.data.formats.raw import raw_layout
from nar_kernels.data.formats.unread import HEAD_BYTES, TAIL_BYTES, reject_unsupported_formats
from nar_kernels.errors import CorpusFormatError


def read_layout(path: Path, dtype: DTypeLike | torch.dtype | None) -> Layout:
    """Detects the format of a file, and locates its tokens."""
    if path.is_dir():
        raise CorpusFormatError(f"{path} is a directory: pass one .npy or raw binary file")
    with path.open("rb") as file:
        head = file.read(HEAD_BYTES)
        if not head:
            raise CorpusFormatError(f"{path} is empty: a corpus has at least one token")
        # By content: some projects name raw files .npy, and .npy files .bin.
        if head.startswith(npy.MAGIC_PREFIX):
            return npy_layout(path, file, dtype)
        file.seek(max(os.fstat(file.fileno()).st_size - TAIL_BYTES, 0))
        reject_unsupported_formats(path, head, file.read())
    return raw_layout(path, dtype)
