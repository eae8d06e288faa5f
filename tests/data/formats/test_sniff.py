"""The dtype of raw files by statistics: right where it is clear, an error where it is not."""

import glob
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from nar_kernels.data.corpus import Corpus
from nar_kernels.data.formats import sniff
from nar_kernels.data.formats.sniff import sniff_dtype
from nar_kernels.data.windows.dataset import TokenDataset
from tests.helpers.corpora import ids_of, refused

FOUND = {"uint8": "u1", "uint16": "<u2", "uint32": "<u4", "int64": "<i8"}

Rng = np.random.Generator


@pytest.fixture
def rng() -> Rng:
    return np.random.default_rng(0)


def text(rng: Rng, num: int) -> np.ndarray:
    """Source files of the standard library, as bytes."""
    files = sorted(glob.glob(f"{os.path.dirname(os.__file__)}/*.py"))
    content = b"".join(Path(file).read_bytes() for file in files)
    return np.resize(np.roll(np.frombuffer(content, "u1"), rng.integers(0, len(content))), num)


def zipf(size: int) -> Callable[[Rng, int], np.ndarray]:
    """Of a vocabulary of this size; frequent ids are low, roughly, as a tokenizer makes them."""
    share = 1 / np.arange(1, size + 1)
    noise = np.random.default_rng(1).normal(0, 1, size)
    ids = np.argsort(np.argsort(noise - np.log(share)))
    return lambda rng, num: ids[rng.choice(size, num, p=share / share.sum())]


def uniform(size: int) -> Callable[[Rng, int], np.ndarray]:
    return lambda rng, num: rng.integers(0, size, num)


IDS = {
    "text": (text, FOUND),
    "Zipf of 256": (zipf(256), ["uint16", "uint32", "int64"]),
    "Zipf of 8192": (zipf(8192), ["uint16", "uint32", "int64"]),
    "Zipf of GPT-2": (zipf(50257), ["uint16", "uint32", "int64"]),
    "Zipf of Llama 3": (zipf(128256), ["uint32", "int64"]),
    "uniform of GPT-2": (uniform(50257), ["uint16", "uint32", "int64"]),
    "uniform of 256": (uniform(256), ["uint16", "uint32", "int64"]),
    "uniform of 100": (uniform(100), FOUND),
    "uniform of 262144": (uniform(262144), ["uint32", "int64"]),
}
GPT_2 = IDS["Zipf of GPT-2"][0]

CASES = [(name, dtype) for name, (_, dtypes) in IDS.items() for dtype in dtypes]


def sniffed(path: Path, ids: np.ndarray | bytes) -> str | None:
    path.write_bytes(bytes(ids) if isinstance(ids, bytes) else ids.tobytes())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return sniff_dtype(path)


@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_ids_of_any_kind(tmp_path: Path, rng: Rng, name: str, dtype: str) -> None:
    """Small files may leave doubts, but never mislead."""
    make, stored = IDS[name][0], FOUND[dtype]
    width = np.dtype(stored).itemsize
    for size, tries in ((4096, 20), (1 << 14, 10), (1 << 18, 3), (3_000_000, 1)):
        for _ in range(tries):
            found = sniffed(tmp_path / "a.bin", make(rng, size // width).astype(stored))
            assert found in ((dtype,) if size >= 1 << 18 else (dtype, None))


def digits(_: Rng) -> np.ndarray:
    return pytest.importorskip("sklearn.datasets").load_digits().images.astype("u1").reshape(-1)


def normal(rng: Rng) -> np.ndarray:
    return rng.normal(0, 1, 100_000)


def with_negative(rng: Rng, dtype: str) -> np.ndarray:
    """-100 where there is no label."""
    return np.where(rng.random(50_000) < 0.3, -100, zipf(999)(rng, 50_000)).astype(dtype)


NO_IDS: dict[str, Callable[[Rng], np.ndarray]] = {
    "zeros": lambda rng: np.zeros(100_000, "u1"),
    "nearly zeros": lambda rng: (rng.random(100_000) < 0.01).astype("<u4"),
    "random bytes": lambda rng: rng.integers(0, 256, 100_000).astype("u1"),
    "all ids of 16 bits": lambda rng: rng.integers(0, 65536, 100_000).astype("<u2"),
    "digits, alike in columns of pixels": digits,
    "big-endian, 16 bits": lambda rng: GPT_2(rng, 100_000).astype(">u2"),
    "big-endian, 32 bits": lambda rng: GPT_2(rng, 100_000).astype(">u4"),
    "big-endian, 64 bits": lambda rng: GPT_2(rng, 100_000).astype(">i8"),
    "24 bits": lambda rng: GPT_2(rng, 9000).astype("<u4").view("u1").reshape(-1, 4)[:, :3].copy(),
    "an odd byte, then ids": lambda rng: np.append(
        np.zeros(1, "u1"), GPT_2(rng, 50_000).astype("<u2").view("u1")
    ),
    "ids and -100": lambda rng: with_negative(rng, "<i8"),
    "ids and -100 in 16 bits": lambda rng: with_negative(rng, "<i2"),
    "half precision": lambda rng: normal(rng).astype("<f2"),
    "half precision, not negative": lambda rng: np.maximum(normal(rng), 0).astype("<f2"),
    "bfloat16": lambda rng: (normal(rng).astype("<f4").view("<u4") >> 16).astype("<u2"),
    "single precision": lambda rng: normal(rng).astype("<f4"),
    "double precision": normal,
    "sound": lambda rng: (3000 * np.sin(np.arange(1e5) / 9) + 50 * normal(rng)).astype("<i2"),
    "a program": lambda rng: np.fromfile(sys.executable, "u1"),
    "records": lambda rng: np.frombuffer(b"%06d,12\n" * 2000 % tuple(range(2000)), "u1"),
}


@pytest.mark.parametrize("name", NO_IDS)
def test_what_is_no_ids_or_could_be_several_things(tmp_path: Path, rng: Rng, name: str) -> None:
    path = tmp_path / "a.bin"
    assert sniffed(path, NO_IDS[name](rng)) is None
    refused(
        path, r"a\.bin does not say what dtype its tokens have: if it is raw binary, pass dtype="
    )


def test_below_4_kib(tmp_path: Path, rng: Rng) -> None:
    ids = GPT_2(rng, 1000).astype("<i8")
    assert sniffed(tmp_path / "a.bin", ids[:511]) is None
    assert sniffed(tmp_path / "a.bin", ids[:512]) == "int64"
    for size in (0, 1, 839, 4095):
        assert sniffed(tmp_path / "a.bin", bytes(size)) is None


def test_what_lies_far_apart_is_seen(tmp_path: Path, rng: Rng) -> None:
    """Only the first half is of 16 bits."""
    halves = (
        GPT_2(rng, 500_000).astype("<u2").tobytes(),
        GPT_2(rng, 250_000).astype("<u4").tobytes(),
    )
    assert sniffed(tmp_path / "a.bin", b"".join(halves)) is None


def test_a_corpus_warns(tmp_path: Path, rng: Rng) -> None:
    path, ids = tmp_path / "a.bin", GPT_2(rng, 200_000).astype("<u2")
    path.write_bytes(ids.tobytes())
    message = (
        r"a\.bin does not say what dtype .* by statistics of its bytes it is uint16: confirm this "
        r"by dtype='uint16', or {\"dtype\": \"uint16\"} in a\.bin\.json"
    )
    with pytest.warns(UserWarning, match=message) as caught:
        corpus = Corpus(path)
    assert len(caught) == 1
    assert ids_of(corpus) == ids.tolist()
    npy = path.rename(tmp_path / "a.npy")  # as OLMo names them
    with pytest.warns(UserWarning, match="it is uint16"):
        assert len(Corpus(npy)) == len(ids)
    npy.rename(path)
    # Once stated, no more: warnings are errors here.
    assert len(Corpus(path, dtype="int32")) == len(ids) // 2
    (tmp_path / "a.bin.json").write_text('{"dtype": "uint16"}')
    assert ids_of(Corpus(path)) == ids.tolist()


def test_text_is_bytes_where_that_is_said(tmp_path: Path, rng: Rng) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(text(rng, 100_000).tobytes())
    assert len(Corpus(path, dtype="uint8")) == 100_000
    dataset = TokenDataset(path, 10, num_tokens=257, mask_id=256, dtype="uint8")
    assert len(dataset) == 10_000
    with pytest.warns(UserWarning, match="it is uint8"):
        assert len(Corpus(path)) == 100_000


def test_a_file_that_does_not_divide(tmp_path: Path, rng: Rng) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(GPT_2(rng, 100_000).astype("<u2").tobytes() + b"\0")
    with pytest.warns(UserWarning, match="it is uint16"):
        refused(path, "has 200001 bytes, not a whole number of uint16 tokens of 2 bytes")


def test_little_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.bin"
    try:
        with path.open("wb") as file:
            file.truncate(1 << 40)
    except OSError as error:
        pytest.skip(f"no sparse file of 1 TiB here: {error}")
    sample = sniff._sample(path)
    assert len(sample) == 64 * 4200
    assert sniff_dtype(path) is None
