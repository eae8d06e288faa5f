"""What ``nar-kernels inspect`` prints."""

import math
import os
import textwrap
from collections.abc import Sequence
from typing import Any

_WIDTH = 100  # characters
_LABEL = 16
_MOST_LINES = 3  # of a window
_NOT_ALL_COUNTED = "(of ids in [0, 2**20), the others aside)"
_UNITS = ("KB", "MB", "GB", "TB", "PB")


def text(facts: dict[str, Any]) -> str:
    """Args:
    facts: what ``--json`` prints.
    """
    rows: dict[str, Sequence[str]] = {
        "format": [f"{facts['format']}, {facts['dtype']}"],
        "files": _files(facts["files"]),
        "tokens": [f"{facts['tokens']:,}" + ", with a loss mask" * facts["has_loss_mask"]],
        "documents": _documents(facts),
        "windows": _windows(facts),
        "ids": _ids(facts["ids"]),
        "vocabulary": _vocabulary(facts["vocabulary"]),
        "bad ids": _bad_ids(facts),
        "most frequent": _most_frequent(facts["ids"]),
        "first window": _first_window(facts["first_window"]),
    }
    first, *others = facts["sources"]
    lines = [f"{first} and {len(others):,} more" if others else first]
    for label, values in rows.items():
        for i, value in enumerate(values):
            lines.append(f"  {'' if i else label:<{_LABEL}}{value}")
    return "\n".join(lines)


def _files(files: dict[str, Any]) -> list[str]:
    if files["count"] < 2:
        return [_bytes(files["bytes"])] if files["count"] else []
    first = [(os.path.basename(f["path"]), f"{f['tokens']:,} tokens") for f in files["first"]]
    more = files["count"] - len(first)
    return [
        f"{files['count']:,}, {_bytes(files['bytes'])}",
        *_aligned(first),
        *([f"and {more:,} more"] if more else []),
    ]


def _documents(facts: dict[str, Any]) -> list[str]:
    documents = facts["documents"]
    if documents is None:
        return ["unknown: --eos-id says which id ends them"] if facts["files"]["count"] else []
    eos_id, ends = documents["eos_id"], ""
    if eos_id is not None:
        ends = f" that end with id {eos_id}"
        if documents["eos_occurs"] is False:
            ends = f": id {eos_id}, which is to end them, does not occur"
    empty = f", {documents['empty']:,} of them empty" if documents["empty"] else ""
    at = {percent: f"{n:,}" for percent, n in documents["length_percentiles"].items()}
    lengths = f"of {at['100']} tokens each"
    if at["0"] != at["100"]:
        most = f"nine of ten from {at['5']} to {at['95']}"
        lengths = f"median {at['50']} tokens, {most}, longest {at['100']}"
    return [f"{documents['count']:,}{ends}{empty}", lengths]


def _windows(facts: dict[str, Any]) -> list[str]:
    windows, documents = facts["windows"], facts["documents"]
    tail = windows["tokens_of_the_tail"]
    lines = [
        f"{windows['count']:,} of {windows['seq_len']:,} tokens"
        + (f"; {tail:,} left over at the end" if tail else "")
    ]
    if documents is not None:
        lines.append(f"documents with a whole one: {documents['that_hold_a_window']:,}")
    return lines


def _ids(ids: dict[str, Any]) -> list[str]:
    distinct = "" if ids["distinct"] is None else f", {ids['distinct']:,} different ones"
    return [f"{ids['min']:,} to {ids['max']:,}{distinct}"]


def _vocabulary(vocabulary: dict[str, Any]) -> list[str]:
    num_tokens, mask_id = vocabulary["num_tokens"], vocabulary["mask_id"]
    if vocabulary["is_given"]:
        return [f"num_tokens {num_tokens}, mask_id {mask_id}"]
    least, more = vocabulary["least"], "more if the tokenizer has ids that do not occur here"
    if mask_id == least:
        return [
            f"{least:,} at least; with a mask token --num-tokens {num_tokens}",
            f"(the default of train; {more})",
        ]
    return [f"{least:,} at least; with --mask-id {mask_id}, --num-tokens {num_tokens}", f"({more})"]


def _bad_ids(facts: dict[str, Any]) -> list[str]:
    bad, vocabulary = facts["bad_ids"], facts["vocabulary"]
    if not bad["count"]:
        return ["none"]
    outside = f"{bad['outside']:,} outside [0, {vocabulary['num_tokens']})"
    masked = f"{bad['masked']:,} equal to mask_id {vocabulary['mask_id']}"
    why = [what for what, n in ((outside, bad["outside"]), (masked, bad["masked"])) if n]
    several = facts["files"]["count"] > 1
    places = [
        (
            f"{place['id']}",
            f"at offset {place['offset']:,}",
            f"{os.path.basename(place['file'])}, {place['offset_in_file']:,}" if several else "",
        )
        for place in bad["first"]
    ]
    more = bad["count"] - len(places)
    return [", ".join(why), *_aligned(places, right=2), *([f"and {more:,} more"] if more else [])]


def _most_frequent(ids: dict[str, Any]) -> list[str]:
    rows = [
        (
            str(m["id"]),
            f"{m['count']:,}",
            f"{m['share']:.2%}",
            "" if m["text"] is None else repr(m["text"]),
        )
        for m in ids["most_frequent"]
    ]
    lines = _aligned(rows, right=3)
    return lines if ids["distinct"] is not None else [*lines, _NOT_ALL_COUNTED]


def _first_window(window: dict[str, Any]) -> list[str]:
    shown = window["text"]
    shown = " ".join(map(str, window["ids"])) if shown is None else repr(shown)
    width = _WIDTH - _LABEL - 2
    return textwrap.wrap(shown, width, max_lines=_MOST_LINES, placeholder=" ...")


def _aligned(rows: Sequence[tuple[str, ...]], right: int = 0) -> list[str]:
    """Columns of a table; the first ``right`` ones are numbers."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if i < right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _bytes(count: int) -> str:
    if count < 1000:
        return f"{count} bytes"
    rounded = float(f"{count:.3g}")  # 999,500 bytes are 1 MB
    power = min(int(math.log10(rounded)) // 3, len(_UNITS))
    return f"{rounded / 1000**power:.3g} {_UNITS[power - 1]}"
