"""tiktoken in place of tokenizers: the same ids, or not at all."""

import json
import random
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from nar_kernels.data.tokenizers import boundaries, fast_bpe
from nar_kernels.data.tokenizers.hugging_face import HuggingFaceTokenizer
from tests.helpers.texts import HARD, bpe_json, prose

tokenizers = pytest.importorskip("tokenizers")
pytest.importorskip("tiktoken")


def split_by(pattern: str) -> dict[str, Any]:
    spec = json.loads(bpe_json())
    level = {**spec["pre_tokenizer"], "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated"}
    spec["pre_tokenizer"] = {
        "type": "Sequence",
        "pretokenizers": [{**split, "invert": False}, level],
    }
    return spec


def of_spec(spec: dict[str, Any]) -> HuggingFaceTokenizer:
    return HuggingFaceTokenizer(json.dumps(spec), "spec")


PATTERNS = [boundaries.GPT2, boundaries.LLAMA3, boundaries.QWEN2]
TOKENIZERS = [of_spec(json.loads(bpe_json())), *(of_spec(split_by(p)) for p in PATTERNS)]


def same(tokenizer: HuggingFaceTokenizer, texts: list[str]) -> bool:
    return all(
        [ids.tolist() for ids in tokenizer.encode_arrays(texts, parse_special=parse)]
        == tokenizer.encode_batch(texts, parse_special=parse)
        for parse in (True, False)
    )


texts = st.lists(
    st.one_of(
        st.sampled_from(
            [*"aZé日5.!'\"-/\n\r\t\v\f \x1c\x85\u00a0\u0301\u017f\u2028\u3000", "  ", "'s", "'LL"]
            + ["\r\n", "<|endoftext|>", " the", "ing", "\u200b", "😀", "\U0001e4d0", "\ufeff"]
        ),
        st.characters(exclude_categories=("Cs",)),
    ),
    max_size=40,
).map("".join)


@pytest.mark.parametrize("number", range(len(TOKENIZERS)))
@given(text=texts)
@example(text=" ".join(HARD))
@example(text=prose()[3])
def test_the_same_ids(number: int, text: str) -> None:
    assert TOKENIZERS[number]._fast is not None
    assert same(TOKENIZERS[number], [text, "other"])


@pytest.mark.parametrize("number", range(1, len(TOKENIZERS)))
@pytest.mark.parametrize("step", [29, pytest.param(1, marks=pytest.mark.slow)])
def test_every_character(number: int, step: int) -> None:
    """Where its kind may matter: beside letters, numbers, punctuation, blanks; in contractions."""
    tokenizer = TOKENIZERS[number]
    unknown = fast_bpe._unknown_characters()
    characters = [chr(code) for code in range(0x30000) if not 0xD800 <= code < 0xE000]
    known = [c for c in characters if not unknown.search(c)]
    assert len(known) > 90_000 and {*"a é日😀\u20ac\U00020000"} <= {*known}
    contexts = ("a{0}a", "1{0}1", "!{0}!", " {0} ", "x'{0}x", "\n{0}")
    assert tokenizer._fast is not None
    # Those of alphabets all, of the rest every so many.
    known = [c for c in known if c < "\u3400"] + [c for c in known if c >= "\u3400"][::step]
    for start in range(0, len(known), 5000):
        chunk = known[start : start + 5000]
        batch = ["|".join(context.format(c) for c in chunk) for context in contexts]
        assert all(tokenizer._fast.encode(text, True) is not None for text in batch)
        assert same(tokenizer, batch)


@pytest.mark.parametrize("number", range(1, len(TOKENIZERS)))
@pytest.mark.parametrize("run", ["a", " ", "\n", "!", "0", "ab", " \n", "é", "a ", "\t\r\n"])
def test_long_runs(number: int, run: str) -> None:
    text = run * (30_000 // len(run))
    assert TOKENIZERS[number]._fast.encode(text, True) is not None  # type: ignore[union-attr]
    assert same(TOKENIZERS[number], [text, "x" + text + "y"])


def test_what_its_regular_expressions_give_up_at() -> None:
    text = "a" + 2_000_000 * " " + "b"
    tokenizer = TOKENIZERS[0]
    assert tokenizer._fast is not None and tokenizer._fast.encode(text, True) is None
    (ids,) = tokenizer.encode_arrays([text])
    assert tokenizer.decode(ids.tolist()) == text


def test_unknown_characters_are_left_to_tokenizers() -> None:
    fast = TOKENIZERS[0]._fast
    assert fast is not None
    for text in ("\U0001e4d0", "a\u0558", "\ud800", "<|endoftext|>"):
        assert fast.encode(text, True) is None
    assert fast.encode("<|endoftext|>", False) is not None


def bpe_of(merges: list[tuple[str, str]], more: tuple[str, ...] = ()) -> dict[str, Any]:
    """A tokenizer with these merges, whose ids are in no order."""
    spec = json.loads(bpe_json())
    tokens = [*fast_bpe._letters(), *dict.fromkeys(a + b for a, b in merges), *more]
    random.Random(len(tokens)).shuffle(tokens)
    spec["model"]["vocab"] = {token: i for i, token in enumerate(["<|endoftext|>", *tokens])}
    spec["model"]["merges"] = [[a, b] for a, b in merges]
    return spec


@settings(max_examples=400)
@given(data=st.data())
def test_random_merges(data: st.DataObject) -> None:
    """Whatever is accepted gives the same ids."""
    tokens, merges = [*"abc"], []
    for _ in range(data.draw(st.integers(0, 12))):
        pair = data.draw(st.sampled_from(tokens)), data.draw(st.sampled_from(tokens))
        if len(pair[0] + pair[1]) < 9 and pair not in merges:
            merges.append(pair)
            tokens = [*dict.fromkeys([*tokens, pair[0] + pair[1]])]
    tokenizer = of_spec(bpe_of(merges))
    drawn = data.draw(st.lists(st.text("abc", max_size=30), min_size=5, max_size=20))
    assert same(tokenizer, drawn)


@pytest.mark.parametrize(
    ("merges", "text"),
    [
        # "xybc" is a token whose pair never meets: "b" and "c" merge first.
        ([("b", "c"), ("x", "y"), ("xy", "b"), ("xyb", "c")], "xybc"),
        # "abc" by two pairs.
        ([("a", "b"), ("ab", "c"), ("b", "c"), ("a", "bc")], "abc"),
    ],
)
def test_merges_that_tiktoken_does_otherwise(merges: list[tuple[str, str]], text: str) -> None:
    spec = bpe_of(merges)
    assert fast_bpe.fast_bpe(spec) is None
    assert same(of_spec(spec), [text])


def test_a_proper_order_is_accepted() -> None:
    spec = bpe_of([("a", "b"), ("ab", "c"), ("d", "abc")])
    assert fast_bpe.fast_bpe(spec) is not None
    assert same(of_spec(spec), ["dabc abcd dab"])


@pytest.mark.parametrize(
    "change",
    [
        {"normalizer": {"type": "NFC"}},
        {"pre_tokenizer": None},
        {"pre_tokenizer": {"type": "Whitespace"}},
        {"pre_tokenizer": split_by(r"\s+|\S+")["pre_tokenizer"]},
        {"pre_tokenizer": {**split_by(boundaries.GPT2)["pre_tokenizer"]["pretokenizers"][1]}},
    ],
)
def test_other_steps(change: dict[str, Any]) -> None:
    spec = json.loads(bpe_json()) | change
    assert fast_bpe.fast_bpe(spec) is None
    assert same(of_spec(spec), [*HARD])


@pytest.mark.parametrize("name", ["add_prefix_space", "behavior", "use_regex", "invert"])
def test_other_options_of_steps(name: str) -> None:
    spec = json.loads(bpe_json())
    if name == "add_prefix_space":
        spec["pre_tokenizer"]["add_prefix_space"] = True
    else:
        spec = split_by(boundaries.GPT2)
        split, level = spec["pre_tokenizer"]["pretokenizers"]
        if name == "behavior":
            split["behavior"] = "Removed"
        elif name == "invert":
            split["invert"] = True
        else:
            level["use_regex"] = True
    assert fast_bpe.fast_bpe(spec) is None
    assert same(of_spec(spec), [*HARD])


def test_tokens_without_a_pair() -> None:
    """Never made, unless a part of a text is looked up as a whole."""
    spec = bpe_of([("a", "b")], more=("xyz",))
    assert fast_bpe.fast_bpe(spec) is not None and same(of_spec(spec), ["xyz ab xyz"])
    spec["model"]["ignore_merges"] = True
    assert fast_bpe.fast_bpe(spec) is None and same(of_spec(spec), ["xyz ab xyz"])


def test_whole_words_first() -> None:
    """As Llama 3 does."""
    spec = json.loads(bpe_json())
    del spec["model"]["vocab"]["<|endoftext|>"]
    spec["added_tokens"] = []
    spec["model"]["ignore_merges"] = True
    spec["model"]["vocab"] = {t: i - 1 for t, i in spec["model"]["vocab"].items()}
    assert fast_bpe.fast_bpe(spec) is not None
    assert same(of_spec(spec), [*HARD, *prose()[:5]])


def test_added_tokens_that_are_not_special() -> None:
    theirs = tokenizers.Tokenizer.from_str(bpe_json())
    theirs.add_tokens(["foo"])
    tokenizer = HuggingFaceTokenizer(theirs.to_str(), "more")
    assert tokenizer._fast is not None
    for parse in (True, False):
        assert tokenizer._fast.encode("a foo", parse) is None
    assert same(tokenizer, ["a foo", "food", "fo o"])


def test_without_tiktoken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fast_bpe, "find_spec", lambda name: None)
    tokenizer = of_spec(json.loads(bpe_json()))
    assert tokenizer._fast is None and same(tokenizer, [*HARD])
