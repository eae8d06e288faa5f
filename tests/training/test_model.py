"""Nets that a run builds, compiles, recomputes, or starts from another run's weights."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from nar_kernels.training import checkpoint
from nar_kernels.training.model import (
    build_model,
    checkpoint_activations,
    choose_bf16,
    load_model,
    prepare,
)
from nar_kernels.training.step import loss_and_gradient
from nar_kernels.training.train import Run, train
from tests.helpers.runs import SENTENCE, SPEC, gradients, same, small, uneven_batch

pytest.importorskip("x_transformers")

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_checkpoint_generates(learnt):
    model, spec = load_model(learnt[1] / "best.pt")
    assert spec == SPEC
    ids = model.generate(4, seed=0)
    assert ids.shape == (4, 16) and ids.max() < 256
    assert torch.equal(ids, model.generate(4, seed=0))
    assert set(bytes(ids.flatten().tolist())) <= set(SENTENCE)


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_a_run_may_start_from_the_weights_of_another(sentences, tmp_path, ema):
    config = small(sentences, tmp_path / "first", steps=5, ema=ema)
    train(config)
    (tmp_path / "other.txt").write_bytes(sentences.read_bytes().upper())
    later = replace(config, data=tmp_path / "other.txt", out=tmp_path / "later", seed=1, steps=3)
    run = Run(replace(later, init=tmp_path / "first" / "last.pt"), torch.device("cpu"))
    first = checkpoint.load(tmp_path / "first" / "last.pt")
    assert same(dict(run.model.state_dict()), dict(first["ema" if ema else "model"]))
    assert run.loader.step == 0 and not run.optimizer.state_dict()["state"]
    if run.ema is not None:
        assert same(run.ema.state_dict(), dict(run.model.state_dict()))

    report = train(run.config)
    assert report["config"]["init"] == str(tmp_path / "first" / "last.pt")
    assert report["steps"] == 3
    (tmp_path / "first" / "last.pt").unlink()  # to resume, it is not needed
    train(replace(run.config, resume=True, steps=4))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dim": 64}, "--dim is 32 there and 64 here"),
        ({"depth": 2}, "--depth is 1 there and 2 here"),
        ({"heads": 2}, "--heads is 1 there and 2 here"),
        ({"rotary": False}, "--rotary is True there and False here"),
        ({"seq_len": 8}, "--seq-len is 16 there and 8 here"),
        ({"dtype": "uint8", "num_tokens": 300}, "--num-tokens is 257 there and 300 here"),
    ],
)
def test_weights_of_another_net_are_refused(learnt_weights, sentences, tmp_path, options, message):
    config = small(sentences, tmp_path / "run", init=learnt_weights, **options)
    with pytest.raises(ValueError, match=f"cannot start from .*last.pt: {message}"):
        train(config)
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def learnt_weights(sentences, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("weights")
    train(small(sentences, out, steps=1))
    return out / "last.pt"


def test_weights_that_fit_no_net_of_their_options(learnt_weights, tmp_path):
    state = checkpoint.load(learnt_weights)
    state["model"].popitem()
    checkpoint.save(tmp_path / "a.pt", state)
    with pytest.raises(ValueError, match="a.pt holds the weights of another net"):
        load_model(tmp_path / "a.pt")


def test_checkpointed_activations_change_no_gradient(sentences, tmp_path):
    config, found = small(sentences, tmp_path, depth=2, dropout=0.3), []
    batch = uneven_batch(sentences)
    for recomputed in (False, True):
        torch.manual_seed(0)
        model, calls = build_model(config, SPEC), []
        keys = list(model.state_dict())
        layer: Any = model.net
        layer = layer.attn_layers.layers[1][1]
        layer.ff[0].register_forward_hook(lambda *_, calls=calls: calls.append(1))
        if recomputed:
            checkpoint_activations(model)
        assert list(model.state_dict()) == keys
        torch.manual_seed(1)
        loss_and_gradient(model, batch)
        assert len(calls) == 1 + recomputed
        found.append(gradients(model))
    assert same(*found)


def test_the_mode_of_the_compiler(sentences, tmp_path, monkeypatch):
    modes: list[str] = []
    monkeypatch.setattr(nn.Module, "compile", lambda net, mode: modes.append(mode))
    for mode in ("default", "reduce-overhead"):
        config = small(sentences, tmp_path, compile=True, compile_mode=mode)
        prepare(build_model(config, SPEC), config, torch.device("cpu"))
    assert modes == ["default", "reduce-overhead"]


@pytest.mark.seconds
def test_options_that_change_no_weight(sentences, tmp_path, monkeypatch):
    """The backend that compiles takes a minute; here another one, which only traces."""
    compile_it = nn.Module.compile
    counters = torch._dynamo.utils.counters

    def trace(net: nn.Module, mode: str) -> None:
        assert mode == "default"
        counters.clear()
        compile_it(net, backend="aot_eager")

    monkeypatch.setattr(nn.Module, "compile", trace)
    states = []
    for name in ("", "compile", "checkpoint_activations"):
        torch._dynamo.reset()
        config = small(sentences, tmp_path / f"run{name}", heads=2, steps=3, accumulate=3)
        train(replace(config, **({name: True} if name else {})))
        states.append(checkpoint.load(config.folder / "last.pt"))
    assert counters["stats"]["unique_graphs"] > 0
    if torch.__version__ >= torch.torch_version.TorchVersion("2.13"):
        assert not counters["graph_break"]
    for state in states[1:]:
        assert state["model"].keys() == states[0]["model"].keys()
        for key, value in states[0]["model"].items():
            torch.testing.assert_close(state["model"][key], value, rtol=1e-3, atol=1e-5)
        expected = states[0]["log"]["losses"]
        torch.testing.assert_close(state["log"]["losses"], expected, rtol=1e-5, atol=0)


def test_bf16(sentences, tmp_path):
    report = train(small(sentences, tmp_path, steps=5, precision="bf16"))
    assert report["environment"]["precision"] == "bf16"
    assert math.isfinite(report["bits_per_token"])
    assert not choose_bf16("fp32", torch.device("cpu"))


def test_a_checkpoint_of_sequences_that_this_version_does_not_know(learnt, tmp_path):
    state = checkpoint.load(learnt[1] / "best.pt")
    state["spec"]["colours"] = 3
    torch.save(state, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"other\.pt describes its sequences by what .*'colours'"):
        load_model(tmp_path / "other.pt")
    del state["spec"]
    torch.save(state, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"other\.pt describes its sequences .*'spec'"):
        load_model(tmp_path / "other.pt")


def test_weights_of_another_tokenizer_are_said(learnt, sentences, tmp_path):
    state = checkpoint.load(learnt[1] / "best.pt")
    state["spec"]["tokenizer"] = "{}"
    torch.save(state, tmp_path / "other.pt")
    config = replace(small(sentences, tmp_path / "run", dim=64), init=tmp_path / "other.pt")
    with pytest.warns(UserWarning, match=r"the tokenizer of .*other\.pt is another than that of"):
        Run(config, torch.device("cpu"))
