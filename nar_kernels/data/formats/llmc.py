"""Files of llm.c and modded-nanogpt: 256 int32, of which three count, then the ids.

The three are a magic number, a version, and the number of tokens. It has 32 bits, so that of a
longer file is given modulo 2**32; the size of the file tells the rest.
"""

import os
import struct
from pathlib import Path

import numpy as np

from nar_kernels.data.formats.base import (
    Layout,
    ReadOptions,
    check_dtype_is_not_given,
    malformed,
)

_HEADER_BYTES = 1024

# Magic number: version and dtype.
_KINDS = {20240520: (1, "uint16"), 20240801: (7, "uint32")}


def is_llmc(path: Path, ends: bytes) -> bool:
    return len(ends) >= 4 and int.from_bytes(ends[:4], "little") in _KINDS


def llmc_layout(path: Path, options: ReadOptions) -> Layout:
    with path.open("rb") as file:
        head, size = file.read(12), os.fstat(file.fileno()).st_size
    if size < _HEADER_BYTES:
        raise malformed(path, "size", f"{size} bytes", f"at least {_HEADER_BYTES}, its header")
    magic, version, count = struct.unpack("<III", head)
    expected_version, dtype = _KINDS[magic]
    check_dtype_is_not_given(path, options, f"a file of llm.c, whose magic number says {dtype}")
    if version != expected_version:
        raise malformed(path, "version", version, f"{expected_version}, with magic number {magic}")
    num_tokens, rest = divmod(size - _HEADER_BYTES, np.dtype(dtype).itemsize)
    if rest or count != num_tokens % (1 << 32):
        found = f"{count}, of {dtype} after {_HEADER_BYTES} bytes"
        raise malformed(path, "number of tokens", found, f"what its {size} bytes hold")
    return Layout.of_one_run("llm.c", path, dtype, _HEADER_BYTES, num_tokens)
