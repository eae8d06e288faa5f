"""Packed chunks of lit-gpt, TinyLlama and SMDM: a header of 24 bytes, then ids.

The header is the magic number ``LITPKDS``; u64 version, 1; u8 code of the dtype; u64 number of
tokens. The writer fills the last chunk of a corpus up with its separator. Nothing says how many of
these there are, so they stay, as tokens.
"""

import os
import struct
from pathlib import Path

import numpy as np

from nar_kernels.data.formats.base import (
    Layout,
    ReadOptions,
    check_dtype_is_not_given,
    dtype_of_code,
    malformed,
)

_MAGIC = b"LITPKDS"
_HEADER = struct.Struct("<7sQBQ")
_FLOATS = {6: "float32", 7: "float64"}  # in the other order than those of Megatron-LM


def is_litpkds(path: Path, ends: bytes) -> bool:
    return ends.startswith(_MAGIC)


def litpkds_layout(path: Path, options: ReadOptions) -> Layout:
    with path.open("rb") as file:
        head, size = file.read(_HEADER.size), os.fstat(file.fileno()).st_size
    if size < _HEADER.size:
        raise malformed(path, "size", f"{size} bytes", f"at least {_HEADER.size}, its header")
    _, version, code, num_tokens = _HEADER.unpack(head)
    if version != 1:
        raise malformed(path, "version", version, 1)
    dtype = dtype_of_code(path, code, _FLOATS)
    check_dtype_is_not_given(path, options, f"a packed chunk, whose header says {dtype}")
    expected = _HEADER.size + num_tokens * np.dtype(dtype).itemsize
    if size != expected:
        found = f"{num_tokens} tokens of {dtype}, which makes {expected} bytes"
        raise malformed(path, "chunk size", found, f"what its {size} bytes hold")
    return Layout.of_one_run("litpkds", path, dtype, _HEADER.size, num_tokens)
