"""Token ids of a memory-mapped file or an array as one flat stream: :class:`Corpus`.

Shapes: T corpus length in tokens.
"""

import hashlib
import mmap
import os
import sys
import warnings
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import DTypeLike
from torch import Tensor

from nar_kernels.data.formats.base import Layout, check_array, check_stream
from nar_kernels.data.formats.detect import read_layout
from nar_kernels.errors import CorpusFormatError
from nar_kernels.ops.tokens import TOKEN_DTYPES

Source = str | os.PathLike[str] | np.ndarray | Tensor

_DIGEST_BLOCKS, _DIGEST_BLOCK_BYTES = 64, 4096


class Corpus:
    """One flat stream of token ids.

    Args:
        source: one of

            * a path to a ``.npy`` file: 1-D, any dtype of :data:`TOKEN_DTYPES`, little-endian;
            * a path to a raw binary file: headerless little-endian ids, as nanoGPT writes them;
            * a 1-D NumPy array or CPU torch tensor, copied only if not contiguous (or an array not
              aligned). It is pickled to spawned workers with its data, a file by path only.

        dtype: dtype of the ids in a raw file: ``"uint16"``, a NumPy or a torch dtype. Default: from
            the sidecar ``<file>.json``, such as ``{"dtype": "uint16"}``. For raw files only.

    Files are memory-mapped copy-on-write: a write to ``tokens`` never reaches the file, which must
    not shrink while in use. ``copy.deepcopy`` shares the corpus, which nothing here writes.

    Files with the signature of another format, such as compressed ones, are rejected whatever
    ``dtype`` says; arrays, such as ``np.memmap(file, dtype=..., mode="r")``, are not checked.

    Attributes:
        tokens: ``[T]`` in the source's dtype; shares the source's memory unless copied.
        name: the path as given, or ``"array"`` or ``"tensor"``.

    Raises:
        CorpusFormatError: the source is not, or not unambiguously, a stream of token ids.
        FileNotFoundError: no such file.
        TypeError: the source is neither a path, an array nor a tensor.
    """

    tokens: Tensor
    name: str

    def __init__(self, source: Source, *, dtype: DTypeLike | torch.dtype | None = None) -> None:
        self._layout: Layout | None = None
        if isinstance(source, str | os.PathLike):
            self.name = os.fspath(source)
            self._layout = read_layout(Path(source), dtype)
            self.tokens = _memory_map(self._layout)
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
        """Fingerprint that detects a different corpus on resume.

        Hex SHA-256 of the dtype, the length, and 64 evenly spaced blocks of 4 KiB, first and last
        included. It is a sample: above 256 KiB, a change between the blocks that keeps the length
        goes undetected. The same tokens have the same digest in any container.
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
            del state["tokens"]  # mapped again on unpickling
        else:
            # A tensor would be pickled with its whole storage, and torch cannot unpickle uint16.
            state["tokens"] = self.tokens.numpy()
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self._layout is not None:
            self.tokens = _memory_map(self._layout)
        elif isinstance(self.tokens, np.ndarray):  # a tensor in pickles of earlier versions
            self.tokens = _from_array(self.tokens)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Corpus":
        return self


def _memory_map(layout: Layout) -> Tensor:
    end = layout.offset + layout.length * np.dtype(layout.dtype).itemsize
    with open(layout.path, "rb") as file:
        # Copy-on-write: torch has no read-only tensors, and a stray write must not reach the file.
        if sys.platform == "linux":
            # Linux refuses private writable mappings larger than RAM and swap, except with
            # MAP_NORESERVE (which Python names from 3.13 on).
            flags = mmap.MAP_PRIVATE | getattr(mmap, "MAP_NORESERVE", 0x4000)
            mapped = mmap.mmap(file.fileno(), end, flags, mmap.PROT_READ | mmap.PROT_WRITE)
        else:
            mapped = mmap.mmap(file.fileno(), end, access=mmap.ACCESS_COPY)
    dtype = TOKEN_DTYPES[layout.dtype]
    return torch.frombuffer(mapped, dtype=dtype, count=layout.length, offset=layout.offset)


def _from_array(array: np.ndarray) -> Tensor:
    check_array("array", array.shape, array.dtype, "array")
    aligned = np.require(array, requirements=("C", "ALIGNED"))
    with warnings.catch_warnings():
        # Read-only arrays, such as np.load(..., mmap_mode="r"), are fine: nothing here writes.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(aligned)


def _from_tensor(tensor: Tensor) -> Tensor:
    if tensor.device.type != "cpu" or tensor.layout != torch.strided:
        raise CorpusFormatError(
            f"tensor is {tensor.layout} on {tensor.device}: a corpus is a dense tensor in CPU "
            "memory; pass tensor.to_dense().cpu()"
        )
    name = str(tensor.dtype).removeprefix("torch.")
    check_stream("tensor", tuple(tensor.shape), name, "tensor.to(torch.int64)", "tensor")
    return tensor.contiguous()
