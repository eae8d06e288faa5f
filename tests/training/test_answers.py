"""Fine-tuning on prompts and answers: `prepare`, `train --init`, `generate --prompt`."""

import json
import math
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from nar_kernels import Corpus, PackedLoader, TrainConfig, load_model
from nar_kernels.cli.main import main
from nar_kernels.data.packing.document_range import DocumentRange
from nar_kernels.data.prepare import prepare
from nar_kernels.data.sources import PackedData, open_data
from nar_kernels.likelihood import evaluate_documents
from nar_kernels.training.config import ANSWERS, PRESETS
from nar_kernels.training.report import describe
from nar_kernels.training.step import loss_and_gradient
from nar_kernels.training.train import Run, train

pytest.importorskip("x_transformers")
pytest.importorskip("fsspec")
pytest.importorskip("matplotlib")
pytest.importorskip("tensorboard")

CPU = torch.device("cpu")
SMALL = {"dim": 32, "depth": 2, "heads": 2, "seq_len": 32, "batch_size": 8, "precision": "fp32"}
SMALL |= {"threads": 1, "eval_draws": 2, "quiet": True}


def write_pairs(folder: Path, num: int = 300) -> Path:
    """A letter, and what it stands for: learned by looking at the prompt alone."""
    rng = random.Random(0)
    pairs = []
    for _ in range(num):
        letter = rng.choice("abcd")
        pairs.append({"prompt": f"{letter}: ", "completion": letter * rng.randint(3, 9) + "\n"})
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    prepare(path, folder / "pairs", tokenizer="bytes", workers=1, quiet=True)
    return folder / "pairs"


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("pairs"))


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of text without prompts."""
    folder = tmp_path_factory.mktemp("text")
    (folder / "text.txt").write_text("some words that are no answers: " * 200)
    config = TrainConfig(folder / "text.txt", out=folder / "run", steps=10, eval_every=10, **SMALL)
    train(config)
    return folder / "run/best.pt"


def bits(checkpoint: Path, corpus: Corpus, first: int) -> float:
    model, spec = load_model(checkpoint)
    ends = corpus.document_ends
    assert ends is not None
    part = DocumentRange(corpus, first, len(ends), 32, spec.num_tokens, spec.mask_id)
    return evaluate_documents(model.net, part, draws=4, device=CPU).bits_per_token


@pytest.mark.seconds
def test_a_model_learns_to_answer(
    pairs: Path, pretrained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    arguments = ["train", "--data", pairs, "--init", pretrained, "--out", out, "--steps", 150]
    arguments += ["--eval-every", 150, "--lr", 0.01, "--warmup", 10, "--threads", 1]
    arguments += ["--precision", "fp32", "--batch-size", 8, "--quiet"]
    assert main([*map(str, arguments)]) == 0
    config = torch.load(out / "last.pt", weights_only=False)["config"]
    assert config["pack"] and (config["dim"], config["seq_len"]) == (32, 32)  # those of --init
    report = json.loads((out / "report.json").read_text())
    assert report["data"]["train_documents"] == 270 and report["data"]["held_out_documents"] == 30

    corpus = Corpus(pairs)
    before, after = bits(pretrained, corpus, 270), bits(out / "best.pt", corpus, 270)
    assert after == pytest.approx(report["best"]["bits_per_token"], abs=0.3)
    # The letter is known from the prompt, and the length of the answer is not.
    assert before > 5 and after < 1.2
    without = write_answers(pairs, tmp_path)
    assert bits(out / "best.pt", without, 270) > after + 0.25

    capsys.readouterr()
    arguments = ["generate", "--checkpoint", out / "best.pt", "--prompt", "c: ", "--seed", 3]
    arguments += ["--max-new-tokens", 12, "--eos-id", 10, "--strategy", "confidence"]
    assert main([*map(str, arguments)]) == 0
    answer = capsys.readouterr().out.partition("c: ")[2]
    assert answer.count("c") >= 3 and not set("abd") & {*answer}


def write_answers(pairs: Path, folder: Path) -> Corpus:
    """The answers without their prompts."""
    lines = [json.loads(line) for line in (pairs.parent / "pairs.jsonl").read_text().splitlines()]
    path = folder / "answers.jsonl"
    path.write_text("".join(json.dumps({"text": x["completion"]}) + "\n" for x in lines))
    prepare(path, folder / "answers", tokenizer="bytes", workers=1, quiet=True)
    return Corpus(folder / "answers")


def config_of(pairs: Path, tmp_path: Path, **options: Any) -> TrainConfig:
    how = SMALL | {"out": tmp_path / "run", "steps": 6, "eval_every": 6, "save_every": 3}
    return TrainConfig.for_data(pairs, **how | options)


@pytest.mark.seconds
def test_prompts_are_never_masked(pairs: Path, tmp_path: Path) -> None:
    run = Run(config_of(pairs, tmp_path), CPU)
    assert isinstance(run.data, PackedData) and isinstance(run.loader, PackedLoader)
    is_answer = run.data.corpus.loss_mask
    assert is_answer is not None
    for step in range(3):
        batch = run.loader.batch(step)
        text = bytes(batch.clean_ids.clamp(max=255).flatten().tolist())
        masked = batch.masked_indices.flatten().numpy()
        for i in np.flatnonzero(masked):
            assert text[i] in b"abcd\n" and text[i + 1 : i + 2] != b":"
        assert int(batch.num_maskable.sum()) < int(batch.lengths.sum())
    held_out = set(run.data.held_out.spans()[0].tolist())
    starts = run.loader._documents(0)[1].tolist()
    assert not held_out & {*starts}


def do_steps(run: Run, num: int) -> None:
    first = run.loader.step
    for step in range(first, first + num):
        run.step(next(run.loader), step)


@pytest.mark.seconds
@pytest.mark.parametrize("loss", ["mean", "sequence", "answer"])
def test_a_packed_run_goes_on(pairs: Path, tmp_path: Path, loss: str) -> None:
    """Bit for bit, with gradient accumulation."""
    config = config_of(pairs, tmp_path, loss=loss, accumulate=2)
    run = Run(config, CPU)
    run.begin()
    do_steps(run, 2)
    run.save("last.pt")
    do_steps(run, 2)
    saved = torch.load(config.folder / "last.pt", weights_only=False)
    other = Run(replace(config, resume=True), CPU)
    other.restore(config.folder / "last.pt", saved)
    do_steps(other, 2)
    ours, theirs = run.model.state_dict(), other.model.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.seconds
@pytest.mark.parametrize("loss", ["mean", "nelbo", "sequence", "answer"])
def test_accumulated_gradients_add_up(pairs: Path, tmp_path: Path, loss: str) -> None:
    gradients = []
    for accumulate in (1, 3):
        config = config_of(pairs, tmp_path / str(accumulate), loss=loss, accumulate=accumulate)
        run = Run(config, CPU)
        batch = run.loader.batch(0)
        value = loss_and_gradient(run.trained, batch, accumulate)
        gradients.append([value, *(p.grad for p in run.model.parameters() if p.grad is not None)])
    for one, other in zip(*gradients, strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-6)


class Uniform(nn.Module):
    """Knows nothing."""

    num_tokens, max_seq_len = 257, 32

    def forward(self, ids: Tensor, attention_mask: Tensor) -> Tensor:
        assert attention_mask.shape == (len(ids), 1, 32, 32)
        return torch.zeros(*ids.shape, 257)


def test_bits_of_a_net_that_knows_nothing(pairs: Path) -> None:
    corpus = Corpus(pairs)
    part = DocumentRange(corpus, 5, 20, 32, 257, 256)
    result = evaluate_documents(Uniform(), part, draws=8, device=CPU)
    assert result.bits_per_token == pytest.approx(math.log2(257), 0.01)


def test_document_ranges(pairs: Path) -> None:
    corpus = Corpus(pairs)
    part = DocumentRange(corpus, 2, 9, 4, 257, 256)
    starts, lengths = part.pieces()
    begins, whole = part.spans()
    assert int(lengths.sum()) == whole.sum() and int(lengths.max()) == 4
    assert starts[0] == begins[0]
    covered = torch.cat([torch.arange(s, s + n) for s, n in zip(starts, lengths, strict=True)])
    assert covered.tolist() == list(range(begins[0], begins[-1] + whole[-1]))
    assert {*bytes(part.counted_ids(10**6).tolist())} <= {*b"abcd\n"}
    assert [bytes(p.tolist())[1:] for p in part.prompts(3)] == [b": "] * 3


def test_presets(pairs: Path, tmp_path: Path) -> None:
    config = TrainConfig.for_data(pairs)
    assert config.pack and config.steps == PRESETS[ANSWERS]["steps"]
    assert not TrainConfig.for_data(pairs, stride=16).pack
    without = write_answers(pairs, tmp_path).name
    assert not TrainConfig.for_data(without).pack
    # Packed on request, whatever the windows of its preset.
    for data in (without, "text"):
        assert TrainConfig.for_data(data, pack=True).stride is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stride": 8, "pack": True}, "--pack and --stride exclude each other, since it is of"),
        ({"cuda_graph": True, "pack": True}, "--pack and --cuda-graph exclude each other, since a"),
        ({"time_low": 0.7, "time_high": 0.2}, "time_low is 0.7 and time_high 0.2"),
        ({"time_low": 0.1, "loss": "nelbo"}, "loss is nelbo, which is a bound only with all times"),
    ],
)
def test_options_that_exclude_each_other(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainConfig("text", **options)


def test_what_cannot_be_packed(pairs: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("no documents " * 99)
    with pytest.raises(ValueError, match="does not say where its documents end"):
        open_data(tmp_path / "a.txt", pack=True)
    with pytest.raises(ValueError, match="num_held_out is 300"):
        open_data(pairs, pack=True, num_held_out=300)
    mixture = tmp_path / "mix.json"
    mixture.write_text(json.dumps({"mixture": [{"data": str(pairs)}] * 2}))
    with pytest.raises(ValueError, match="pack is for the documents of one source, and .* of 2"):
        open_data(mixture, pack=True)
    with pytest.raises(ValueError, match="digits|end"):
        open_data("text", pack=True)
    with pytest.raises(ValueError, match="pack is given with stride"):
        open_data(pairs, pack=True, stride=8)
    with pytest.raises(ValueError, match="300 documents of .* have more than seq_len 5 tokens"):
        open_data(pairs, pack=True, seq_len=5, overlong="refuse")


def with_answers_at(pairs: Path, folder: Path, chosen: Callable[[np.ndarray], np.ndarray]) -> Path:
    """The same pairs, but only some tokens count."""
    shutil.copytree(pairs, folder)
    path = folder / "loss-mask-00000.npy"
    np.save(path, chosen(np.load(path)))
    return folder


@pytest.mark.parametrize("pack", [False, True])
def test_nothing_that_counts_is_held_out(pairs: Path, tmp_path: Path, pack: bool) -> None:
    def first_half(mask: np.ndarray) -> np.ndarray:
        return mask * (np.arange(len(mask)) < len(mask) // 2).astype(np.uint8)

    folder = with_answers_at(pairs, tmp_path / "half", first_half)
    with pytest.raises(ValueError, match="no token in the .*held.out.* counts in a loss"):
        open_data(folder, pack=pack, seq_len=32)
    if pack:
        folder = with_answers_at(pairs, tmp_path / "other", lambda mask: mask - first_half(mask))
        with pytest.raises(ValueError, match="no token in the documents to train on"):
            open_data(folder, pack=True, seq_len=32, num_held_out=200)


@pytest.mark.seconds
def test_pairs_longer_than_a_row(pairs: Path, tmp_path: Path) -> None:
    for overlong, of_train in (("split", 2), ("truncate", 1)):
        config = config_of(pairs, tmp_path, seq_len=8, overlong=overlong)
        run = Run(config, CPU)
        assert isinstance(run.data, PackedData) and isinstance(run.loader, PackedLoader)
        assert run.loader.plan.max_pieces == of_train
        text = describe(config, run.data, run.model, run.baselines, run.environment)
        assert f"{run.data.train.num_longer + run.data.held_out.num_longer} documents are" in text
        lengths = run.data.held_out.pieces()[1]
        assert int(lengths.max()) == 8 and (len(lengths) > 30) == (overlong == "split")


@pytest.mark.seconds
@pytest.mark.parametrize("pack", [False, True])
def test_baselines_are_of_what_counts(pairs: Path, tmp_path: Path, pack: bool) -> None:
    """Letters of answers, not prompts: with them it would be 2.8 bits a token."""
    config = config_of(pairs, tmp_path, pack=pack, **({} if pack else {"stride": 32}))
    value = Run(config, CPU).baselines["unigram_cross_entropy"].bits_per_token
    assert 2 < value < 2.6
