"""``nar-kernels inspect``."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from nar_kernels.data.corpus import Corpus
from nar_kernels.data.inspection import Decode, Inspection, inspect_corpus, no_text
from nar_kernels.files import check_writable
from nar_kernels.show import pictures
from nar_kernels.show.inspection import text

HELP = "say what a corpus holds: files, documents, ids, and whether any id is bad"

NAMES = {
    name: f"--{name.replace('_', '-')}"
    for name in ("dtype", "column", "eos_id", "num_tokens", "mask_id", "seq_len", "picture")
}


def add_to(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=_run, names=NAMES)
    parser.add_argument(
        "source", nargs="+", metavar="SOURCE", help="files, folders or globs, one corpus in all"
    )
    parser.add_argument("--dtype", help="dtype of the ids in raw files, such as uint16")
    parser.add_argument("--column", help="of a table, the one with the ids")
    parser.add_argument("--eos-id", type=int, help="the id that ends each document")
    parser.add_argument(
        "--num-tokens",
        type=int,
        help="vocabulary with the mask token, whose ids are checked (default: the least that fits)",
    )
    parser.add_argument(
        "--mask-id", type=int, help="the mask token, which must not occur (default: the last id)"
    )
    parser.add_argument(
        "--seq-len", type=int, default=256, help="tokens of a window (default: 256)"
    )
    parser.add_argument(
        "--picture", help="also draw how often ids occur, and how long documents are: a .png file"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def _run(arguments: argparse.Namespace) -> int:
    """Returns 1 if there are bad ids."""
    picture = None if arguments.picture is None else Path(arguments.picture)
    if picture is not None:
        if picture.suffix != ".png":
            raise ValueError(f"--picture is {picture}: it must be a .png file")
        check_writable(picture)
    sources = arguments.source
    corpus = Corpus(
        sources[0] if len(sources) == 1 else sources,
        dtype=arguments.dtype,
        column=arguments.column,
        eos_id=arguments.eos_id,
    )
    inspection = inspect_corpus(
        corpus,
        seq_len=arguments.seq_len,
        num_tokens=arguments.num_tokens,
        mask_id=arguments.mask_id,
        decode=_decoder(corpus),
    )
    facts = inspection.facts
    print(json.dumps(facts) if arguments.json else text(facts))
    if picture is not None:
        _draw(picture, inspection)
    return int(facts["bad_ids"]["count"] > 0)


def _decoder(corpus: Corpus) -> Decode:
    return _text_of_bytes if corpus.dtype == torch.uint8 else no_text


def _text_of_bytes(ids: Sequence[int]) -> str | None:
    """None if they look like something else."""
    decoded = bytes(ids).decode(errors="replace")
    is_text = all(c.isprintable() or c in "\t\n\r" for c in decoded)
    return decoded if is_text else None


def _draw(path: Path, inspection: Inspection) -> None:
    ids, documents = inspection.ids, inspection.documents
    assert ids.counts is not None
    nothing = np.zeros(0, np.int64)
    pictures.corpus(
        path,
        id_counts=ids.counts,
        lengths=nothing if documents is None else documents.lengths,
        length_counts=nothing if documents is None else documents.counts,
        title=f"{Path(inspection.facts['source']).name}: {ids.num_ids:,} tokens",
    )
