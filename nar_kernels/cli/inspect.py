"""``nar-kernels inspect``."""

import argparse
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nar_kernels.data.corpus import Corpus
from nar_kernels.data.inspect.inspection import Decode, Inspection, inspect_corpus, no_text
from nar_kernels.data.mixture_file import MixtureSource, read_mixture
from nar_kernels.data.opened import Opened, open_source, opened_corpus
from nar_kernels.data.tokenizer import Tokenizer, open_tokenizer, tokenizer_from_json
from nar_kernels.files import check_writable
from nar_kernels.options import option_of
from nar_kernels.show import pictures
from nar_kernels.show.inspection import text

HELP = "say what a corpus holds: files, documents, ids, and whether any id is bad"

_SEQ_LEN = 256

NAMES = {
    name: option_of(name)
    for name in ("dtype", "column", "eos_id", "num_tokens", "mask_id", "seq_len")
}


def add_to(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=_run, names=NAMES)
    parser.add_argument(
        "source",
        nargs="+",
        metavar="SOURCE",
        help="what --data of train takes; or several files, folders or globs, one corpus in all",
    )
    parser.add_argument("--dtype", help="dtype of the ids in raw files, such as uint16")
    parser.add_argument("--column", help="of a table, the one with the ids")
    parser.add_argument("--eos-id", type=int, help="the id that ends each document")
    parser.add_argument(
        "--num-tokens",
        type=int,
        help="vocabulary, the mask token included: all ids must be in it (default: that of the "
        "source, else the least)",
    )
    parser.add_argument(
        "--mask-id",
        type=int,
        help="the mask token, which must not occur (default: that of the source, else the last id)",
    )
    parser.add_argument(
        "--seq-len",
        type=int,
        help=f"tokens of a window (default: those of an image, else {_SEQ_LEN})",
    )
    parser.add_argument(
        "--tokenizer",
        help="to show text: bytes, a tokenizer.json, a folder with one, or tiktoken:NAME "
        "(default: that of the source)",
    )
    parser.add_argument(
        "--picture", help="also draw how often ids occur, and how long documents are: a .png file"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def _run(arguments: argparse.Namespace) -> int:
    """Returns 1 if there are bad ids."""
    picture = None if arguments.picture is None else Path(arguments.picture)
    mixture = read_mixture(arguments.source[0]) if len(arguments.source) == 1 else None
    if picture is not None:
        if mixture is not None:
            raise ValueError(
                f"--picture is of one corpus, but {arguments.source[0]} is a mixture of "
                f"{len(mixture)}: name one of them"
            )
        if picture.suffix != ".png":
            raise ValueError(f"--picture is {picture}: it must be a .png file")
        check_writable(picture)
    if mixture is not None:
        all_facts = [{"weight": part.weight, **_of_part(arguments, part)} for part in mixture]
        if arguments.json:
            print(json.dumps({"mixture": all_facts}))
        else:
            print("\n\n".join(map(text, all_facts)))
        return int(any(facts["bad_ids"]["count"] > 0 for facts in all_facts))
    inspection = _inspect(arguments, _open(arguments))
    facts = {"sources": arguments.source, **inspection.facts}
    print(json.dumps(facts) if arguments.json else text(facts))
    if picture is not None:
        _draw(picture, Path(arguments.source[0]).name, inspection)
    return int(facts["bad_ids"]["count"] > 0)


def _of_part(arguments: argparse.Namespace, part: MixtureSource) -> dict[str, Any]:
    """The facts of one source of a mixture."""
    opened = open_source(
        part.data,
        dtype=part.dtype or arguments.dtype,
        column=part.column or arguments.column,
        eos_id=arguments.eos_id,
        folder=None,
    )
    return {"sources": [part.data], **_inspect(arguments, opened).facts}


def _inspect(arguments: argparse.Namespace, opened: Opened) -> Inspection:
    num_tokens, mask_id, seq_len = arguments.num_tokens, arguments.mask_id, arguments.seq_len
    if num_tokens is None:
        num_tokens = opened.fixed.get("num_tokens")
        mask_id = opened.own_mask_id if mask_id is None else mask_id
    return inspect_corpus(
        opened.corpus,
        seq_len=opened.fixed.get("seq_len", _SEQ_LEN) if seq_len is None else seq_len,
        num_tokens=num_tokens,
        mask_id=mask_id,
        decode=_decoder(opened, arguments.tokenizer),
    )


def _open(arguments: argparse.Namespace) -> Opened:
    """What ``train`` would open; or several sources, one after the other."""
    dtype, column, eos_id = arguments.dtype, arguments.column, arguments.eos_id
    if len(arguments.source) == 1:
        (name,) = arguments.source
        return open_source(name, dtype=dtype, column=column, eos_id=eos_id, folder=None)
    return opened_corpus(Corpus(arguments.source, dtype=dtype, column=column, eos_id=eos_id))


def _decoder(opened: Opened, name: str | None) -> Decode:
    """The text of ids: by a tokenizer of this name, or that of the corpus."""
    if name is not None:
        return partial(_text, open_tokenizer(name))
    if opened.tokenizer is not None:
        try:
            return partial(_text, tokenizer_from_json(opened.tokenizer))
        except ImportError:  # nobody asked for text
            return no_text
    are_bytes = opened.render == "ids" and opened.corpus.dtype == torch.uint8
    return _text_of_bytes if are_bytes or opened.render == "bytes" else no_text


def _text(tokenizer: Tokenizer, ids: Sequence[int]) -> str | None:
    try:
        return tokenizer.decode(ids)
    except ValueError:  # of an id that the tokenizer does not have
        return None


def _text_of_bytes(ids: Sequence[int]) -> str | None:
    """None if they look like something else."""
    decoded = _text(open_tokenizer("bytes"), ids)
    if decoded is None or not all(c.isprintable() or c in "\t\n\r" for c in decoded):
        return None
    return decoded


def _draw(path: Path, name: str, inspection: Inspection) -> None:
    ids, documents = inspection.ids, inspection.documents
    assert ids.counts is not None
    nothing = np.zeros(0, np.int64)
    pictures.corpus(
        path,
        id_counts=ids.counts,
        lengths=nothing if documents is None else documents.lengths,
        length_counts=nothing if documents is None else documents.counts,
        title=f"{name}: {ids.num_ids:,} tokens",
    )
