"""``bytes``: each byte of UTF-8 is a token."""

import re
from collections.abc import Sequence

import numpy as np

from nar_kernels.data.tokenizers.base import Tokenizer, spans_of_bytes


class ByteTokenizer(Tokenizer):
    """256 ids, no special tokens."""

    kind = "bytes"
    name = "bytes"
    vocab_size = 256
    eos_id = None
    mask_id = None
    piece_boundary = re.compile(rb"(?=[\x00-\x7f\xc0-\xff])")  # between characters

    def encode_batch(
        self, texts: Sequence[str], *, parse_special: bool = True
    ) -> list[Sequence[int]]:
        return [list(text.encode()) for text in texts]

    def encode_arrays(
        self, texts: Sequence[str], *, parse_special: bool = True
    ) -> list[np.ndarray]:
        return [np.frombuffer(text.encode(), np.uint8) for text in texts]

    def encode_with_spans(
        self, text: str, *, parse_special: bool = True
    ) -> tuple[Sequence[int], np.ndarray]:
        ids = list(text.encode())
        return ids, spans_of_bytes(text, np.ones(len(ids), np.int64))

    def _decode(self, ids: list[int]) -> str:
        return bytes(ids).decode(errors="replace")

    def to_json(self) -> str:
        return self._as_json()
