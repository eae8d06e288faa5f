"""Raw binary files: headerless ids, whose dtype the caller or a sidecar gives."""

import json
from pathlib import Path

import numpy as np
import torch
from numpy.typing import DTypeLike

from nar_kernels.data.formats.base import Layout, ReadOptions
from nar_kernels.errors import CorpusFormatError
from nar_kernels.ops.tokens import TOKEN_DTYPES


def raw_layout(path: Path, options: ReadOptions) -> Layout:
    dtype = options.dtype
    sidecar = path.with_name(path.name + ".json")
    declared = _sidecar_dtype(sidecar) if sidecar.exists() else None
    given = None if dtype is None else _dtype_name(dtype, f"{path} was given dtype=")
    if given and declared and given != declared:
        raise CorpusFormatError(
            f"dtype= says {given} but {sidecar} says {declared}: leave out dtype=, or correct the "
            "sidecar"
        )
    name = given or declared
    if name is None:
        no_header = " has no .npy header and" if path.suffix == ".npy" else ""
        raise CorpusFormatError(
            f"{path}{no_header} does not say what dtype its tokens have: if it is raw binary, pass "
            "dtype= (nanoGPT's .bin files are dtype='uint16'; dtype='uint8' reads any file as "
            f'bytes), or write {{"dtype": "uint16"}} to {sidecar.name}'
        )
    size, itemsize = path.stat().st_size, np.dtype(name).itemsize
    if size % itemsize:
        raise CorpusFormatError(
            f"{path} has {size} bytes, not a whole number of {name} tokens of {itemsize} bytes: "
            "the dtype is wrong, or the file is truncated"
        )
    return Layout.of_one_run("raw", path, name, 0, size // itemsize)


def _sidecar_dtype(sidecar: Path) -> str:
    try:
        content = json.loads(sidecar.read_text())
    except ValueError as error:
        raise CorpusFormatError(f"{sidecar} is not JSON ({error}): correct or remove it") from error
    dtype = content.get("dtype") if isinstance(content, dict) else None
    if not isinstance(dtype, str):
        raise CorpusFormatError(
            f'{sidecar} names no dtype: it must be like {{"dtype": "uint16"}}; correct or remove it'
        )
    return _dtype_name(dtype, f"{sidecar} says ")


def _dtype_name(dtype: DTypeLike | torch.dtype, origin: str) -> str:
    """The name of a dtype in :data:`TOKEN_DTYPES`; ``origin`` says in errors who gave it."""
    wanted = str(dtype).removeprefix("torch.") if isinstance(dtype, torch.dtype) else dtype
    try:
        parsed = np.dtype(wanted)
    except (TypeError, ValueError):
        parsed = None
    if parsed is None or not parsed.isnative or parsed.name not in TOKEN_DTYPES:
        raise CorpusFormatError(
            f"{origin}{dtype!r}: a raw file holds little-endian {', '.join(TOKEN_DTYPES)}; "
            "write other data to a .npy file of one of these types"
        )
    return parsed.name
