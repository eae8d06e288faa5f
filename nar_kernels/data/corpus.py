"""Token ids of files or an array as one flat stream: :class:`Corpus`.

Shapes: T corpus length in tokens, D documents.
"""

import hashlib
import os
import warnings
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import DTypeLike
from torch import Tensor

from nar_kernels.checks import as_int
from nar_kernels.data.formats.base import Layout, ReadOptions, check_array, check_stream
from nar_kernels.data.formats.manifest import Manifest
from nar_kernels.data.formats.prepared import manifests_of
from nar_kernels.data.formats.source import PathSource, read_layouts
from nar_kernels.data.stream import TokenStream, as_tensor
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
              aligned). It is pickled to spawned workers with its data, a file by path only, which
              must have the same size and time of the last write there.

        dtype: dtype of the ids in raw files: ``"uint16"``, a NumPy or a torch dtype. Default: from
            the sidecar ``<file>.json``, such as ``{"dtype": "uint16"}``. For raw files only.
        column: of a table (Arrow, Parquet, MDS), the one with the ids. Default: ``"input_ids"`` or
            ``"tokens"``, or the only one that holds lists of integers.
        eos_id: the id that ends each document, for sources that do not say where documents end.

    Files are memory-mapped copy-on-write: a write to ``tokens`` never reaches the file, which must
    not change while in use, nor its companions. ``copy.deepcopy`` shares the corpus, which nothing
    here writes.

    Files with the signature of a format that is not read, such as compressed ones, are rejected
    whatever ``dtype`` says; arrays, such as ``np.memmap(file, dtype=..., mode="r")``, are not
    checked.

    Attributes:
        stream: the :class:`~nar_kernels.data.stream.TokenStream` of ids.
        loss_mask: a stream of as many uint8, 1 where a token counts in a loss, or None.
        manifests: a :class:`~nar_kernels.data.formats.manifest.Manifest` of each folder that
            ``nar-kernels prepare`` wrote, all of one vocabulary. Empty if there are other files.
        name: the path as given (the first one of a list), or ``"array"`` or ``"tensor"``.

    Raises:
        CorpusFormatError: the source is not, or not unambiguously, a stream of token ids.
        FileNotFoundError: no such file.
        TypeError: the source is neither paths, an array nor a tensor.
    """

    name: str
    stream: TokenStream
    loss_mask: TokenStream | None
    manifests: tuple[Manifest, ...]
    _joined: "Sequence[Corpus]"

    def __init__(
        self,
        source: Source,
        *,
        dtype: DTypeLike | torch.dtype | None = None,
        column: str | None = None,
        eos_id: int | None = None,
    ) -> None:
        self.eos_id = None if eos_id is None else as_int("eos_id", eos_id)
        self.loss_mask, self.manifests = None, ()
        self._joined = ()
        if isinstance(source, np.ndarray | Tensor):
            for option, value, of in (
                ("dtype", dtype, "raw binary files"),
                ("column", column, "tables"),
            ):
                if value is not None:
                    raise CorpusFormatError(
                        f"{option}={value!r} was given with an array of {source.dtype}: {option}= "
                        f"is for {of}; leave it out"
                    )
            self.name = "tensor" if isinstance(source, Tensor) else "array"
            self.stream = TokenStream.of_array(_checked(source))
            return
        if not _is_paths(source):
            raise TypeError(
                "a corpus is a path, a list of paths, a numpy array or a torch tensor, not "
                f"{type(source).__name__}"
            )
        self.name = _name(source)
        layouts = read_layouts(source, ReadOptions(dtype, column))
        self.stream = TokenStream.of_files(layouts)
        self.manifests = manifests_of(layouts)
        self.loss_mask = _loss_mask(layouts, self.name)

    @classmethod
    def joined(cls, corpora: "Sequence[Corpus]") -> "Corpus":
        """Several corpora of one dtype, one after the other, in the same memory.

        Raises:
            CorpusFormatError: they have different dtypes.
        """
        first = corpora[0]
        for other in corpora[1:]:
            if other.dtype != first.dtype:
                raise CorpusFormatError(
                    f"{other.name} holds {other.dtype} and {first.name} {first.dtype}: corpora "
                    "that are used together have one dtype; write one of them again"
                )
        if len(corpora) == 1:
            return first
        corpus = cls.__new__(cls)
        corpus.name = " and ".join(c.name for c in corpora)
        corpus.stream = TokenStream.joined([c.stream for c in corpora])
        corpus.loss_mask, corpus.manifests, corpus.eos_id = None, (), None
        if any(c.loss_mask is not None for c in corpora):  # where there is none, all tokens count
            corpus.loss_mask = TokenStream.joined(
                [c.loss_mask or TokenStream.of_ones(len(c)) for c in corpora]
            )
        corpus._joined = tuple(corpora)
        return corpus

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
        """``[T]`` in the source's dtype, which shares its memory: of an array, or of a file whose
        ids are one aligned run.

        Raises:
            ValueError: the ids lie in several places, such as files, or not aligned: use
                :meth:`read`.
        """
        if self.stream.runs is not None:
            places = self.stream.runs.shape[1] - 1
            why = f"lie in {places} places" if places > 1 else "are not aligned in memory"
            raise ValueError(
                f"the ids of {self.name} {why}, so they are no tensor: use corpus.read(start, stop)"
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

    def where(self, offset: int) -> str:
        """What errors call an offset, such as ``"offset 7 of a.bin"``: of several files, the one
        that it lies in."""
        return self.stream.where(offset, self.name)

    @cached_property
    def document_ends(self) -> np.ndarray | None:
        """int64 ``[D]``, ascending: how many tokens precede the end of each document; the last is
        T. A map of a file where that can be. None if neither the source nor ``eos_id`` says.

        Raises:
            CorpusFormatError: they do not ascend, or not to T.
        """
        if self.eos_id is not None:
            return self._ends_by_eos(self.eos_id)
        if self._joined:
            parts = [(corpus.document_ends, len(corpus)) for corpus in self._joined]
        else:
            parts = [(_ends_of_file(layout), layout.num_tokens) for layout in self.stream.layouts]
        before = np.cumsum([0, *(length for _, length in parts)])
        shifted = [
            ends + start if start else ends
            for (ends, _), start in zip(parts, before.tolist(), strict=False)
            if ends is not None
        ]
        if not parts or len(shifted) < len(parts):
            return None
        return shifted[0] if len(shifted) == 1 else np.concatenate(shifted)

    def _ends_by_eos(self, eos_id: int) -> np.ndarray:
        parts = []
        for start in range(0, len(self), _SCAN_CHUNK):
            ids = self.stream.read(start, min(start + _SCAN_CHUNK, len(self))).numpy()
            parts.append(np.flatnonzero(ids == eos_id) + (start + 1))
        ends = np.concatenate(parts)
        if not len(ends):
            warnings.warn(
                f"eos_id {eos_id} does not occur in {self.name}, which is taken for one document: "
                "give the id that ends each, or none",
                stacklevel=2,
            )
        return ends if len(ends) and ends[-1] == len(self) else np.append(ends, len(self))

    @cached_property
    def digest(self) -> str:
        """Fingerprint that detects a different corpus on resume.

        Hex SHA-256 of the dtype, the length, and 64 evenly spaced blocks of 4 KiB, first and last
        included. It is a sample: above 256 KiB, a change between the blocks that keeps the length
        goes undetected. The same tokens have the same digest in any container.
        """
        return _digest(self.stream)

    @cached_property
    def loss_mask_digest(self) -> str | None:
        """The same of the loss mask, if there is one."""
        return None if self.loss_mask is None else _digest(self.loss_mask)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "document_ends"}

    def __deepcopy__(self, memo: dict[int, Any]) -> "Corpus":
        return self


def _digest(stream: TokenStream) -> str:
    itemsize, size = stream.dtype.itemsize, stream.nbytes
    last = max(size - _DIGEST_BLOCK_BYTES, 0)
    sha = hashlib.sha256(f"{stream.dtype} {len(stream)}".encode())
    for i in range(_DIGEST_BLOCKS):
        start = last * i // (_DIGEST_BLOCKS - 1)
        stop = min(start + _DIGEST_BLOCK_BYTES, size)
        ids = stream.read(start // itemsize, -(-stop // itemsize))
        content = ids.contiguous().view(torch.uint8).numpy().tobytes()
        skipped = start % itemsize
        sha.update(content[skipped : skipped + stop - start])
    return sha.hexdigest()


def _is_paths(source: object) -> bool:
    if isinstance(source, str | os.PathLike):
        return True
    return isinstance(source, Sequence) and all(isinstance(x, str | os.PathLike) for x in source)


def _name(source: PathSource) -> str:
    if isinstance(source, str | os.PathLike):
        return os.fspath(source)
    return os.fspath(source[0]) if source else "an empty list"


def _ends_of_file(layout: Layout) -> np.ndarray | None:
    if layout.document_ends is None:
        return None
    ends, length = layout.document_ends(), layout.num_tokens
    if not len(ends) or ends[0] < 0 or ends[-1] != length or (ends[1:] < ends[:-1]).any():
        raise CorpusFormatError(
            f"the documents of {layout.path} do not divide its {length} tokens: their ends must "
            "ascend to that; write its index again"
        )
    return ends


def _loss_mask(layouts: Sequence[Layout], name: str) -> TokenStream | None:
    masks = [layout.loss_mask for layout in layouts if layout.loss_mask is not None]
    if masks and len(masks) < len(layouts):
        without = next(layout for layout in layouts if layout.loss_mask is None)
        raise CorpusFormatError(
            f"{without.path} has no loss mask, but other files of {name} do: give it one, or "
            "remove theirs"
        )
    return TokenStream.of_files(masks) if masks else None


def _checked(source: np.ndarray | Tensor) -> Tensor:
    if isinstance(source, np.ndarray):
        if isinstance(source, np.ma.MaskedArray):
            raise CorpusFormatError(
                "array is a masked one, and a corpus has no masked ids: pass array.compressed(), "
                "without them, or array.data, with what is under the mask"
            )
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
