"""An optimiser step: the gradient does not depend on how a batch is split."""

import pytest
import torch

from nar_kernels.training.config import TrainConfig
from nar_kernels.training.model import build_model
from nar_kernels.training.optim import learning_rate
from nar_kernels.training.step import loss_and_gradient
from tests.helpers.runs import SPEC, gradients, small, uneven_batch

pytest.importorskip("x_transformers")

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("loss", ["mean", "nelbo"])
@pytest.mark.parametrize("accumulate", [2, 3, 4, 8])
def test_accumulation_is_exact(sentences, tmp_path, loss, accumulate):
    config = small(sentences, tmp_path, loss=loss, dropout=0.0)
    torch.manual_seed(0)
    model, batch = build_model(config, SPEC), uneven_batch(sentences)
    whole = loss_and_gradient(model, batch).item()
    expected = gradients(model)
    model.zero_grad()

    assert loss_and_gradient(model, batch, accumulate).item() == pytest.approx(whole, rel=1e-6)
    for ours, theirs in zip(gradients(model), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-7)


def test_a_mean_of_means_would_be_noticed(sentences, tmp_path):
    torch.manual_seed(0)
    model = build_model(small(sentences, tmp_path, dropout=0.0), SPEC)
    batch = uneven_batch(sentences)
    parts = [model(part).loss.item() for part in batch.microbatches(2)]
    whole = loss_and_gradient(model, batch).item()
    assert sum(parts) / len(parts) != pytest.approx(whole, rel=1e-3)


def test_learning_rate_warms_up_and_decays():
    config = TrainConfig("digits", lr=2.0, warmup=10, steps=110)
    rates = [learning_rate(step, config) for step in range(110)]
    assert 0 < rates[0] < rates[5] < rates[9] < rates[10] == 2.0
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[60] == pytest.approx(1.0)
    assert 0 < rates[-1] < 0.01
