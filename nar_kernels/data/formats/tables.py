"""Which column of a table holds the ids."""

from collections.abc import Collection, Mapping
from pathlib import Path

from nar_kernels.errors import CorpusFormatError
from nar_kernels.ops.tokens import TOKEN_DTYPES

_BY_NAME = ("input_ids", "tokens")


def choose_column(
    path: Path,
    columns: Mapping[str, str],
    lists: Collection[str],
    wanted: str | None,
    numbers: Collection[str] = (),
) -> str:
    """The name of the column with the ids.

    Args:
        columns: what each holds, for error messages.
        lists: those of lists of token ids.
        wanted: the one that the user named.
        numbers: those of one id a row, which the user must name: it could be a count.

    Raises:
        CorpusFormatError: it has none, or several and no name says which.
    """
    listing = ", ".join(f"{name!r} ({kind})" for name, kind in columns.items()) or "no columns"
    if wanted is not None:
        if wanted in lists or wanted in numbers:
            return wanted
        if wanted in columns:
            raise CorpusFormatError(
                f"column {wanted!r} of {path} holds {columns[wanted]}, not token ids, which are "
                f"lists of {', '.join(TOKEN_DTYPES)}: name another, or convert it; it has {listing}"
            )
        raise CorpusFormatError(f"{path} has no column {wanted!r}: it has {listing}")
    for name in _BY_NAME:
        if name in lists:
            return name
    if len(lists) == 1:
        return next(iter(lists))
    found = "several columns" if lists else "no column"
    raise CorpusFormatError(
        f"{path} has {found} of lists of token ids ({', '.join(TOKEN_DTYPES)}): name the right one "
        f"with column=; it has {listing}"
    )
