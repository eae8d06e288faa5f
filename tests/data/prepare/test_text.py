"""Text of every kind of file: its tokens are those of the tokenizer, called directly."""

import bz2
import gzip
import importlib.util
import json
import lzma
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nar_kernels.data.corpus import Corpus
from nar_kernels.data.formats.prepared import check_files
from nar_kernels.data.prepare import prepare
from nar_kernels.data.tokenizer import open_tokenizer, tokenizer_from_json
from tests.helpers.prepared import contents, documents
from tests.helpers.texts import (
    HARD,
    bpe_json,
    prose,
    word_pieces,
    write_chat_tokenizer,
    write_lines,
)

tokenizers = pytest.importorskip("tokenizers")

TEXTS = [*HARD, *prose()[:8]]
FULL = [text for text in TEXTS if text]


@pytest.fixture
def bpe(tmp_path: Path) -> Path:
    path = tmp_path / "bpe.json"
    path.write_text(bpe_json(), encoding="utf-8")
    return path


def encoded(texts: list[str], eos: list[int] | None = None) -> list[list[int]]:
    """By the package itself."""
    theirs = tokenizers.Tokenizer.from_str(bpe_json())
    eos = [0] if eos is None else eos
    return [theirs.encode(text, add_special_tokens=False).ids + eos for text in texts]


def run(inputs: Any, out: Path, **options: Any) -> list[list[int]]:
    prepare(inputs, out, **{"quiet": True, "workers": 1, **options})
    return documents(out)


def test_json_lines(tmp_path: Path, bpe: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", [{"text": text, "id": 3} for text in TEXTS])
    out = tmp_path / "out"
    manifest = prepare(path, out, tokenizer=bpe, quiet=True, workers=1)
    assert documents(out) == encoded(FULL)
    assert manifest == Corpus(out).manifests[0]
    assert (manifest.vocab_size, manifest.num_tokens, manifest.mask_id) == (600, 601, 600)
    assert manifest.eos_id == 0 and manifest.dtype == "uint16"
    assert manifest.total_documents == len(FULL) and manifest.image_shape is None
    ids = [id_ for document in documents(out) for id_ in document]
    assert (manifest.total_tokens, manifest.min_id, manifest.max_id) == (
        len(ids),
        0,
        max(ids),
    )
    assert manifest.tokenizer is not None and manifest.tokenizer.name == str(bpe)
    tokenizer = tokenizer_from_json((out / manifest.tokenizer.file).read_text())
    assert [tokenizer.decode(document[:-1]) for document in documents(out)] == FULL
    assert tokenizers.Tokenizer.from_file(str(out / "tokenizer.json")).get_vocab_size() == 600
    check_files(out)
    assert sorted(path.name for path in out.iterdir()) == [
        "documents-00000.npy",
        "manifest.json",
        "tokenizer.json",
        "tokens-00000.npy",
    ]
    assert np.load(out / "tokens-00000.npy", mmap_mode="r").tolist() == ids
    assert not (tmp_path / "out.partial").exists()


def test_text_files(tmp_path: Path, bpe: Path) -> None:
    """One document each, sorted; line ends stay as they are."""
    folder = tmp_path / "texts"
    (folder / "sub/.hidden").mkdir(parents=True)
    names = ["b.txt", "a.md", "sub/c.py", "sub/d"]
    for name, text in zip(names, FULL[-4:], strict=True):
        (folder / name).write_bytes(text.encode())
    (folder / "sub/.hidden/e.txt").write_text("no")
    (folder / ".f").write_text("no")
    (folder / "empty.txt").write_text("")
    in_order = [FULL[-3], FULL[-4], FULL[-2], FULL[-1]]
    assert run(folder, tmp_path / "1", tokenizer=bpe) == encoded(in_order)
    paths = [folder / name for name in names]
    assert run(paths, tmp_path / "2", tokenizer=bpe) == encoded(FULL[-4:])
    assert run(str(folder / "*.*"), tmp_path / "3", tokenizer=bpe) == encoded(in_order[:2])
    assert run(str(folder / "**/*.py"), tmp_path / "4", tokenizer=bpe) == encoded([FULL[-2]])


@pytest.mark.parametrize(
    ("suffix", "compress"),
    [
        (".gz", gzip.compress),
        (".gz", lambda data: gzip.compress(data[:999]) + gzip.compress(data[999:])),
        (".bz2", bz2.compress),
        (".xz", lzma.compress),
        (".zst", None),
    ],
)
def test_compressed_files(tmp_path: Path, bpe: Path, suffix: str, compress: Any) -> None:
    if compress is None:
        has_zstd = importlib.util.find_spec("backports") and pytest.importorskip("backports.zstd")
        if not has_zstd:
            pytest.skip("needs backports.zstd")
        zstd = has_zstd
        compress = lambda data: zstd.compress(data[:999]) + zstd.compress(data[999:])  # noqa: E731
    lines = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(compress(lines))
    assert run(path, tmp_path / "lines", tokenizer=bpe, batch_bytes=500) == encoded(FULL)
    path = tmp_path / f"a.txt{suffix}"
    path.write_bytes(compress(FULL[-1].encode()))
    assert run(path, tmp_path / "text", tokenizer=bpe) == encoded(FULL[-1:])
    path.write_bytes(compress(FULL[-1].encode())[:-20])
    with pytest.raises(ValueError, match=f"a.txt{suffix} cannot be read .*get a whole copy"):
        run(path, tmp_path / "cut", tokenizer=bpe)


def test_zstd_that_may_be_cut_is_not_read(tmp_path: Path, monkeypatch: Any) -> None:
    compression = pytest.importorskip("fsspec.compression")
    utils = pytest.importorskip("fsspec.utils")
    (tmp_path / "a.jsonl.zst").write_bytes(b"x")

    def zstandard_file(file: Any) -> Any:
        return file

    monkeypatch.setitem(compression.compr, "zstd", zstandard_file)
    monkeypatch.setitem(utils.compressions, "zst", "zstd")
    with pytest.raises(ImportError, match="nothing here reads .zst: run `pip install backports"):
        prepare(tmp_path / "a.jsonl.zst", tmp_path / "out")


def test_parquet(tmp_path: Path, bpe: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pyarrow.table({"n": list(range(len(TEXTS))), "body": TEXTS})
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=5)
    for i, size in enumerate((100, 1 << 20)):
        options = {"tokenizer": bpe, "text_column": "body", "batch_bytes": size}
        assert run(tmp_path / "a.parquet", tmp_path / f"{i}", **options) == encoded(FULL)
    with pytest.raises(ValueError, match="a.parquet, row 0: there is no 'text', but 'n', 'body'"):
        run(tmp_path / "a.parquet", tmp_path / "no", tokenizer=bpe)
    table = pyarrow.table({"tools": ["x"], "conversations": ["y"], "prompt": ["z"]})
    parquet.write_table(table, tmp_path / "other.parquet")
    with pytest.raises(ValueError, match="no 'text', but 'tools', 'conversations', 'prompt': name"):
        run(tmp_path / "other.parquet", tmp_path / "no", tokenizer=bpe)
    parquet.write_table(pyarrow.table({"text": ["a", None]}), tmp_path / "null.parquet")
    with pytest.raises(ValueError, match="null.parquet, row 1: 'text' is null"):
        run(tmp_path / "null.parquet", tmp_path / "null", tokenizer=bpe)
    (tmp_path / "not.parquet").write_bytes(b"PAR1 not")
    with pytest.raises(ValueError, match="not.parquet cannot be read"):
        run(tmp_path / "not.parquet", tmp_path / "not", tokenizer=bpe)


def test_urls(tmp_path: Path, bpe: Path) -> None:
    memory = pytest.importorskip("fsspec").filesystem("memory")
    lines = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()
    memory.pipe("/corpus/a.jsonl.gz", gzip.compress(lines))
    memory.pipe("/corpus/more/b.txt", FULL[-1].encode())
    options = {"tokenizer": bpe, "batch_bytes": 2000, "workers": 2}
    expected = encoded([*FULL, FULL[-1]])
    assert run("memory://corpus", tmp_path / "folder", **options) == expected
    assert run("memory://corpus/*.gz", tmp_path / "glob", **options) == expected[:-1]
    assert run("memory://corpus/more/b.txt", tmp_path / "file", **options) == expected[-1:]
    (tmp_path / "c.txt").write_text("hello")
    assert run(f"file://{tmp_path}/c.txt", tmp_path / "local", **options) == encoded(["hello"])
    with pytest.raises(FileNotFoundError, match="there is no file memory://corpus/no.txt"):
        run("memory://corpus/no.txt", tmp_path / "no", **options)
    memory.rm("/corpus", recursive=True)


@pytest.mark.parametrize("separator", ["<|endoftext|>", "\n\n", "é"])
@pytest.mark.parametrize("size", [1, 7, 1 << 20])
def test_a_separator(tmp_path: Path, bpe: Path, separator: str, size: int) -> None:
    texts = ["one\n two", "thr<|endof", "", "four", "\n", "fünf"]
    for i, last in enumerate(("", separator)):
        path = tmp_path / f"{i}.txt"
        path.write_bytes((separator.join(texts) + last).encode())
        # "\n" and "" meet a separator of line breaks in more than one way.
        parts = (separator.join(texts) + last).split(separator)
        options = {"tokenizer": bpe, "document_separator": separator, "batch_bytes": size}
        found = run(path, tmp_path / f"out{i}", **options)
        assert found == encoded([part for part in parts if part])


@pytest.mark.parametrize("size", [1, 100, 3000, 1 << 20])
@pytest.mark.parametrize("name", ["bytes", "bpe", "pieces", "whole"])
def test_a_long_document_in_pieces(tmp_path: Path, bpe: Path, name: str, size: int) -> None:
    text = "\n".join([*HARD, *prose()[:3]])
    if size == 1:
        text = text[:800]
    path = tmp_path / "long.txt"
    path.write_bytes(text.encode())
    if name == "pieces":
        bpe.write_text(word_pieces().to_str())
    elif name == "whole":  # a blank before the text: it must be seen as a whole
        spec = json.loads(bpe_json())
        spec["pre_tokenizer"]["add_prefix_space"] = True
        bpe.write_text(json.dumps(spec))
    tokenizer = open_tokenizer("bytes" if name == "bytes" else bpe)
    expected = list(tokenizer.encode_batch([text])[0])
    expected += [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    options = {"tokenizer": "bytes" if name == "bytes" else bpe, "batch_bytes": size}
    assert run([path, path], tmp_path / "out", **options) == [expected, expected]


def test_a_separator_that_does_not_occur(tmp_path: Path, capsys: Any) -> None:
    """As one in which a shell leaves a backslash."""
    for name, text in (("a", "one\n\ntwo"), ("b", "three"), ("c", ""), ("d", "four\r\n\r\nfive")):
        (tmp_path / f"{name}.txt").write_bytes(text.encode())
    options: dict[str, Any] = {"tokenizer": "bytes", "quiet": False, "batch_bytes": 2}
    for separator, number, name in (("\n\n", 2, "b.txt"), ("\\n\\n", 3, "a.txt")):
        out = tmp_path / f"out{number}"
        run(str(tmp_path / "*.txt"), out, document_separator=separator, **options)
        said = capsys.readouterr().out
        assert f"not occur, each one document: {number}, such as {tmp_path / name}" in said
    run(tmp_path / "a.txt", tmp_path / "out", document_separator="\n\n", **options)
    assert "does not occur" not in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["no words", "a tokenizer", "a separator", "words"])
def test_a_large_text_without_a_cut_is_said(
    tmp_path: Path, bpe: Path, monkeypatch: Any, capsys: Any, kind: str
) -> None:
    monkeypatch.setattr("nar_kernels.data.prepare.batches._LARGE", 2000)
    (tmp_path / "a.txt").write_text("some words " * 500 if kind != "no words" else "日本語 " * 500)
    options: dict[str, Any] = {"tokenizer": bpe, "quiet": False, "batch_bytes": 100}
    if kind == "a tokenizer":
        spec = json.loads(bpe_json())
        spec["pre_tokenizer"]["add_prefix_space"] = True
        bpe.write_text(json.dumps(spec))
    elif kind == "a separator":
        options["document_separator"] = "|"
    run(tmp_path / "a.txt", tmp_path / "out", **options)
    note = f"note: {tmp_path}/a.txt has "
    assert capsys.readouterr().out.count(note) == (kind != "words")


def test_the_end_of_text(tmp_path: Path, bpe: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", [{"text": "a"}, {"text": "b<|endoftext|>"}])
    plain = encoded(["a", "b"], eos=[])
    assert run(path, tmp_path / "1", tokenizer=bpe) == [[*ids, 0] for ids in plain]
    no = run(path, tmp_path / "2", tokenizer=bpe, append_eos=False)
    assert no == [plain[0], [*plain[1], 0]]
    text = run(path, tmp_path / "3", tokenizer=bpe, parse_special_tokens=False)
    assert text[1].count(0) == 1 and len(text[1]) > 3
    for tokenizer in ("bytes", None):  # so little text gets bytes
        with pytest.raises(ValueError, match="append_eos is true, but the tokenizer bytes has no"):
            run(path, tmp_path / "4", tokenizer=tokenizer, append_eos=True)
    assert run(path, tmp_path / "5", tokenizer="bytes") == [[97], list(b"b<|endoftext|>")]


def test_the_mask_token_in_text_is_text(tmp_path: Path, capsys: Any) -> None:
    """Data must not contain it."""
    theirs = word_pieces()
    (tmp_path / "pieces.json").write_text(theirs.to_str())
    text = "the [MASK] token of [CLS] models"
    path = write_lines(tmp_path / "a.jsonl", [{"text": "the text"}, {"text": text}])
    options = {"tokenizer": tmp_path / "pieces.json", "quiet": False}
    found = run(path, tmp_path / "out", **options)
    manifest = Corpus(tmp_path / "out").manifests[0]
    assert manifest is not None and manifest.mask_id == 4
    assert manifest.num_tokens == manifest.vocab_size and manifest.eos_id is None
    assert found[0] == theirs.encode("the text", add_special_tokens=False).ids
    pieces = [theirs.encode(part, add_special_tokens=False).ids for part in text.split("MASK")]
    mask = theirs.encode("MASK", add_special_tokens=False).ids
    assert found[1] == [*pieces[0], *mask, *pieces[1]]
    assert 2 in found[1] and 4 not in found[1]
    assert "mask tokens that the text names, taken for text: 1" in capsys.readouterr().out


def test_the_mask_token_in_a_long_text(tmp_path: Path, capsys: Any) -> None:
    """The tokens do not depend on how it is cut."""
    (tmp_path / "pieces.json").write_text(word_pieces().to_str())
    (tmp_path / "a.txt").write_text("some words [CLS] and more\n" * 20 + "a [MASK] [MASK] b\n" * 2)
    found = []
    for size in (200, 1 << 20):
        options = {"tokenizer": tmp_path / "pieces.json", "batch_bytes": size, "quiet": False}
        found.append(run(tmp_path / "a.txt", tmp_path / str(size), **options))
        assert "the text names, taken for text: 4" in capsys.readouterr().out
    assert found[0] == found[1] and found[0][0].count(2) == 20 and 4 not in found[0][0]


@pytest.mark.seconds
def test_a_document_that_has_no_tokens(tmp_path: Path) -> None:
    """With a loss mask, which is another way to encode it, and in a worker."""
    model = tokenizers.models.WordLevel({"the": 0, "cat": 1}, "[UNK]")
    words = tokenizers.Tokenizer(model)
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    words.save(str(tmp_path / "words.json"))
    for record in ({"text": "the zebra"}, {"prompt": "the ", "completion": "zebra"}):
        path = write_lines(tmp_path / "a.jsonl", [{"text": "the cat"}, record])
        for workers in (1, 2):
            options = {"tokenizer": tmp_path / "words.json", "workers": workers, "batch_bytes": 5}
            with pytest.raises(
                ValueError, match="line 2: the tokenizer fails .*/words.json cannot .*\\[UNK"
            ):
                run(path, tmp_path / "out", **options)


def test_tiktoken(tmp_path: Path, monkeypatch: Any) -> None:
    registry = pytest.importorskip("tiktoken.registry")
    from tests.helpers.texts import encoding

    monkeypatch.setitem(registry.ENCODINGS, "small", small := encoding())
    registry.list_encoding_names()
    monkeypatch.setitem(registry.ENCODING_CONSTRUCTORS, "small", None)
    path = write_lines(tmp_path / "a.jsonl", [{"text": text} for text in TEXTS])
    options = {"tokenizer": "tiktoken:small", "batch_bytes": 1000, "workers": 2}
    expected = [[*small.encode_ordinary(text), 300] for text in FULL]
    assert run(path, tmp_path / "out", **options) == expected


def test_a_folder_of_hugging_face(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    folder = write_chat_tokenizer(tmp_path / "chat")
    theirs = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    path = write_lines(tmp_path / "a.jsonl", [{"text": text} for text in TEXTS])
    found = run(path, tmp_path / "out", tokenizer=folder)
    expected = [theirs(text, add_special_tokens=False)["input_ids"] for text in FULL]
    assert found == [[*ids, theirs.eos_token_id] for ids in expected]
    manifest = Corpus(tmp_path / "out").manifests[0]
    assert manifest is not None
    assert (manifest.eos_id, manifest.mask_id, manifest.num_tokens) == (601, 602, 603)


def test_a_mark_of_utf8_is_dropped(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfa\xef\xbb\xbf")
    (tmp_path / "b.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "b"}\r\n\r\n{"text": "c"}')
    paths = [tmp_path / "a.txt", tmp_path / "b.jsonl"]
    found = run(paths, tmp_path / "out", tokenizer="bytes")
    assert found == [list(b"a\xef\xbb\xbf"), [98], [99]]


@pytest.mark.parametrize("shard_tokens", [1, 50, 1000, 10**9])
def test_shards_end_where_documents_do(tmp_path: Path, bpe: Path, shard_tokens: int) -> None:
    path = write_lines(tmp_path / "a.jsonl", [{"text": text[:500]} for text in TEXTS * 3])
    expected = encoded([text[:500] for text in FULL * 3])
    options = {"tokenizer": bpe, "shard_tokens": shard_tokens, "batch_bytes": 700}
    assert run(path, tmp_path / "out", **options) == expected
    manifest = Corpus(tmp_path / "out").manifests[0]
    assert manifest is not None
    sizes = [shard.num_tokens for shard in manifest.shards]
    assert all(size >= shard_tokens for size in sizes[:-1])
    lengths = iter(map(len, expected))
    for shard in manifest.shards:  # the last document fills it
        own = [next(lengths) for _ in range(shard.num_documents)]
        assert sum(own) == shard.num_tokens and sum(own[:-1]) < shard_tokens
    check_files(tmp_path / "out")


@pytest.mark.seconds
def test_the_same_for_any_number_of_workers(tmp_path: Path, bpe: Path) -> None:
    draw = random.Random(0)
    records = [{"text": draw.choice(TEXTS)[: draw.randrange(900)]} for _ in range(200)]
    write_lines(tmp_path / "a.jsonl", records)
    (tmp_path / "b.txt").write_bytes("\n".join(TEXTS).encode())
    inputs = [tmp_path / "a.jsonl", tmp_path / "b.txt"]
    made = []
    for workers in (1, 2, 3):
        out = tmp_path / str(workers) / "out"
        options = {"batch_bytes": 2000, "shard_tokens": 9000, "workers": workers}
        prepare(inputs, out, tokenizer=bpe, quiet=True, **options)
        made.append(contents(out))
    assert made[0] == made[1] == made[2] and len(made[0]) > 6


def test_all_empty(tmp_path: Path, bpe: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", [{"text": ""}] * 3)
    with pytest.raises(ValueError, match="no text in the inputs: all documents are empty"):
        run(path, tmp_path / "out", tokenizer=bpe)
    assert not (tmp_path / "out").exists()


def test_what_was_left_out_is_said(tmp_path: Path, bpe: Path, capsys: Any) -> None:
    path = write_lines(tmp_path / "a.jsonl", [{"text": ""}, {"text": "a"}, {"text": ""}])
    run(path, tmp_path / "out", tokenizer=bpe, quiet=False)
    assert "empty documents, left out: 2" in capsys.readouterr().out


RECORDS: list[tuple[bytes, str]] = [
    (b'{"text": "a"}\n{"body": 1}', "line 2: there is no 'text', but 'body': name the one with"),
    (b'{"text": "a"}\n\n{"text": 7}', "line 3: 'text' is 7: it must be text"),
    (b'{"text": "a"}\n{"text": null}', "line 2: 'text' is null"),
    (b'{"text": "a"}\n["b"]', 'line 2: it is no object, but \\["b"\\]: a line is like'),
    (b'{"text": "a"}\n{"text": "b}', "line 2 is no JSON .* correct or remove it$"),
    (b'[\n{"text": "a"}\n]', "line 1 is no JSON .*a line a record with `jq -c '.\\[\\]'`"),
    (b'{\n"text": "a"\n}', "line 1 is no JSON .*a line a record with `jq -c .`"),
    ('{"text": "a"}'.encode("utf-16"), "line 1: byte 0xff is not UTF-8 .*iconv"),
    ('{"text": "a"}'.encode("utf-16-be"), "line 1 is no JSON"),
    (b'{"text": "a"}\n' + '{"text": "a"}'.encode("utf-16-be"), "line 2 is no JSON"),
    (b'{"text": "a"}\n{"text": "\xff"}', "line 2: byte 0xff is not UTF-8 .*iconv"),
    (b'{"text": "a"}\n{"text": "\\ud800"}', "line 2: '.ud800' is half of a surrogate pair"),
    (b'{"text": "a"}\n{"messages": []}', "line 2: it is a conversation, and the tokenizer has no"),
    (b'{"prompt": [1], "completion": []}', "line 1: 'completion' has no messages: give one"),
    (
        b'{"text": "a"}\n{"prompt": "a", "completion": [1]}',
        "line 2: .*: both must be text, or both lists",
    ),
]


@pytest.mark.parametrize("size", [10, 1 << 20])
@pytest.mark.parametrize(("content", "message"), RECORDS)
def test_bad_records(tmp_path: Path, bpe: Path, content: bytes, message: str, size: int) -> None:
    (tmp_path / "bad.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=f"{tmp_path}/bad.jsonl, {message}"):
        run(tmp_path / "bad.jsonl", tmp_path / "out", tokenizer=bpe, batch_bytes=size)
    assert not (tmp_path / "out").exists()


@pytest.mark.seconds
def test_the_first_bad_record_is_named(tmp_path: Path, bpe: Path) -> None:
    lines = [json.dumps({"text": "word " * 20})] * 100
    lines[60] = lines[40] = "{"
    (tmp_path / "bad.jsonl").write_text("\n".join(lines))
    with pytest.raises(ValueError, match="bad.jsonl, line 41 is no JSON"):
        run(tmp_path / "bad.jsonl", tmp_path / "out", tokenizer=bpe, batch_bytes=500, workers=2)


def test_a_file_that_may_not_be_read(tmp_path: Path, monkeypatch: Any) -> None:
    """Which says nothing of its content. (Root may read all.)"""
    local = pytest.importorskip("fsspec.implementations.local")
    path = write_lines(tmp_path / "a.jsonl", [{"text": "a"}])
    for error in (PermissionError(13, "Permission denied", str(path)), OSError(5, "broken")):

        def refusing(*args: Any, error: OSError = error, **kwargs: Any) -> None:
            raise error

        monkeypatch.setattr(local.LocalFileSystem, "_open", refusing)
        with pytest.raises(type(error), match=f"(denied|rror): '{path}'"):
            run(path, tmp_path / "out", tokenizer="bytes")


def test_a_chat_template_that_is_binary(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", [{"text": "a"}])
    (tmp_path / "chat.jinja").write_bytes(b"\xff")
    with pytest.raises(ValueError, match="chat.jinja is no chat template, but binary"):
        run(path, tmp_path / "out", chat_template=tmp_path / "chat.jinja")


def test_text_that_is_not_utf8(tmp_path: Path, bpe: Path) -> None:
    path = tmp_path / "latin.txt"
    path.write_bytes(b"word word\n" * 50 + "é".encode("latin-1") + b"\nmore\n")
    for i, size in enumerate((20, 1 << 20)):
        options = {"tokenizer": bpe, "batch_bytes": size}
        with pytest.raises(ValueError, match="latin.txt, line 51: byte 0xe9 is not UTF-8"):
            run(path, tmp_path / f"{i}", **options)
        with pytest.raises(ValueError, match="latin.txt, line 51: byte 0xe9 is not UTF-8"):
            run(path, tmp_path / f"s{i}", document_separator="\n", **options)


def test_ids_beyond_the_vocabulary_are_refused(tmp_path: Path, monkeypatch: Any) -> None:
    """And never wrapped around."""
    from nar_kernels.data.tokenizers.byte_level import ByteTokenizer

    (tmp_path / "a.txt").write_text("a")
    for bad in (256, 65536 + 97, -1):
        monkeypatch.setattr(
            ByteTokenizer, "encode_arrays", lambda *a, bad=bad, **k: [np.array([97, bad])]
        )
        with pytest.raises(ValueError, match=f"gave id {bad}, outside its vocabulary"):
            run(tmp_path / "a.txt", tmp_path / "out", tokenizer="bytes")


def test_a_document_that_the_tokenizer_fails_at(tmp_path: Path, monkeypatch: Any) -> None:
    from nar_kernels.data.tokenizers.byte_level import ByteTokenizer

    def failing(self: Any, texts: list[str], parse_special: bool = True) -> list[np.ndarray]:
        if "bad" in "".join(texts):
            raise ValueError("stack too small")
        return [np.array([97]) for _ in texts]

    monkeypatch.setattr(ByteTokenizer, "encode_arrays", failing)
    path = write_lines(tmp_path / "a.jsonl", [{"text": "good"}, {"text": "bad"}])
    with pytest.raises(ValueError, match="a.jsonl, line 2: the tokenizer fails .stack too small"):
        run(path, tmp_path / "out", tokenizer="bytes")


@pytest.mark.parametrize(
    ("vocab_size", "dtype"), [(257, "uint16"), (65535, "uint16"), (65536, "uint32")]
)
def test_the_dtype_holds_the_mask(tmp_path: Path, vocab_size: int, dtype: str) -> None:
    spec = json.loads(bpe_json())
    model = spec["model"]
    if vocab_size > 600:
        model["vocab"]["<last>"] = vocab_size - 1
        token = {**spec["added_tokens"][0], "content": "<last>", "id": vocab_size - 1}
        spec["added_tokens"].append(token)
    else:
        model["vocab"] = {t: i for t, i in model["vocab"].items() if i < vocab_size}
        model["merges"] = []
    (tmp_path / "t.json").write_text(json.dumps(spec))
    (tmp_path / "a.txt").write_text("a<last>")
    run(tmp_path / "a.txt", tmp_path / "out", tokenizer=tmp_path / "t.json")
    corpus = Corpus(tmp_path / "out")
    (manifest,) = corpus.manifests
    assert (manifest.vocab_size, manifest.dtype) == (vocab_size, dtype)
    if vocab_size > 600:
        assert corpus.read(0, len(corpus)).tolist()[1] == vocab_size - 1


def test_archives(tmp_path: Path) -> None:
    for name in ("a.tar", "a.tar.gz", "a.zip", "a.tgz"):
        (tmp_path / name).write_bytes(b"x")
        with pytest.raises(ValueError, match=f"{name} is an archive: unpack it"):
            run(tmp_path / name, tmp_path / "out")
    (tmp_path / "a.npy.gz").write_bytes(b"x")
    with pytest.raises(ValueError, match="is compressed as a whole"):
        run(tmp_path / "a.npy.gz", tmp_path / "out")


def test_mistakes_in_options(tmp_path: Path, bpe: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    np.save(tmp_path / "a.npy", np.zeros((1, 2, 2), np.uint8))
    both = [tmp_path / "a.txt", tmp_path / "a.npy"]
    for inputs, options, message in (
        (both, {}, "a.txt is among .npy files"),
        ([], {}, "there is no input"),
        ("", {}, "the name of an input is empty"),
        (tmp_path / "no", {}, "there is no file .*no: an input is"),
        (tmp_path / "a.txt", {"workers": 0}, "workers is 0: it must be at least 1"),
        (tmp_path / "a.txt", {"shard_tokens": 0}, "shard_tokens is 0"),
        (tmp_path / "a.txt", {"train_bpe": 256}, "train_bpe is 256: it must be in .257, 2..31."),
        (tmp_path / "a.txt", {"train_bpe": 300, "tokenizer": bpe}, "exclude each other"),
        (tmp_path / "a.txt", {"labels": "x.npy"}, "labels is for image codes"),
        (tmp_path / "a.txt", {"vocab_size": 7}, "vocab_size is for image codes"),
        (tmp_path / "a.txt", {"document_separator": ""}, "--document-separator is empty"),
        (tmp_path / "a.npy", {"tokenizer": "bytes"}, "tokenizer is for text"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            run(inputs, tmp_path / "out", **options)
    with pytest.raises(ValueError, match="out is 's3://a/b': it must be a folder of this machine"):
        prepare(tmp_path / "a.txt", "s3://a/b")
    with pytest.raises(TypeError, match="workers is 'two'"):
        run(tmp_path / "a.txt", tmp_path / "out", workers="two")
    assert not list(tmp_path.glob("out*"))
