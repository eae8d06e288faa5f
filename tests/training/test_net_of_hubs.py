"""`--net hf:`: models of transformers in the trainer, and back."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nar_kernels.cli.main import main
from nar_kernels.data.prepare import prepare
from nar_kernels.data.sequence_spec import SequenceSpec
from nar_kernels.data.sources import open_data
from nar_kernels.data.tokenizer import open_tokenizer
from nar_kernels.training.config import TrainConfig
from nar_kernels.training.hugging_face import described, open_net, rebuilt
from nar_kernels.training.model import load_run
from nar_kernels.training.train import train
from tests.helpers.nets_of_hubs import LENGTH, NUM_TOKENS, model_of
from tests.helpers.texts import bpe_json, prose, word_pieces

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")
pytestmark = [pytest.mark.seconds, pytest.mark.usefixtures("one_thread")]


def config_of(folder: Path, **options: Any) -> TrainConfig:
    settings = {
        **{"seq_len": LENGTH, "held_out": 4, "eval_draws": 1, "batch_size": 4, "steps": 3},
        **{"warmup": 1, "eval_every": 3, "save_every": 2, "threads": 1, "quiet": True},
        **{"device": "cpu", "precision": "fp32", "out": str(folder / "run"), "overwrite": True},
    }
    return TrainConfig(**{**settings, **options})


def written(folder: Path, tokenizer: str) -> tuple[Path, Path]:
    """A folder with a tokenizer, and a corpus of its ids."""
    folder.mkdir()
    (folder / "tokenizer.json").write_text(tokenizer)
    encode = tokenizers.Tokenizer.from_str(tokenizer).encode
    ids = encode(" ".join(prose()[:3]), add_special_tokens=False).ids
    np.array(ids, np.uint16).tofile(folder / "ids.bin")
    return folder, folder / "ids.bin"


def exported(run: Path, out: Path) -> Any:
    assert main(["export", "--checkpoint", str(run / "last.pt"), "--out", str(out)]) == 0
    return out


@pytest.mark.parametrize(
    ("family", "tokenizer", "has_weights"), [("Bert", "words", True), ("Llama", "bpe", False)]
)
def test_there_and_back(
    family: str, tokenizer: str, has_weights: bool, tmp_path: Path, capsys: Any
) -> None:
    """The tokenizer of words has a mask; that of bytes gets one, behind its ids."""
    text = bpe_json() if tokenizer == "bpe" else word_pieces().to_str()
    folder, ids = written(tmp_path / "tokenizer", text)
    model = model_of(family)
    net = tmp_path / "net"
    if has_weights:
        model.save_pretrained(net)
    else:
        net.mkdir()
        (net / "config.json").write_text(model.config.to_json_string())
    options: dict[str, Any] = {"data": str(ids), "dtype": "uint16", "tokenizer": str(folder)}
    config = config_of(tmp_path, net=f"hf:{net}", ema=0.5, **options)
    report = train(config)
    assert report["steps"] == 3
    for file in [*net.iterdir(), folder / "tokenizer.json"]:
        file.unlink()  # from here on, the checkpoint is enough
    wrapper, spec, _ = load_run(tmp_path / "run" / "last.pt")
    assert type(wrapper.net.net).__name__ == type(model).__name__
    assert wrapper.num_tokens == spec.num_tokens == wrapper.net.net.config.vocab_size
    resumed = train(TrainConfig.continued(config.to_dict(), steps=4, resume=True, quiet=True))
    assert resumed["steps"] == 4
    wrapper, spec, _ = load_run(tmp_path / "run" / "last.pt")

    out = exported(tmp_path / "run", tmp_path / "exported")
    again = type(model).from_pretrained(out).eval()
    some = torch.from_numpy(np.fromfile(ids, np.uint16)[:LENGTH].astype(np.int64))[None]
    assert torch.equal(again(some).logits, wrapper.net.net(some).logits)
    own = transformers.AutoTokenizer.from_pretrained(out)
    assert own.mask_token_id == spec.mask_id == again.config.mask_token_id
    assert len(own) == spec.num_tokens
    ids_of = tokenizers.Tokenizer.from_str(text).encode(prose()[0], add_special_tokens=False).ids
    assert own(prose()[0], add_special_tokens=False)["input_ids"] == ids_of

    generate = ["generate", "--checkpoint", str(tmp_path / "run" / "last.pt"), "--num-samples", "1"]
    capsys.readouterr()
    assert main([*generate, "--device", "cpu"]) == 0
    assert capsys.readouterr().out.strip()

    # What was exported is a net to go on from.
    further = train(config_of(tmp_path, **options | {"tokenizer": str(out), "net": f"hf:{out}"}))
    assert further["steps"] == 3


def test_weights_are_those_of_the_folder(tmp_path: Path) -> None:
    """Also where the vocabulary of the data has more ids, or fewer than the padding needs."""
    model = model_of("Bert", pad_token_id=NUM_TOKENS - 1)
    model.save_pretrained(tmp_path)
    for num_tokens in (NUM_TOKENS - 3, NUM_TOKENS, NUM_TOKENS + 3):
        spec = SequenceSpec(num_tokens, LENGTH, "ids", None)
        net = open_net(f"hf:{tmp_path}", spec)
        weight = net.get_input_embeddings().weight
        both = min(num_tokens, NUM_TOKENS)
        assert len(weight) == num_tokens and all(module.training for module in net.modules())
        assert torch.equal(weight[:both], model.get_input_embeddings().weight[:both])
        assert net.get_output_embeddings().weight is weight
        assert rebuilt(described(net))(torch.tensor([[1]])).logits.shape[-1] == num_tokens


def test_block_diffusion_of_a_decoder(tmp_path: Path) -> None:
    """Without the mask that would make it look both ways everywhere."""
    (tmp_path / "config.json").write_text(model_of("Llama").config.to_json_string())
    np.arange(600, dtype=np.uint16).__mod__(40).tofile(tmp_path / "ids.bin")
    data: dict[str, Any] = {"data": str(tmp_path / "ids.bin"), "dtype": "uint16", "num_tokens": 41}
    options = {"net": f"hf:{tmp_path / 'config.json'}", "block_length": 4}
    train(config_of(tmp_path, checkpoint_activations=True, **data, **options))
    wrapper, spec, _ = load_run(tmp_path / "run" / "best.pt")
    assert wrapper.block_length == 4 and not wrapper.net.looks_both_ways
    assert wrapper.generate(1, seed=0).shape == (1, LENGTH)


def test_what_is_refused(tmp_path: Path) -> None:
    spec = SequenceSpec(NUM_TOKENS, LENGTH + 1, "ids", None)
    with pytest.raises(ValueError, match="net is bert: it must be hf: and a folder"):
        TrainConfig(data="text", net="bert")
    with pytest.raises(ValueError, match="dim is 64, which does not go with --net"):
        TrainConfig(data="text", net="hf:x", dim=64)
    with pytest.raises(ValueError, match="init is a.pt, which does not go .* export that run"):
        TrainConfig(data="text", net="hf:x", init="a.pt")
    assert TrainConfig.for_data("digits", net="hf:x").dim == TrainConfig(data="digits").dim
    with pytest.raises(FileNotFoundError, match="there is no .*config.json"):
        open_net(f"hf:{tmp_path}", spec)
    file = tmp_path / "config.json"
    file.write_text('{"model_type": "none"}')
    with pytest.raises(ValueError, match="which transformers does not know"):
        open_net(f"hf:{file}", spec)
    file.write_text(model_of("Bert").config.to_json_string())
    with pytest.raises(ValueError, match="seq_len is 13, but hf:.* has 12 positions"):
        open_net(f"hf:{file}", spec)


@pytest.mark.parametrize("kind", ["own", "t5"])
def test_code_of_the_folder_is_not_run(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor is anybody asked whether to."""
    auto = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind, "auto_map": auto}))
    (tmp_path / "own.py").write_text("raise SystemExit")
    (tmp_path / "model.safetensors").touch()
    asked: list[str] = []
    monkeypatch.setattr("builtins.input", lambda text="": asked.append(text) or "y")
    with pytest.raises(ValueError, match="trust_remote_code|does not know"):
        open_net(f"hf:{tmp_path}", SequenceSpec(NUM_TOKENS, LENGTH, "ids", None))
    assert not asked


def test_a_tokenizer_of_other_data_is_refused(tmp_path: Path) -> None:
    folder, _ = written(tmp_path / "tokenizer", bpe_json())
    tokenizer = open_tokenizer(folder)
    with pytest.raises(ValueError, match="but text holds bytes: name data of its token ids"):
        open_data("text", tokenizer=tokenizer)
    text = tmp_path / "some.txt"
    text.write_text(" ".join(prose()[:3]))
    prepare([text], tmp_path / "corpus", tokenizer=str(folder), quiet=True)
    same = open_data(tmp_path / "corpus", tokenizer=tokenizer, seq_len=8)
    assert same.spec.num_tokens == tokenizer.vocab_size + 1
    (folder / "tokenizer.json").write_text(word_pieces().to_str())
    with pytest.raises(ValueError, match="was prepared with another: leave it out"):
        open_data(tmp_path / "corpus", tokenizer=open_tokenizer(folder))


def test_export_is_for_models_of_transformers(tmp_path: Path, capsys: Any) -> None:
    train(config_of(tmp_path, data="text", dim=8, depth=1, heads=1, seq_len=32, stride=32))
    arguments = ["--checkpoint", str(tmp_path / "run" / "last.pt"), "--out", str(tmp_path / "out")]
    assert main(["export", *arguments]) == 2
    assert "holds a net of x-transformers" in capsys.readouterr().err
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    assert main(["export", *arguments]) == 2
    assert "is there already" in capsys.readouterr().err
