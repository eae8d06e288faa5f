"""Encodings of the package ``tiktoken``, such as ``tiktoken:gpt2``."""

import base64
import os
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from functools import cached_property
from typing import Any

import numpy as np

from nar_kernels.data.tokenizers import boundaries
from nar_kernels.data.tokenizers.base import Tokenizer, find_eos, find_mask, spans_of_bytes
from nar_kernels.extras import import_extra

_reading = threading.Lock()


class TiktokenTokenizer(Tokenizer):
    """A ``tiktoken.Encoding``."""

    kind = "tiktoken"

    def __init__(self, encoding: Any) -> None:
        self._encoding = encoding
        self.name = f"tiktoken:{encoding.name}"
        self.vocab_size = encoding.max_token_value + 1
        self._special: dict[str, int] = dict(encoding._special_tokens)
        roles = {"eos_token": find_eos(self._special), "mask_token": find_mask(self._special)}
        self.special_tokens = {role: token for role, token in roles.items() if token is not None}
        self.eos_id, self.mask_id = (
            self._special.get(self.special_tokens.get(role, "")) for role in roles
        )
        self.piece_boundary = boundaries.of_pattern(encoding._pat_str, self._special)

    @cached_property
    def without_mask(self) -> Tokenizer:
        other = copy(self)
        other._special = {t: id_ for t, id_ in self._special.items() if id_ != self.mask_id}
        return other

    def encode_batch(
        self, texts: Sequence[str], *, parse_special: bool = True
    ) -> list[Sequence[int]]:
        return [ids.tolist() for ids in self.encode_arrays(texts, parse_special=parse_special)]

    def encode_arrays(
        self, texts: Sequence[str], *, parse_special: bool = True
    ) -> list[np.ndarray]:
        allowed = set(self._special) if parse_special else set()
        return [
            self._encoding.encode_to_numpy(text, allowed_special=allowed, disallowed_special=())
            for text in texts
        ]

    def encode_with_spans(
        self, text: str, *, parse_special: bool = True
    ) -> tuple[Sequence[int], np.ndarray]:
        (ids,) = self.encode_batch([text], parse_special=parse_special)
        lengths = [len(self._encoding.decode_single_token_bytes(id_)) for id_ in ids]
        return ids, spans_of_bytes(text, np.array(lengths, np.int64))

    def _knows(self, id_: int) -> bool:
        try:
            self._encoding.decode_single_token_bytes(id_)
        except (KeyError, OverflowError):
            return False
        return True

    def _decode(self, ids: list[int]) -> str:
        return self._encoding.decode(ids, errors="replace")

    def to_json(self) -> str:
        ranks = self._encoding._mergeable_ranks.items()
        return self._as_json(
            pattern=self._encoding._pat_str,
            ranks={base64.b64encode(token).decode(): rank for token, rank in ranks},
            special_tokens=self._special,
        )

    @classmethod
    def from_fields(cls, fields: dict[str, Any]) -> "TiktokenTokenizer":
        """From those of :meth:`to_json`."""
        ranks = fields["ranks"].items()
        encoding = import_extra("tiktoken", None).Encoding(
            fields["name"].removeprefix("tiktoken:"),
            pat_str=fields["pattern"],
            mergeable_ranks={base64.b64decode(token): rank for token, rank in ranks},
            special_tokens=fields["special_tokens"],
        )
        return cls(encoding)


def open_encoding(name: str) -> TiktokenTokenizer:
    """The encoding ``name`` of tiktoken, from its cache: nothing is downloaded.

    Raises:
        ValueError: no such encoding.
        FileNotFoundError: its files are not in the cache; the message says which, and where.
        ImportError: without tiktoken.
    """
    tiktoken = import_extra("tiktoken", None)
    if name not in (names := tiktoken.list_encoding_names()):
        raise ValueError(f"tiktoken has no encoding {name!r}: it has {', '.join(names)}")

    def missing(file: str) -> bytes:
        raise FileNotFoundError(
            f"tiktoken:{name} needs {file.rpartition('/')[2]}, which is not in {_cache()}, and "
            'nothing is downloaded here: run `python -c "import tiktoken; '
            f"tiktoken.get_encoding('{name}')\"` where there is a network, and copy that folder "
            "(TIKTOKEN_CACHE_DIR names another one)"
        )

    with _reading_by(missing):
        return TiktokenTokenizer(tiktoken.get_encoding(name))


@contextmanager
def _reading_by(read_file: Callable[[str], bytes]) -> Iterator[None]:
    """What tiktoken calls for a file that its cache lacks, or has with another content."""
    load = import_extra("tiktoken.load", None)
    with _reading:  # of one thread at a time, or one would put back what another has put there
        original = load.read_file
        load.read_file = read_file
        try:
            yield
        finally:
            load.read_file = original


def _cache() -> str:
    """Where tiktoken looks, as in its load.py."""
    for variable in ("TIKTOKEN_CACHE_DIR", "DATA_GYM_CACHE_DIR"):
        if variable in os.environ:
            return os.environ[variable]
    return os.path.join(tempfile.gettempdir(), "data-gym-cache")
