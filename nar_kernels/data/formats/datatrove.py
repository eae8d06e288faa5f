"""Files of datatrove: raw ids in ``X.ds``, and beside them what is known of them.

* ``X.ds.metadata``: ``tokenizer|token size``, then the number of tokens, in lines of text.
* ``X.ds.index``: u64, how many tokens precede the end of each document.
* ``X.ds.loss``: a byte for each token, 1 where it counts in a loss.

Each of the three may be missing.
"""

import os
from functools import partial
from pathlib import Path

import numpy as np

from nar_kernels.data.formats.base import Layout, ReadOptions, malformed
from nar_kernels.data.formats.raw import headerless_layout, raw_layout, stated_dtype
from nar_kernels.errors import CorpusFormatError

_BY_SIZE = {2: "uint16", 4: "uint32"}
_MAX_METADATA = 1 << 16  # bytes


def is_datatrove(path: Path, ends: bytes) -> bool:
    """By its name: a file of raw ids has nothing else to know it by."""
    return path.suffix == ".ds"


def datatrove_layout(path: Path, options: ReadOptions) -> Layout:
    size = os.stat(path).st_size
    metadata, index, loss = (_beside(path, what) for what in ("metadata", "index", "loss"))
    token_size, count = _read_metadata(metadata) if metadata else (None, None)
    last_end = _last_end(index) if index else None
    dtype = stated_dtype(path, options)
    if dtype and token_size and np.dtype(dtype).itemsize != token_size:
        raise CorpusFormatError(
            f"{path} was given dtype {dtype}, but {metadata} says that a token has {token_size} "
            "bytes: leave out the dtype"
        )
    if dtype is None and token_size is None and last_end is not None:
        token_size = next((s for s in _BY_SIZE if s * last_end == size), None)
        if token_size is None:
            # Either could be wrong, and nothing says which.
            raise malformed(
                str(index),
                "last entry",
                f"{last_end} tokens",
                f"a half or a quarter of the {size} bytes of {path}",
            )
    if dtype is None:
        dtype = _BY_SIZE[token_size] if token_size else raw_layout(path, options).dtype
    layout = headerless_layout(
        "datatrove",
        path,
        dtype,
        document_ends=partial(_document_ends, str(index.absolute())) if index else None,
        loss_mask=headerless_layout("datatrove", loss, "uint8") if loss else None,
        beside=(str(index.absolute()),) if index else (),
    )
    counts = {metadata: ("number of tokens", count), index: ("last entry", last_end)}
    if layout.loss_mask is not None:
        counts[loss] = ("number of bytes", layout.loss_mask.num_tokens)
    for file, (field, found) in counts.items():
        if found not in (None, layout.num_tokens):
            expected = f"{layout.num_tokens}, the tokens of {dtype} in {path}"
            raise malformed(str(file), field, found, expected)
    return layout


def _beside(path: Path, what: str) -> Path | None:
    file = path.with_name(f"{path.name}.{what}")
    return file if file.is_file() else None


def _read_metadata(path: Path) -> tuple[int | None, int | None]:
    """Bytes of a token, and the number of tokens; None where it does not say."""
    with path.open("rb") as file:
        lines = file.read(_MAX_METADATA).decode(errors="replace").splitlines()
    if not lines:
        raise malformed(path, "content", "empty", "'tokenizer|token size' and the number of tokens")
    _, divider, size = lines[0].rpartition("|")  # without a size in old versions
    if divider and size not in map(str, _BY_SIZE):
        raise malformed(path, "token size", repr(size), "2 or 4")
    count = lines[1] if len(lines) > 1 else None
    if count is not None and not (count.isascii() and count.isdecimal() and len(count) < 20):
        raise malformed(path, "number of tokens", repr(count), "a number")
    return int(size) if divider else None, None if count is None else int(count)


def _last_end(path: Path) -> int:
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        if size < 8 or size % 8:
            raise malformed(path, "size", f"{size} bytes", "8 for each document")
        file.seek(-8, os.SEEK_END)
        return int.from_bytes(file.read(8), "little")


def _document_ends(path: str) -> np.ndarray:
    return np.memmap(path, "<i8", "r")
