r"""Byte-level BPE of the package tokenizers, encoded by tiktoken: the same ids, but sooner.

Both split a text by a regular expression, and in each part merge the two neighbours of the lowest
rank, the leftmost ones first, until there are none. tokenizers takes ranks from a list of pairs,
tiktoken from a table of tokens: it merges any two neighbours that together are a token. That is the
same if every token, encoded by itself, is that token, by a pair of its own. For say ``a`` and ``b``
are neighbours, and ``ab`` is a token. No merge has crossed the ends of ``ab`` so far, so those
within it were, in order, the first ones of ``ab`` encoded by itself. What is left to do there is to
merge ``a`` and ``b``: they are its pair.

The engines of the regular expressions know different versions of Unicode. Text with characters
newer than Unicode 3.2, other than pictures, is left to tokenizers; so is text with added tokens.
"""

import re
import unicodedata
from functools import cache
from importlib.util import find_spec
from typing import Any

import numpy as np

from nar_kernels.data.tokenizers import boundaries
from nar_kernels.extras import import_extra

# By the expression of a tokenizer: one that splits in the same places, and is quicker.
_EXPRESSIONS = {
    boundaries.GPT2: boundaries.R50K,
    boundaries.LLAMA3: boundaries.LLAMA3,
    boundaries.QWEN2: boundaries.QWEN2,
}
_OTHER_PLANES = (
    (0x1F300, 0x1FAFF),  # pictures: neither letters nor numbers nor blanks in any version
    (0x20000, 0x2A6D6),  # CJK
)


class FastBpe:
    """Encodes most texts as a tokenizer does; see :func:`fast_bpe`."""

    def __init__(self, encoding: Any, ids: np.ndarray, added: list[dict[str, Any]]) -> None:
        self._encoding, self._ids = encoding, ids
        self._unknown = _unknown_characters()
        all_added = [token["content"] for token in added]
        not_special = [token["content"] for token in added if not token["special"]]
        self._added = {True: _any_of(all_added), False: _any_of(not_special)}

    def encode(self, text: str, parse_special: bool) -> np.ndarray | None:
        """The ids of a text; None: the tokenizer itself must encode it."""
        if not text.isascii() and self._unknown.search(text):
            return None
        if self._added[parse_special].search(text):
            return None
        try:
            ranks = self._encoding.encode_to_numpy(text, disallowed_special=())
        except ValueError:  # its regular expressions give up at a million blanks in a row
            return None
        return self._ids[ranks]


def fast_bpe(spec: dict[str, Any]) -> FastBpe | None:
    """For a ``tokenizer.json``; None if it is not known to give the same ids, or without tiktoken.
    Takes a second for a hundred thousand tokens."""
    expression = _expression(spec)
    ranks = None if expression is None else _ranks(spec["model"])
    if ranks is None or find_spec("tiktoken") is None:
        return None
    encoding = import_extra("tiktoken", "prepare").Encoding(
        "fast",
        pat_str=expression,
        mergeable_ranks=dict(zip(ranks, range(len(ranks)), strict=True)),
        special_tokens={},
    )
    return FastBpe(encoding, np.array(list(ranks.values()), np.uint32), spec["added_tokens"])


def _expression(spec: dict[str, Any]) -> str | None:
    """What tiktoken is to split texts by."""
    step = spec["pre_tokenizer"]
    if spec["normalizer"] is not None or step is None:
        return None
    level, pattern = step, boundaries.GPT2
    if step["type"] == "Sequence" and len(step["pretokenizers"]) == 2:
        split, level = step["pretokenizers"]
        if split["type"] != "Split" or split["behavior"] != "Isolated" or split["invert"]:
            return None
        pattern = split["pattern"].get("Regex")
    if level["type"] != "ByteLevel" or level["add_prefix_space"]:
        return None
    splits_again = level is not step
    if level["use_regex"] == splits_again:
        return None
    return _EXPRESSIONS.get(pattern)


def _ranks(model: dict[str, Any]) -> dict[bytes, int] | None:
    """The id of each token, by its bytes, in the order in which they merge, bytes first. None if
    tiktoken would merge otherwise."""
    plain = ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix")
    if model["type"] != "BPE" or any(model[name] for name in plain):
        return None
    vocab: dict[str, int] = model["vocab"]
    letters = _letters()
    merged = [a + b for a, b in model["merges"]]
    tokens = [*letters, *merged]
    if len(set(tokens)) != len(tokens) or not vocab.keys() >= set(tokens):
        return None
    if model["ignore_merges"] and len(tokens) != len(vocab):
        return None
    # Each token by itself.
    tokenizers = import_extra("tokenizers", "prepare")
    bpe = tokenizers.models.BPE(vocab=vocab, merges=[(a, b) for a, b in model["merges"]])
    if any(len(bpe.tokenize(token)) != 1 for token in merged):
        return None
    return {bytes(letters[letter] for letter in token): vocab[token] for token in tokens}


def _letters() -> dict[str, int]:
    """The byte that each letter of a byte-level vocabulary stands for, as GPT-2 has it: itself, if
    it can be seen in Latin-1."""
    seen = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(seen)]
    return {chr(byte): byte for byte in seen} | {chr(256 + i): b for i, b in enumerate(others)}


def _any_of(texts: list[str]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, texts)) or "(?!)")  # matches nothing


@cache
def _unknown_characters() -> re.Pattern[str]:
    """A character that the engines may not agree about."""
    old = unicodedata.ucd_3_2_0
    codes = [code for code in range(0x10000) if old.category(chr(code)) not in ("Cn", "Cs", "Co")]
    ranges = []
    start = 0
    for i, code in enumerate(codes):
        if i + 1 == len(codes) or codes[i + 1] != code + 1:
            ranges.append((codes[start], code))
            start = i + 1
    known = "".join(f"\\U{a:08x}-\\U{b:08x}" for a, b in [*ranges, *_OTHER_PLANES])
    return re.compile(f"[^{known}]")
