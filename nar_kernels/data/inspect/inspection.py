"""What a person wants to know of a corpus before training on it: :func:`inspect_corpus`.

Shapes: T corpus length in tokens, L sequence length (``seq_len``), V vocabulary (``num_tokens``).
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from nar_kernels.checks import as_int
from nar_kernels.data.corpus import Corpus
from nar_kernels.data.inspect.document_lengths import DocumentLengths, document_lengths
from nar_kernels.data.inspect.remembered import recall, remember
from nar_kernels.data.inspect.scan import BadIds, CorpusScan, find_bad, scan
from nar_kernels.data.stream import MappedFile
from nar_kernels.ops.masking import check_vocabulary

# The text of ids; None if they have none.
Decode = Callable[[Sequence[int]], str | None]

_MOST_IDS = (1 << 31) - 1  # of a vocabulary
_MOST_PLACES, _MOST_FILES, _MOST_FREQUENT = 5, 5, 8
_QUANTILES = (0, 5, 25, 50, 75, 95, 100)  # percent


class Inspection(NamedTuple):
    """Attributes:
    facts: what ``nar-kernels inspect --json`` prints; docs/data.md says what it has.
    ids: which the corpus holds, with counts.
    documents: their lengths, or None if nothing says where they end.
    """

    facts: dict[str, Any]
    ids: CorpusScan
    documents: DocumentLengths | None


def no_text(ids: Sequence[int]) -> None:
    """A :data:`Decode` where no tokenizer is known."""


def inspect_corpus(
    corpus: Corpus,
    *,
    seq_len: int = 256,
    num_tokens: int | None = None,
    mask_id: int | None = None,
    decode: Decode = no_text,
) -> Inspection:
    """Reads a corpus, in parallel; what was found in files is remembered.

    Args:
        seq_len: L, at least 1, of the windows that are counted.
        num_tokens: V, the mask token included. Default: the least that holds all ids and a mask
            token behind them.
        mask_id: which ids must not be, in [0, V). Default: V - 1.
        decode: text of ids, if a tokenizer is known.

    Raises:
        ValueError: an argument is out of range.
        CorpusFormatError: the index of the documents is not right.
        CorpusChangedError: a file has changed since it was opened.
    """
    seq_len = as_int("seq_len", seq_len)
    if seq_len < 1:
        raise ValueError(f"seq_len is {seq_len}: it must be at least 1")
    if num_tokens is not None:
        num_tokens = as_int("num_tokens", num_tokens)
        check_vocabulary(num_tokens, num_tokens - 1)
    if mask_id is not None:
        mask_id = as_int("mask_id", mask_id)
        if num_tokens is not None:
            check_vocabulary(num_tokens, mask_id)
        elif not 0 <= mask_id < _MOST_IDS:
            raise ValueError(f"mask_id is {mask_id}: it must be in [0, 2**31 - 1)")
    ids = scan(corpus)
    vocabulary = _vocabulary(ids, num_tokens, mask_id)
    bad = _bad_ids(corpus, ids, vocabulary["num_tokens"], vocabulary["mask_id"])
    documents = document_lengths(corpus)
    first = corpus.read(0, min(seq_len, len(corpus))).tolist()
    files = corpus.stream.files or []
    facts = {
        "format": ", ".join(sorted({file.layout.format for file in files})) or corpus.name,
        "dtype": str(corpus.dtype).removeprefix("torch."),
        "files": {
            "count": len(files),
            "bytes": sum(file.signature[0] for file in files),
            "first": [
                {
                    "path": file.name,
                    "bytes": file.signature[0],
                    "tokens": file.layout.num_tokens,
                }
                for file in files[:_MOST_FILES]
            ],
        },
        "tokens": len(corpus),
        "has_loss_mask": corpus.loss_mask is not None,
        "documents": None if documents is None else _documents(corpus, documents, ids, seq_len),
        "ids": _ids(ids, decode),
        "vocabulary": vocabulary,
        "bad_ids": _located(corpus, bad),
        "windows": {
            "seq_len": seq_len,
            "count": len(corpus) // seq_len,
            "tokens_of_the_tail": len(corpus) % seq_len,
        },
        "first_window": {"ids": first, "text": decode(first)},
    }
    return Inspection(facts, ids, documents)


def _vocabulary(ids: CorpusScan, num_tokens: int | None, mask_id: int | None) -> dict[str, Any]:
    is_given = num_tokens is not None
    if num_tokens is None:
        # With a mask token of its own, unless that is somewhere else.
        last = ids.max_id + 1 if mask_id is None else max(ids.max_id, mask_id)
        num_tokens = max(min(last + 1, _MOST_IDS), 2)
    mask_id = num_tokens - 1 if mask_id is None else mask_id
    least = max(ids.max_id + 1, 0)
    return {"num_tokens": num_tokens, "mask_id": mask_id, "is_given": is_given, "least": least}


def _bad_ids(corpus: Corpus, ids: CorpusScan, num_tokens: int, mask_id: int) -> BadIds:
    if ids.is_valid(num_tokens, mask_id):
        return BadIds(0, 0, [])
    what = f"ids outside [0, {num_tokens}), or {mask_id}"
    known = recall(corpus, what)
    if known is not None:
        outside, masked = known["counts"].tolist()
        return BadIds(outside, masked, known["offsets"].tolist())
    bad = find_bad(corpus, num_tokens=num_tokens, mask_id=mask_id, max_places=_MOST_PLACES)
    counts, offsets = np.array([bad.outside, bad.masked]), np.array(bad.offsets, np.int64)
    remember(corpus, what, counts=counts, offsets=offsets)
    return bad


def _located(corpus: Corpus, bad: BadIds) -> dict[str, Any]:
    first = [
        {
            "offset": offset,
            "id": int(corpus.read(offset, offset + 1)),
            **_place_in_files(corpus, offset),
        }
        for offset in bad.offsets
    ]
    return {"count": bad.count, "outside": bad.outside, "masked": bad.masked, "first": first}


def _place_in_files(corpus: Corpus, offset: int) -> dict[str, Any]:
    part, inside = corpus.stream.place(offset)
    return {"file": part.name if isinstance(part, MappedFile) else None, "offset_in_file": inside}


def _documents(
    corpus: Corpus, documents: DocumentLengths, ids: CorpusScan, seq_len: int
) -> dict[str, Any]:
    return {
        "count": documents.num_documents,
        "empty": documents.num_empty,
        "eos_id": corpus.eos_id,
        "eos_occurs": None if corpus.eos_id is None else ids.has(corpus.eos_id),
        "mean_length": documents.mean,
        "length_percentiles": {str(q): documents.quantile(q / 100) for q in _QUANTILES},
        "that_hold_a_window": documents.at_least(seq_len),
    }


def _ids(ids: CorpusScan, decode: Decode) -> dict[str, Any]:
    assert ids.counts is not None
    # Of equal ones, the least ids.
    most = np.argsort(-ids.counts, kind="stable")[:_MOST_FREQUENT]
    frequent = [(int(id), int(ids.counts[id])) for id in most if ids.counts[id]]
    all_counted = ids.min_id >= 0 and ids.max_id < len(ids.counts)
    return {
        "min": ids.min_id,
        "max": ids.max_id,
        "distinct": int((ids.counts > 0).sum()) if all_counted else None,
        "most_frequent": [
            {"id": id, "count": count, "share": count / ids.num_ids, "text": decode([id])}
            for id, count in frequent
        ],
    }
