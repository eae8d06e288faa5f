"""Apache Parquet, such as that of the Hugging Face hub: a column of lists of integers.

Each row is a document. Its values are encoded, and mostly compressed, so they go through the cache.
Needs pyarrow.
"""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from nar_kernels.data.formats.arrow import arrow_errors, column_of_ids, values_of
from nar_kernels.data.formats.base import Layout, ReadOptions, check_dtype_is_not_given
from nar_kernels.data.formats.cache import Decoded, cached_layout
from nar_kernels.extras import import_extra

# Text could begin with the magic number too.
_PARQUET = re.compile(rb"PAR1([\0-\x08\x0e-\x1f]|.{4,}PAR1\Z)", re.DOTALL)

# Few, since documents may be long. (The metadata of a column says how long they are; but to ask
# for it ends the process if it is damaged, with pyarrow 26.)
_BATCH_ROWS = 64


def is_parquet(path: Path, ends: bytes) -> bool:
    return bool(_PARQUET.match(ends))


def parquet_layout(path: Path, options: ReadOptions) -> Layout:
    check_dtype_is_not_given(path, options, "a Parquet file, which says the types of its columns")
    with arrow_errors(path), _open(path) as file:
        column, dtype, has_rows = column_of_ids(path, file.schema_arrow, options)
    return cached_layout("parquet", path, column, dtype, has_rows, partial(_decode, path, column))


@contextmanager
def _open(path: Path) -> Iterator[Any]:
    pa = import_extra("pyarrow", "arrow")
    parquet = import_extra("pyarrow.parquet", "arrow")
    # As bytes: pyarrow takes a str for UTF-8. A buffer: column chunks are read piece by piece.
    with pa.OSFile(os.fsencode(path)) as file:
        yield parquet.ParquetFile(file, pre_buffer=False, buffer_size=1 << 20)


def _decode(path: Path, column: str) -> Iterator[Decoded]:
    with arrow_errors(path), _open(path) as file:
        for group in range(file.num_row_groups):
            batches = file.iter_batches(_BATCH_ROWS, [group], columns=[column], use_threads=False)
            for batch in batches:
                values = values_of(path, batch.column(column))
                yield values.array.to_numpy(), values.ends
