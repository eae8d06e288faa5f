"""`nar-kernels inspect`: what it prints of a corpus, and its exit status."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nar_kernels.cli.main import main
from nar_kernels.data.inspect import scan as scan_module
from nar_kernels.data.prepare import prepare
from nar_kernels.show.inspection import _bytes
from tests.helpers.corpora import write_scattered_megatron

pytestmark = pytest.mark.usefixtures("one_thread")

TEXT = b"to be, or not to be: " * 40


def inspect(*argv: object, status: int = 0) -> None:
    assert main(["inspect", *map(str, argv)]) == status


@pytest.fixture
def facts(capsys: pytest.CaptureFixture[str]):
    """What `--json` prints: one line."""

    def of(*argv: object, status: int = 0) -> dict[str, Any]:
        capsys.readouterr()
        inspect(*argv, "--json", status=status)
        out, err = capsys.readouterr()
        assert out.count("\n") == 1 and err == ""
        return json.loads(out)

    return of


@pytest.fixture
def rows(capsys: pytest.CaptureFixture[str]):
    """The lines of a terminal, by their labels."""

    def of(*argv: object, status: int = 0) -> dict[str, list[str]]:
        capsys.readouterr()
        inspect(*argv, status=status)
        out, err = capsys.readouterr()
        assert err == "" and max(map(len, out.splitlines())) <= 100
        found: dict[str, list[str]] = {}
        label = ""
        for line in out.splitlines()[1:]:
            assert line.startswith("  ") and line == line.rstrip()
            label = line[2:18].strip() or label
            found.setdefault(label, []).append(line[18:])
        return found

    return of


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Ten ids in three files."""
    folder = tmp_path / "shards"
    folder.mkdir()
    np.save(folder / "shard-1.npy", np.array([1, 2, 0], "uint16"))
    np.save(folder / "shard-2.npy", np.array([9, 2, 2, 2], "uint16"))
    np.save(folder / "shard-10.npy", np.array([0, 0, 5], "uint16"))
    return folder


def test_text(tmp_path: Path, rows) -> None:
    (tmp_path / "play.txt").write_bytes(TEXT)
    assert rows(tmp_path / "play.txt") == {
        "format": ["raw, uint8"],
        "files": ["840 bytes"],
        "tokens": ["840"],
        "documents": ["unknown: --eos-id says which id ends them"],
        "windows": ["3 of 256 tokens; 72 left over at the end"],
        "ids": ["32 to 116, 9 different ones"],
        "vocabulary": ["num_tokens 257, mask_id 256"],
        "bad ids": ["none"],
        "most frequent": [
            " 32  240  28.57%  ' '",
            "111  160  19.05%  'o'",
            "116  120  14.29%  't'",
            " 98   80   9.52%  'b'",
            "101   80   9.52%  'e'",
            " 44   40   4.76%  ','",
            " 58   40   4.76%  ':'",
            "110   40   4.76%  'n'",
        ],
        "first window": [
            "'to be, or not to be: to be, or not to be: to be, or not to be: to be, or not to",
            "be: to be, or not to be: to be, or not to be: to be, or not to be: to be, or not",
            "to be: to be, or not to be: to be, or not to be: to be, or not to be: to be, ...",
        ],
    }


def test_json_has_all(shards: Path, facts) -> None:
    found = facts(shards, "--eos-id", 0, "--seq-len", 3)
    paths = [str(shards / f"shard-{i}.npy") for i in (1, 2, 10)]
    assert found == {
        "sources": [str(shards)],
        "format": "npy",
        "dtype": "uint16",
        "files": {
            "count": 3,
            "bytes": 3 * 128 + 20,
            "first": [
                {"path": path, "bytes": 128 + 2 * n, "tokens": n}
                for path, n in zip(paths, (3, 4, 3), strict=True)
            ],
        },
        "tokens": 10,
        "has_loss_mask": False,
        "documents": {
            "count": 4,
            "empty": 1,
            "eos_id": 0,
            "eos_occurs": True,
            "mean_length": 2.5,
            "length_percentiles": {"0": 1, "5": 1, "25": 1, "50": 1, "75": 3, "95": 5, "100": 5},
            "that_hold_a_window": 2,
        },
        "ids": {
            "min": 0,
            "max": 9,
            "distinct": 5,
            "most_frequent": [
                {"id": 2, "count": 4, "share": 0.4, "text": None},
                {"id": 0, "count": 3, "share": 0.3, "text": None},
                {"id": 1, "count": 1, "share": 0.1, "text": None},
                {"id": 5, "count": 1, "share": 0.1, "text": None},
                {"id": 9, "count": 1, "share": 0.1, "text": None},
            ],
        },
        "vocabulary": {"num_tokens": 11, "mask_id": 10, "is_given": False, "least": 10},
        "bad_ids": {"count": 0, "outside": 0, "masked": 0, "first": []},
        "windows": {"seq_len": 3, "count": 3, "tokens_of_the_tail": 1},
        "first_window": {"ids": [1, 2, 0], "text": None},
    }


def test_documents_and_files(shards: Path, rows) -> None:
    found = rows(shards, "--eos-id", 0, "--seq-len", 3)
    assert found["files"] == [
        "3, 404 bytes",
        "shard-1.npy   3 tokens",
        "shard-2.npy   4 tokens",
        "shard-10.npy  3 tokens",
    ]
    assert found["documents"] == [
        "4 that end with id 0, 1 of them empty",
        "median 1 tokens, nine of ten from 1 to 5, longest 5",
    ]
    assert found["windows"][1] == "documents with a whole one: 2"


def test_the_least_vocabulary(tmp_path: Path, rows) -> None:
    np.save(tmp_path / "a.npy", np.array([5, 1000], "uint16"))
    assert rows(tmp_path / "a.npy")["vocabulary"] == [
        "1,001 at least; with a mask token --num-tokens 1002",
        "(the default of train; more if the tokenizer has ids that do not occur here)",
    ]


def test_built_in_data(rows, facts) -> None:
    pytest.importorskip("sklearn")
    found = rows("digits")
    assert "documents" not in found and "files" not in found
    assert found["windows"] == ["1,797 of 64 tokens"]
    assert found["vocabulary"] == ["num_tokens 18, mask_id 17"]
    text = facts("text")
    assert text["sources"] == ["text"] and text["bad_ids"]["count"] == 0
    assert text["first_window"]["text"].isascii()


@pytest.fixture
def prepared(tmp_path: Path) -> Path:
    (tmp_path / "lines.jsonl").write_text('{"text": "ab"}\n{"text": "cd"}\n')
    prepare(
        [str(tmp_path / "lines.jsonl")], str(tmp_path / "corpus"), tokenizer="bytes", quiet=True
    )
    return tmp_path / "corpus"


def test_a_prepared_corpus(prepared: Path, rows, facts) -> None:
    """Its manifest says what its vocabulary, its documents and its tokenizer are."""
    found = rows(prepared, "--seq-len", 2)
    assert found["documents"] == ["2", "of 2 tokens each"]
    assert found["windows"] == ["2 of 2 tokens", "documents with a whole one: 2"]
    assert found["vocabulary"] == ["num_tokens 257, mask_id 256"]
    assert found["first window"] == ["'ab'"]
    # What is given counts more.
    assert facts(prepared, "--num-tokens", 99, status=1)["bad_ids"]["outside"] == 2
    assert facts(prepared, "--mask-id", 98, status=1)["bad_ids"]["masked"] == 1


def test_documents_that_lie_apart_and_not_aligned(tmp_path: Path, facts) -> None:
    documents = [np.arange(n, dtype="uint16") for n in (300, 2, 1)]
    written = write_scattered_megatron(tmp_path, documents)
    found = facts(written.source, "--num-tokens", 300, "--seq-len", 2, status=1)
    assert (found["format"], found["tokens"]) == ("megatron", 303)
    assert found["documents"]["that_hold_a_window"] == 2
    assert found["documents"]["length_percentiles"]["100"] == 300
    assert [most["count"] for most in found["ids"]["most_frequent"]] == [3, 2, 1, 1, 1, 1, 1, 1]
    assert [bad["offset"] for bad in found["bad_ids"]["first"]] == [299]


def test_tokenizers(tmp_path: Path, rows, facts) -> None:
    pytest.importorskip("tokenizers")
    vocabulary = {"to": 0, "be": 1, "or": 2, "[UNK]": 3}
    model = {"type": "WordLevel", "vocab": vocabulary, "unk_token": "[UNK]"}
    (tmp_path / "tokenizer.json").write_text(json.dumps({"version": "1.0", "model": model}))
    np.save(tmp_path / "a.npy", np.array([0, 1, 2, 1], "uint8"))
    named = ("--tokenizer", tmp_path / "tokenizer.json", "--seq-len", 3)
    assert rows(tmp_path / "a.npy", *named)["first window"] == ["'to be or'"]
    texts = [most["text"] for most in facts(tmp_path / "a.npy", *named)["ids"]["most_frequent"]]
    assert texts == ["be", "to", "or"]
    # An id that is none of its own.
    np.save(tmp_path / "b.npy", np.array([0, 7, 1], "uint8"))
    found = facts(tmp_path / "b.npy", *named)
    assert found["first_window"] == {"ids": [0, 7, 1], "text": None}
    assert [most["text"] for most in found["ids"]["most_frequent"]] == ["to", "be", None]


def test_without_the_package_of_the_tokenizer(
    prepared: Path, rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That of a corpus is left out; one that was asked for is an error."""

    def fails(name: str) -> None:
        raise ImportError("tokenizers is not installed: run `pip install tokenizers`")

    manifest = json.loads((prepared / "manifest.json").read_text())
    manifest["tokenizer"]["name"] = "words"
    (prepared / "manifest.json").write_text(json.dumps(manifest))
    monkeypatch.setattr("nar_kernels.cli.inspect.tokenizer_from_json", fails)
    assert rows(prepared)["first window"] == ["97 98 99 100"]
    monkeypatch.setattr("nar_kernels.cli.inspect.open_tokenizer", fails)
    inspect(prepared, "--tokenizer", "words", status=2)


def test_lines_as_documents(tmp_path: Path, rows) -> None:
    (tmp_path / "a.txt").write_text("one\n\nthree\n")
    assert rows(tmp_path / "a.txt", "--eos-id", 10)["documents"] == [
        "3 that end with id 10, 1 of them empty",
        "median 4 tokens, nine of ten from 1 to 6, longest 6",
    ]


def test_an_id_that_ends_no_document(shards: Path, rows, facts) -> None:
    with pytest.warns(UserWarning, match="eos_id 7 does not occur"):
        found = rows(shards, "--eos-id", 7)
    expected = ["1: id 7, which is to end them, does not occur", "of 10 tokens each"]
    assert found["documents"] == rows(shards, "--eos-id", 7)["documents"] == expected  # remembered
    assert facts(shards, "--eos-id", 7)["documents"]["eos_occurs"] is False
    np.save(shards / "a.npy", np.array([1, 1 << 20, 1 << 30]))
    found = facts(shards / "a.npy", "--eos-id", 1 << 20)["documents"]
    assert found["count"] == 2 and found["eos_occurs"] is None


def test_frequencies_of_large_ids(tmp_path: Path, rows, facts) -> None:
    note = "(of ids in [0, 2**20), the others aside)"
    np.save(tmp_path / "a.npy", np.array([1 << 20, 1 << 20, 5]))
    assert facts(tmp_path / "a.npy")["ids"]["distinct"] is None
    assert rows(tmp_path / "a.npy")["most frequent"] == ["5  1  33.33%", note]
    np.save(tmp_path / "b.npy", np.array([(1 << 20) - 1, 5, 5]))
    assert facts(tmp_path / "b.npy")["ids"]["distinct"] == 2
    assert note not in rows(tmp_path / "b.npy")["most frequent"]


def test_many_files(tmp_path: Path, rows, facts) -> None:
    for i in range(12):
        np.save(tmp_path / f"{i}.npy", np.array([i, 1], "uint8"))
    assert rows(tmp_path)["files"][-2:] == ["4.npy  2 tokens", "and 7 more"]
    found = facts(tmp_path / "3.npy", tmp_path / "1.npy")
    assert found["first_window"]["ids"] == [3, 1, 1, 1]


def test_bad_ids(shards: Path, rows, facts) -> None:
    options = (shards, "--num-tokens", 6, "--mask-id", 2)
    for _ in range(2):  # the second time they are remembered
        assert rows(*options, status=1)["bad ids"] == [
            "1 outside [0, 6), 4 equal to mask_id 2",
            "2  at offset 1  shard-1.npy, 1",
            "9  at offset 3  shard-2.npy, 0",
            "2  at offset 4  shard-2.npy, 1",
            "2  at offset 5  shard-2.npy, 2",
            "2  at offset 6  shard-2.npy, 3",
        ]
    found = facts(*options, status=1)["bad_ids"]
    assert (found["count"], found["outside"], found["masked"]) == (5, 1, 4)
    file = str(shards / "shard-2.npy")
    assert found["first"][1] == {"offset": 3, "id": 9, "file": file, "offset_in_file": 0}
    # As in `train`, the last id is that of the mask.
    assert facts(shards, "--num-tokens", 10, status=1)["bad_ids"]["masked"] == 1
    assert facts(shards, "--num-tokens", 11)["bad_ids"]["count"] == 0
    assert rows(shards, "--num-tokens", 11)["vocabulary"] == ["num_tokens 11, mask_id 10"]


def test_more_bad_ids_than_are_shown(tmp_path: Path, rows) -> None:
    np.save(tmp_path / "a.npy", np.arange(2000))
    lines = rows(tmp_path / "a.npy", "--num-tokens", 900, status=1)["bad ids"]
    assert lines == [
        "1,100 outside [0, 900), 1 equal to mask_id 899",
        "899  at offset 899",
        "900  at offset 900",
        "901  at offset 901",
        "902  at offset 902",
        "903  at offset 903",
        "and 1,096 more",
    ]


def test_negative_ids_are_bad_in_every_vocabulary(tmp_path: Path, rows, facts) -> None:
    np.save(tmp_path / "a.npy", np.array([3, -100, 1 << 40, -100]))
    found = facts(tmp_path / "a.npy", status=1)
    assert found["bad_ids"]["outside"] == 3
    assert found["vocabulary"]["num_tokens"] == (1 << 31) - 1
    assert found["ids"] == {
        "min": -100,
        "max": 1 << 40,
        "distinct": None,
        "most_frequent": [{"id": 3, "count": 1, "share": 0.25, "text": None}],
    }
    assert rows(tmp_path / "a.npy", status=1)["ids"] == ["-100 to 1,099,511,627,776"]
    np.save(tmp_path / "b.npy", np.array([-2, -1]))
    lines = rows(tmp_path / "b.npy", status=1)
    assert lines["most frequent"] == ["(of ids in [0, 2**20), the others aside)"]
    assert lines["bad ids"][0] == "2 outside [0, 2)"


def test_a_mask_id_without_a_vocabulary(shards: Path, facts, rows) -> None:
    assert rows(shards, "--mask-id", 4)["vocabulary"] == [
        "10 at least; with --mask-id 4, --num-tokens 10",
        "(more if the tokenizer has ids that do not occur here)",
    ]
    assert facts(shards, "--mask-id", 4)["vocabulary"]["num_tokens"] == 10
    assert facts(shards, "--mask-id", 20)["vocabulary"]["num_tokens"] == 21
    assert facts(shards, "--mask-id", 5, status=1)["bad_ids"]["masked"] == 1


def test_a_corpus_shorter_than_a_window(tmp_path: Path, facts) -> None:
    np.save(tmp_path / "a.npy", np.array([1, 2]))
    found = facts(tmp_path / "a.npy")
    assert found["windows"] == {"seq_len": 256, "count": 0, "tokens_of_the_tail": 2}
    assert found["first_window"]["ids"] == [1, 2]


def test_bytes_that_are_no_text(tmp_path: Path, facts, rows) -> None:
    (tmp_path / "a.bin").write_bytes(bytes(range(20)))
    assert facts(tmp_path / "a.bin", "--dtype", "uint8")["first_window"]["text"] is None
    assert rows(tmp_path / "a.bin", "--dtype", "uint8")["first window"] == [
        " ".join(map(str, range(20)))
    ]
    (tmp_path / "b.bin").write_bytes("é\x1b[31m".encode())
    assert facts(tmp_path / "b.bin", "--dtype", "uint8")["first_window"]["text"] is None
    (tmp_path / "c.bin").write_bytes("é\nè".encode()[:-1])
    assert facts(tmp_path / "c.bin", "--dtype", "uint8")["first_window"]["text"] == "é\n\ufffd"


def test_the_second_time_nothing_is_read(
    shards: Path, rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = (shards, "--eos-id", "0", "--num-tokens", "6")
    first = rows(*options, status=1)

    def read(*args: object, **kwargs: object) -> None:
        raise AssertionError("it is read again")

    monkeypatch.setattr(scan_module, "_portions", read)
    monkeypatch.setattr("nar_kernels.data.corpus.Corpus._ends_by_eos", read)
    assert rows(*options, status=1) == first


@pytest.mark.parametrize("documents", [True, False])
def test_picture(shards: Path, tmp_path: Path, rows, documents: bool) -> None:
    pytest.importorskip("matplotlib")
    picture = tmp_path / "ids.png"
    rows(shards, *(["--eos-id", 0] if documents else []), "--picture", picture)
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_picture_of_one_id(tmp_path: Path, rows) -> None:
    pytest.importorskip("matplotlib")
    np.save(tmp_path / "a.npy", np.zeros(5, "uint8"))
    rows(tmp_path / "a.npy", "--eos-id", 0, "--picture", tmp_path / "ids.png")
    np.save(tmp_path / "a.npy", np.full(5, -1))
    rows(tmp_path / "a.npy", "--picture", tmp_path / "none.png", status=1)


def test_a_mixture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], facts
) -> None:
    monkeypatch.chdir(tmp_path)
    np.save("a.npy", np.arange(9, dtype="uint16"))
    Path("b.bin").write_bytes(np.array([7, -1], "int32").tobytes())
    parts = [{"data": "a.npy"}, {"data": "b.bin", "dtype": "int32", "weight": 0.5}]
    Path("mix.json").write_text(json.dumps({"mixture": parts}))
    found = facts("mix.json", status=1)["mixture"]
    assert [part["weight"] for part in found] == [1, 0.5]
    assert [part["tokens"] for part in found] == [9, 2]
    assert [part["bad_ids"]["count"] for part in found] == [0, 1]
    inspect("mix.json", status=1)
    first, second = capsys.readouterr().out.split("\n\n")
    assert first.startswith("a.npy\n") and second.startswith("b.bin\n")
    inspect("mix.json", "--picture", "x.png", status=2)
    assert "--picture is of one corpus, but mix.json is a mixture of 2" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["missing.npy"], r"missing\.npy"),
        (["raw.bin"], r"raw\.bin does not say what dtype its tokens have: .*--dtype"),
        (["raw.bin", "--dtype", "float32"], "--dtype"),
        (["a.npy", "--dtype", "uint16"], r"--dtype='?uint16'? was given|--dtype uint16 was given"),
        (["a.npy", "raw.bin"], r"raw\.bin"),
        (["a.npy", "--seq-len", "0"], "--seq-len is 0: it must be at least 1"),
        (["a.npy", "--num-tokens", "1"], r"--num-tokens is 1: it must be in \[2, 2\*\*31\)"),
        (["a.npy", "--num-tokens", "9", "--mask-id", "9"], r"--mask-id 9 is not in \[0"),
        (["a.npy", "--mask-id", "-1"], r"--mask-id is -1: it must be in \[0, 2\*\*31 - 1\)"),
        (["a.npy", "--tokenizer", "nothing.json"], "there is no tokenizer nothing.json"),
        (["a.npy", "--picture", "x.jpg"], r"--picture is x\.jpg: it must be a \.png file"),
        (["a.npy", "--picture", "nowhere/x.png"], "there is no folder nowhere"),
    ],
)
def test_mistakes(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    np.save("a.npy", np.arange(9, dtype="uint16"))
    Path("raw.bin").write_bytes(bytes(10))
    inspect(*options, status=2)
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("nar-kernels: ") and err.count("\n") == 1
    assert re.search(message, err)


def test_unknown_options(capsys: pytest.CaptureFixture[str]) -> None:
    for options in ([], ["a.npy", "--nothing"], ["a.npy", "--seq-len", "long"]):
        with pytest.raises(SystemExit) as stopped:
            inspect(*options)
        assert stopped.value.code == 2
    capsys.readouterr()


@pytest.mark.parametrize(
    ("count", "shown"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (1000, "1 KB"),
        (999_499, "999 KB"),
        (999_500, "1 MB"),
        (2_345_678_901, "2.35 GB"),
        (10**16, "10 PB"),
    ],
)
def test_sizes(count: int, shown: str) -> None:
    assert _bytes(count) == shown
