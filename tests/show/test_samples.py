"""Samples of a run as text, arrays and pictures."""

import numpy as np
import pytest
import torch
from torch import Tensor

from nar_kernels.data.sequence_spec import SequenceSpec
from nar_kernels.sampling.config import SamplingConfig, Strategy
from nar_kernels.show import pictures, samples
from nar_kernels.training.config import TrainConfig
from nar_kernels.training.model import build_model, load_model
from tests.helpers.runs import SPEC, rgb

pytest.importorskip("x_transformers")

pytestmark = pytest.mark.usefixtures("one_thread")


def test_images_show_ink_and_masks(tmp_path):
    ids = torch.tensor([0, 1, 2, 3, 4, 4]).view(1, 1, 2, 3)
    pictures.images(tmp_path / "a.png", ids, mask_id=4)
    picture = rgb(tmp_path / "a.png")
    size = pictures._PIXELS
    cells = [
        picture[18 + row * size + size // 2, 18 + column * size + size // 2]
        for row in range(2)
        for column in range(3)
    ]
    ink = [cell.sum() for cell in cells[:4]]
    assert ink[0] == 3 * 255 and ink == sorted(ink, reverse=True) and ink[3] < 200
    assert (cells[4] == cells[5]).all() and cells[4].max() - cells[4].min() > 100  # no grey


def test_order_of_filling(learnt):
    """In random order, what stays masked does not depend on the net."""
    model, _ = load_model(learnt[1] / "last.pt")
    kept: dict[str, list[Tensor]] = {}
    orders: tuple[Strategy, Strategy] = ("random", "confidence")
    for order in orders:
        for trained in (True, False):
            if not trained:
                model = build_model(TrainConfig("text", dim=32), SPEC)
            states = model.sample(SamplingConfig(strategy=order), 8, seed=1)
            kept.setdefault(order, []).extend(state.masked for state in states)
    random, confidence = (torch.stack(kept[order]) for order in orders)
    half = len(random) // 2
    assert torch.equal(random[:half], random[half:])
    assert not torch.equal(confidence[:half], confidence[half:])


def test_samples_as_text(tmp_path):
    spec = SequenceSpec(257, 3, "bytes", None)
    assert "abc\n---" in samples.text(torch.tensor([[97, 98, 99], [255, 97, 97]]), spec)
    ids = torch.tensor([[0, 1], [1, 0]])
    assert samples.text(ids, SequenceSpec(3, 2, "ids", None)) == "0 1\n1 0\n"
    image = SequenceSpec(3, 2, "image", (1, 2))
    assert samples.text(ids, image) == "  @@\n\n@@  \n"
    samples.write(tmp_path / "a.npy", ids, image)
    assert np.load(tmp_path / "a.npy").tolist() == ids.tolist()
    samples.write(tmp_path / "a.png", ids, image)
    assert rgb(tmp_path / "a.png").shape[2] == 3
    with pytest.raises(ValueError, match="not images"):
        samples.write(tmp_path / "b.png", ids, spec)
