"""Token ids of files or an array as one flat stream: :class:`Corpus`.

Shapes: T corpus length in tokens, D documents.
"""

import hashlib
import os
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import DTypeLike
from torch import Tensor

from nar_kernels.checks import as_int
from nar_kernels.data.formats.base import ReadOptions, check_array, check_stream
from nar_kernels.data.formats.detect import PathSource, read_layouts
from nar_kernels.data.stream import Stream, as_tensor
from nar_kernels.errors import CorpusFormatError

Source = PathSource | np.ndarray | Tensor

_DIGEST_BLOCKS, _DIGEST_BLOCK_BYTES = 64, 4096
_SCAN_CHUNK = 1 << 20  # tokens


class Corpus:
    """One flat stream of token ids.

    Args:
        source: one of

            * a path to a file: ``.npy``, raw, or any format of the table in docs/data.md, which is
              recognised by its content;
            * a folder, a glob or a list of such files, one after the other;
            * a 1-D NumPy array or CPU torch tensor, copied only if not contiguous (or an array not
              aligned). It is pickled to spawned workers with its data, a file by path only.

        dtype: dtype of the ids in raw files: ``"uint16"``, a NumPy or a torch dtype. Default: from
            the sidecar ``<file>.json``, such as ``{"dtype": "uint16"}``. For raw files only.
        column: of a table (Arrow, Parquet, MDS), the one with the ids. Default: ``"input_ids"`` or
            ``"tokens"``, or the only one that holds lists of integers.
        eos_id: the id that ends each document, for sources that do not say where documents end.

    Files are memory-mapped copy-on-write: a write to ``tokens`` never reaches the file, which must
    not change while in use. ``copy.deepcopy`` shares the corpus, which nothing here writes.

    Files with the signature of a format that is not read, such as compressed ones, are rejected
    whatever ``dtype`` says; arrays, such as ``np.memmap(file, dtype=..., mode="r")``, are not
    checked.

    Attributes:
        stream: the :class:`~nar_kernels.data.stream.Stream` of ids.
        loss_mask: a stream of as many uint8, 1 where a token counts in a loss, or None.
        name: the path as given (the first one of a list), or ``"array"`` or ``"tensor"``.

    Raises:
        CorpusFormatError: the source is not, or not unambiguously, a stream of token ids.
        FileNotFoundError: no such file.
        TypeError: the source is neither paths, an array nor a tensor.
    """

    stream: Stream
    loss_mask: Stream | None
    name: str

    def __init__(
        self,
        source: Source,
        *,
        dtype: DTypeLike | torch.dtype | None = None,
        column: str | None = None,
        eos_id: int | None = None,
    ) -> None:
        self.eos_id = None if eos_id is None else as_int("eos_id", eos_id)
        self.loss_mask = None
        if isinstance(source, np.ndarray | Tensor):
            if dtype is not None:
                raise CorpusFormatError(
                    f"dtype={dtype!r} was given with an array of {source.dtype}: dtype= is for raw "
                    "binary files; leave it out"
                )
            self.name = "tensor" if isinstance(source, Tensor) else "array"
            self.stream = Stream(_checked(source))
            return
        if not _is_paths(source):
            raise TypeError(
                "a corpus is a path, a list of paths, a numpy array or a torch tensor, not "
                f"{type(source).__name__}"
            )
        self.name = _name(source)
        layouts = read_layouts(source, ReadOptions(dtype, column))
        self.stream = Stream(layouts)
        masks = [layout.loss_mask for layout in layouts]
        if any(mask is not None for mask in masks):
            for layout in layouts:
                if layout.loss_mask is None:
                    raise CorpusFormatError(
                        f"{layout.path} has no loss mask, but other files of {self.name} do: give "
                        "it one, or remove theirs"
                    )
            self.loss_mask = Stream([mask for mask in masks if mask is not None])

    def __len__(self) -> int:
        """T, the number of tokens."""
        return len(self.stream)

    @property
    def dtype(self) -> torch.dtype:
        """Of the ids."""
        return self.stream.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of all ids."""
        return self.stream.nbytes

    @property
    def tokens(self) -> Tensor:
        """``[T]`` in the source's dtype, which shares its memory: of an array or a single file.

        Raises:
            ValueError: the ids lie in several places, such as files: use :meth:`read`.
        """
        if self.stream.runs is not None:
            raise ValueError(
                f"the ids of {self.name} lie in {self.stream.runs.shape[1] - 1} places, not in one "
                "tensor: use corpus.read(start, stop)"
            )
        return self.stream.flat

    def read(self, start: int, stop: int) -> Tensor:
        """``[stop - start]``, in the source's dtype: the ids from ``start`` to ``stop``.

        Raises:
            IndexError: not 0 <= start <= stop <= T.
        """
        start, stop = as_int("start", start), as_int("stop", stop)
        if not 0 <= start <= stop <= len(self):
            raise IndexError(
                f"tokens {start} to {stop} are not all in {self.name}, which has {len(self)}"
            )
        return self.stream.read(start, stop)

    @cached_property
    def document_ends(self) -> np.ndarray | None:
        """int64 ``[D]``, ascending: how many tokens precede the end of each document; the last is
        T. A map of a file where that can be. None if neither the source nor ``eos_id`` says.

        Raises:
            CorpusFormatError: they do not ascend, or not to T.
        """
        if self.eos_id is not None:
            return self._ends_by_eos(self.eos_id)
        parts: list[np.ndarray] = []
        before = 0
        for layout in self.stream.layouts:
            if layout.document_ends is None:
                return None
            ends = layout.document_ends()
            if (
                not len(ends)
                or ends[-1] != layout.num_tokens
                or ends[0] < 0
                or (ends[1:] < ends[:-1]).any()
            ):
                raise CorpusFormatError(
                    f"the documents of {layout.path} do not divide its {layout.num_tokens} tokens: "
                    "their ends must ascend to that; write its index again"
                )
            parts.append(ends + before if before else ends)
            before += layout.num_tokens
        return None if not parts else parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _ends_by_eos(self, eos_id: int) -> np.ndarray:
        parts = []
        for start in range(0, len(self), _SCAN_CHUNK):
            ids = self.stream.read(start, min(start + _SCAN_CHUNK, len(self))).numpy()
            parts.append(np.flatnonzero(ids == eos_id) + (start + 1))
        ends = np.concatenate(parts)
        return ends if len(ends) and ends[-1] == len(self) else np.append(ends, len(self))

    @cached_property
    def digest(self) -> str:
        """Fingerprint that detects a different corpus on resume.

        Hex SHA-256 of the dtype, the length, and 64 evenly spaced blocks of 4 KiB, first and last
        included. It is a sample: above 256 KiB, a change between the blocks that keeps the length
        goes undetected. The same tokens have the same digest in any container.
        """
        itemsize, size = self.dtype.itemsize, self.nbytes
        last = max(size - _DIGEST_BLOCK_BYTES, 0)
        sha = hashlib.sha256(f"{self.dtype} {len(self)}".encode())
        for i in range(_DIGEST_BLOCKS):
            start = last * i // (_DIGEST_BLOCKS - 1)
            stop = min(start + _DIGEST_BLOCK_BYTES, size)
            ids = self.stream.read(start // itemsize, -(-stop // itemsize))
            content = ids.contiguous().view(torch.uint8).numpy().tobytes()
            skipped = start % itemsize
            sha.update(content[skipped : skipped + stop - start])
        return sha.hexdigest()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "document_ends"}

    def __deepcopy__(self, memo: dict[int, Any]) -> "Corpus":
        return self


def _is_paths(source: object) -> bool:
    if isinstance(source, str | os.PathLike):
        return True
    return isinstance(source, Sequence) and all(isinstance(x, str | os.PathLike) for x in source)


def _name(source: PathSource) -> str:
    if isinstance(source, str | os.PathLike):
        return os.fspath(source)
    return os.fspath(source[0]) if source else "an empty list"


def _checked(source: np.ndarray | Tensor) -> Tensor:
    if isinstance(source, np.ndarray):
        check_array("array", source.shape, source.dtype, "array")
        return as_tensor(source)
    if source.device.type != "cpu" or source.layout != torch.strided:
        raise CorpusFormatError(
            f"tensor is {source.layout} on {source.device}: a corpus is a dense tensor in CPU "
            "memory; pass tensor.to_dense().cpu()"
        )
    name = str(source.dtype).removeprefix("torch.")
    check_stream("tensor", tuple(source.shape), name, "tensor.to(torch.int64)", "tensor")
    return source.contiguous()
