"""A tokenizer of the inputs' own."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from nar_kernels.data.corpus import Corpus
from nar_kernels.data.prepare import prepare
from nar_kernels.data.prepare.train_bpe import default_size, sample_every, train_bpe
from nar_kernels.data.tokenizer import tokenizer_from_json
from tests.helpers.paths import ROOT
from tests.helpers.prepared import documents
from tests.helpers.texts import HARD, prose, write_lines

tokenizers = pytest.importorskip("tokenizers")


@pytest.mark.parametrize("batch_bytes", [4000, 1 << 20])
def test_a_trained_tokenizer(tmp_path: Path, batch_bytes: int) -> None:
    texts = [text for text in [*prose()[:30], *HARD] if text]
    path = write_lines(tmp_path / "a.jsonl", [{"text": text} for text in texts])
    out = tmp_path / "out"
    options: dict[str, Any] = {"quiet": True, "workers": 1, "batch_bytes": batch_bytes}
    manifest = prepare(path, out, train_bpe=1000, **options)
    assert (manifest.vocab_size, manifest.eos_id, manifest.mask_id) == (1000, 0, 1000)
    tokenizer = tokenizer_from_json((out / "tokenizer.json").read_text())
    assert [tokenizer.decode(ids[:-1]) for ids in documents(out)] == texts
    assert all(ids[-1] == 0 for ids in documents(out))
    theirs = tokenizers.Tokenizer.from_file(str(out / "tokenizer.json"))
    assert documents(out) == [theirs.encode(text).ids + [0] for text in texts]
    # It is of this text: compressed better than a few bytes a token.
    assert manifest.total_tokens < sum(len(text.encode()) for text in texts) / 2.5


def test_too_few_pairs(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("abcabcab")
    manifest = prepare(tmp_path / "a.txt", tmp_path / "out", train_bpe=5000, quiet=True)
    assert 257 < manifest.vocab_size < 270 and manifest.num_tokens == manifest.vocab_size + 1


@pytest.mark.slow
def test_the_same_text_gives_the_same_tokenizer(tmp_path: Path) -> None:
    """Whatever the threads that train it, and Python's hashes."""
    script = (
        "import sys; from tests.helpers.texts import prose\n"
        "from nar_kernels.data.prepare.train_bpe import train_bpe\n"
        "open(sys.argv[1], 'w').write(train_bpe(iter([list(prose()[:40])]), 2000).to_json())"
    )
    made = []
    for i, threads in enumerate(("1", "3")):
        path = tmp_path / str(i)
        env = {**os.environ, "RAYON_NUM_THREADS": threads, "PYTHONHASHSEED": str(i)}
        env["PYTHONPATH"] = str(ROOT)
        subprocess.run([sys.executable, "-c", script, str(path)], check=True, env=env, cwd=ROOT)
        made.append(path.read_bytes())
    assert made[0] == made[1]


def test_the_size_fits_the_text() -> None:
    assert default_size(0) is None
    assert default_size(116_000) is None
    assert default_size(117_000) == 512
    assert default_size(470_000) == 1024
    assert default_size(33_000_000) == 8192
    assert default_size(1 << 40) == 32768
    assert sample_every(1 << 28) == 1 and sample_every((1 << 28) + 1) == 2


@pytest.mark.parametrize(("repeats", "name"), [(1, "bytes"), (3, "BPE of 512 tokens")])
def test_the_default(tmp_path: Path, capsys: Any, repeats: int, name: str) -> None:
    text = "\n".join(prose())[:100_000]
    path = write_lines(tmp_path / "a.jsonl", [{"text": text}] * repeats)
    prepare(path, tmp_path / "out", workers=1)
    manifest = Corpus(tmp_path / "out").manifests[0]
    assert manifest.tokenizer is not None and manifest.tokenizer.name == name
    said = capsys.readouterr().out
    if repeats == 1:
        assert re.search(r"no tokenizer was given: bytes \(1..kB of text, too little for a", said)
    else:
        assert "no tokenizer was given: a BPE of 512 tokens, trained on them (3" in said
        assert "training a BPE of 512 tokens" in said


def test_a_sample_is_enough(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    """One batch in three, and each file is one."""
    texts = prose()[:40]
    (tmp_path / "in").mkdir()
    for i, text in enumerate(texts):
        (tmp_path / f"in/{i:02}.txt").write_bytes(text.encode())
    size = sum(len(text.encode()) for text in texts) / 3
    monkeypatch.setattr("nar_kernels.data.prepare.train_bpe._SAMPLE_BYTES", size)
    prepare(tmp_path / "in", tmp_path / "out", train_bpe=300, workers=1)
    assert ", on one part of 3" in capsys.readouterr().out
    made = (tmp_path / "out/tokenizer.json").read_text()
    assert made == train_bpe(iter([list(texts[::3])]), 300).to_json()
    assert made != train_bpe(iter([list(texts)]), 300).to_json()
