"""Files of datatrove, and what lies beside them."""

from pathlib import Path

import numpy as np
import pytest

from nar_kernels.data.corpus import Corpus
from nar_kernels.errors import CorpusFormatError
from tests.helpers.corpora import ids_of, refused, write_datatrove

DOCUMENTS = [np.arange(3, dtype="<u2"), np.arange(0, dtype="<u2"), np.arange(9, dtype="<u2")]
IDS = np.concatenate(DOCUMENTS)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write_datatrove(tmp_path, DOCUMENTS).source


def beside(path: Path, what: str) -> Path:
    return path.with_name(f"{path.name}.{what}")


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
@pytest.mark.parametrize("lacks", ["metadata", "index", "loss", "nothing"])
def test_what_may_be_missing(tmp_path: Path, dtype: str, lacks: str) -> None:
    path = write_datatrove(tmp_path, [document.astype(dtype) for document in DOCUMENTS]).source
    beside(path, lacks).unlink(missing_ok=True)
    corpus = Corpus(path)
    assert corpus.stream.layouts[0].dtype == dtype
    assert ids_of(corpus) == IDS.tolist()
    assert (corpus.loss_mask is None) == (lacks == "loss")
    if lacks == "index":
        assert corpus.document_ends is None
    else:
        assert corpus.document_ends.tolist() == [3, 3, 12]


def test_ends_are_a_map(path: Path) -> None:
    assert isinstance(Corpus(path).document_ends, np.memmap)


def test_the_dtype_of_a_lone_file(path: Path) -> None:
    for what in ("metadata", "index"):
        beside(path, what).unlink()
    refused(path, r"datatrove\.ds does not say what dtype its tokens have")
    assert ids_of(Corpus(path, dtype="uint16")) == IDS.tolist()
    beside(path, "json").write_text('{"dtype": "uint16"}')
    corpus = Corpus(path)
    assert ids_of(corpus) == IDS.tolist()
    assert len(corpus.loss_mask) == len(corpus)
    refused(path, "has 24 bytes, not a whole number of int64|dtype= says int64", dtype="int64")


def test_a_dtype_beside_metadata(path: Path) -> None:
    assert ids_of(Corpus(path, dtype="uint16")) == ids_of(Corpus(path, dtype="int16"))
    refused(path, r"given dtype uint32, but .*\.metadata says .* 2 bytes", dtype="uint32")


def test_metadata_of_odd_names(path: Path) -> None:
    for first in ("a|b|2", "Unknown Tokenizer|2|2", "tokenizer \N{SNOWMAN}|2", "of an old version"):
        beside(path, "metadata").write_text(f"{first}\n12\n12 T", encoding="utf-8")
        assert ids_of(Corpus(path)) == IDS.tolist()
    beside(path, "metadata").write_bytes(b"\xff\xfe|2\n12")
    assert ids_of(Corpus(path)) == IDS.tolist()
    beside(path, "metadata").write_text("name|2")
    assert ids_of(Corpus(path)) == IDS.tolist()


@pytest.mark.parametrize(
    ("what", "content", "message"),
    [
        ("metadata", b"", r"\.metadata: content is empty, but must be 'tokenizer|token size'"),
        ("metadata", b"name|8\n12", r"\.metadata: token size is '8', but must be 2 or 4"),
        ("metadata", b"name|\n12", r"token size is '', but must be 2 or 4"),
        ("metadata", b"name|two\n12", "token size is 'two'"),
        ("metadata", b"name|2\nmany", r"number of tokens is 'many', but must be a number"),
        ("metadata", b"name|2\n-12", "number of tokens is '-12'"),
        ("metadata", b"name|2\n" + b"9" * 5000, "number of tokens is '999"),
        ("metadata", "name|2\n\u0661\u0662".encode(), "number of tokens is '"),
        (
            "metadata",
            b"name|2\n13",
            r"number of tokens is 13, but must be 12, the tokens of uint16",
        ),
        ("metadata", b"name|4\n12", r"number of tokens is 12, but must be 6, the tokens of uint32"),
        ("index", b"", r"\.index: size is 0 bytes, but must be 8 for each document"),
        ("index", bytes(9), "size is 9 bytes, but must be 8"),
        (
            "index",
            np.array([3, 11], "<u8"),
            "last entry is 11, but must be 12, the tokens of uint16",
        ),
        ("index", np.array([3, 13], "<u8"), "last entry is 13"),
        ("index", np.array([1 << 63], "<u8"), "last entry is 9223372036854775808"),
        ("index", np.array([5, 3, 12], "<u8"), "do not divide its 12 tokens: their ends must asc"),
        ("index", np.array([13, 12], "<u8"), "do not divide its 12 tokens"),
        ("index", np.array([1 << 63, 12], "<u8"), "do not divide its 12 tokens"),
        # Differences that wrap.
        ("index", np.array([(1 << 63) - 1, (1 << 64) - 2, 12], "<u8"), "do not divide"),
        ("loss", b"", r"\.loss: number of bytes is 0, but must be 12, the tokens of uint16"),
        ("loss", bytes(11), "number of bytes is 11"),
        ("loss", bytes(13), "number of bytes is 13"),
    ],
)
def test_bad_companions(path: Path, what: str, content: bytes | np.ndarray, message: str) -> None:
    beside(path, what).write_bytes(bytes(content) if isinstance(content, bytes) else content)
    refused(path, message)


def test_bad_sizes(path: Path) -> None:
    path.write_bytes(IDS.tobytes()[:-1])
    refused(path, "has 23 bytes, not a whole number of uint16 tokens")
    path.write_bytes(IDS.tobytes()[:-2])
    refused(path, "must be 11, the tokens of uint16")
    beside(path, "metadata").unlink()
    refused(path, r"\.index: last entry is 12 tokens, but must be a half or a quarter of the 22 by")


def test_a_mask_for_some_files_only(tmp_path: Path, path: Path) -> None:
    other = path.with_name("other.ds")
    other.write_bytes(IDS.tobytes())
    beside(other, "index").write_bytes(np.array([12], "<u8").tobytes())
    with pytest.raises(CorpusFormatError, match=r"other\.ds has no loss mask, but other files"):
        Corpus(tmp_path)
    beside(other, "loss").write_bytes(bytes(12))
    mask = Corpus(tmp_path).loss_mask
    assert mask.read(0, len(mask)).tolist() == [1, 0, 0] * 4 + [0] * 12
