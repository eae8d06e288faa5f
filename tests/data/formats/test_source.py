"""Which files a source has: names, lists, folders and globs, each file once and in one order."""

import json
import os
import random
import shutil
from pathlib import Path

import numpy as np
import pytest

from nar_kernels.data.corpus import Corpus
from nar_kernels.data.formats.names import natural
from nar_kernels.data.prepare import prepare
from nar_kernels.errors import CorpusFormatError
from tests.helpers.corpora import WRITERS, ids_of

IDS = np.arange(5, dtype="uint16")
DOCUMENTS = [IDS[:2], IDS[2:]]


def write_raw(path: Path, ids: np.ndarray = IDS) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(ids.tobytes())
    return path


def write_list(path: Path, **content: object) -> Path:
    path.write_text(json.dumps(content))
    return path


# Lists


def test_a_dtype_of_a_list(tmp_path: Path) -> None:
    write_raw(tmp_path / "a.bin")
    untyped = write_list(tmp_path / "untyped.json", files=["a.bin"])
    typed = write_list(tmp_path / "typed.json", files=["a.bin"], dtype="uint16")
    for corpus in (Corpus(untyped, dtype="uint16"), Corpus(typed, dtype=np.uint16), Corpus(typed)):
        assert ids_of(corpus) == IDS.tolist()
    with pytest.raises(CorpusFormatError, match=r"dtype= says int16 but .*typed\.json says uint16"):
        Corpus(typed, dtype="int16")
    assert bytes(ids_of(Corpus(typed, dtype="uint8"))) == typed.read_bytes()  # as text


def test_a_list_is_no_part_of_itself(tmp_path: Path) -> None:
    write_raw(tmp_path / "a.bin")
    path = write_list(tmp_path / "list.json", files=["*"], dtype="uint16")
    assert ids_of(Corpus(path)) == IDS.tolist()
    other = write_list(tmp_path / "other.json", files=["a.bin"])
    with pytest.raises(CorpusFormatError, match=r"list\.json names another list, .*other\.json"):
        Corpus(path)
    other.unlink()
    (tmp_path / "a.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"\*"):
        Corpus(path)


def test_brackets_in_the_names_of_folders(tmp_path: Path) -> None:
    folder = tmp_path / "run [v1]"
    folder.mkdir()
    np.save(folder / "a.npy", IDS)
    np.save(folder / "b[1].npy", IDS)
    path = write_list(folder / "list.json", files=["*.npy", "b[1].npy"])
    assert ids_of(Corpus(path)) == [*IDS] * 3
    for pattern in (
        folder / "*.npy",
        tmp_path / "run*" / "*.npy",
        tmp_path / "run [[]v1]" / "*.npy",
    ):
        assert ids_of(Corpus(str(pattern))) == [*IDS] * 2


# Files that belong to others


@pytest.mark.parametrize("format", ["megatron", "datatrove"])
def test_names_as_a_shell_expands_a_glob(tmp_path: Path, format: str) -> None:
    written = WRITERS[format](tmp_path, DOCUMENTS)
    corpus = Corpus(sorted(written.files))
    assert ids_of(corpus) == IDS.tolist()
    assert corpus.document_ends is not None and corpus.document_ends.tolist() == [2, 5]
    assert (corpus.loss_mask is not None) == (format == "datatrove")
    assert ids_of(Corpus([written.source, written.source])) == [*IDS] * 2


def test_sidecars_in_a_list(tmp_path: Path) -> None:
    path = write_raw(tmp_path / "a.bin")
    sidecar = write_list(tmp_path / "a.bin.json", dtype="uint16")
    assert ids_of(Corpus([path, sidecar])) == IDS.tolist()


def test_a_file_by_two_names(tmp_path: Path) -> None:
    path = WRITERS["megatron"](tmp_path, DOCUMENTS).source
    prefix = path.with_suffix("")
    listed = write_list(tmp_path / "list.json", files=[path.name])
    for other in (prefix, tmp_path, tmp_path / "*.idx", listed, listed.with_name("*.json")):
        with pytest.raises(CorpusFormatError, match=r"megatron\.bin is named twice, by .*: l"):
            Corpus([path, other])
    with pytest.raises(CorpusFormatError, match="is named twice"):
        Corpus([prefix, listed])


def test_an_empty_part_of_megatron(tmp_path: Path) -> None:
    nothing = np.zeros(0, "uint16")
    empty = WRITERS["megatron"](tmp_path, [nothing, nothing]).source
    for suffix in (".bin", ".idx"):
        empty.with_suffix(suffix).rename(tmp_path / f"a{suffix}")
    WRITERS["megatron"](tmp_path, DOCUMENTS)
    for source in (tmp_path, tmp_path / "*.bin", tmp_path / "*.idx", tmp_path / "*"):
        assert ids_of(Corpus(str(source))) == IDS.tolist()


# Folders and globs


def test_the_order_of_names_with_equal_numbers() -> None:
    paths = [Path(f"s{number}.npy") for number in ("1", "01", "001", "0001", "2", "10")]
    expected = sorted(paths, key=natural)
    for seed in range(20):
        random.Random(seed).shuffle(paths)
        assert sorted(paths, key=natural) == expected
    assert [path.name for path in expected[-2:]] == ["s2.npy", "s10.npy"]


def test_hidden_files(tmp_path: Path) -> None:
    for name in ("a.npy", ".a.npy", ".b.tmp.npy"):
        np.save(tmp_path / name, IDS)
    for source in (tmp_path, tmp_path / "*.npy", tmp_path / "**"):
        assert ids_of(Corpus(str(source))) == IDS.tolist()
    assert ids_of(Corpus(tmp_path / ".a.npy")) == IDS.tolist()


def test_broken_links(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", IDS)
    for name in ("b.npy", "c*.npy"):
        link = tmp_path / name
        link.symlink_to("gone.npy")
        for source in (link, tmp_path, tmp_path / "*", [tmp_path / "a.npy", link]):
            source = source if isinstance(source, list) else str(source)
            with pytest.raises(
                FileNotFoundError, match=r"link to gone\.npy, which is not there: .*npy"
            ):
                Corpus(source)
        link.unlink()


def test_what_else_a_glob_matches(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", IDS)
    (tmp_path / "README.md").write_text("of the corpus")
    assert ids_of(Corpus(tmp_path)) == IDS.tolist()
    with pytest.raises(CorpusFormatError, match=r"README\.md does not say what dtype"):
        Corpus(str(tmp_path / "*"))


def test_globs_of_files_of_a_described_folder(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("to be, or not to be\n" * 9)
    out = tmp_path / "parts" / "out"
    prepare(tmp_path / "a.txt", out, tokenizer="bytes", quiet=True, workers=1)
    for pattern in (out / "*", out / "tokens*", tmp_path / "parts" / "**" / "*.npy"):
        with pytest.raises(CorpusFormatError, match="matches files of .*out, .*: name the folder"):
            Corpus(str(pattern))
    shutil.copytree(out, tmp_path / "parts" / "out 2")
    assert len(Corpus(str(tmp_path / "parts" / "*"))) == 2 * len(Corpus(out))
    with pytest.raises(CorpusFormatError, match="column='a' was given, but .*out is not a table"):
        Corpus(out, column="a")
    shards = WRITERS["mds"](tmp_path / "parts", DOCUMENTS).source
    assert ids_of(Corpus(str(shards / "*.mds"))) == IDS.tolist()
    with pytest.raises(CorpusFormatError, match="a folder that says itself what its files are"):
        Corpus(str(shards / "*"))


# What is no file


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
def test_pipes(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.npy")
    for source in (tmp_path / "a.npy", tmp_path, str(tmp_path / "*")):
        with pytest.raises(CorpusFormatError, match=r"a\.npy is no file, but a pipe .* write it"):
            Corpus(source)


@pytest.mark.parametrize("name", ["a\0b", "", "\ud800", "*\0"])
def test_names_that_no_file_has(name: str) -> None:
    for source in (name, [name]):
        with pytest.raises(CorpusFormatError, match="no file can be called .*: name a file"):
            Corpus(source)
