"""Corpora: the token ids of a file or an array as one flat stream, never copied to memory whole.

A new file format is one function that returns a :class:`_Layout`, called in :func:`_read_layout`.
Shapes: T tokens of the corpus.
"""

import hashlib
import json
import mmap
import os
import re
import sys
import warnings
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from numpy.lib import format as npy
from numpy.typing import DTypeLike
from torch import Tensor

from nar_kernels.errors import CorpusFormatError
from nar_kernels.ops.arguments import TOKEN_DTYPES

Source = str | os.PathLike[str] | np.ndarray | Tensor

# Files that a raw reader would take for tokens, headers included: what to do with them, how they
# begin (and end), what they are. Ids or text could begin with a short magic number, so that of gzip
# and others is taken together with what must follow it.
_HEAD_BYTES, _TAIL_BYTES = 512, 8
_BY_OFFSET = "pass its tokens as an array, such as np.memmap(file, dtype=..., mode='r', offset=...)"
_RAW = (
    "; if these are raw ids all the same, pass np.memmap(file, dtype=..., mode='r'), or np.save it "
    "to a .npy file"
)
_BY_LIBRARY = f"read the ids with a library for this format, and pass them as an array{_RAW}"
_UNREAD_FORMATS: dict[str, dict[bytes, str]] = {
    _BY_OFFSET: {
        re.escape((20240520).to_bytes(4, "little")): (
            "an llm.c or modded-nanogpt file: uint16 after 1024 bytes"
        ),
        re.escape((20240801).to_bytes(4, "little")): "an llm.c file: uint32 after 1024 bytes",
        rb"LITPKDS": "a packed chunk of lit-gpt or TinyLlama: tokens after 24 bytes",
        rb"MMIDIDX": "the index of a Megatron-LM corpus, not its tokens",
    },
    f"load it, with np.load or torch.load, and pass the array of ids that it holds{_RAW}": {
        rb"PK(\x03\x04|\x05\x06)": "a zip archive, as np.savez and torch.save write them",
        # Protocols 4 and 5 begin with the length of a frame.
        rb"\x80[\x04\x05]\x95.{5}\0{3}": "a pickle",
        rb"\x80[\x02\x03]([]}]q\0[(KX]|c(numpy|torch|array|collections|builtins|__builtin__)\b)": (
            "a pickle"
        ),
        rb"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19": "a file of torch.save, in its old format",
    },
    f"decompress it{_RAW}": {
        # Flags; time; how hard it was compressed; system.
        rb"\x1f\x8b\x08[\0-\x1f].{4}[\0\x02\x04][\0-\x0d\xff]": "compressed by gzip",
        rb"BZh[1-9](1AY&SY|\x17rE8P\x90)": "compressed by bzip2",
        rb"\xfd7zXZ\0": "compressed by xz",
        rb"\x28\xb5\x2f\xfd": "compressed by zstd",
        rb"\x04\x22\x4d\x18[\x40-\x7f][\x40-\x70]": "compressed by lz4",
        rb"7z\xbc\xaf\x27\x1c": "a 7z archive",
        rb"Rar!\x1a\x07[\0\x01]": "a RAR archive",
    },
    f"extract it{_RAW}": {rb".{257}ustar(\x0000|  \0)": "a tar archive"},
    _BY_LIBRARY: {
        rb"PAR1([\0-\x08\x0e-\x1f]|.{4,}PAR1\Z)": "a Parquet file",
        rb"ARROW1\0\0|FEA1.{4,}FEA1\Z": "an Arrow or Feather file",
        # A message: its length, then a table of the flatbuffer that it is.
        rb"\xff{4}.{2}[\0-\x0f]\0\x10\0{5}\n\0": "a stream of Arrow, as datasets saves them",
        # The length of the header, below 128 MiB, and its beginning.
        rb'.{3}[\0-\x07]\0{4}\{"[ -~]': "a safetensors file",
        rb"\x89HDF\r\n\x1a\n": "an HDF5 file",
        rb"GGUF[\x01-\x0f]\0{3}": "a GGUF file",
        rb"Obj\x01.{1,16}avro\.": "an Avro file",
        rb"%PDF-\d\.\d": "a PDF document",
        rb"SQLite format 3\0": "an SQLite database",
    },
    f"decode it, and pass its ids as an array{_RAW}": {
        rb"\x89PNG\r\n\x1a\n": "a PNG image",
        rb"\xff\xd8\xff[\xc0-\xfe]..(JFIF|Exif)\0": "a JPEG image",
        rb"GIF8[79]a": "a GIF image",
        rb"RIFF.{4}WAVEfmt": "a WAV file",
        rb"fLaC\0{3}\x22": "a FLAC file",
    },
}

_DIGEST_BLOCKS, _DIGEST_BLOCK_BYTES = 64, 4096


class _Layout(NamedTuple):
    """Where the tokens of a file lie."""

    path: str
    dtype: str
    offset: int  # bytes before the first token
    length: int  # tokens


class Corpus:
    """One flat stream of token ids.

    Args:
        source: one of

            * a path to a ``.npy`` file: 1-D, any type of :data:`TOKEN_DTYPES`, little-endian;
            * a path to a raw binary file: nothing but little-endian ids, as nanoGPT writes them;
            * a 1-D numpy array or CPU torch tensor. It is copied only if it is not contiguous. Its
              data travels to spawned workers; a path travels as a path, so prefer that for files.

        dtype: type of the ids in a raw file: ``"uint16"``, a numpy or a torch dtype. Default: what
            the sidecar ``<file>.json`` says, such as ``{"dtype": "uint16"}``. For raw files only.

    A file is memory-mapped, copy-on-write: a write to ``tokens`` never reaches it. It must not
    shrink while it is in use. A pickle holds the path of a file, and the tokens of an array;
    ``copy.deepcopy`` shares the corpus, which nothing here writes.

    Files that begin as those of another format do, such as compressed ones, are refused whatever
    ``dtype`` says. An array, such as ``np.memmap(file, dtype=..., mode="r")``, is not looked at.

    Attributes:
        tokens: ``[T]`` in the source's own type, sharing the source's memory.
        name: the path as given, or ``"array"`` or ``"tensor"``.

    Raises:
        CorpusFormatError: the source is no stream of token ids, or not surely one.
        FileNotFoundError: there is no such file.
        TypeError: the source is neither a path, an array nor a tensor.
    """

    tokens: Tensor
    name: str

    def __init__(self, source: Source, *, dtype: DTypeLike | torch.dtype | None = None) -> None:
        self._layout: _Layout | None = None
        if isinstance(source, str | os.PathLike):
            self.name = os.fspath(source)
            self._layout = _read_layout(Path(source), dtype)
            self.tokens = _map(self._layout)
            return
        if not isinstance(source, np.ndarray | Tensor):
            raise TypeError(
                f"a corpus is a path, a numpy array or a torch tensor, not {type(source).__name__}"
            )
        if dtype is not None:
            raise CorpusFormatError(
                f"dtype={dtype!r} was given with an array of {source.dtype}: dtype= is for raw "
                "binary files; leave it out"
            )
        if isinstance(source, Tensor):
            self.name, self.tokens = "tensor", _from_tensor(source)
        else:
            self.name, self.tokens = "array", _from_array(source)

    def __len__(self) -> int:
        """T, the number of tokens."""
        return len(self.tokens)

    @cached_property
    def digest(self) -> str:
        """A fingerprint, to notice on resume that the corpus is another one.

        SHA-256 in hexadecimal over the dtype, the length, and 64 blocks of 4 KiB, evenly spaced,
        the first and the last included. It is a sample: above 256 KiB, a change between the blocks
        that keeps the length goes unnoticed. The same tokens give the same digest in any container.
        """
        content = self.tokens.view(torch.uint8)
        last = max(len(content) - _DIGEST_BLOCK_BYTES, 0)
        sha = hashlib.sha256(f"{self.tokens.dtype} {len(self)}".encode())
        for i in range(_DIGEST_BLOCKS):
            start = last * i // (_DIGEST_BLOCKS - 1)
            sha.update(content[start : start + _DIGEST_BLOCK_BYTES].numpy().tobytes())
        return sha.hexdigest()

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        if self._layout is not None:
            del state["tokens"]  # the receiver maps the file again
        else:
            # A tensor would travel with all the memory of which it is a part, and torch cannot read
            # the pickle of one of uint16.
            state["tokens"] = self.tokens.numpy()
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self._layout is not None:
            self.tokens = _map(self._layout)
        elif isinstance(self.tokens, np.ndarray):  # a tensor in pickles of earlier versions
            self.tokens = _from_array(self.tokens)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Corpus":
        return self


def _read_layout(path: Path, dtype: DTypeLike | torch.dtype | None) -> _Layout:
    """Finds out what kind of file this is, and where its tokens lie."""
    if path.is_dir():
        raise CorpusFormatError(f"{path} is a directory: pass one .npy or raw binary file")
    with path.open("rb") as file:
        head = file.read(_HEAD_BYTES)
        if not head:
            raise CorpusFormatError(f"{path} is empty: a corpus has at least one token")
        # Whatever its name: some projects name raw files .npy, and .npy files .bin.
        if head.startswith(npy.MAGIC_PREFIX):
            return _npy_layout(path, file, dtype)
        file.seek(max(os.fstat(file.fileno()).st_size - _TAIL_BYTES, 0))
        _refuse_unread_formats(path, head, file.read())
    return _raw_layout(path, dtype)


def _npy_layout(path: Path, file: BinaryIO, dtype: DTypeLike | torch.dtype | None) -> _Layout:
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
    _check_array(str(path), shape, file_dtype, expression)
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
    return _Layout(str(path.absolute()), file_dtype.name, offset, shape[0])


def _refuse_unread_formats(path: Path, head: bytes, tail: bytes) -> None:
    """Raises for files that a raw reader would take for tokens, headers included."""
    found = [
        (what, remedy)
        for remedy, formats in _UNREAD_FORMATS.items()
        for pattern, what in formats.items()
        if re.match(pattern, head + tail, re.DOTALL)
    ]
    if _is_tfrecord(head):
        found.append(("a TFRecord file", _BY_LIBRARY))
    index = path.with_suffix(".idx")
    if not found and path.suffix == ".bin" and index.is_file():
        with index.open("rb") as file:
            if file.read(7) == b"MMIDIDX":
                what = f"half of a Megatron-LM corpus, the other being {index.name}"
                found.append((what, _BY_OFFSET))
    for what, remedy in found:
        raise CorpusFormatError(f"{path} is {what}. This format is not read yet: {remedy}")


def _is_tfrecord(head: bytes) -> bool:
    """Whether the file begins with the length of a record and its masked CRC-32C."""
    crc = 0xFFFFFFFF
    for byte in head[:8]:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ 0x82F63B78 * (crc & 1)
    crc ^= 0xFFFFFFFF
    masked = (crc >> 15 | crc << 17) + 0xA282EAD8 & 0xFFFFFFFF
    return head[8:12] == masked.to_bytes(4, "little")


def _raw_layout(path: Path, dtype: DTypeLike | torch.dtype | None) -> _Layout:
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
            f"{path}{no_header} does not say what type its tokens have: if it is raw binary, pass "
            "dtype= (nanoGPT's .bin files are dtype='uint16'; dtype='uint8' reads any file as "
            f'bytes), or write {{"dtype": "uint16"}} to {sidecar.name}'
        )
    size, itemsize = path.stat().st_size, np.dtype(name).itemsize
    if size % itemsize:
        raise CorpusFormatError(
            f"{path} has {size} bytes, not a whole number of {name} tokens of {itemsize} bytes: "
            "its dtype is another one, or it is truncated"
        )
    return _Layout(str(path.absolute()), name, 0, size // itemsize)


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
    """The name in :data:`TOKEN_DTYPES` of a type; ``origin`` says who named it."""
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


def _map(layout: _Layout) -> Tensor:
    end = layout.offset + layout.length * np.dtype(layout.dtype).itemsize
    with open(layout.path, "rb") as file:
        # Copy-on-write: torch has no read-only tensors, and a stray write must not reach the file.
        if sys.platform == "linux":
            # Linux refuses private writable maps larger than memory and swap, unless told not to
            # reserve memory for them. (Python names the flag from 3.13 on.)
            flags = mmap.MAP_PRIVATE | getattr(mmap, "MAP_NORESERVE", 0x4000)
            mapped = mmap.mmap(file.fileno(), end, flags, mmap.PROT_READ | mmap.PROT_WRITE)
        else:
            mapped = mmap.mmap(file.fileno(), end, access=mmap.ACCESS_COPY)
    dtype = TOKEN_DTYPES[layout.dtype]
    return torch.frombuffer(mapped, dtype=dtype, count=layout.length, offset=layout.offset)


def _from_array(array: np.ndarray) -> Tensor:
    _check_array("array", array.shape, array.dtype, "array")
    aligned = np.require(array, requirements=("C", "ALIGNED"))
    with warnings.catch_warnings():
        # Read-only arrays, such as those of np.load(..., mmap_mode="r"), are welcome: nothing here
        # writes.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(aligned)


def _from_tensor(tensor: Tensor) -> Tensor:
    if tensor.device.type != "cpu" or tensor.layout != torch.strided:
        raise CorpusFormatError(
            f"tensor is {tensor.layout} on {tensor.device}: a corpus is a dense tensor in CPU "
            "memory; pass tensor.to_dense().cpu()"
        )
    name = str(tensor.dtype).removeprefix("torch.")
    _check_stream("tensor", tuple(tensor.shape), name, "tensor.to(torch.int64)", "tensor")
    return tensor.contiguous()


def _check_array(name: str, shape: Sequence[int], dtype: np.dtype, expression: str) -> None:
    if not dtype.isnative:
        raise CorpusFormatError(
            f"{name} has dtype {dtype.str}, whose byte order is not this machine's: use "
            f"{expression}.astype({dtype.name!r})"
        )
    _check_stream(name, shape, dtype.name, f"{expression}.astype('int64')", expression)


def _check_stream(
    name: str, shape: Sequence[int], dtype: str, converted: str, expression: str
) -> None:
    """Raises unless this is a non-empty 1-D array of token ids."""
    if dtype not in TOKEN_DTYPES:
        raise CorpusFormatError(
            f"{name} has dtype {dtype}: token ids are one of {', '.join(TOKEN_DTYPES)}; if these "
            f"are token ids, use {converted}"
        )
    if len(shape) != 1:
        raise CorpusFormatError(
            f"{name} has shape {tuple(shape)}: a corpus is one flat stream of tokens; use "
            f"{expression}.reshape(-1)"
        )
    if shape[0] < 1:
        raise CorpusFormatError(f"{name} is empty: a corpus has at least one token")
