"""Apache Parquet, such as that of the Hugging Face hub: a column of lists of integers.

Each row is a document. Its values are encoded, and mostly compressed, so they go through the cache.
Needs pyarrow.
"""

import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from nar_kernels.data.formats.arrow import arrow_errors, column_of_ids, values_of
from nar_kernels.data.formats.base import Layout, ReadOptions, check_dtype_is_not_given
from nar_kernels.data.formats.cache import Decoded, cached_layout
from nar_kernels.extras import import_extra

# Text could begin with the magic number too.
_PARQUET = re.compile(rb"PAR1([\0-\x08\x0e-\x1f]|.{4,}PAR1\Z)", re.DOTALL)

_BATCH_TOKENS = 1 << 22


def is_parquet(path: Path, ends: bytes) -> bool:
    return bool(_PARQUET.match(ends))


def parquet_layout(path: Path, options: ReadOptions) -> Layout:
    check_dtype_is_not_given(path, options, "a Parquet file, which says the types of its columns")
    with arrow_errors(path), _open(path) as file:
        column, dtype, has_rows = column_of_ids(path, file.schema_arrow, options)
    return cached_layout("parquet", path, column, dtype, has_rows, partial(_decode, path, column))


def _open(path: Path) -> Any:
    parquet = import_extra("pyarrow.parquet", "arrow")
    # A buffer: column chunks are read piece by piece.
    return parquet.ParquetFile(str(path), pre_buffer=False, buffer_size=1 << 20)


def _decode(path: Path, column: str) -> Iterator[Decoded]:
    with arrow_errors(path), _open(path) as file:
        for group in range(file.num_row_groups):
            rows = _rows_of_a_batch(file.metadata.row_group(group), column)
            for batch in file.iter_batches(rows, [group], columns=[column], use_threads=False):
                values = values_of(path, batch.column(column))
                yield values.array.to_numpy(), values.ends


def _rows_of_a_batch(group: Any, column: str) -> int:
    """So that memory does not grow with the length of documents."""
    columns = map(group.column, range(group.num_columns))
    ids = (c.num_values for c in columns if c.path_in_schema.split(".")[0] == column)
    return max(_BATCH_TOKENS * group.num_rows // max(next(ids, 0), 1), 1)
