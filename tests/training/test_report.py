"""`report.json`, curves and TensorBoard."""

import json

import pytest
import torch

from nar_kernels import SamplingConfig, TrainConfig
from nar_kernels.data.sources import open_data
from nar_kernels.training.model import build_model
from nar_kernels.training.report import draw_samples
from nar_kernels.training.train import train
from tests.helpers.runs import small

pytest.importorskip("x_transformers")

pytestmark = pytest.mark.usefixtures("one_thread")


def test_the_report_and_its_files(learnt):
    report, out = learnt
    assert json.loads((out / "report.json").read_text()) == report
    assert all((out / name).exists() for name in report["files"].values())
    assert report["steps"] == 300
    assert report["data"]["train_windows"] == 273 and report["data"]["held_out_windows"] == 8
    assert report["tokens_per_second"] == pytest.approx(300 * 8 * 16 / report["step_seconds"])
    assert report["seconds"] > report["step_seconds"]
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_one_held_out_window_has_no_spread(sentences, tmp_path):
    report = train(small(sentences, tmp_path, steps=1, held_out=1))
    assert report["standard_error"] is None
    assert "NaN" not in (tmp_path / "report.json").read_text()


def test_tensorboard_has_the_curves(learnt):
    report, out = learnt
    module = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = module.EventAccumulator(str(out / "tb")).Reload()
    held_out = events.Scalars("held_out/bits_per_token")
    assert [point.step for point in held_out] == [50, 100, 150, 200, 250, 300]
    assert held_out[-1].value == pytest.approx(report["bits_per_token"], rel=1e-5)
    assert len(events.Scalars("train/bits_per_token")) == 30


@pytest.mark.seconds
def test_images_are_shown_as_they_appear():
    pytest.importorskip("x_transformers")
    pytest.importorskip("sklearn")
    config = TrainConfig.for_data("digits", dim=8, depth=1, heads=2)
    data = open_data("digits")
    model = build_model(config, data.spec)
    ids = draw_samples(config, data, model)
    assert ids.shape == (10, 19, 64)
    num_masked = (ids == data.spec.mask_id).sum(-1)
    assert (num_masked[:, 0] == 64).all() and (num_masked[:, -1] == 0).all()
    assert (num_masked.diff(dim=1) <= 0).all()
    last = model.sample(SamplingConfig(), 10, seed=config.seed).last()
    assert torch.equal(ids[:, -1], last.ids)
