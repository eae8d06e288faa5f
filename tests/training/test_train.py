"""The trainer: that it learns, what it is deterministic in, and when it gives up."""

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from nar_kernels.errors import InvalidTokenError
from nar_kernels.ops.corrupted import Corrupted
from nar_kernels.sampling.config import SamplingConfig
from nar_kernels.training import checkpoint
from nar_kernels.training.config import TrainConfig
from nar_kernels.training.model import load_model
from nar_kernels.training.train import DivergedError, Run, train
from tests.helpers.runs import same, small

pytest.importorskip("x_transformers")

pytestmark = pytest.mark.usefixtures("one_thread")


def test_the_mask_token_must_be_counted(tmp_path):
    np.save(tmp_path / "ids.npy", np.arange(320, dtype=np.uint16) % 10)
    config = small(tmp_path / "ids.npy", tmp_path / "run", num_tokens=10, held_out=4)
    with pytest.raises(InvalidTokenError, match="equals mask_id"):
        train(config)
    assert not (tmp_path / "run").exists()


def steps_of(config: TrainConfig, disturb: Callable[[Run], object]) -> list[Tensor]:
    """The weights after some steps, each of them after a call of ``disturb``."""
    run = Run(config, torch.device("cpu"))
    for step, batch in zip(range(5), run.loader, strict=False):
        disturb(run)
        run.step(batch, step)
    return [p.detach() for p in run.model.parameters()]


def test_dropout_is_a_function_of_seed_and_step(sentences, tmp_path):
    """So the state of PyTorch's generator need not be saved."""
    config = small(sentences, tmp_path, dropout=0.5)
    expected = steps_of(config, lambda run: None)
    assert same(steps_of(config, lambda run: torch.manual_seed(5)), expected)

    def another_seed(run: Run) -> None:
        run.noise_seed = 5

    assert not same(steps_of(config, another_seed), expected)


def test_it_learns(learnt):
    report, _ = learnt
    unigram = report["baselines"]["unigram_cross_entropy"]["bits_per_token"]
    assert report["bits_per_token"] < 0.7 * unigram
    assert report["below_best_baseline"] == pytest.approx(unigram - report["bits_per_token"])
    curve = [point["bits_per_token"] for point in report["curve"]["held_out"]]
    assert len(curve) == 6 and curve[-1] == report["bits_per_token"]
    assert report["best"]["bits_per_token"] == min(curve)


def test_bad_ids_are_found_before_the_first_step(tmp_path):
    """Also one that no step would show, or only the evaluation."""
    ids = np.arange(3200, dtype=np.uint16) % 10
    for place in (5, 3195):
        bad = ids.copy()
        bad[place] = 77
        np.save(tmp_path / "ids.npy", bad)
        config = small(tmp_path / "ids.npy", tmp_path / "run", num_tokens=11, steps=1)
        with pytest.raises(InvalidTokenError, match=f"token id 77 at offset {place} of"):
            train(config)
        assert not (tmp_path / "run").exists()


def test_the_default_device_changes_nothing(sentences, tmp_path):
    config = small(sentences, tmp_path / "plain", steps=4, eval_every=2, ema=0.9, accumulate=2)
    expected = train(config)
    model, _ = load_model(tmp_path / "plain" / "best.pt")
    drawn = model.sample(SamplingConfig(), 2, seed=0).last().ids
    try:
        torch.set_default_device("meta")
        report = train(replace(config, out=tmp_path / "meta"))
        train(replace(config, out=tmp_path / "meta", resume=True, steps=5))
        with torch.device("meta"):
            model, _ = load_model(tmp_path / "plain" / "best.pt")
            again = model.sample(SamplingConfig(), 2, seed=0).last().ids
    finally:
        torch.set_default_device(None)
    assert report["curve"] == expected["curve"]
    assert torch.equal(again, drawn)


def test_divergence_saves_nothing(sentences, tmp_path):
    config = small(sentences, tmp_path, lr=1e38, warmup=0, save_every=1, eval_every=1, clip=1e38)
    with pytest.raises(DivergedError, match="is (nan|inf) after .* steps: .* lower --lr"):
        train(config)
    state = checkpoint.load(tmp_path / "last.pt")
    assert state["loader"]["step"] < 40
    assert all(p.isfinite().all() for p in state["model"].values() if p.is_floating_point())


def test_divergence_that_is_noticed_late_saves_nothing(sentences, tmp_path):
    """On a GPU nobody looks at the loss in every step, and AdamW goes on with what is ruined."""
    run = Run(small(sentences, tmp_path, save_every=5, eval_every=1000), torch.device("cpu"))
    run.flush_every = 10
    run.begin()
    step = run.step

    def ruined(batch: Corrupted, number: int) -> None:
        step(batch, number)
        if number == 6:
            next(run.model.parameters()).data.fill_(math.nan)

    run.step = ruined  # type: ignore[method-assign]
    with pytest.raises(DivergedError, match="is nan after 7 steps"):
        run.fit()
    state = checkpoint.load(tmp_path / "last.pt")
    assert state["loader"]["step"] == 5 and len(state["log"]["losses"]) == 5
    assert all(p.isfinite().all() for p in state["model"].values())


def test_when_the_loss_is_looked_at_changes_nothing(sentences, tmp_path):
    config = small(sentences, tmp_path / "often", steps=25, eval_every=12, save_every=7)
    expected = train(config)
    run = Run(replace(config, out=str(tmp_path / "rarely")), torch.device("cpu"))
    run.flush_every = 10
    flushed: list[int] = []
    flush = run.flush

    def noted(stop: bool = False) -> bool:
        stops = flush(stop)
        flushed.append(len(run.log.losses))
        return stops

    run.flush = noted  # type: ignore[method-assign]
    run.begin()
    run.fit()
    assert flushed == [7, 10, 12, 14, 20, 21, 24, 25]
    assert run.finish()["curve"] == expected["curve"]
    ours, theirs = (checkpoint.load(tmp_path / name / "last.pt") for name in ("rarely", "often"))
    assert same(ours["model"], theirs["model"])
    assert same(ours["log"]["losses"], theirs["log"]["losses"])
