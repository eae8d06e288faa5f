"""NumPy ``.npy`` files."""

import os
from pathlib import Path
from typing import BinaryIO

import torch
from numpy.lib import format as npy
from numpy.typing import DTypeLike

from nar_kernels.data.formats.base import Layout, check_array
from nar_kernels.errors import CorpusFormatError


def npy_layout(path: Path, file: BinaryIO, dtype: DTypeLike | torch.dtype | None) -> Layout:
    file.seek(0)
    try:
        # Version 3 differs from 2 only in the names of structured fields, which are refused below.
        version_1 = npy.read_magic(file) == (1, 0)
        read_header = npy.read_array_header_1_0 if version_1 else npy.read_array_header_2_0
        shape, fortran_order, file_dtype = read_header(file)
    except Exception as error:  # numpy lets TokenError and others through on a damaged header
        raise CorpusFormatError(f"{path} has a damaged .npy header ({error})") from error
    if dtype is not None:
        raise CorpusFormatError(
            f"dtype={dtype!r} was given, but {path} is a .npy file, whose header says {file_dtype}:"
            " dtype= is for raw binary files; leave it out"
        )
    expression = f"np.load({str(path)!r}, mmap_mode='r')"
    check_array(str(path), shape, file_dtype, expression)
    if fortran_order:
        raise CorpusFormatError(
            f"{path} is stored in Fortran order: a corpus is one flat stream of tokens; use "
            f"{expression}.reshape(-1)"
        )
    offset = file.tell()
    size, expected = os.fstat(file.fileno()).st_size, offset + shape[0] * file_dtype.itemsize
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
    return Layout(str(path.absolute()), file_dtype.name, offset, shape[0])
