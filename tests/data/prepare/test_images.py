"""Integer codes of images: flat ids, the shape of an image, and labels."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nar_kernels.data.corpus import Corpus
from nar_kernels.data.formats.prepared import check_files
from nar_kernels.data.prepare import prepare
from nar_kernels.data.prepare.staging import Staging
from tests.helpers.prepared import contents, read_ends

CODES = np.random.default_rng(0).integers(0, 300, (50, 4, 6))
LABELS = np.arange(50) % 7


def save(folder: Path, **arrays: np.ndarray) -> None:
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)


@pytest.mark.parametrize("dtype", ["int64", "uint16", ">i4"])
@pytest.mark.parametrize("size", [1, 1000, 1 << 20])
def test_images(tmp_path: Path, dtype: str, size: int) -> None:
    save(tmp_path, codes=CODES.astype(dtype), labels=LABELS.astype("uint8"))
    out = tmp_path / "out"
    options = {"labels": tmp_path / "labels.npy", "quiet": True, "batch_bytes": size}
    manifest = prepare(tmp_path / "codes.npy", out, shard_tokens=300, **options)
    corpus = Corpus(out)
    assert corpus.manifests[0] == manifest
    assert corpus.read(0, len(corpus)).tolist() == CODES.reshape(-1).tolist()
    assert read_ends(corpus).tolist() == list(range(24, 50 * 24 + 1, 24))
    assert manifest.image_shape == (4, 6) and manifest.tokenizer is None
    assert manifest.vocab_size == CODES.max() + 1 == manifest.mask_id == manifest.num_tokens - 1
    assert manifest.dtype == "uint16" and manifest.eos_id is None
    assert manifest.labels == "labels.npy"
    labels = np.load(out / "labels.npy")
    assert labels.dtype == np.int64 and labels.tolist() == LABELS.tolist()
    assert [shard.num_documents for shard in manifest.shards] == [13, 13, 13, 11]
    assert not (out / "tokenizer.json").exists()
    check_files(out)


def test_several_files_and_a_vocabulary(tmp_path: Path) -> None:
    save(tmp_path, a=CODES[:20] % 200, b=CODES[20:] % 200)
    out = tmp_path / "out"
    manifest = prepare(str(tmp_path / "*.npy"), out, vocab_size=255, quiet=True)
    assert (manifest.vocab_size, manifest.mask_id, manifest.dtype) == (255, 255, "uint8")
    corpus = Corpus(out)
    assert corpus.read(0, len(corpus)).tolist() == (CODES % 200).reshape(-1).tolist()
    assert manifest.labels is None
    manifest = prepare(str(tmp_path / "*.npy"), tmp_path / "16", vocab_size=256, quiet=True)
    assert manifest.dtype == "uint16"


def test_a_url(tmp_path: Path) -> None:
    memory = pytest.importorskip("fsspec").filesystem("memory")
    save(tmp_path, a=CODES)
    memory.pipe("/images/a.npy", (tmp_path / "a.npy").read_bytes())
    prepare("memory://images/a.npy", tmp_path / "out", quiet=True)
    corpus = Corpus(tmp_path / "out")
    assert corpus.read(0, len(corpus)).tolist() == CODES.reshape(-1).tolist()
    memory.rm("/images", recursive=True)


def test_going_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, a=CODES[:33], b=CODES[33:], labels=LABELS)
    options: dict[str, Any] = {"labels": tmp_path / "labels.npy", "quiet": True}
    options |= {"batch_bytes": 500, "shard_tokens": 100}
    inputs = [tmp_path / "a.npy", tmp_path / "b.npy"]
    prepare(inputs, tmp_path / "whole", **options)
    add = Staging.add
    for number in (3, 7):

        def stopping(self: Staging, *args: Any, number: int = number) -> None:
            add(self, *args)
            if len(self.done.shards) == number:
                raise KeyboardInterrupt

        monkeypatch.setattr(Staging, "add", stopping)
        with pytest.raises(KeyboardInterrupt):
            prepare(inputs, tmp_path / "out", **options)
    monkeypatch.setattr(Staging, "add", add)
    with pytest.raises(FileExistsError, match="begun with other labels"):
        prepare(inputs, tmp_path / "out", **{**options, "labels": None})
    prepare(inputs, tmp_path / "out", **options)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        (CODES / 2, r"a.npy holds float64 \[50, 4, 6\]: image codes are integers \[N, h, w\]"),
        (CODES[0], r"a.npy holds int64 \[4, 6\]: image codes"),
        (CODES[:0], r"holds int64 \[0, 4, 6\]"),
        (np.asfortranarray(CODES), "in Fortran order: image codes"),
        (CODES - 1, "a.npy holds the code -1: codes are from 0 on"),
        (CODES > 3, r"holds bool"),
        (CODES + (1 << 33), r"a.npy holds the code 85\d+: codes must be below 4294967295, so that"),
    ],
)
def test_what_are_no_codes(tmp_path: Path, codes: np.ndarray, message: str) -> None:
    save(tmp_path, a=codes)
    with pytest.raises(ValueError, match=message):
        prepare(tmp_path / "a.npy", tmp_path / "out", quiet=True)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (LABELS[1:], r"labels.npy holds int64 \[49\]: labels are integers from 0 on, \[50\]"),
        (LABELS - 1, "labels are integers from 0 on"),
        (LABELS / 2, "labels.npy holds float64"),
        (LABELS[:, None], r"holds int64 \[50, 1\]"),
        (LABELS.astype("uint64") + (1 << 63), "labels.npy holds uint64"),
    ],
)
def test_what_are_no_labels(tmp_path: Path, labels: np.ndarray, message: str) -> None:
    save(tmp_path, a=CODES, labels=labels)
    with pytest.raises(ValueError, match=message):
        options = {"labels": tmp_path / "labels.npy", "quiet": True}
        prepare(tmp_path / "a.npy", tmp_path / "out", **options)


def test_labels_that_are_no_file(tmp_path: Path) -> None:
    save(tmp_path, a=CODES)
    np.savez(tmp_path / "labels.npz", labels=LABELS)
    (tmp_path / "empty.npy").write_bytes(b"")
    (tmp_path / "two").mkdir()
    save(tmp_path / "two", a=LABELS, b=LABELS)
    for name, message in (
        ("labels.npz", "labels.npz is no .npy file"),
        ("empty.npy", "empty.npy is no .npy file"),
        ("two", "labels is '.*two', which are 2 files: name one"),
        ("no.npy", "there is no file .*no.npy"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            options = {"labels": tmp_path / name, "quiet": True}
            prepare(tmp_path / "a.npy", tmp_path / "out", **options)


def test_options_of_text(tmp_path: Path) -> None:
    save(tmp_path, a=CODES)
    for option in ({"text_column": "body"}, {"parse_special_tokens": False}, {"train_bpe": 300}):
        with pytest.raises(ValueError, match=f"{next(iter(option))} is for text, and the inputs"):
            prepare(tmp_path / "a.npy", tmp_path / "out", quiet=True, **option)


def test_other_mistakes(tmp_path: Path) -> None:
    save(tmp_path, a=CODES, b=CODES[:, :3])
    with pytest.raises(ValueError, match="holds the code 299, outside .0, 200.: give a larger"):
        prepare(tmp_path / "a.npy", tmp_path / "out", vocab_size=200, quiet=True)
    inputs = [tmp_path / "a.npy", tmp_path / "b.npy"]
    with pytest.raises(ValueError, match=r"b.npy has images of \(3, 6\), and .*a.npy of \(4, 6\)"):
        prepare(inputs, tmp_path / "out", quiet=True)
    (tmp_path / "c.npy").write_bytes(b"no")
    with pytest.raises(ValueError, match="c.npy has no .npy header"):
        prepare(tmp_path / "c.npy", tmp_path / "out", quiet=True)
    content = (tmp_path / "a.npy").read_bytes()
    (tmp_path / "c.npy").write_bytes(content[:-5])
    with pytest.raises(ValueError, match="c.npy is truncated"):
        prepare(tmp_path / "c.npy", tmp_path / "out", quiet=True)
