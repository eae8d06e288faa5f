r"""Where a text may be cut so that its pieces have the same tokens as the whole.

A cut is after an ASCII letter that one blank or line break and another ASCII letter follow. It is
exact for a tokenizer that

* changes a character, if at all, independently of the characters beyond such a cut (as Unicode
  normalization does: nothing combines with a letter across a blank);
* first splits text where a letter meets a blank, whatever comes before and after, and looks for
  tokens within the parts only. That holds for a regular expression none of whose matches has a
  blank after a letter, and which does not look back: on the right of the cut, matching starts
  anew; on the left, only a run of blanks looks ahead, and there is none;
* has no added token that reaches across a cut.
"""

import re
from collections.abc import Iterable
from typing import Any

BETWEEN_WORDS = re.compile(rb"[A-Za-z](?=[ \n][A-Za-z])")

# Regular expressions in use that fulfil the above: of GPT-2, Llama 3 and Qwen 2, as the package
# tokenizers has them, and those of the encodings of tiktoken.
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3, QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    + digits
    + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    for digits in ("{1,3}", "")
)
R50K = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
CL100K = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|"
    r"\s++$|\s*[\r\n]|\s+(?!\S)|\s"
)
O200K = "|".join(
    [
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)
PATTERNS = frozenset({GPT2, LLAMA3, QWEN2, R50K, CL100K, O200K})

_NORMALIZERS = ("NFC", "NFD", "NFKC", "NFKD", "Lowercase", "BertNormalizer")


def of_tokenizers(spec: dict[str, Any]) -> re.Pattern[bytes] | None:
    """The boundary for a ``tokenizer.json``; None if no cut is known to be exact."""
    added = spec.get("added_tokens") or []
    # What takes in blanks on its right would also do so behind a letter.
    reaches = any(token["rstrip"] or re.search(r"\s", token["content"]) for token in added)
    normalizers = _parts(spec.get("normalizer"), "normalizers")
    if reaches or any(n["type"] not in _NORMALIZERS for n in normalizers):
        return None
    steps = _parts(spec.get("pre_tokenizer"), "pretokenizers")
    if not steps or not _splits_words(steps[0]) or not all(map(_only_splits, steps[1:])):
        return None
    return BETWEEN_WORDS


def of_pattern(pattern: str, special_tokens: Iterable[str]) -> re.Pattern[bytes] | None:
    """The boundary for a tokenizer of tiktoken; None if no cut is known to be exact."""
    reaches = any(re.search(r"\s", token) for token in special_tokens)
    return None if reaches or pattern not in PATTERNS else BETWEEN_WORDS


def _parts(component: dict[str, Any] | None, name: str) -> list[dict[str, Any]]:
    if component is None:
        return []
    return component[name] if component["type"] == "Sequence" else [component]


def _splits_words(step: dict[str, Any]) -> bool:
    match step["type"]:
        case "ByteLevel":
            return step["use_regex"] and not step["add_prefix_space"]
        case "Split":
            pattern = step["pattern"].get("Regex")
            return pattern in PATTERNS and step["behavior"] == "Isolated" and not step["invert"]
    return step["type"] in ("BertPreTokenizer", "Whitespace", "WhitespaceSplit")


def _only_splits(step: dict[str, Any]) -> bool:
    """Whether a later step looks at each part by itself, and not at whether it is the first."""
    if step["type"] == "ByteLevel":
        return not step["add_prefix_space"]
    return step["type"] in ("Digits", "Punctuation", "Split", "BertPreTokenizer", "Whitespace")
