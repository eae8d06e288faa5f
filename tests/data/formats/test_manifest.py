"""``manifest.json``: what is written is read, and what is malformed is named."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nar_kernels.data.formats.manifest import (
    FILE,
    Manifest,
    Shard,
    TokenizerFile,
    Vocabulary,
    read_manifest,
)
from nar_kernels.errors import CorpusFormatError

DIGEST = "0" * 64
FIRST = Shard(
    "t0.npy", "d0.npy", "m0.npy", 7, 2, 3, 90, dict.fromkeys(["t0.npy", "d0.npy", "m0.npy"], DIGEST)
)
SECOND = Shard("t1.npy", "d1.npy", None, 5, 1, 1, 50, dict.fromkeys(["t1.npy", "d1.npy"], DIGEST))
MANIFEST = Manifest.of_shards(
    [FIRST, SECOND], Vocabulary(100), eos_id=0, tokenizer=TokenizerFile("bpe", "tokenizer.json")
)
IMAGES = replace(MANIFEST, tokenizer=None, eos_id=None, image_shape=(2, 2), labels="labels.npy")


@pytest.mark.parametrize("manifest", [MANIFEST, IMAGES])
def test_there_and_back(tmp_path: Path, manifest: Manifest) -> None:
    manifest.write(tmp_path)
    assert read_manifest(tmp_path) == manifest
    assert json.loads((tmp_path / FILE).read_text())["format"] == "nar_kernels corpus"


def test_sums() -> None:
    assert (MANIFEST.total_tokens, MANIFEST.total_documents) == (12, 3)
    assert (MANIFEST.min_id, MANIFEST.max_id) == (1, 90)


@pytest.mark.parametrize(
    ("size", "own", "mask", "rows", "dtype"),
    [
        (255, None, 255, 256, "uint8"),
        (256, None, 256, 257, "uint16"),
        (256, 4, 4, 256, "uint8"),
        (65535, None, 65535, 65536, "uint16"),
        (65536, None, 65536, 65537, "uint32"),
        (65536, 103, 103, 65536, "uint16"),
        (100, 120, 120, 121, "uint8"),
    ],
)
def test_vocabulary(size: int, own: int | None, mask: int, rows: int, dtype: str) -> None:
    vocabulary = Vocabulary(size, own)
    assert (vocabulary.mask_id, vocabulary.num_tokens, vocabulary.dtype) == (mask, rows, dtype)


def test_a_vocabulary_that_no_dtype_holds() -> None:
    with pytest.raises(ValueError, match="vocab_size is 4294967296: .* below 2..32"):
        _ = Vocabulary(1 << 32).dtype


def edited(content: dict[str, Any], field: str, value: Any) -> None:
    *path, last = field.replace("[", ".").replace("]", "").split(".")
    place: Any = content
    for part in path:
        place = place[int(part) if part.isdecimal() else part]
    if value is DIGEST:
        del place[last]
    else:
        place[last] = value


@pytest.mark.parametrize(
    ("field", "value", "found", "expected"),
    [
        ("version", 2, "2", "1: update nar_kernels"),
        ("dtype", "int8", '"int8"', "one of uint8, uint16, uint32"),
        ("dtype", ["uint8"], r'["uint8"]', "one of uint8"),
        ("vocab_size", DIGEST, "missing", "an integer from 1 on"),
        ("vocab_size", 0, "0", "an integer from 1 on"),
        ("vocab_size", True, "true", "an integer from 1 on"),
        ("vocab_size", 100.0, "100.0", "an integer from 1 on"),
        ("mask_id", -1, "-1", "an integer from 0 on"),
        ("mask_id", 300, "101", ""),
        ("num_tokens", 100, "100", "101, by the other fields"),
        ("eos_id", "x", '"x"', "an integer from 0 on, or null"),
        ("eos_id", DIGEST, "missing", "an integer from 0 on, or null"),
        ("tokenizer", "bpe", '"bpe"', "an object or null"),
        ("tokenizer.name", DIGEST, "missing", "a string"),
        ("tokenizer.file", "../x", '"../x"', "the name of a file in this folder"),
        ("total_tokens", 13, "13", "12, by the other fields"),
        ("total_documents", 4, "4", "3, by the other fields"),
        ("min_id", 0, "0", "1, by the other fields"),
        ("max_id", 91, "91", "90, by the other fields"),
        ("shards", [], "[]", "a list of objects"),
        ("shards", {}, "{}", "a list of objects"),
        ("shards", [7], "", ""),
        ("shards[0].tokens", "/etc/passwd", '"/etc/passwd"', "the name of a file in this folder"),
        ("shards[1].documents", None, "null", "the name of a file in this folder"),
        ("shards[0].loss_mask", 3, "3", "a file name or null"),
        ("shards[0].num_tokens", DIGEST, "missing", "an integer from 1 on"),
        ("shards[1].num_documents", 0, "0", "an integer from 1 on"),
        ("shards[0].sha256", [], "[]", "an object"),
        ("image_shape", [2], "[2]", "[height, width] or null"),
        ("image_shape", [0, 2], "[0, 2]", "[height, width] or null"),
        ("image_shape", [2, 3], "", ""),
        ("labels", "", '""', "a file name or null"),
    ],
)
def test_a_malformed_field(
    tmp_path: Path, field: str, value: Any, found: str, expected: str
) -> None:
    MANIFEST.write(tmp_path)
    content = json.loads((tmp_path / FILE).read_text())
    edited(content, field, value)
    (tmp_path / FILE).write_text(json.dumps(content))
    with pytest.raises(CorpusFormatError) as caught:
        read_manifest(tmp_path)
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / FILE}: ") and " but must be " in message
    if expected:
        assert f": {field} is {found}, but must be {expected}" in message


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"7", b"\xff", b"{}"])
def test_what_is_no_manifest(tmp_path: Path, content: bytes) -> None:
    (tmp_path / FILE).write_bytes(content)
    with pytest.raises(
        CorpusFormatError, match="manifest.json: (the content|format) is .*but must"
    ):
        read_manifest(tmp_path)


def test_ids_that_the_dtype_does_not_hold(tmp_path: Path) -> None:
    replace(MANIFEST, vocab_size=300, mask_id=300, num_tokens=301).write(tmp_path)
    with pytest.raises(CorpusFormatError, match="num_tokens is 301, but must be at most 256"):
        read_manifest(tmp_path)
    replace(MANIFEST, vocab_size=90, mask_id=90, num_tokens=91).write(tmp_path)
    with pytest.raises(CorpusFormatError, match="max_id is 90, but must be from min_id, 1, to voc"):
        read_manifest(tmp_path)


def test_the_tokenizer(tmp_path: Path) -> None:
    MANIFEST.write(tmp_path)
    manifest = read_manifest(tmp_path)
    assert replace(manifest, tokenizer=None).tokenizer_json() is None
    (tmp_path / "tokenizer.json").write_text('{"a": "é"}', encoding="utf-8")
    assert manifest.tokenizer_json() == '{"a": "é"}'
    for content in (b"\xff", b"{"):
        (tmp_path / "tokenizer.json").write_bytes(content)
        with pytest.raises(
            CorpusFormatError, match="tokenizer.json: the content is no JSON .*must"
        ):
            manifest.tokenizer_json()
