"""The layout of a corpus file, and the checks that all formats share."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from nar_kernels.errors import CorpusFormatError
from nar_kernels.ops.tokens import TOKEN_DTYPES


class Layout(NamedTuple):
    """Location of the tokens in a file."""

    path: str
    dtype: str
    offset: int  # bytes before the first token
    length: int  # tokens


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
