"""Pieces of a text have the tokens of the whole."""

import json
import re
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from nar_kernels.data.tokenizer import Tokenizer, open_tokenizer
from nar_kernels.data.tokenizers import boundaries
from nar_kernels.data.tokenizers.hugging_face import HuggingFaceTokenizer
from nar_kernels.data.tokenizers.tiktoken_ranks import TiktokenTokenizer
from tests.helpers.texts import HARD, bpe_json, encoding, prose, word_pieces

pytest.importorskip("tokenizers")
tiktoken = pytest.importorskip("tiktoken")


def split_by(pattern: str) -> dict[str, Any]:
    spec = json.loads(bpe_json())
    level = {**spec["pre_tokenizer"], "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated"}
    steps = [{**split, "invert": False}, level]
    spec["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": steps}
    return spec


def normalized() -> dict[str, Any]:
    spec = json.loads(bpe_json())
    spec["normalizer"] = {"type": "Sequence", "normalizers": [{"type": "NFC"}]}
    return spec


def of_tiktoken(pattern: str) -> Tokenizer:
    small = encoding()
    return TiktokenTokenizer(
        tiktoken.Encoding(
            "small",
            pat_str=pattern,
            mergeable_ranks=small._mergeable_ranks,
            special_tokens=small._special_tokens,
        )
    )


def of_spec(spec: dict[str, Any]) -> Tokenizer:
    return HuggingFaceTokenizer(json.dumps(spec), "spec")


# Oniguruma, of the package tokenizers, and the engine of tiktoken do not read all of them.
POSSESSIVE = sorted(p for p in boundaries.PATTERNS if "++" in p or "?+" in p)
PLAIN = sorted(boundaries.PATTERNS - {*POSSESSIVE})
TOKENIZERS = [
    open_tokenizer("bytes"),
    of_spec(json.loads(bpe_json())),
    of_spec(normalized()),
    HuggingFaceTokenizer(word_pieces().to_str(), "pieces"),
    HuggingFaceTokenizer(word_pieces().to_str(), "pieces").without_mask,
    *(of_spec(split_by(pattern)) for pattern in PLAIN),
    *(of_tiktoken(pattern) for pattern in sorted(boundaries.PATTERNS)),
]

# Where letters, blanks and what else patterns speak of meet.
texts = st.lists(
    st.sampled_from(
        [*"aZé日5.!'\"-/\n\r\t \u00a0\u0301", "  ", "'s", "'ll", "'S", "\r\n", "<|endoftext|>"]
        + ["<|endoftext|> ", "a b", "a\nb", "x  y", "the cat", "[MASK]"]
    ),
    max_size=40,
).map("".join)


def pieces(text: str, boundary: re.Pattern[bytes]) -> list[str]:
    content = text.encode()
    cuts = [0, *(match.end() for match in boundary.finditer(content)), len(content)]
    return [content[a:b].decode() for a, b in zip(cuts, cuts[1:], strict=False)]


@pytest.mark.parametrize("number", range(len(TOKENIZERS)))
@given(text=texts)
@example(text=" ".join(HARD) + " and the end")
@example(text=prose()[3])
def test_pieces_have_the_tokens_of_the_whole(number: int, text: str) -> None:
    tokenizer = TOKENIZERS[number]
    assert tokenizer.piece_boundary is not None
    parts = pieces(text, tokenizer.piece_boundary)
    assert "".join(parts) == text
    together = [id_ for ids in tokenizer.encode_batch(parts) for id_ in ids]
    assert together == tokenizer.encode_batch([text])[0]


def test_most_text_can_be_cut() -> None:
    assert len(pieces(prose()[3], boundaries.BETWEEN_WORDS)) > 100


@pytest.mark.parametrize(
    "change",
    [
        {"normalizer": {"type": "Prepend", "prepend": "x"}},
        {"normalizer": {"type": "Strip", "strip_left": True, "strip_right": True}},
        {"pre_tokenizer": None},
        {"pre_tokenizer": {"type": "Digits", "individual_digits": True}},
        {"pre_tokenizer": split_by(r"\s+\S+|.")["pre_tokenizer"]},
    ],
)
def test_tokenizers_that_must_see_all(change: dict[str, Any]) -> None:
    assert of_spec(json.loads(bpe_json()) | change).piece_boundary is None


def test_a_prefix_blank_must_see_all() -> None:
    spec = json.loads(bpe_json())
    spec["pre_tokenizer"]["add_prefix_space"] = True
    assert of_spec(spec).piece_boundary is None


@pytest.mark.parametrize("more", [{"rstrip": True}, {"content": "a token"}])
def test_added_tokens_that_reach_across(more: dict[str, Any]) -> None:
    spec = json.loads(bpe_json())
    token = {**spec["added_tokens"][0], "content": "<x>", "id": 600, **more}
    spec["added_tokens"].append(token)
    assert of_spec(spec).piece_boundary is None


def test_other_patterns_of_tiktoken_must_see_all() -> None:
    assert of_tiktoken(r"\s+\S+|[\s\S]").piece_boundary is None
