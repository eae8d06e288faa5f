"""What users made with an earlier version comes out the same: see tests/golden."""

import json
import shutil

import numpy as np
import pytest
import torch

from nar_kernels import load_model
from tests import golden


def test_outputs_are_the_same_bit_for_bit():
    expected = np.load(golden.OUTPUTS)
    outputs = golden.outputs()
    assert set(outputs) == set(expected.files)
    for name, output in outputs.items():
        assert output.dtype == getattr(torch, str(expected[name].dtype)), name
        np.testing.assert_array_equal(output.numpy(), expected[name], err_msg=name)


def test_losses_are_the_same():
    expected = json.loads(golden.NUMBERS.read_text())["losses"]
    assert golden.losses() == pytest.approx(expected, rel=1e-5)


def test_an_old_checkpoint_loads_and_its_run_goes_on(tmp_path, one_thread):
    pytest.importorskip("x_transformers")
    pytest.importorskip("sklearn")
    model, spec = load_model(golden.CHECKPOINT)
    assert (spec.num_tokens, spec.seq_len, spec.image_shape) == (18, 64, (8, 8))
    assert model.generate(2, seed=1).shape == (2, 64)
    shutil.copy(golden.CHECKPOINT, tmp_path / "last.pt")
    expected = json.loads(golden.NUMBERS.read_text())["continued_bits"]
    assert golden.continued_bits(tmp_path) == pytest.approx(expected, rel=1e-3)
