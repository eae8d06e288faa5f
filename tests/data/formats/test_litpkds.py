"""Packed chunks of lit-gpt, TinyLlama and SMDM."""

from pathlib import Path

import numpy as np
import pytest

from nar_kernels.data.corpus import Corpus
from tests.helpers.corpora import MEGATRON_CODES, ids_of, litpkds_bytes, refused

IDS = np.arange(10, dtype="<u2")


@pytest.mark.parametrize("dtype", MEGATRON_CODES)
def test_ids(tmp_path: Path, dtype: str) -> None:
    info, path = np.iinfo(dtype), tmp_path / "train_0000000000.bin"
    ids = np.array([info.max, 0, info.min, 7, 7, 7], dtype)
    path.write_bytes(litpkds_bytes(ids))
    corpus = Corpus(path)
    assert ids_of(corpus) == corpus.tokens.tolist() == ids.tolist()
    assert corpus.stream.layouts[0].dtype == dtype
    assert corpus.document_ends is None
    assert Corpus(path, eos_id=7).document_ends.tolist() == [4, 5, 6]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 2}, r"a\.bin: version is 2, but must be 1"),
        ({"version": 1 << 40}, "version is 1099511627776"),
        ({"code": 0}, r"code of the dtype is 0, but must be one of 1 \(uint8\)"),
        ({"code": 6}, r"code of the dtype is 6 \(float32\), but must be one of"),
        ({"code": 7}, r"code of the dtype is 7 \(float64\), but must be one of"),
        ({"code": 255}, "code of the dtype is 255"),
        ({"code": 4}, "chunk size is 10 tokens of int32, which makes 64 bytes, but .* its 44"),
        ({"chunk_size": 9}, "chunk size is 9 tokens of uint16, which makes 42 bytes, but must be"),
        ({"chunk_size": 11}, "chunk size is 11"),
        ({"chunk_size": (1 << 64) - 1}, "chunk size is 18446744073709551615"),
    ],
)
def test_bad_fields(tmp_path: Path, changes: dict[str, int], message: str) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(litpkds_bytes(IDS, **changes))
    refused(path, message)


def test_bad_sizes(tmp_path: Path) -> None:
    path, good = tmp_path / "a.bin", litpkds_bytes(IDS)
    for size in (7, 23):
        path.write_bytes(good[:size])
        refused(path, f"size is {size} bytes, but must be at least 24, its header")
    for content in (good[:24], good[:-1], good + b"\0"):
        path.write_bytes(content)
        refused(path, f"chunk size is 10 .* what its {len(content)} bytes hold")
