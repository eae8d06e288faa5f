"""What ``--data`` names, opened but not cut into windows yet: :func:`open_source`.

Built-in data sets need no download.
"""

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from nar_kernels.data.corpus import Corpus
from nar_kernels.data.formats.detect import SUFFIXES, exists, holds_ids
from nar_kernels.data.formats.prepared import has_labels, labels_of
from nar_kernels.data.sequence_spec import Render
from nar_kernels.data.tokenizer import Tokenizer
from nar_kernels.extras import import_extra

NUM_BYTES = 256

# Taken for token ids by name, as raw ones must be; other files are bytes of text, unless they say
# that they hold ids.
_ID_SUFFIXES = (*SUFFIXES, ".idx")

# scikit-learn's digits: 1797 images of 8 x 8 pixels in 0 .. 16.
_DIGITS_SHAPE, _DIGITS_LEVELS, _DIGITS_HELD_OUT = (8, 8), 17, 180


class Opened(NamedTuple):
    """A corpus, and what it says of itself.

    Attributes:
        fixed: the options that it determines, of ``num_tokens``, ``seq_len`` and ``stride``.
        num_held_out: default for that option.
        own_mask_id, tokenizer, image_shape: as of ``SequenceSpec``.
        labels: reads integers ``[N]``, the class of each image, if it holds them.
    """

    corpus: Corpus
    render: Render
    fixed: dict[str, int]
    num_held_out: int | None = None
    image_shape: tuple[int, int] | None = None
    own_mask_id: int | None = None
    tokenizer: str | None = None
    labels: Callable[[], np.ndarray] | None = None


def open_source(
    name: str,
    *,
    dtype: str | None,
    column: str | None,
    eos_id: int | None,
    folder: Path | None,
) -> Opened:
    """Opens a built-in data set, or whatever :class:`Corpus` reads; any other file is bytes.

    Args:
        name: ``"digits"``, ``"text"``, or a path or glob.
        dtype, column, eos_id: as of ``Corpus``.
        folder: where else to look for a relative path.

    Raises:
        ValueError, CorpusFormatError, FileNotFoundError: the source or an option is wrong.
        ImportError: ``digits`` without scikit-learn.
    """
    if name in BUILT_IN:
        for option, value in (("dtype", dtype), ("column", column), ("eos_id", eos_id)):
            if value is not None:
                what = "has no documents" if option == "eos_id" else "has its own"
                raise ValueError(f"{option} is {value}, but {name} {what}: leave it out")
        return BUILT_IN[name]()
    path = _find(name, folder)
    if dtype is None and _is_text(path):
        corpus = Corpus(path, dtype="uint8", column=column, eos_id=eos_id)
        return Opened(corpus, "bytes", {"num_tokens": NUM_BYTES + 1})
    return opened_corpus(Corpus(path, dtype=dtype, column=column, eos_id=eos_id))


def opened_corpus(corpus: Corpus) -> Opened:
    """A corpus of token ids, with what the folders of ``nar-kernels prepare`` say of it."""
    if not corpus.manifests:
        return Opened(corpus, "ids", {})
    manifest = corpus.manifests[0]  # the others say the same
    fixed = {"num_tokens": manifest.num_tokens}
    render: Render = "ids"
    tokenizer = None
    if manifest.image_shape is not None:
        size = manifest.image_shape[0] * manifest.image_shape[1]
        render, fixed = "image", fixed | {"seq_len": size, "stride": size}
    elif manifest.tokenizer is not None:
        render = "bytes" if manifest.tokenizer.name == "bytes" else "text"
        tokenizer = manifest.tokenizer_json() if render == "text" else None
    own_mask_id = None if manifest.mask_id == manifest.num_tokens - 1 else manifest.mask_id
    return Opened(
        corpus,
        render,
        fixed,
        image_shape=manifest.image_shape,
        own_mask_id=own_mask_id,
        tokenizer=tokenizer,
        labels=partial(labels_of, corpus.manifests) if has_labels(corpus.manifests) else None,
    )


def with_tokenizer(name: str, opened: Opened, tokenizer: Tokenizer) -> Opened:
    """A source whose ids are those of a tokenizer. Its mask token, if it has none, gets the id
    behind them.

    Raises:
        ValueError: the source is something else, or says another tokenizer.
    """
    if opened.tokenizer not in (None, tokenizer.to_json()):
        raise ValueError(
            f"tokenizer is {tokenizer.name}, but {name} was prepared with another: leave it out, "
            "or prepare the data with this one"
        )
    if opened.tokenizer is not None:
        return opened
    if opened.render != "ids":
        raise ValueError(
            f"tokenizer is {tokenizer.name}, but {name} holds {opened.render}: name data of its "
            "token ids, or run `nar-kernels prepare` on text"
        )
    size, mask_id = tokenizer.vocab_size, tokenizer.mask_id
    return opened._replace(
        render="text",
        fixed={**opened.fixed, "num_tokens": size + (mask_id is None)},
        own_mask_id=mask_id,
        tokenizer=tokenizer.to_json(),
    )


def _open_digits() -> Opened:
    digits = import_extra("sklearn.datasets").load_digits()
    images = digits.images.astype(np.uint8)
    assert images.shape[1:] == _DIGITS_SHAPE
    size = _DIGITS_SHAPE[0] * _DIGITS_SHAPE[1]
    return Opened(
        Corpus(images.reshape(-1)),
        "image",
        {"num_tokens": _DIGITS_LEVELS + 1, "seq_len": size, "stride": size},
        num_held_out=_DIGITS_HELD_OUT,
        image_shape=_DIGITS_SHAPE,
        labels=lambda: digits.target,
    )


def _open_text() -> Opened:
    """English prose in the standard library: the language reference that ``help()`` shows."""
    from pydoc_data.topics import topics

    text = "\n\n".join(topics[name] for name in sorted(topics))
    ids = np.frombuffer(text.encode(), dtype=np.uint8)
    return Opened(Corpus(ids), "bytes", {"num_tokens": NUM_BYTES + 1})


BUILT_IN = {"digits": _open_digits, "text": _open_text}


def _is_text(path: str) -> bool:
    return os.path.isfile(path) and Path(path).suffix not in _ID_SUFFIXES and not holds_ids(path)


def _find(name: str, folder: Path | None) -> str:
    """The name, or that in ``folder``, whichever names something."""
    places = [name]
    if folder is not None and not os.path.isabs(name):
        places.append(os.path.join(folder, name))
    for place in places:
        if exists(place):
            return place
    looked = f" (looked for {' and '.join(os.path.abspath(place) for place in places)})"
    raise FileNotFoundError(
        f"there is no file {name}{looked}, and the built-in data sets are {' and '.join(BUILT_IN)}"
    )
