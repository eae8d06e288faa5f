"""What --data of a user's own text starts with."""

import json
from pathlib import Path

import pytest
import torch

from nar_kernels.data.prepare import prepare
from nar_kernels.data.sequence_spec import SequenceSpec
from nar_kernels.data.sources import open_data
from nar_kernels.training.config import PREPARED_TEXT, PRESETS, TrainConfig
from nar_kernels.training.model import build_model

pytest.importorskip("x_transformers")
pytest.importorskip("tokenizers")


def test_prepared_text_has_a_preset(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("some words " * 300)
    prepare(tmp_path / "a.txt", tmp_path / "a", tokenizer="bytes", workers=1)
    config = TrainConfig.for_data(tmp_path / "a", lr=1e-3)
    preset = PRESETS[PREPARED_TEXT]
    assert (config.seq_len, config.shift_tokens, config.lr) == (preset["seq_len"], 1, 1e-3)
    assert TrainConfig.for_data("digits").shift_tokens == 0


def test_several_folders_of_text_have_it_too(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("some words " * 300)
    for name in ("part-0", "part-1"):
        prepare(tmp_path / "a.txt", tmp_path / name, tokenizer="bytes", workers=1)
    mixture = tmp_path / "mix.json"
    mixture.write_text(json.dumps({"mixture": [{"data": "part-0"}, {"data": "part-1"}]}))
    for data in (tmp_path / "part-*", mixture):
        assert TrainConfig.for_data(data).shift_tokens == 1
        opened = open_data(data)
        assert opened.spec.render == "bytes" and opened.spec.num_tokens == 257
    mixture.write_text(json.dumps({"mixture": [{"data": "part-0"}, {"data": "text"}]}))
    for data in (mixture, tmp_path / "nothing-*"):
        assert TrainConfig.for_data(data).shift_tokens == 0


@pytest.mark.parametrize("shift", [0, 1, 2])
def test_a_block_sees_so_many_neighbours_without_attention(shift: int) -> None:
    """By the first block's feed-forward, with attention switched off."""
    config = TrainConfig("text", dim=30, depth=1, heads=1, rotary=False, shift_tokens=shift)
    spec = SequenceSpec(11, 9, "ids", None)
    net = build_model(config, spec).net.eval()
    attention = net.attn_layers.layers[0][1]  # type: ignore[union-attr, index]
    attention.register_forward_hook(lambda module, args, out: (torch.zeros_like(out[0]), *out[1:]))
    ids = torch.full((1, 9), 3)
    changed = ids.clone()
    changed[0, 4] = 7
    with torch.no_grad():
        moved = (net(ids) - net(changed)).abs().amax(2)[0] > 1e-6
    assert moved.nonzero()[:, 0].tolist() == list(range(4 - shift, 5 + shift))
