"""The layout of a corpus file, and the checks that all formats share."""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import DTypeLike

from nar_kernels.errors import CorpusFormatError
from nar_kernels.ops.tokens import TOKEN_DTYPES


class ReadOptions(NamedTuple):
    """What a user may say about a source that does not say it itself."""

    dtype: DTypeLike | torch.dtype | None = None  # of raw files
    column: str | None = None  # of tables: Arrow, Parquet, MDS


@dataclass(frozen=True, eq=False)
class Layout:
    """Where the ids of one file are: runs of them, which follow each other in the stream.

    Attributes:
        format: name of the format, such as ``"npy"``.
        path: absolute, of the file as users know it.
        dtype: of the ids, one of :data:`TOKEN_DTYPES`.
        offsets: int64 ``[P]``, bytes of the file before each run; need not be aligned.
        lengths: int64 ``[P]``, tokens of each run, at least 0.
        size: bytes of the file that is mapped, as it was when this was read.
        document_ends: returns int64 ``[D]``, ascending, how many tokens of the file precede the end
            of each document; the last is the number of all. Picklable. None: the format does not
            say.
        loss_mask: as many uint8, 1 where a token counts in a loss, and 0 elsewhere; or None.
        prepared_in: the folder of ``nar-kernels prepare`` that this is a shard of, or None.
        decoded: absolute path of the file in the cache that holds the ids and is mapped, with these
            offsets; None: ``path`` itself is.
        beside: absolute paths of other files that were read, and must stay as they are: indices.
    """

    format: str
    path: str
    dtype: str
    offsets: np.ndarray
    lengths: np.ndarray
    size: int
    document_ends: Callable[[], np.ndarray] | None = None
    loss_mask: "Layout | None" = None
    prepared_in: str | None = None
    decoded: str | None = None
    beside: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        # Kernels read there unchecked, so this holds whatever a reader of a format overlooked.
        behind = self.size - self.offsets  # cannot overflow: offsets are at least 0
        inside = (self.offsets >= 0) & (behind >= 0) & (self.lengths >= 0)
        inside &= self.lengths <= behind // np.dtype(self.dtype).itemsize
        if not inside.all():
            run = int(inside.argmin())
            raise malformed(
                self.path,
                f"run {run} of its ids",
                f"{self.lengths[run]} of {self.dtype} from byte {self.offsets[run]}",
                f"within its {self.size} bytes",
            )

    @classmethod
    def of_one_run(
        cls, format: str, path: Path, dtype: str, offset: int, length: int, **more: Any
    ) -> "Layout":
        """The layout of a file whose ids are all in one place."""
        return cls(
            format,
            str(path.absolute()),
            dtype,
            np.array([offset], np.int64),
            np.array([length], np.int64),
            os.stat(path).st_size,
            **more,
        )

    @property
    def mapped(self) -> str:
        """The file that is mapped."""
        return self.decoded or self.path

    @property
    def others(self) -> list[str]:
        """All other files that must stay as they are."""
        of_mask = [] if self.loss_mask is None else [self.loss_mask.mapped]
        return [*([self.path] if self.decoded else []), *self.beside, *of_mask]

    @property
    def num_tokens(self) -> int:
        return int(self.lengths.sum())


def malformed(
    path: str | os.PathLike[str], field: str, found: object, expected: object
) -> Exception:
    """The error for a field of a file that is not what it must be."""
    return CorpusFormatError(f"{os.fspath(path)}: {field} is {found}, but must be {expected}")


def merge_runs(
    offsets: np.ndarray, lengths: np.ndarray, itemsize: int
) -> tuple[np.ndarray, np.ndarray]:
    """Offsets and lengths of runs, int64, with those that lie one behind the other made one."""
    apart = offsets[1:] != offsets[:-1] + lengths[:-1] * itemsize
    begins = np.flatnonzero(np.concatenate((np.ones(min(len(offsets), 1), bool), apart)))
    return offsets[begins], np.add.reduceat(lengths, begins) if len(begins) else lengths


def parse_json(path: Path, content: bytes, remedy: str) -> Any:
    """What a JSON file holds; CorpusFormatError, with the remedy, if it is none."""
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise CorpusFormatError(f"{path} is not JSON ({error}): {remedy}") from error


def is_described(folder: Path, file: str, key: str, data: str) -> bool:
    """Whether a JSON file describes a folder: it has this key. What is not JSON counts only where
    a glob, ``data``, matches files in the folder, and is damaged then; it may be of others."""
    path = folder / file
    if not path.is_file():
        return False
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        return any(folder.glob(data))
    return isinstance(content, dict) and key in content


def is_file_name(name: str) -> bool:
    """Whether a file can have this name."""
    try:
        return b"\0" not in os.fsencode(name)
    except UnicodeEncodeError:
        return False


def path_beside(path: Path, name: object, field: str) -> Path:
    """The path of a file that ``path`` names in ``field``, relative to its own folder.

    Raises:
        CorpusFormatError: no file can have such a name.
    """
    if isinstance(name, str) and is_file_name(name):
        return path.parent / name
    raise malformed(path, field, repr(name), "the name of a file")


# As Megatron-LM and lit-gpt number dtypes; the codes 6 and 7 are floats in either, in either order.
_CODES = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 8: "uint16"}


def dtype_of_code(path: Path, code: int, floats: Mapping[int, str]) -> str:
    """The dtype that a header says by a number; CorpusFormatError if it is none of ids."""
    if code not in _CODES:
        found = f"{code} ({floats[code]})" if code in floats else code
        known = ", ".join(f"{code} ({name})" for code, name in _CODES.items())
        raise malformed(path, "code of the dtype", found, f"one of {known}")
    return _CODES[code]


def check_dtype_is_not_given(path: Path, options: ReadOptions, what: str) -> None:
    """Raises CorpusFormatError if the user gave a dtype for a file that says it itself; ``what`` is
    such as ``"a .npy file, whose header says uint16"``."""
    if options.dtype is not None:
        raise CorpusFormatError(
            f"dtype={options.dtype!r} was given, but {path} is {what}: dtype= is for raw binary "
            "files; leave it out"
        )


def check_column_is_not_given(path: Path, options: ReadOptions) -> None:
    """Raises CorpusFormatError if the user named a column of what is not a table."""
    if options.column is not None:
        raise CorpusFormatError(
            f"column={options.column!r} was given, but {path} is not a table: leave it out"
        )


def check_array(name: str, shape: Sequence[int], dtype: np.dtype, expression: str) -> None:
    """:func:`check_stream`, and native byte order."""
    if not dtype.isnative:
        raise CorpusFormatError(
            f"{name} has dtype {dtype.str}, whose byte order is not this machine's: use "
            f"{expression}.astype({dtype.name!r})"
        )
    check_stream(name, shape, dtype.name, f"{expression}.astype('int64')", expression)


def check_stream(
    name: str, shape: Sequence[int], dtype: str, converted: str, expression: str
) -> None:
    """Raises CorpusFormatError unless this is a non-empty 1-D array of token ids.

    Messages suggest ``expression``, code for the array, or ``converted``, code for it as int64.
    """
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
