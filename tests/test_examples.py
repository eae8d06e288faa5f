"""The examples run, resume where they stopped, and are short enough to read."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from nar_kernels import TrainConfig
from nar_kernels.data.prepare import prepare
from nar_kernels.train import train
from tests.helpers.paths import ROOT
from tests.helpers.tiny import tiny_sizes
from tests.helpers.tiny_tokenizer import WORDS, tiny_tokenizer

EXAMPLES = ROOT / "examples"
LOOPS = {"accelerate_loop", "lightning_module", "torchrun_loop", "hugging_face_trainer"}

pytestmark = [
    pytest.mark.seconds,
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings(
        *(f"ignore::{kind}" for kind in ("FutureWarning", "UserWarning", "DeprecationWarning"))
    ),
]


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def weights(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: x.clone() for name, x in state.items()}


def assert_equal(one: dict[str, Tensor], two: dict[str, Tensor]) -> None:
    assert one.keys() == two.keys() and len(one) > 4
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("corpus")
    text = folder / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 200)
    prepare(text, folder / "tokens", tokenizer="bytes")
    return str(folder / "tokens")


def test_examples_are_short():
    for path in EXAMPLES.glob("*.py"):
        lines = len(path.read_text().splitlines())
        assert lines < (60 if path.stem in LOOPS else 40), path.name


def test_accelerate(corpus: str, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    main = example("accelerate_loop").main
    for out, steps in (("whole", [6]), ("parts", [3, 6])):
        for last in steps:
            main(corpus, str(tmp_path / out), last, save_every=3)
    whole, parts = (
        torch.load(tmp_path / out / "checkpoint" / "optimizer.bin") for out in ("whole", "parts")
    )
    for one, two in zip(whole["state"].values(), parts["state"].values(), strict=True):
        assert one["step"] == 6 and torch.equal(one["exp_avg"], two["exp_avg"])


def test_lightning(corpus: str, tmp_path: Path) -> None:
    lightning = pytest.importorskip("pytorch_lightning")
    main = example("lightning_module").main

    def run(folder: str, steps: int, checkpoint: Path | None = None) -> dict[str, Tensor]:
        keep = lightning.callbacks.ModelCheckpoint(
            tmp_path / folder, "{step}", save_top_k=-1, every_n_train_steps=1
        )
        module = main(
            corpus, checkpoint, max_steps=steps, callbacks=[keep], logger=False, accelerator="cpu",
            enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        return weights(module.state_dict())

    whole = run("whole", 6)
    run("part", 3)
    assert_equal(run("rest", 6, tmp_path / "part" / "step=3.ckpt"), whole)


def test_torchrun(corpus: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one process."""
    main = example("torchrun_loop").main
    variables = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    main(corpus, str(tmp_path / "whole.pt"), 6, save_every=3)
    for last in (3, 6):
        main(corpus, str(tmp_path / "parts.pt"), last, save_every=3)
    whole, parts = (torch.load(tmp_path / f"{name}.pt") for name in ("whole", "parts"))
    assert_equal(whole["model"], parts["model"])


@pytest.fixture
def masked_lm(tmp_path: Path) -> str:
    transformers = pytest.importorskip("transformers")
    tokenizer = tiny_tokenizer(model_max_length=32)
    config = transformers.BertConfig(**tiny_sizes(len(tokenizer), 32))
    for part in (transformers.BertForMaskedLM(config), tokenizer):
        part.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def test_hugging_face_trainer(masked_lm: str, tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    pytest.importorskip("accelerate")
    from transformers import BertForMaskedLM

    pairs = [
        {"prompt": " ".join(WORDS[i : i + 2]), "answer": " ".join(WORDS[: 1 + i % 5])}
        for i in range(20)
    ]
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    options: dict[str, Any] = {
        "per_device_train_batch_size": 4, "save_steps": 3, "use_cpu": True, "disable_tqdm": True,
        "report_to": [], "lr_scheduler_type": "constant",
    }  # fmt: skip
    main = example("hugging_face_trainer").main
    for out, steps in (("whole", [7]), ("parts", [3, 7])):
        for last in steps:
            main(masked_lm, str(file), str(tmp_path / out), max_steps=last, **options)
    whole, parts = (
        weights(BertForMaskedLM.from_pretrained(tmp_path / out).state_dict())
        for out in ("whole", "parts")
    )
    assert_equal(whole, parts)


def test_class_conditional_images(tmp_path: Path) -> None:
    codes = np.arange(40)[:, None, None] % 7 + np.zeros((1, 4, 3), np.int64)
    np.save(tmp_path / "codes.npy", codes)
    np.save(tmp_path / "labels.npy", np.arange(40) % 5)
    main = example("class_conditional_images").main
    images = main(str(tmp_path / "codes.npy"), str(tmp_path / "labels.npy"), steps=3)
    assert images.shape == (5, 4, 3) and ((images >= 0) & (images < 7)).all()


def test_modernbert_and_block_diffusion(corpus: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    for name, kind in (
        ("modernbert_text", "ForMaskedLM"),
        ("block_diffusion_llama", "ForCausalLM"),
    ):
        torch.manual_seed(0)
        ids = example(name).main(corpus, str(tmp_path / name), steps=2)
        assert ids.shape[1] == 128 and (ids < 257).all()
        model = getattr(transformers, f"AutoModel{kind}").from_pretrained(tmp_path / name)
        assert type(model).__name__.endswith(kind)


def test_finetune_answers(tmp_path: Path) -> None:
    text, pairs = tmp_path / "text.txt", tmp_path / "pairs.jsonl"
    text.write_text("one two three four five six seven eight nine ten. " * 400)
    pairs.write_text("".join(
        json.dumps({"prompt": f"{i} is ", "completion": "more " * (1 + i % 7)}) + "\n"
        for i in range(60)
    ))  # fmt: skip
    prepare(text, tmp_path / "tokens", train_bpe=300)
    options = {"dim": 32, "depth": 1, "heads": 2, "steps": 2, "seq_len": 32, "quiet": True}
    train(TrainConfig.for_data(tmp_path / "tokens", out=tmp_path / "run", **options))
    prepare(pairs, tmp_path / "pairs", tokenizer=str(tmp_path / "tokens" / "tokenizer.json"))
    torch.manual_seed(0)
    losses = example("finetune_answers").main(
        str(tmp_path / "pairs"), str(tmp_path / "run" / "best.pt"), str(tmp_path / "a.pt"), steps=40
    )
    assert torch.stack(losses[-5:]).mean() < torch.stack(losses[:5]).mean()
