"""The moving average of the weights."""

import pytest
import torch
from torch import nn

from nar_kernels.data.sources import open_data
from nar_kernels.likelihood import evaluate
from nar_kernels.training import checkpoint
from nar_kernels.training.ema import Ema
from nar_kernels.training.model import load_model
from nar_kernels.training.train import train
from tests.helpers.runs import same, small

pytest.importorskip("x_transformers")

pytestmark = pytest.mark.usefixtures("one_thread")


def test_the_average_is_what_it_says():
    model = nn.Linear(3, 2)
    average, expected = Ema(model, 0.8), model.weight.detach().clone()
    for step in range(60):
        with torch.no_grad():
            model.weight.copy_(torch.full_like(expected, step))
        average.update(step)
        decay = min(0.8, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * step
    with average.applied():
        torch.testing.assert_close(model.weight, expected)
    assert (model.weight == 59).all()
    # In the long run a ramp is followed at a distance of decay / (1 - decay).
    assert average.state_dict()["weight"].mean().item() == pytest.approx(55, abs=0.1)


def test_evaluation_and_generation_use_the_average(sentences, tmp_path):
    config = small(sentences, tmp_path, steps=20, ema=0.9)
    report = train(config)
    state = checkpoint.load(tmp_path / "last.pt")
    assert not same(state["ema"], state["model"]) and state["ema"].keys() == state["model"].keys()
    model, _ = load_model(tmp_path / "last.pt")
    assert same(dict(model.state_dict()), dict(state["ema"]))
    data = open_data(str(sentences), seq_len=16, num_held_out=8)
    bits = {}
    for name in ("ema", "model"):
        model.load_state_dict(state[name])
        arguments = model.net, data.held_out, data.held_out_windows
        bits[name] = evaluate(*arguments, draws=2, device=torch.device("cpu")).bits_per_token
    assert report["bits_per_token"] == bits["ema"] != bits["model"]
    plain = train(small(sentences, tmp_path / "plain", steps=20))
    assert same(checkpoint.load(tmp_path / "plain" / "last.pt")["model"], state["model"])
    assert plain["bits_per_token"] == bits["model"]
