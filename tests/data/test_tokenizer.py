"""Tokenizers of each kind: the ids of their own library, and themselves again from JSON."""

import json
from pathlib import Path

import numpy as np
import pytest

from nar_kernels.data.tokenizer import Tokenizer, open_tokenizer, tokenizer_from_json
from nar_kernels.data.tokenizers.hugging_face import HuggingFaceTokenizer
from nar_kernels.data.tokenizers.tiktoken_ranks import TiktokenTokenizer
from tests.helpers.texts import (
    CHAT_ML,
    HARD,
    bpe_json,
    encoding,
    prose,
    word_pieces,
    write_chat_tokenizer,
)

tokenizers = pytest.importorskip("tokenizers")
TEXTS = [*HARD, *prose()[:5]]


@pytest.fixture
def bpe(tmp_path: Path) -> Path:
    path = tmp_path / "bpe.json"
    path.write_text(bpe_json(), encoding="utf-8")
    return path


def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """An encoding of tiktoken that needs no download."""
    registry = pytest.importorskip("tiktoken.registry")
    small = encoding()
    arguments = {
        "name": "small",
        "pat_str": small._pat_str,
        "mergeable_ranks": small._mergeable_ranks,
        "special_tokens": small._special_tokens,
    }
    registry.list_encoding_names()  # fills the table
    monkeypatch.setitem(registry.ENCODING_CONSTRUCTORS, "small", lambda: arguments)
    monkeypatch.setattr(registry, "ENCODINGS", {})


def same(a: Tokenizer, b: Tokenizer) -> bool:
    properties = ("vocab_size", "eos_id", "mask_id", "chat_template", "piece_boundary")
    return all(getattr(a, name) == getattr(b, name) for name in properties) and a.encode_batch(
        TEXTS
    ) == b.encode_batch(TEXTS)


def test_bytes():
    tokenizer = open_tokenizer("bytes")
    assert (tokenizer.name, tokenizer.vocab_size) == ("bytes", 256)
    assert tokenizer.eos_id is None and tokenizer.mask_id is None
    assert tokenizer.encode_batch(TEXTS) == [list(text.encode()) for text in TEXTS]
    for text, ids in zip(TEXTS, tokenizer.encode_batch(TEXTS), strict=True):
        assert tokenizer.decode(ids) == text
    assert tokenizer.decode([0xE2, 0x82, 65]) == "\ufffdA"
    assert same(tokenizer_from_json(tokenizer.to_json()), tokenizer)


def test_tokenizer_json(bpe: Path):
    tokenizer = open_tokenizer(bpe)
    theirs = tokenizers.Tokenizer.from_file(str(bpe))
    expected = [encoded.ids for encoded in theirs.encode_batch(TEXTS, add_special_tokens=False)]
    assert tokenizer.encode_batch(TEXTS) == expected
    assert tokenizer.name == str(bpe)
    assert tokenizer.vocab_size == theirs.get_vocab_size() and tokenizer.eos_id == 0
    assert tokenizer.mask_id is None and tokenizer.chat_template is None
    for text, ids in zip(TEXTS, expected, strict=True):
        assert tokenizer.decode(ids) == text
    partial = expected[TEXTS.index(HARD[7])][:1]
    assert tokenizer.decode(partial) == "\ufffd" == theirs.decode(partial)


def test_json_of_a_plain_tokenizer_is_a_tokenizer_json(bpe: Path):
    """That other programs read, too."""
    text = open_tokenizer(bpe).to_json()
    assert tokenizers.Tokenizer.from_str(text).get_vocab_size() == 600
    assert same(tokenizer_from_json(text), open_tokenizer(bpe))
    pieces = HuggingFaceTokenizer(word_pieces().to_str(), "pieces")
    assert tokenizers.Tokenizer.from_str(pieces.to_json()).token_to_id("[MASK]") == pieces.mask_id


def test_special_tokens_in_text(bpe: Path, monkeypatch: pytest.MonkeyPatch):
    text = "a<|endoftext|>b"
    tokenizer = open_tokenizer(bpe)
    (ids,) = tokenizer.encode_batch([text])
    (plain,) = tokenizer.encode_batch([text], parse_special=False)
    assert ids.count(0) == 1 and 0 not in plain
    assert tokenizer.decode(ids) == tokenizer.decode(plain) == text
    registered(monkeypatch)
    tokenizer = open_tokenizer("tiktoken:small")
    assert 300 in tokenizer.encode_batch([text])[0]
    assert 300 not in tokenizer.encode_batch([text], parse_special=False)[0]


def test_truncation_and_padding_of_a_file_are_off(tmp_path: Path):
    theirs = tokenizers.Tokenizer.from_str(bpe_json())
    theirs.enable_truncation(3)
    theirs.enable_padding(length=512)
    theirs.save(str(tmp_path / "tokenizer.json"))
    tokenizer = open_tokenizer(tmp_path / "tokenizer.json")
    plain = HuggingFaceTokenizer(bpe_json(), "plain")
    assert tokenizer.encode_batch(TEXTS) == plain.encode_batch(TEXTS)


def test_special_tokens_that_a_post_processor_adds_are_left_out():
    theirs = word_pieces()
    processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    bare = HuggingFaceTokenizer(theirs.to_str(), "bare").encode_batch(["the text"])
    theirs.post_processor = processor
    assert HuggingFaceTokenizer(theirs.to_str(), "with").encode_batch(["the text"]) == bare
    assert theirs.encode("the text").ids == [2, *bare[0], 3]


def test_a_post_processor_takes_no_blanks_out_of_spans():
    """As that of GPT-2, whose ``trim_offsets`` is on by default."""
    text = "def f():\n    if x:\n        y"
    plain = HuggingFaceTokenizer(bpe_json(), "plain")
    theirs = tokenizers.Tokenizer.from_str(bpe_json())
    theirs.post_processor = tokenizers.processors.ByteLevel()
    tokenizer = HuggingFaceTokenizer(theirs.to_str(), "trims")
    for parse in (True, False):
        ids, spans = tokenizer.encode_with_spans(text, parse_special=parse)
        expected = plain.encode_with_spans(text, parse_special=parse)
        assert list(ids) == expected[0] and spans.tolist() == expected[1].tolist()
        assert (spans[:, 1] > spans[:, 0]).all()
    assert tokenizer.to_json() == theirs.to_str()  # the file's own


def test_the_mask_token_alone_as_text():
    text = "the [MASK] of [CLS]"
    theirs = word_pieces()
    tokenizer = HuggingFaceTokenizer(theirs.to_str(), "pieces")
    expected = [
        id_
        for part in ("the [", "MASK] of ", "[CLS]")
        for id_ in theirs.encode(part, add_special_tokens=False).ids
    ]
    assert tokenizer.without_mask.encode_batch([text]) == [expected] and 4 not in expected
    assert 4 in tokenizer.encode_batch([text])[0]
    plain = tokenizer.encode_batch([text], parse_special=False)
    assert tokenizer.without_mask.encode_batch([text], parse_special=False) == plain
    assert not {2, 4} & {*plain[0]}


def test_a_mask_token_that_is_not_special_is_text_with_the_others():
    spec = json.loads(word_pieces().to_str())
    for token in spec["added_tokens"]:
        token["special"] = False
    tokenizer = HuggingFaceTokenizer(json.dumps(spec), "pieces")
    assert 4 in tokenizer.encode_batch(["a [MASK]"])[0]
    assert 4 not in tokenizer.encode_batch(["a [MASK]"], parse_special=False)[0]
    assert 4 not in tokenizer.without_mask.encode_batch(["a [MASK]"])[0]


def test_the_mask_token_of_tiktoken_as_text():
    tiktoken = pytest.importorskip("tiktoken")
    small = encoding()
    special = {"<|mask|>": 300, "<|other|>": 301}
    tokenizer = TiktokenTokenizer(
        tiktoken.Encoding(
            "small",
            pat_str=small._pat_str,
            mergeable_ranks=small._mergeable_ranks,
            special_tokens=special,
        )
    )
    assert tokenizer.mask_id == 300
    text = "a<|mask|><|other|>"
    assert tokenizer.encode_batch([text])[0][-2:] == [300, 301]
    (ids,) = tokenizer.without_mask.encode_batch([text])
    assert 300 not in ids and ids[-1] == 301 and tokenizer.decode(ids) == text


def words_without_unknown() -> HuggingFaceTokenizer:
    """It can encode two words."""
    theirs = tokenizers.Tokenizer(tokenizers.models.WordLevel({"the": 0, "cat": 1}, "[UNK]"))
    theirs.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return HuggingFaceTokenizer(theirs.to_str(), "words.json")


def test_a_text_that_a_tokenizer_cannot_encode():
    tokenizer = words_without_unknown()
    assert tokenizer.encode_batch(["the cat"]) == [[0, 1]]
    for encode in (
        lambda: tokenizer.encode_batch(["the dog"]),
        lambda: tokenizer.encode_with_spans("a"),
    ):
        with pytest.raises(
            ValueError, match="words.json cannot encode a text .WordLevel error: .*"
        ):
            encode()


def test_a_folder_of_hugging_face(tmp_path: Path):
    tokenizer = open_tokenizer(write_chat_tokenizer(tmp_path / "chat"))
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "chat/tokenizer.json"))
    assert tokenizer.eos_id == theirs.token_to_id("<|im_end|>") == 601
    assert tokenizer.mask_id == theirs.token_to_id("<|mdm_mask|>") == 602
    assert tokenizer.vocab_size == 603
    assert tokenizer.chat_template == CHAT_ML
    assert tokenizer.special_tokens["bos_token"] == "<|im_start|>"
    again = tokenizer_from_json(tokenizer.to_json())
    assert same(again, tokenizer) and again.special_tokens == tokenizer.special_tokens
    assert again.name == str(tmp_path / "chat")
    # The file alone finds what is beside it.
    assert same(open_tokenizer(tmp_path / "chat/tokenizer.json"), tokenizer)
    (tmp_path / "copy.json").write_text(tokenizer.to_json(), encoding="utf-8")
    assert same(open_tokenizer(tmp_path / "copy.json"), tokenizer)
    # Nor does it matter which of the two a prepared folder has.
    (tmp_path / "prepared").mkdir()
    (tmp_path / "copy.json").rename(tmp_path / "prepared/tokenizer.json")
    assert same(open_tokenizer(tmp_path / "prepared"), tokenizer)


def test_named_chat_templates(tmp_path: Path):
    folder = write_chat_tokenizer(tmp_path / "chat")
    (folder / "chat_template.jinja").unlink()
    config = json.loads((folder / "tokenizer_config.json").read_text())
    named = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": "y"}]
    cases = [(named, "y"), ("z", "z"), (named[:1], None), ([{"template": "x"}, "y"], None)]
    for templates, expected in cases:
        config["chat_template"] = templates
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        assert open_tokenizer(folder).chat_template == expected


def test_a_folder_without_tokenizer_json(tmp_path: Path):
    transformers = pytest.importorskip("transformers")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "cat", "##s", "a", "."]
    (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n")
    config = {"tokenizer_class": "BertTokenizer", "mask_token": "[MASK]"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = open_tokenizer(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    texts = ["The cats.", "a CAT"]
    assert tokenizer.encode_batch(texts) == theirs(texts, add_special_tokens=False)["input_ids"]
    assert (tokenizer.mask_id, tokenizer.eos_id, tokenizer.vocab_size) == (4, None, 10)
    assert same(tokenizer_from_json(tokenizer.to_json()), tokenizer)


def test_a_folder_without_any_tokenizer(tmp_path: Path):
    pytest.importorskip("transformers")
    with pytest.raises(ValueError, match="has no tokenizer.json, and transformers finds no other"):
        open_tokenizer(tmp_path)


def test_tiktoken(monkeypatch: pytest.MonkeyPatch):
    registered(monkeypatch)
    theirs = encoding()
    tokenizer = open_tokenizer("tiktoken:small")
    expected = [theirs.encode_ordinary(text) for text in TEXTS]
    assert tokenizer.encode_batch(TEXTS) == expected
    assert (tokenizer.name, tokenizer.vocab_size) == ("tiktoken:small", 302)
    assert (tokenizer.eos_id, tokenizer.mask_id) == (300, None)
    for text, ids in zip(TEXTS, expected, strict=True):
        assert tokenizer.decode(ids) == text
    assert tokenizer.decode([0xE2, 65]) == "\ufffdA"
    again = tokenizer_from_json(tokenizer.to_json())
    assert same(again, tokenizer) and again.name == tokenizer.name


def test_tiktoken_downloads_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("tiktoken")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr("tiktoken.registry.ENCODINGS", {})
    requests = pytest.importorskip("requests")
    monkeypatch.setattr(requests, "get", None)
    for name, file in (("gpt2", "vocab.bpe"), ("cl100k_base", "cl100k_base.tiktoken")):
        with pytest.raises(FileNotFoundError) as caught:
            open_tokenizer(f"tiktoken:{name}")
        assert f"needs {file}, which is not in {tmp_path}" in str(caught.value)
        assert f"tiktoken.get_encoding('{name}')" in str(caught.value)
    with pytest.raises(ValueError, match="tiktoken has no encoding 'gpt9': it has "):
        open_tokenizer("tiktoken:gpt9")
    # What is in the cache, but damaged, is not loaded again either.
    import hashlib

    url = "https://openaipublic.blob.core.windows.net/encodings/cl100k_base.tiktoken"
    (tmp_path / hashlib.sha1(url.encode()).hexdigest()).write_bytes(b"damaged")
    with pytest.raises(FileNotFoundError, match="nothing is downloaded"):
        open_tokenizer("tiktoken:cl100k_base")


def all_kinds() -> list[Tokenizer]:
    return [
        open_tokenizer("bytes"),
        HuggingFaceTokenizer(bpe_json(), "bpe"),
        HuggingFaceTokenizer(word_pieces().to_str(), "pieces"),
        TiktokenTokenizer(encoding()),
    ]


@pytest.mark.parametrize("kind", range(4))
def test_ids_that_are_none(kind: int):
    pytest.importorskip("tiktoken")
    tokenizer = all_kinds()[kind]
    for bad in (tokenizer.vocab_size, -1, 1 << 40):
        with pytest.raises(ValueError, match=f"token id {bad} is none of .*leave out what is no"):
            tokenizer.decode([65, bad])
    ids = np.array([5, 6], np.uint16)
    assert tokenizer.decode(ids) == tokenizer.decode([5, 6])  # type: ignore[arg-type]


def test_a_gap_in_a_vocabulary():
    pytest.importorskip("tiktoken")
    with pytest.raises(ValueError, match="token id 290 is none of tiktoken:small"):
        TiktokenTokenizer(encoding()).decode([290])
    spec = json.loads(bpe_json())
    spec["added_tokens"].append({**spec["added_tokens"][0], "content": "<far>", "id": 700})
    spec["model"]["vocab"]["<far>"] = 700
    tokenizer = HuggingFaceTokenizer(json.dumps(spec), "gap")
    assert tokenizer.vocab_size == 701 and tokenizer.decode([700]) == "<far>"
    with pytest.raises(ValueError, match="token id 650 is none of gap"):
        tokenizer.decode([650])


@pytest.mark.parametrize("kind", range(4))
def test_half_a_surrogate_pair_is_no_text(kind: int):
    pytest.importorskip("tiktoken")
    tokenizer = all_kinds()[kind]
    with pytest.raises(UnicodeEncodeError):
        tokenizer.encode_batch(["fine", "a\ud800"])
    with pytest.raises(UnicodeEncodeError):
        tokenizer.encode_with_spans("a\ud800")


@pytest.mark.parametrize("kind", range(4))
@pytest.mark.parametrize("text", TEXTS)
def test_spans(kind: int, text: str):
    """They ascend, and each token's text is within that of its characters."""
    pytest.importorskip("tiktoken")
    tokenizer = all_kinds()[kind]
    ids, spans = tokenizer.encode_with_spans(text)
    assert list(ids) == tokenizer.encode_batch([text])[0]
    assert spans.shape == (len(ids), 2) and spans.dtype == np.int64
    starts, ends = spans.T
    assert (starts < ends).all() and (ends <= len(text)).all()
    assert (np.diff(starts) >= 0).all() and (np.diff(ends) >= 0).all()
    if tokenizer.name != "pieces" and len(ids):
        assert starts[0] == 0 and ends[-1] == len(text)
        assert (starts[1:] <= ends[:-1]).all()  # none is left out
        for id_, start, end in zip(ids, starts, ends, strict=True):
            piece = tokenizer.decode([id_])
            assert piece == text[start:end] or "\ufffd" in piece


def test_arrays_are_the_lists():
    pytest.importorskip("tiktoken")
    for tokenizer in all_kinds():
        arrays = tokenizer.encode_arrays(TEXTS)
        assert [array.tolist() for array in arrays] == tokenizer.encode_batch(TEXTS)


def test_what_is_no_tokenizer(tmp_path: Path):
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/tokenizer.json").write_bytes(b"\xff\xfe\x00")
    cut = {"format": "nar_kernels tokenizer", "version": 1, "kind": "tokenizers"}
    (tmp_path / "cut.json").write_text(json.dumps(cut))
    (tmp_path / "text.json").write_text("hello")
    (tmp_path / "other.json").write_text('{"a": 1}')
    newer = {"format": "nar_kernels tokenizer", "version": 9, "kind": "bytes"}
    (tmp_path / "newer.json").write_text(json.dumps(newer))
    dropout = json.loads(bpe_json())
    dropout["model"]["dropout"] = 0.1
    (tmp_path / "dropout.json").write_text(json.dumps(dropout))
    for name, message in (
        ("binary", "is no tokenizer.json, but binary"),
        ("folder", "folder/tokenizer.json is no tokenizer.json, but binary"),
        ("cut.json", "cut.json: this tokenizer is malformed .KeyError: 'tokenizer'.: take"),
        ("text.json", "is not JSON"),
        ("other.json", "is no tokenizer.json that the package tokenizers"),
        ("newer.json", "version 9: known are"),
        ("dropout.json", "drops merges at random"),
    ):
        with pytest.raises(ValueError, match=message):
            open_tokenizer(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="hub, `hf download org/model --include"):
        open_tokenizer("org/model")
    with pytest.raises(FileNotFoundError, match="there is no tokenizer /no/file"):
        open_tokenizer("/no/file")


def test_an_end_that_is_no_token(tmp_path: Path):
    folder = write_chat_tokenizer(tmp_path / "chat")
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<no>"}')
    with pytest.raises(ValueError, match="eos_token of .* is '<no>', which is no token"):
        open_tokenizer(folder)
    (folder / "tokenizer_config.json").write_text("[")
    with pytest.raises(ValueError, match="tokenizer_config.json is no JSON object"):
        open_tokenizer(folder)
