"""What training, generation and preparing need of a tokenizer: :class:`Tokenizer`."""

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

# Of tokenizers that do not say which of their special tokens these are.
_EOS_TOKENS = ("<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>", "<｜end▁of▁sentence｜>")
_MASK_TOKENS = ("[MASK]", "<mask>", "<|mdm_mask|>", "<|mask|>")

FORMAT, _VERSION = "nar_kernels tokenizer", 1


class Tokenizer(ABC):
    """Text to token ids and back.

    Attributes:
        kind: of the JSON of :meth:`to_json`.
        name: as a user names it, such as ``"bytes"``, ``"tiktoken:gpt2"`` or a path.
        vocab_size: ids are in [0, vocab_size).
        eos_id: the id that ends a document, or None.
        mask_id: of the tokenizer's own mask token, such as BERT's ``[MASK]``, or None.
        chat_template: Jinja template of a conversation, or None.
        special_tokens: for that template: names such as ``"bos_token"``, and their texts.
        piece_boundary: matches UTF-8 text up to where it may be cut: the ids of the pieces, put
            together, are those of the text. None: the text must be encoded as a whole.
    """

    kind: ClassVar[str]
    name: str
    vocab_size: int
    eos_id: int | None
    mask_id: int | None
    chat_template: str | None = None
    special_tokens: Mapping[str, str] = {}
    piece_boundary: re.Pattern[bytes] | None = None

    @abstractmethod
    def encode_batch(
        self, texts: Sequence[str], *, parse_special: bool = True
    ) -> list[Sequence[int]]:
        """The ids of each text. Nothing is added to it, such as an end or a start.

        Args:
            parse_special: whether the text of a special token, such as ``<|endoftext|>``, is that
                token. If false, it is text like any other.

        Raises:
            UnicodeEncodeError: a text has a lone surrogate.
            ValueError: the tokenizer cannot encode a text.
        """

    @property
    def without_mask(self) -> "Tokenizer":
        """This tokenizer, but that the text of its mask token is text like any other, for
        :meth:`encode_arrays` and :meth:`encode_with_spans`.

        Raises:
            ValueError: it has no mask token.
        """
        raise ValueError(f"{self.name} has no mask token")

    def encode_arrays(
        self, texts: Sequence[str], *, parse_special: bool = True
    ) -> list[np.ndarray]:
        """:meth:`encode_batch`, each as an array of integers: quicker where there are many."""
        return [
            np.asarray(ids, np.int64)
            for ids in self.encode_batch(texts, parse_special=parse_special)
        ]

    @abstractmethod
    def encode_with_spans(
        self, text: str, *, parse_special: bool = True
    ) -> tuple[Sequence[int], np.ndarray]:
        """The ids ``[L]`` of a text, and the characters that each stands for: int64 ``[L, 2]``, the
        first of them and the first after them. Tokens that share a character have it both."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, special tokens included; bytes that are no UTF-8 become U+FFFD.

        Raises:
            ValueError: an id is none of the vocabulary, such as a mask id beyond it.
        """
        numbers = [int(id_) for id_ in ids]
        for id_ in numbers:
            if not self._knows(id_):
                raise ValueError(
                    f"token id {id_} is none of {self.name}, whose ids are in "
                    f"[0, {self.vocab_size}): leave out what is no text, such as masks"
                )
        return self._decode(numbers)

    def _knows(self, id_: int) -> bool:
        return 0 <= id_ < self.vocab_size

    @abstractmethod
    def _decode(self, ids: list[int]) -> str: ...

    @abstractmethod
    def to_json(self) -> str:
        """All of it, for :func:`nar_kernels.data.tokenizer.tokenizer_from_json`."""

    def _as_json(self, **fields: Any) -> str:
        content: dict[str, Any] = {"format": FORMAT, "version": _VERSION, "kind": self.kind}
        content |= {"name": self.name, "chat_template": self.chat_template}
        return json.dumps({**content, **fields}, ensure_ascii=False)


def read_fields(text: str, kinds: Collection[str]) -> dict[str, Any] | None:
    """The fields of :meth:`Tokenizer._as_json`; None if it is other JSON.

    Raises:
        ValueError: not JSON, or of a later version.
    """
    try:
        content = json.loads(text)
    except ValueError as error:
        raise ValueError(f"this is no tokenizer: it is not JSON ({error})") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        return None
    if content.get("version") != _VERSION or content.get("kind") not in kinds:
        raise ValueError(
            f"this tokenizer is {content.get('kind')!r}, version {content.get('version')!r}: known "
            f"are {', '.join(kinds)}, version {_VERSION}; a newer nar_kernels wrote it"
        )
    return content


def find_eos(tokens: Mapping[str, int]) -> str | None:
    """Which of some special tokens ends a document, by what is usual."""
    return next((token for token in _EOS_TOKENS if token in tokens), None)


def find_mask(tokens: Mapping[str, int]) -> str | None:
    """Which of some special tokens is the mask, by what is usual."""
    return next((token for token in _MASK_TOKENS if token in tokens), None)


def spans_of_bytes(text: str, lengths: np.ndarray) -> np.ndarray:
    """The spans of :meth:`Tokenizer.encode_with_spans` of tokens that have ``lengths`` bytes."""
    content = np.frombuffer(text.encode(), np.uint8)
    # How many characters begin up to and including each byte.
    begun = np.cumsum((content & 0xC0) != 0x80)
    ends = np.cumsum(lengths)
    return np.stack([begun[ends - lengths] - 1, begun[ends - 1]], axis=1)
