"""``nar-kernels prepare``: what it prints, and its exit status."""

import json
from dataclasses import fields

import numpy as np
import pytest

from nar_kernels.cli.main import main
from nar_kernels.data.corpus import Corpus
from nar_kernels.data.prepare.config import PrepareConfig
from nar_kernels.options import option_of
from tests.helpers.prepared import documents
from tests.helpers.texts import bpe_json, prose, write_lines

pytest.importorskip("tokenizers")


def fails(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    assert main(["prepare", *map(str, argv)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("nar-kernels: ") and error.count("\n") == 1
    return error


def test_every_option_is_on_the_command_line(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["prepare", "--help"])
    assert stopped.value.code == 0
    out = capsys.readouterr().out
    assert all(option_of(f.name) in out for f in fields(PrepareConfig) if f.metadata)
    assert "--no-append-eos" in out and "--no-parse-special-tokens" in out


def test_it_says_what_it_made(capsys, tmp_path):
    (tmp_path / "bpe.json").write_text(bpe_json())
    path = write_lines(tmp_path / "a.jsonl", [{"text": text} for text in prose()[:5]])
    out = tmp_path / "out"
    argv = [str(path), "--out", str(out), "--tokenizer", str(tmp_path / "bpe.json")]
    assert main(["prepare", *argv]) == 0
    printed = capsys.readouterr().out
    total = len(Corpus(out))
    assert f"{out}: {total:,} tokens of 5 documents, uint16, in 1 shards" in printed
    assert "vocab_size 600, num_tokens 601, mask_id 600, eos_id 0" in printed
    assert "tokens/s" in printed
    assert "out exists: name another folder, or pass --overwrite to" in fails(capsys, *argv)
    assert main(["prepare", *argv, "--overwrite", "--quiet", "--no-append-eos"]) == 0
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""
    assert len(Corpus(out)) == total - 5


def test_options(tmp_path):
    (tmp_path / "a.txt").write_text("one|two|three")
    argv = ["prepare", str(tmp_path / "a.txt"), "--tokenizer", "bytes", "--quiet"]
    argv += ["--document-separator", "|", "--shard-tokens", "4", "--workers", "2"]
    assert main([*argv, "--out", str(tmp_path / "out")]) == 0
    assert documents(tmp_path / "out") == [list(b"one"), list(b"two"), list(b"three")]
    assert len(json.loads((tmp_path / "out/manifest.json").read_text())["shards"]) == 2


def test_images(capsys, tmp_path):
    np.save(tmp_path / "a.npy", np.zeros((3, 2, 2), np.uint8))
    np.save(tmp_path / "labels.npy", np.arange(3))
    argv = ["prepare", str(tmp_path / "a.npy"), "--labels", str(tmp_path / "labels.npy")]
    assert main([*argv, "--vocab-size", "9", "--out", str(tmp_path / "out")]) == 0
    assert "12 tokens of 3 images, uint8, in 1 shards" in capsys.readouterr().out


def test_mistakes(capsys, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"body": 1}')
    (tmp_path / "chat.jsonl").write_text('{"messages": []}')
    path, out = tmp_path / "a.jsonl", ("--out", tmp_path / "out", "--tokenizer", "bytes")
    assert (
        "line 1: there is no 'text', but 'body': name the one with the text with --text"
        in fails(capsys, path, *out)
    )
    assert "give one with --chat-template, a Jinja" in fails(capsys, tmp_path / "chat.jsonl", *out)
    assert "--shard-tokens is 0: it must be" in fails(capsys, path, *out, "--shard-tokens", 0)
    assert "--tokenizer and --train-bpe exclude" in fails(capsys, path, *out, "--train-bpe", 999)
    assert "--append-eos is true, but" in fails(capsys, path, *out, "--append-eos")
    assert "--labels is for image codes" in fails(capsys, path, *out, "--labels", "x")
    assert "--vocab-size is for image codes" in fails(capsys, path, *out, "--vocab-size", 3)
    assert "there is no file" in fails(capsys, tmp_path / "no", *out)
    assert not (tmp_path / "out").exists()


def test_ctrl_c(capsys, tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("a")

    def interrupted(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("nar_kernels.data.prepare.text.write_shards", interrupted)
    argv = ["prepare", str(tmp_path / "a.txt"), "--out", str(tmp_path / "out")]
    assert main([*argv, "--tokenizer", "bytes"]) == 130
    printed = capsys.readouterr().out
    assert "stopped: the same command goes on after the last finished shard" in printed
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    assert main([*argv, "--tokenizer", "bytes"]) == 0
