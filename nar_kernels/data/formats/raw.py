"""Raw binary files: headerless ids, whose dtype the caller or a sidecar gives, or statistics."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import DTypeLike

from nar_kernels.data.formats.base import Layout, ReadOptions, parse_json
from nar_kernels.data.formats.sniff import sniff_dtype
from nar_kernels.errors import CorpusFormatError
from nar_kernels.ops.tokens import TOKEN_DTYPES


def raw_layout(path: Path, options: ReadOptions) -> Layout:
    name = stated_dtype(path, options) or sniff_dtype(path)
    if name is None:
        no_header = " has no .npy header and" if path.suffix == ".npy" else ""
        raise CorpusFormatError(
            f"{path}{no_header} does not say what dtype its tokens have: if it is raw binary, pass "
            "dtype= (nanoGPT's .bin files are dtype='uint16'; dtype='uint8' reads any file as "
            f'bytes), or write {{"dtype": "uint16"}} to {_sidecar(path).name}'
        )
    return headerless_layout("raw", path, name)


def headerless_layout(format: str, path: Path, dtype: str, **more: Any) -> Layout:
    """The layout of a file that is nothing but ids of this type."""
    size, itemsize = path.stat().st_size, np.dtype(dtype).itemsize
    if size % itemsize:
        raise CorpusFormatError(
            f"{path} has {size} bytes, not a whole number of {dtype} tokens of {itemsize} bytes: "
            "the dtype is wrong, or the file is truncated"
        )
    return Layout.of_one_run(format, path, dtype, 0, size // itemsize, **more)


def stated_dtype(path: Path, options: ReadOptions) -> str | None:
    """The dtype that the user or the sidecar of a file gives, or None."""
    given = None
    if options.dtype is not None:
        given = dtype_name(options.dtype, f"{path} was given dtype=")
    sidecar = _sidecar(path)
    declared = _sidecar_dtype(sidecar) if sidecar.exists() else None
    if given and declared and given != declared:
        raise CorpusFormatError(
            f"dtype= says {given} but {sidecar} says {declared}: leave out dtype=, or correct the "
            "sidecar"
        )
    return given or declared


def has_sidecar(path: Path) -> bool:
    return _sidecar(path).exists()


def _sidecar(path: Path) -> Path:
    return path.with_name(path.name + ".json")


def _sidecar_dtype(sidecar: Path) -> str:
    content = parse_json(sidecar, sidecar.read_bytes(), "correct or remove it")
    dtype = content.get("dtype") if isinstance(content, dict) else None
    if not isinstance(dtype, str):
        raise CorpusFormatError(
            f'{sidecar} names no dtype: it must be like {{"dtype": "uint16"}}; correct or remove it'
        )
    return dtype_name(dtype, f"{sidecar} says ")


def dtype_name(dtype: DTypeLike | torch.dtype, origin: str) -> str:
    """The name of a dtype in :data:`TOKEN_DTYPES`; ``origin`` says in errors who gave it."""
    wanted = str(dtype).removeprefix("torch.") if isinstance(dtype, torch.dtype) else dtype
    try:
        parsed = np.dtype(wanted)
    except Exception:  # numpy parses strings as Python, and lets SyntaxError and others through
        parsed = None
    if parsed is None or not parsed.isnative or parsed.name not in TOKEN_DTYPES:
        raise CorpusFormatError(
            f"{origin}{dtype!r}: a raw file holds little-endian {', '.join(TOKEN_DTYPES)}; "
            "write other data to a .npy file of one of these types"
        )
    return parsed.name
