"""NumPy ``.npy`` files."""

import os
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.lib import format as npy

from nar_kernels.data.formats.base import (
    Layout,
    ReadOptions,
    check_array,
    check_dtype_is_not_given,
)
from nar_kernels.errors import CorpusFormatError


def is_npy(path: Path, head: bytes) -> bool:
    return head.startswith(npy.MAGIC_PREFIX)


def npy_layout(path: Path, options: ReadOptions) -> Layout:
    with path.open("rb") as file:
        shape, fortran_order, file_dtype = _read_header(path, file)
        offset, size = file.tell(), os.fstat(file.fileno()).st_size
    check_dtype_is_not_given(path, options, f"a .npy file, whose header says {file_dtype}")
    expression = f"np.load({str(path)!r}, mmap_mode='r')"
    check_array(str(path), shape, file_dtype, expression)
    if fortran_order:
        raise CorpusFormatError(
            f"{path} is stored in Fortran order: a corpus is one flat stream of tokens; use "
            f"{expression}.reshape(-1)"
        )
    expected = offset + shape[0] * file_dtype.itemsize
    if size != expected:
        state = "it is truncated" if size < expected else "something was appended to it"
        raise CorpusFormatError(
            f"{path} has {size} bytes, but its .npy header promises {shape[0]} tokens of "
            f"{file_dtype}, which makes {expected}: {state}; write it again"
        )
    if offset % file_dtype.itemsize:
        raise CorpusFormatError(
            f"the tokens of {path} begin at byte {offset}, which is not aligned for {file_dtype}: "
            "write it again with np.save"
        )
    return Layout.of_one_run("npy", path, file_dtype.name, offset, shape[0])


def _read_header(path: Path, file: BinaryIO) -> tuple[tuple[int, ...], bool, np.dtype]:
    try:
        # Version 3 differs from 2 only in the names of structured fields, which are refused.
        version_1 = npy.read_magic(file) == (1, 0)
        read_header = npy.read_array_header_1_0 if version_1 else npy.read_array_header_2_0
        return read_header(file)
    except Exception as error:  # numpy lets TokenError and others through on a damaged header
        raise CorpusFormatError(f"{path} has a damaged .npy header ({error})") from error
