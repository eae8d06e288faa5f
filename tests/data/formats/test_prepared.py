"""Folders of ``nar-kernels prepare`` as corpora."""

import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest

from nar_kernels.data.corpus import Corpus
from nar_kernels.data.formats.manifest import FILE, read_manifest
from nar_kernels.data.formats.prepared import check_files
from nar_kernels.data.prepare import prepare
from nar_kernels.data.windows.dataset import TokenDataset
from nar_kernels.errors import CorpusFormatError
from tests.helpers.prepared import read_ends
from tests.helpers.texts import write_lines

pytest.importorskip("fsspec")
pytest.importorskip("tqdm")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two shards of two documents, with a loss mask."""
    records = [
        {"text": "abc"},
        {"prompt": "de", "completion": "fgh"},
        {"text": "i"},
        {"text": "jklm"},
    ]
    path = write_lines(tmp_path / "a.jsonl", records)
    out = tmp_path / "out"
    prepare(path, out, tokenizer="bytes", shard_tokens=6, quiet=True, workers=1)
    return out


def test_a_corpus(folder: Path) -> None:
    corpus = Corpus(folder)
    assert bytes(corpus.read(0, 13).tolist()) == b"abcdefghijklm"
    assert read_ends(corpus).tolist() == [3, 8, 9, 13]
    assert corpus.loss_mask is not None
    assert corpus.loss_mask.read(0, 13).tolist() == [1, 1, 1, 0, 0] + [1] * 8
    assert corpus.manifests == (read_manifest(folder),)
    assert len(corpus.stream.layouts) == 2 and corpus.stream.layouts[0].format == "prepared"
    again = pickle.loads(pickle.dumps(corpus))
    assert again.manifests == corpus.manifests and read_ends(again).tolist() == [3, 8, 9, 13]
    assert again.digest == corpus.digest == Corpus(np.arange(97, 110, dtype="uint16")).digest
    windows = TokenDataset(folder, 5, num_tokens=257, mask_id=256)
    assert [bytes(w.tolist()) for w in windows] == [b"abcde", b"fghij"]


def test_what_is_not_prepared_has_no_manifest(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.arange(5))
    (tmp_path / FILE).write_text('{"some": "other"}')
    for source in (tmp_path, tmp_path / "a.npy", np.arange(5), [tmp_path / "a.npy"]):
        corpus = Corpus(source)
        assert not corpus.manifests and len(corpus) == 5


def test_several_folders(folder: Path) -> None:
    second = shutil.copytree(folder, folder.with_name("second"))
    corpus = Corpus([folder, second])
    assert bytes(corpus.read(0, 26).tolist()) == b"abcdefghijklm" * 2
    assert len(corpus.manifests) == 2 and len(read_ends(corpus)) == 8
    assert TokenDataset([folder, second], 5).mask_id == 256


def test_several_folders_of_different_vocabularies(folder: Path, tmp_path: Path) -> None:
    text = tmp_path / "b.txt"
    text.write_text("to be, or not to be: " * 9)
    prepare(text, tmp_path / "bytes", tokenizer="bytes", quiet=True, workers=1)
    np.save(tmp_path / "plain.npy", np.arange(5, dtype="uint16"))
    assert len(Corpus([tmp_path / "bytes"]).manifests) == 1
    assert not Corpus([tmp_path / "bytes", tmp_path / "plain.npy"]).manifests
    prepare(text, tmp_path / "other", train_bpe=260, quiet=True, workers=1)
    with pytest.raises(CorpusFormatError, match="other and .*out differ in their tokenizer: .*aga"):
        Corpus([folder, tmp_path / "other"])


def test_a_dtype_is_not_given(folder: Path) -> None:
    with pytest.raises(
        CorpusFormatError, match="a prepared corpus, whose manifest.json says uint16"
    ):
        Corpus(folder, dtype="uint8")


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        ("tokens-00000.npy", np.zeros(7, "uint16"), "holds 7 uint16, but .* says 8 uint16"),
        ("tokens-00001.npy", np.zeros(5, "int64"), "holds 5 int64, but .* says 5 uint16"),
        ("loss-mask-00000.npy", np.zeros(7, "uint8"), "holds 7 uint8, but .* says 8 uint8"),
        ("loss-mask-00001.npy", np.zeros(5, "bool"), "has dtype bool"),
        ("documents-00000.npy", np.zeros(3, "int64"), "holds 3 int64, but .* says 2 int64"),
        ("documents-00001.npy", np.array([1, 4]), "do not divide its 5 tokens"),
    ],
)
def test_a_file_of_another_corpus(folder: Path, name: str, array: np.ndarray, message: str) -> None:
    np.save(folder / name, array)
    with pytest.raises(CorpusFormatError, match=message):
        _ = Corpus(folder).document_ends


def test_a_missing_file(folder: Path) -> None:
    (folder / "tokens-00001.npy").unlink()
    with pytest.raises(FileNotFoundError, match="tokens-00001.npy"):
        Corpus(folder)


def test_a_malformed_manifest(folder: Path) -> None:
    content = json.loads((folder / FILE).read_text())
    (folder / FILE).write_text(json.dumps({**content, "mask_id": None}))
    with pytest.raises(CorpusFormatError, match="manifest.json: mask_id is null, but must be an"):
        Corpus(folder)
    (folder / FILE).write_text(json.dumps(content)[:200])
    with pytest.raises(CorpusFormatError, match="manifest.json: the content is no JSON"):
        Corpus(folder)


def test_damage_is_found(folder: Path) -> None:
    check_files(folder)
    path = folder / "tokens-00001.npy"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    Corpus(folder)  # of the right size
    with pytest.raises(
        CorpusFormatError, match=r"shards\[1\].sha256.tokens-00001.npy is .*damaged"
    ):
        check_files(folder)
