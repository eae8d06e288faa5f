"""Runs with blocks and with several masks of each window: that they learn, and resume."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from nar_kernels.cli.main import main
from nar_kernels.ops.views import Pairing
from nar_kernels.training import checkpoint
from nar_kernels.training.model import load_model
from nar_kernels.training.train import Run, train
from tests.helpers.runs import killed_in_step, same, small

pytest.importorskip("x_transformers")

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")


@pytest.mark.parametrize("views", [1, "complement"])
def test_blocks_learn(sentences, tmp_path, views):
    report = train(
        small(
            sentences,
            tmp_path,
            **{"block_length": 4, "views": views, "dropout": 0.0, "dim": 64, "lr": 6e-3},
            **{"steps": 150, "eval_every": 150, "loss": "nelbo"},
        )
    )
    unigram = report["baselines"]["unigram_cross_entropy"]["bits_per_token"]
    assert report["bits_per_token"] < 0.5 * unigram
    model, _ = load_model(tmp_path / "best.pt")
    assert model.block_length == 4
    assert model.generate(2, seed=1).shape == (2, 16)  # block by block


@pytest.mark.parametrize("views", [2, "complement", "coupled"])
def test_a_step_has_all_views(sentences, tmp_path, views):
    run = Run(small(sentences, tmp_path, views=views, block_length=8), CPU)
    batch = run.loader.batch(0)
    num = 3 if views == "coupled" else 2
    assert batch.views.num == num and len(batch.input_ids) == 8 * num
    assert batch.views.is_paired == (views != 2)
    if views == "complement":
        assert batch.views.pairing is Pairing.COMPLEMENT
        assert batch.num_masked.sum() == batch.num_maskable[:8].sum()


@pytest.mark.parametrize("views", [2, "complement"])
def test_killed_and_resumed(sentences, tmp_path, views):
    options = {"views": views, "block_length": 8, "steps": 12, "save_every": 4, "accumulate": 2}
    train(small(sentences, tmp_path / "whole", **options))
    config = small(sentences, tmp_path / "killed", **options)
    killed_in_step(7, config, CPU)
    train(replace(config, resume=True))
    whole, resumed = (checkpoint.load(tmp_path / name / "last.pt") for name in ("whole", "killed"))
    assert same(whole["model"], resumed["model"])
    with pytest.raises(ValueError, match=f"cannot resume .*: --views was {views} and is 1 now"):
        train(replace(config, resume=True, views=1))


def test_views_of_packed_documents(tmp_path):
    (tmp_path / "lines.txt").write_bytes(b"ab cd\nefg\n" * 60)
    data = {"pack": True, "eos_id": ord("\n"), "views": "complement"}
    run = Run(small(tmp_path / "lines.txt", tmp_path / "run", **data), CPU)
    batch = run.loader.batch(0)
    assert batch.documents is not None
    assert batch.num_masked.sum() == batch.num_maskable[: len(batch.num_maskable) // 2].sum()


def test_mistakes(sentences, tmp_path, capsys):
    def fails(*options: object) -> str:
        where = ["--data", sentences, "--out", tmp_path / "run"]
        assert main([str(argument) for argument in ["train", *where, *options]]) == 2
        return capsys.readouterr().err

    assert "--views is 'pair': it must be a number of views" in fails("--views", "pair")
    assert "--views is 0: there must be at least 1" in fails("--views", 0)
    assert "whose weights give no bound" in fails("--views", "coupled", "--loss", "nelbo")
    with pytest.raises(TypeError, match="views is 1.5: it must be an int"):
        small(sentences, tmp_path, views=1.5)
    assert small(sentences, tmp_path, views=np.int64(2)).views == 2
    assert small(sentences, tmp_path, views="2").views == 2
    for views, message in (("pair", "must be a number of views"), (0, "at least 1"), (-3, "least")):
        with pytest.raises(ValueError, match=message):
            small(sentences, tmp_path, views=views)
