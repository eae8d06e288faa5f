"""A user's own text, from a file to samples, with the three commands of the README."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from nar_kernels.cli.main import main
from nar_kernels.data.sources import open_data
from nar_kernels.data.tokenizer import tokenizer_from_json
from nar_kernels.sampling.decode import DecodeState
from nar_kernels.show.terminal import _frame
from nar_kernels.training.model import load_model

pytest.importorskip("x_transformers")
pytest.importorskip("tokenizers")
pytestmark = [pytest.mark.seconds, pytest.mark.usefixtures("one_thread")]

POEM = """The café at the end of the road has a façade of green and gold.
It opens at noon, it closes at ten, and the coffee is never cold.

"""
TINY = ("--seq-len", "32", "--dim", "32", "--depth", "1", "--heads", "2", "--eval-draws", "1")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The three commands, but for the number of steps and the size of the net."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "poem.txt").write_text(POEM * 60, encoding="utf-8")
    tokens, out = str(folder / "poem"), folder / "run"
    assert main(["prepare", str(folder / "poem.txt"), "--out", tokens, "--train-bpe", "400"]) == 0
    assert main(["train", "--data", tokens, "--out", str(out), "--steps", "40", *TINY]) == 0
    return out


def generate(run: Path, *options: object) -> int:
    command = ["generate", "--checkpoint", str(run / "best.pt"), "--num-samples", "2"]
    return main([*command, *map(str, options)])


def test_samples_are_text(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    samples = (run / "samples.txt").read_text(encoding="utf-8")
    assert samples.count("-" * 72) == 3
    assert set(re.findall("[a-zé]+", POEM)) & set(re.findall("[a-zé]+", samples))
    assert generate(run, "--prompt", "The café") == 0
    shown = capsys.readouterr().out.split("\n" + "-" * 72 + "\n")
    assert len(shown) == 2 and all(sample.startswith("The café") for sample in shown)


def test_gaps_in_text(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate(run, "--infill", "It opens at[MASK:3] it closes") == 0
    shown = capsys.readouterr().out.split("\n" + "-" * 72 + "\n")
    assert all(re.match("It opens at.* it closes", sample, re.DOTALL) for sample in shown)


def test_answers_end_with_the_token_of_the_tokenizer(run: Path, tmp_path: Path) -> None:
    eos_id = tokenizer_from_json(load_model(run / "best.pt")[1].tokenizer or "").eos_id
    assert eos_id is not None
    out = tmp_path / "ids.npy"
    options = "--prompt", "It opens at", "--temperature", 1e6, "--out", out, "--num-samples", 64
    drawn = {}
    for how in ([], ["--eos", "allow"], ["--eos", "never"], ["--max-new-tokens", "20"]):
        assert generate(run, *options, *how) == 0
        drawn[" ".join(how)] = np.load(out) == eos_id
    assert drawn[""].any() and not drawn["--eos never"].any()
    assert (drawn["--eos allow"] == np.maximum.accumulate(drawn[""], 1)).all()
    short = drawn["--max-new-tokens 20"]
    assert short.shape[1] < 32 and (short == np.maximum.accumulate(short, 1)).all() and short.any()
    assert generate(run, *options, "--strategy", "margin", "--eos", "last") == 0


def test_the_tokenizer_is_in_the_checkpoint(run: Path, tmp_path: Path) -> None:
    """Which may go anywhere, without data or tokenizer."""
    alone = tmp_path / "model.pt"
    alone.write_bytes((run / "best.pt").read_bytes())
    assert main(["generate", "--checkpoint", str(alone), "--num-samples", "1"]) == 0
    spec = load_model(alone)[1]
    assert spec.render == "text" and spec.tokenizer is not None
    data = open_data(run.parent / "poem", seq_len=32)
    assert data.spec == spec
    assert data.train.corpus.document_ends is not None


def test_the_page_shows_text(run: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    out = tmp_path / "ids.npy"
    assert generate(run, "--html", page, "--out", out) == 0
    html = page.read_text(encoding="utf-8")
    found = re.search(r'<script id="data" type="application/json">(.*?)</script>', html, re.DOTALL)
    assert found is not None
    data = json.loads(found[1])
    assert data["render"] == "text"
    assert {str(id_) for id_ in np.load(out).flatten().tolist()} <= data["pieces"].keys()
    assert any("é" in piece or "the" in piece for piece in data["pieces"].values())


def test_the_terminal_shows_text(run: Path) -> None:
    _, spec = load_model(run / "best.pt")
    data = open_data(run.parent / "poem", seq_len=32)
    ids = data.train[0][None].clone()
    masked = torch.zeros_like(ids, dtype=torch.bool)
    masked[0, 4:6] = True
    ids[masked] = spec.mask_id
    log_prob = torch.zeros(ids.shape).where(~masked, torch.nan)
    lines = _frame(DecodeState(3, 8, ids, masked, log_prob), spec)
    assert lines[0] == "step 3 of 8, 6% masked"
    assert max(map(len, lines)) <= 72
    text = "".join(lines[1:])
    assert "░░░░" in text and "The café at" in text


def test_ids_that_are_no_text_are_shown_as_such(run: Path) -> None:
    from nar_kernels.show.pieces import pieces_of

    spec = load_model(run / "best.pt")[1]
    pieces = pieces_of(spec)
    ids = pieces.ids("the road")
    assert pieces.text([*ids, spec.mask_id]) == "the road\N{REPLACEMENT CHARACTER}"


def test_a_prompt_that_is_no_text(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["generate", "--checkpoint", str(run / "best.pt"), "--prompt", "caf\udce9"]
    assert main(command) == 2
    assert "the prompt is not UTF-8" in capsys.readouterr().err
