"""llm.c and modded-nanogpt."""

from pathlib import Path

import numpy as np
import pytest

from nar_kernels.data.corpus import Corpus
from tests.helpers.corpora import ids_of, llmc_bytes, refused

IDS = np.arange(10, dtype="<u2")


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_ids(tmp_path: Path, dtype: str) -> None:
    path, ids = tmp_path / "a.bin", np.array([0, 1, np.iinfo(dtype).max, 7], dtype)
    path.write_bytes(llmc_bytes(ids))
    corpus = Corpus(path)
    assert ids_of(corpus) == corpus.tokens.tolist() == ids.tolist()
    assert corpus.stream.layouts[0].dtype == dtype


def test_the_count_of_a_long_file(tmp_path: Path) -> None:
    """Its upper bits are lost, and the size of the file tells them."""
    path, num_tokens = tmp_path / "a.bin", (1 << 32) + 5
    try:
        with path.open("wb") as file:
            file.write(llmc_bytes(IDS[:0], count=5))
            file.truncate(1024 + 2 * num_tokens)
    except OSError as error:
        pytest.skip(f"no sparse file of 8 GiB here: {error}")
    corpus = Corpus(path)
    assert len(corpus) == num_tokens
    assert corpus.read(num_tokens - 2, num_tokens).tolist() == [0, 0]
    with path.open("r+b") as file:
        file.write(llmc_bytes(IDS[:0], count=6))
    refused(path, "number of tokens is 6.* but must be what its 8589935626 bytes hold")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 7}, r"a\.bin: version is 7, but must be 1, with magic number 20240520"),
        ({"version": 0}, "version is 0"),
        ({"magic": 20240801}, "version is 1, but must be 7, with magic number 20240801"),
        ({"magic": 20240801, "version": 7}, "number of tokens is 10, of uint32 after 1024 bytes"),
        ({"count": 9}, "number of tokens is 9, of uint16 after 1024 bytes, but must be what its"),
        ({"count": 11}, "number of tokens is 11"),
        ({"count": (1 << 32) - 1}, "number of tokens is 4294967295"),
        ({"magic": 20240522}, "questions with answers for llm.c. This format is not supported"),
        ({"magic": 20240326}, "a checkpoint or tokenizer of llm.c. This format is not supported"),
        ({"magic": 20240521}, "does not say what dtype"),
    ],
)
def test_bad_fields(tmp_path: Path, changes: dict[str, int], message: str) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(llmc_bytes(IDS, **changes))
    refused(path, message)


def test_bad_sizes(tmp_path: Path) -> None:
    path, good = tmp_path / "a.bin", llmc_bytes(IDS)
    for size in (4, 11, 12, 1023):
        path.write_bytes(good[:size])
        refused(path, f"size is {size} bytes, but must be at least 1024, its header")
    for content in (good[:-1], good[:-2], good + b"\0", good + b"\0\0"):
        path.write_bytes(content)
        refused(path, f"must be what its {len(content)} bytes hold")
